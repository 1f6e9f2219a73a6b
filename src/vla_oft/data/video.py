"""Video files: random access to frames by time.

    seek to the keyframe before the wanted frame, decode forward to it:   K . . . K . . [x]
                                                                                  ^seek  ^wanted

Frames are found by their presentation time, never by counting: files begin at other times than zero, and store frames in another order than
they show them. The first frames after a keyframe may need the frames before it (open groups of pictures); then decoding starts one keyframe
earlier.

Containers stay open, a few per thread (decoding releases the GIL, so threads decode in parallel); after a fork they are reopened.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from vla_oft.data import packets
from vla_oft.data.pixels import copy_rgb
from vla_oft.data.recent import Recent

MAX_OPEN = 16
"""Containers kept open per thread."""

SEEK_COST = 2
"""A seek costs as much as decoding this many frames (measured: 0.5 for AV1, 1.7 for H.264)."""

TOLERANCE = 0.4
"""How far from its time a frame may lie, as a share of the time between frames. Joined files drift a little; half would be ambiguous."""

MAX_PIXELS = 7680 * 4320
"""No camera of a robot has more."""


def read_frames(path: str | Path, indices: Sequence[int] | np.ndarray, fps: float, start_s: float = 0.0) -> np.ndarray:
    """Frames of a file, any order, repeats allowed: uint8 (N, H, W, 3) RGB. Frame i is shown `start_s + i / fps` after the file's first.

    Raises ValueError naming the file when it is missing, damaged, too short, or recorded at another rate.
    """
    wanted = np.asarray(indices, np.int64)
    out: np.ndarray | None = None
    for slot in np.argsort(wanted, kind="stable").tolist():
        frame = _frame(str(path), start_s + int(wanted[slot]) / fps, fps)
        if out is None:
            out = np.empty((len(wanted), frame.height, frame.width, 3), np.uint8)
        copy_rgb(frame, out[slot])
    if out is None:
        video = _open(str(path), fps)
        return np.empty((0, video.height, video.width, 3), np.uint8)
    return out


def read_frame_into(path: str | Path, index: int, fps: float, start_s: float, out: np.ndarray) -> bool:
    """Decode one frame into `out`, uint8 (H, W, 3) contiguous; False, and nothing done, where it has another size. As `read_frames`."""
    frame = _frame(str(path), start_s + index / fps, fps)
    if (frame.height, frame.width, 3) != out.shape:
        return False
    copy_rgb(frame, out)
    return True


def num_frames(path: str | Path, fps: float) -> int:
    """Frames of a file, from its header; nothing is decoded.

    Raises ValueError if the file is missing or damaged, ends before its last frame, or was recorded at another rate.
    """
    video = _open(str(path), fps)
    needed, size = max((entry.pos + entry.size for entry in video.stream.index_entries), default=0), os.path.getsize(path)
    if size < needed:
        raise ValueError(f"{path}: truncated: {size} bytes, its frames need {needed}; copy the file again")
    return video.num_frames


def _frame(path: str, time_s: float, fps: float) -> av.VideoFrame:
    """The frame at a time after the file's first, in rgb24: from its packets if that is possible, by way of the container otherwise."""
    key = path, fps, *_version(path)
    track = _tracks.get(key, lambda: _track(path, key, fps))
    frame = packets.frame(track, time_s) if track is not None else None
    if frame is not None:
        return frame
    video = _open(path, fps)
    try:
        return video.frame(time_s)
    except (av.FFmpegError, EOFError) as error:
        _cache().pop(path, None)
        video.close()
        raise ValueError(f"{path}: cannot decode ({error}); copy or record the file again") from None


def _track(path: str, key: packets.Key, fps: float) -> tuple[packets.Track | None, int]:
    video = _open(path, fps)
    track = packets.Track.of(video.container, path, key, TOLERANCE * video.period)
    if track is None:
        return None, _NO_TRACK_BYTES
    _cache().pop(path, None)
    video.close()
    return track, track.num_bytes


