"""Random access to video: whatever the encoder, the frame at a time is the one that decoding from the start shows there."""

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from vla_oft.data import packets
from vla_oft.data.clips import encode_clip
from vla_oft.data.video import num_frames, read_frames

FPS = 10.0
CODECS = {
    "h264": ("libx264", {"crf": "18", "x264-params": "scenecut=0"}, 10, 0),
    "h264 with b-frames": ("libx264", {"x264-params": "keyint=12:min-keyint=12:scenecut=0:bframes=3:b-adapt=0"}, 12, 3),
    "h264 open gop": ("libx264", {"x264-params": "keyint=12:min-keyint=12:scenecut=0:bframes=3:b-adapt=0:open-gop=1"}, 12, 3),
    "h264 one keyframe": ("libx264", {"x264-params": "keyint=250:scenecut=0:bframes=3"}, 250, 3),
    "hevc open gop": ("libx265", {"x265-params": "keyint=12:min-keyint=12:scenecut=0:bframes=3:open-gop=1:log-level=none"}, 12, 3),
    "av1": ("libsvtav1", {"crf": "30", "preset": "12", "g": "2"}, 2, None),
    "av1 pyramid": ("libsvtav1", {"crf": "30", "preset": "8", "g": "10"}, 10, None),
}


def frame(step: int, size: int = 64) -> np.ndarray:
    """Frame t has a bar of t columns, and noise of its own, so that no two frames are alike."""
    image = np.random.default_rng(step).integers(0, 40, (size, size, 3)).astype(np.uint8)
    image[:, :step] = 220
    return image


def bar(image: np.ndarray) -> int:
    return int((image[..., 1].mean(axis=0) > 120).sum())