class _Video:
    """One open container, remembering where it is. Times are ticks of the stream from its first frame on."""

    def __init__(self, path: str, fps: float) -> None:
        self.container = av.open(path)
        self.stream = self.container.streams.video[0]
        self.stream.codec_context.thread_count = 1  # loaders run many processes; a second thread only decodes ahead in vain
        self.height, self.width = self.stream.codec_context.height, self.stream.codec_context.width
        assert self.stream.time_base is not None
        self.tick_s, self.origin = float(self.stream.time_base), self.stream.start_time or 0
        self.period = 1 / (fps * self.tick_s)
        self.num_frames = int(self.stream.frames or round((self.stream.duration or 0) / self.period))
        self.converter = VideoReformatter()  # kept: a frame's own would build its tables anew for every frame
        self.decoder: Iterator[av.VideoFrame] | None = None
        self.target, self.position, self.broken = 0, 0, False
        self.latest: av.VideoFrame | None = None
        self._keyframes: np.ndarray | None = None
        _check(path, self, fps)

    def close(self) -> None:
        """Release the decoder now: the generator refers to this object, and only the garbage collector would find that out."""
        self.decoder = self.latest = None
        self.container.close()

    def frame(self, time_s: float) -> av.VideoFrame:
        """The frame at a time after the first, in rgb24."""
        target = round(time_s / self.tick_s)
        if self.latest is not None and self._near(self.position, target):
            return self.latest
        found = self._forward(target) if self._is_ahead(target) else None
        if found is None:
            found = self._seek(target)
        self.position = self._time(found)
        # one thread: more are started for every frame otherwise, and cost three times as long for small images
        self.latest = self.converter.reformat(found, format="rgb24", threads=1)
        return self.latest

    @property
    def keyframes(self) -> np.ndarray:
        """Sorted times at which decoding can begin, in decoding order's time: at or before the keyframe is shown."""
        if self._keyframes is None:
            found = [entry.timestamp for entry in self.stream.index_entries if entry.is_keyframe]
            self._keyframes = np.array(sorted(found), np.int64) - self.origin
        return self._keyframes

    def _is_ahead(self, target: int) -> bool:
        """Whether decoding on from here is cheaper than to seek."""
        if self.decoder is None or self.latest is None or target <= self.position:
            return False
        last = int(np.searchsorted(self.keyframes, target, side="right")) - 1
        return last < 0 or int(self.keyframes[last]) - self.position <= SEEK_COST * self.period

    def _seek(self, target: int) -> av.VideoFrame:
        """The frame at `target`, decoded from the keyframe before it, or from an earlier one where that shows it too late."""
        first = int(np.searchsorted(self.keyframes, target, side="right")) - 1
        earlier = [int(self.keyframes[k]) - 1 for k in (first, first - 1) if k > 0]
        begin = min([0, *self.keyframes[:1].tolist()])
        for time in (target, *earlier, begin):
            self.container.seek(time + self.origin, stream=self.stream)
            self.decoder, self.latest, self.broken = self._decode(), None, False
            found = self._forward(target, begins_file=time == begin)
            if found is not None:
                return found
        raise AssertionError("unreachable: the last attempt finds a frame or raises")

    def _decode(self) -> Iterator[av.VideoFrame]:
        """All frames from here on, but on the way to the target only those that others are predicted from."""
        context, packets = self.stream.codec_context, self.container.demux(self.stream)
        try:
            for packet in packets:
                if context.name != "libdav1d":  # which heeds what is set when it opens for ever after: it would skip wanted frames, too
                    early = packet.pts is not None and packet.pts - self.origin < self.target - self.period / 2
                    context.skip_frame = "NONREF" if early else "DEFAULT"
                yield from packet.decode()  # type: ignore[misc]
        finally:
            # PyAV 18 leaks 250 bytes with each generator that is merely forgotten: a megabyte a second and process
            packets.close()  # type: ignore[attr-defined]

    def _forward(self, target: int, begins_file: bool = False) -> av.VideoFrame | None:
        """The frame at `target`; None when the first frame here is too late already, so that decoding must begin earlier."""
        assert self.decoder is not None
        self.target, before = target, self.position if self.latest is not None else None
        for frame in self.decoder:
            time = self._time(frame)
            self.broken = frame.is_corrupt or (self.broken and not frame.key_frame)  # later frames are predicted from a broken one
            if self._near(time, target) and not self.broken:
                return frame
            if time > target - TOLERANCE * self.period:
                if before is None and not begins_file:
                    return None
                self.decoder = None
                raise EOFError(self._gap(target, time))
            before = time
        self.decoder = None
        raise EOFError(f"the file ends before {target * self.tick_s:.3f} s")

    def _time(self, frame: av.VideoFrame) -> int:
        return (frame.pts or 0) - self.origin

    def _near(self, time: int, target: int) -> bool:
        return abs(time - target) <= TOLERANCE * self.period

    def _gap(self, target: int, time: int) -> str:
        if self.broken:
            return f"the frame at {target * self.tick_s:.3f} s is damaged"
        return (
            f"no frame at {target * self.tick_s:.3f} s, the next is at {time * self.tick_s:.3f} s: "
            "frames were dropped; re-encode it at a constant rate"
        )