def record(path: Path, codec: str = "h264", times: range | list[int] = range(48), first_pts: int = 0, fps: float = FPS) -> Path:
    """One frame at each of `times`, in units of 1 / fps; its bar tells the time."""
    name, options, gop, b_frames = CODECS[codec]
    av.logging.set_level(av.logging.PANIC)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(name, rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt, stream.gop_size, stream.options = 64, 64, "yuv420p", gop, options
        stream.codec_context.time_base = Fraction(1, round(fps))
        if b_frames is not None:
            stream.max_b_frames = b_frames
        for time in times:
            picture = av.VideoFrame.from_ndarray(frame(time), format="rgb24")
            picture.pts, picture.time_base = time + first_pts, Fraction(1, round(fps))
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def decoded(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([image.to_ndarray(format="rgb24") for image in container.decode(video=0)])


@pytest.mark.parametrize("codec", CODECS)
def test_any_frame_is_the_one_that_decoding_from_the_start_shows(tmp_path, codec):
    path = record(tmp_path / "a.mp4", codec)
    whole = decoded(path)
    assert [bar(image) for image in whole[4:44]] == list(range(4, 44)) and num_frames(path, FPS) == 48
    for index in np.random.default_rng(0).permutation(48):
        np.testing.assert_array_equal(read_frames(path, [index], FPS)[0], whole[index], err_msg=str(index))
    for index in range(48):
        np.testing.assert_array_equal(read_frames(path, [index], FPS)[0], whole[index])
    for order in ([13, 0, 7, 7, 47], range(47, -1, -1), [11, 12, 13, 36, 35]):
        np.testing.assert_array_equal(read_frames(path, order, FPS), whole[list(order)])


def test_a_file_may_begin_at_any_time(tmp_path):
    path = record(tmp_path / "a.mp4", "h264 with b-frames", first_pts=25)
    with av.open(str(path)) as container:
        start = container.streams.video[0].start_time
    assert [bar(image) for image in read_frames(path, [40, 5, 20], FPS)] == [40, 5, 20], start
    moved = record(tmp_path / "b.mkv", "h264", first_pts=25)
    with av.open(str(moved)) as container:
        assert container.streams.video[0].start_time or container.start_time
    assert [bar(image) for image in read_frames(moved, [40, 5, 20], FPS)] == [40, 5, 20]


def test_an_episode_in_the_midst_of_a_file_is_found_by_time(tmp_path):
    path = record(tmp_path / "a.mp4")
    assert [bar(image) for image in read_frames(path, [0, 7], FPS, start_s=2.0)] == [20, 27]
    # joined files drift: nearest frame, as long as there is no doubt
    assert [bar(image) for image in read_frames(path, [0, 7], FPS, start_s=2.03)] == [20, 27]
    assert [bar(image) for image in read_frames(path, [0, 7], FPS, start_s=1.97)] == [20, 27]
    with pytest.raises(ValueError, match=r"a.mp4: cannot decode \(no frame at 2.050 s"):
        read_frames(path, [0], FPS, start_s=2.05)


def test_what_lies_before_the_keyframe_is_not_needed(tmp_path):
    path = record(tmp_path / "a.mp4")
    with av.open(str(path)) as container:
        entries = container.streams.video[0].index_entries
        first, last = entries[0].pos, entries[30].pos
        assert entries[30].is_keyframe
    expected = read_frames(path, [31], FPS)
    data = bytearray(path.read_bytes())
    data[first:last] = bytes(last - first)
    (tmp_path / "b.mp4").write_bytes(data)
    np.testing.assert_array_equal(read_frames(tmp_path / "b.mp4", [31], FPS), expected)
    with pytest.raises(ValueError, match=r"b.mp4: cannot decode"):
        read_frames(tmp_path / "b.mp4", [5], FPS)


def test_damage_in_the_midst_of_a_file_reaches_to_the_next_keyframe(tmp_path):
    path = record(tmp_path / "a.mp4")
    whole = decoded(path)
    with av.open(str(path)) as container:
        entry = container.streams.video[0].index_entries[33]
        first, last = entry.pos + entry.size // 3, entry.pos + entry.size
    data = bytearray(path.read_bytes())
    data[first:last] = bytes(byte ^ 0x5A for byte in data[first:last])
    path.write_bytes(data)
    np.testing.assert_array_equal(read_frames(path, [32, 40, 47, 0], FPS), whole[[32, 40, 47, 0]])
    for asked in ([33], [36], [32, 36], [35, 33]):
        with pytest.raises(ValueError, match=r"a.mp4: cannot decode \(the frame at 3.[356]00 s is damaged\)"):
            read_frames(path, asked, FPS)
    np.testing.assert_array_equal(read_frames(path, [40], FPS), whole[[40]])


def test_a_wrong_rate_is_named_with_both_rates(tmp_path):
    path = record(tmp_path / "a.mp4")
    for wrong in (20.0, 5.0, 30.0, 8.0):
        with pytest.raises(ValueError, match=rf"a.mp4: recorded at 10 frames a second, but meta/info.json says {wrong:g}; correct fps"):
            read_frames(path, [0], wrong)


def test_dropped_frames_are_an_error_not_another_frame(tmp_path):
    path = record(tmp_path / "a.mp4", "h264", [t for t in range(60) if t != 33])
    assert bar(read_frames(path, [32], FPS)[0]) == 32 and bar(read_frames(path, [34], FPS)[0]) == 34
    for asked in ([33], [32, 33, 34]):
        with pytest.raises(ValueError, match=r"a.mp4: cannot decode \(no frame at 3.300 s, the next is at 3.400 s: frames were dropped"):
            read_frames(path, asked, FPS)
    assert bar(read_frames(path, [34], FPS)[0]) == 34


@pytest.mark.parametrize("faststart", [False, True])
def test_a_truncated_file_is_found_by_its_header(tmp_path, faststart):
    path = record(tmp_path / "a.mp4")
    if faststart:
        with av.open(str(path)) as source, av.open(str(tmp_path / "f.mp4"), "w", options={"movflags": "faststart"}) as out:
            stream = out.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    out.mux(packet)
        path = tmp_path / "f.mp4"
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(ValueError, match="f.mp4: truncated: .* copy the file again" if faststart else "a.mp4: not a readable video"):
        num_frames(path, FPS)
    with pytest.raises(ValueError, match=r"mp4: (cannot decode|not a readable video)"):
        read_frames(path, [47], FPS)


def test_what_is_no_video_is_named(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"hello")
    for name, message in (("none.mp4", "none.mp4: the video is missing"), ("", "the video is missing"), ("a.mp4", "not a readable video")):
        with pytest.raises(ValueError, match=message):
            read_frames(tmp_path / name, [0], FPS)
    with pytest.raises(ValueError, match=r"cannot decode \(the file ends before 5.000 s"):
        read_frames(record(tmp_path / "b.mp4"), [50], FPS)


def test_a_file_that_is_replaced_is_read_anew(tmp_path):
    path = record(tmp_path / "a.mp4")
    assert bar(read_frames(path, [20], FPS)[0]) == 20
    path.unlink()
    record(path, "h264", list(range(5, 53)))
    assert bar(read_frames(path, [20], FPS)[0]) == 25


def test_video_is_read_after_a_fork(tmp_path):
    path = record(tmp_path / "a.mp4", "av1")
    read_frames(path, [3], FPS)
    child = os.fork()
    if not child:
        os._exit(0 if [bar(f) for f in read_frames(path, [9, 1], FPS)] == [9, 1] else 1)
    widths = [bar(f) for f in read_frames(path, [4, 11], FPS)]
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 and widths == [4, 11]


@pytest.mark.parametrize(
    "codecs", [("h264", "h264"), ("h264", "h264 with b-frames"), ("av1", "av1"), ("h264 one keyframe", "hevc open gop")]
)
def test_files_read_in_turns_do_not_disturb_each_other(tmp_path, codecs):
    paths = [record(tmp_path / f"{number}.mp4", codec, range(3 * number, 48)) for number, codec in enumerate(codecs * 3)]
    whole = [decoded(path) for path in paths]
    rng = np.random.default_rng(0)
    for number in rng.integers(0, len(paths), 150):
        step = int(rng.integers(len(whole[number])))
        np.testing.assert_array_equal(read_frames(paths[number], [step], FPS)[0], whole[number][step])
    for step in range(33):  # side by side, in order
        for path, frames in zip(paths, whole, strict=True):
            np.testing.assert_array_equal(read_frames(path, [step], FPS)[0], frames[step])


def test_each_file_keeps_its_colours(tmp_path):
    """Two files that differ in nothing but how colours are to be understood."""
    paths = []
    for number, (matrix, full) in enumerate([(1, 1), (5, 1), (5, 2)]):  # BT.709 and BT.601, small and full range
        paths.append(tmp_path / f"{number}.mp4")
        with av.open(str(paths[-1]), "w") as container:
            stream = container.add_stream("libx264", rate=10, options={"crf": "18"})
            stream.width, stream.height, stream.pix_fmt, stream.gop_size, stream.max_b_frames = 64, 64, "yuv420p", 1, 0
            stream.codec_context.colorspace, stream.codec_context.color_range = matrix, full
            for step in range(6):
                image = np.zeros((64, 64, 3), np.uint8)
                image[:, :, step % 3] = 200
                picture = av.VideoFrame.from_ndarray(image, format="rgb24")
                picture.pts, picture.time_base = step, Fraction(1, 10)
                container.mux(stream.encode(picture))
            container.mux(stream.encode())
    whole = [decoded(path) for path in paths]
    assert len({frames.tobytes() for frames in whole}) > 1
    for step in (3, 0, 5, 1):
        for path, frames in zip(paths, whole, strict=True):
            np.testing.assert_array_equal(read_frames(path, [step], 10)[0], frames[step])


def test_frames_are_read_by_packet_where_they_are_stored_in_order(tmp_path):
    for codec, in_order in (("h264", True), ("av1", True), ("h264 with b-frames", False)):
        path = record(tmp_path / f"{codec}.mp4", codec)
        with av.open(str(path)) as container:
            track = packets.Track.of(container, str(path), (codec,), 100.0)
        assert (track is not None) == in_order
        if track is not None:
            found = packets.frame(track, 1.7)
            assert found is not None and bar(found.to_ndarray()) == 17 and packets.frame(track, 1.75) is None


@pytest.mark.parametrize("keyint", [1, 16, 48])
def test_frames_in_order_are_decoded_once_each(tmp_path, monkeypatch, keyint):
    paths = [tmp_path / "a.mp4", tmp_path / "b.mp4"]
    for path in paths:
        path.write_bytes(encode_clip([frame(step) for step in range(48)], FPS, keyint=keyint).data)
    decoded_packets: list[int] = []
    decode = packets._Decoder._decode
    monkeypatch.setattr(packets._Decoder, "_decode", lambda self, *given, **how: decoded_packets.append(0) or decode(self, *given, **how))
    for start in (0, 16, 32):  # two cameras in blocks, as an episode is decoded
        for path in paths:
            assert [bar(image) for image in read_frames(path, range(start, start + 16), FPS)[4:12]] == list(range(start + 4, start + 12))
    assert len(decoded_packets) == 2 * 48


def test_frames_at_starts_of_episodes_are_keyframes(tmp_path):
    (tmp_path / "a.mp4").write_bytes(encode_clip([frame(t) for t in range(20)], FPS, keyframes=(0, 7)).data)
    with av.open(str(tmp_path / "a.mp4")) as container:
        keys = [index for index, entry in enumerate(container.streams.video[0].index_entries) if entry.is_keyframe]
    assert {0, 7} <= set(keys)
    with pytest.raises(ValueError, match="even height and width, got 31 x 31; .* images=True"):
        encode_clip([frame(0, 31)], FPS)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' memory accounts")
def test_memory_stays_flat_over_many_seeks(tmp_path):
    """A forgotten generator of PyAV's leaks 250 bytes: 2 MB here, gigabytes in an epoch."""

    def anonymous_kb() -> int:
        return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))

    path = tmp_path / "clip.mp4"
    path.write_bytes(encode_clip(np.random.default_rng(0).integers(0, 255, (40, 16, 16, 3), np.uint8), 10).data)
    steps = np.random.default_rng(1).integers(0, 40, 10_000).tolist()
    for step in steps[:2000]:
        read_frames(path, [step], 10)
    before = anonymous_kb()
    for step in steps[2000:]:
        read_frames(path, [step], 10)
    assert anonymous_kb() - before < 1000