def _check(path: str, video: _Video, fps: float) -> None:
    """Raise ValueError when a header is impossible, or tells of another frame rate."""
    if not 0 < video.height * video.width <= MAX_PIXELS:
        raise ValueError(f"{path}: frames of {video.width} x {video.height} pixels, at most {MAX_PIXELS} are read; record the file again")
    rate = float(video.stream.average_rate or 0)
    if rate and abs(rate / fps - 1) > max(0.02, 1.5 / max(video.num_frames, 1)):
        raise ValueError(
            f"{path}: recorded at {rate:g} frames a second, but meta/info.json says {fps:g}; correct fps there, or re-encode the video"
        )


class _PerThread(threading.local):
    def __init__(self) -> None:
        self.videos: OrderedDict[str, tuple[_Video, tuple[float, int, int]]] = OrderedDict()
        self.process = os.getpid()


_open_videos = _PerThread()
_NO_TRACK_BYTES = 400  # of an entry, its key included
_tracks: Recent[packets.Track | None] = Recent(64 * 2**20)  # 32 bytes a frame: some two million frames, shared by all threads
_inherited: list[OrderedDict[str, tuple[_Video, tuple[float, int, int]]]] = []


def _cache() -> OrderedDict[str, tuple[_Video, tuple[float, int, int]]]:
    if _open_videos.process != os.getpid():
        # After a fork, the parent's containers share its file positions, and closing one waits for decoder threads that do not
        # exist in this process (dav1d): they are left alone for ever.
        _inherited.append(_open_videos.videos)
        _open_videos.videos, _open_videos.process = OrderedDict(), os.getpid()
    return _open_videos.videos


def _open(path: str, fps: float) -> _Video:
    videos = _cache()
    version = (fps, *_version(path))
    if path in videos and videos[path][1] != version:
        videos.pop(path)[0].close()
    if path not in videos:
        with _named(path):
            videos[path] = _Video(path, fps), version
    while len(videos) > MAX_OPEN:
        videos.popitem(last=False)[1][0].close()
    videos.move_to_end(path)
    return videos[path][0]


def _version(path: str) -> tuple[int, int]:
    """Changes when the file does."""
    try:
        stat = os.stat(path)
    except OSError:  # opening it says what is wrong
        return -1, -1
    return stat.st_mtime_ns, stat.st_size


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Whatever keeps a file from being opened becomes a ValueError that names it."""
    try:
        yield
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(f"{path}: the video is missing; copy the dataset again") from None
    except PermissionError:
        raise ValueError(f"{path}: no permission to read it; change its owner or mode (chmod -R u+rX)") from None
    except (av.FFmpegError, IndexError, OSError) as error:
        raise ValueError(f"{path}: not a readable video ({error}); copy or record the file again") from None
