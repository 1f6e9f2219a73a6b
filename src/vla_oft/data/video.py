"""Video files: random access to frames, and clips that are encoded anywhere and joined without re-encoding.

    seek to the keyframe before the wanted frame, decode forward until it:   K . . . K . . [x]
                                                                                     ^seek   ^wanted

Containers stay open, a few per thread (decoding releases the GIL, so threads decode in parallel); after a fork they are reopened.
"""

import io
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter

MAX_OPEN = 16
"""Containers kept open per thread."""

DECODE_AHEAD = 24
"""Decode forward rather than seek when the wanted frame is at most this far ahead."""


@dataclass(frozen=True)
class Clip:
    """An H.264 mp4 file in memory, frames in presentation order, the first a keyframe."""

    data: bytes
    num_frames: int
    height: int
    width: int


def read_frames(path: str | Path, indices: Sequence[int] | np.ndarray, fps: float) -> np.ndarray:
    """Frames at positions `indices` (any order, repeats allowed) of a file, uint8 (N, H, W, 3) RGB."""
    wanted = np.asarray(indices, np.int64)
    video = _open(str(path), fps)
    out: np.ndarray | None = None
    try:
        for slot in np.argsort(wanted, kind="stable"):
            image = video.image(int(wanted[slot]))
            if out is None:
                out = np.empty((len(wanted), *image.shape), np.uint8)
            out[slot] = image
    except (av.FFmpegError, EOFError) as error:
        _cache().pop(str(path), None)
        raise ValueError(f"{path}: cannot decode ({error}); copy or record the file again") from None
    return out if out is not None else np.empty((0, video.height, video.width, 3), np.uint8)


def num_frames(path: str | Path, fps: float) -> int:
    """Frames of a file, from its header. Raises ValueError if the file is missing or damaged."""
    return _open(str(path), fps).num_frames


class _Video:
    """One open container, remembering where it is."""

    def __init__(self, path: str, fps: float) -> None:
        self.fps, self.path = fps, path
        self.container = av.open(path)
        self.stream = self.container.streams.video[0]
        self.stream.codec_context.thread_count = 1
        self.height, self.width = self.stream.codec_context.height, self.stream.codec_context.width
        assert self.stream.time_base is not None
        self.tick_s = self.stream.time_base
        length = self.stream.frames or round(float((self.stream.duration or 0) * self.tick_s) * fps)
        self.num_frames = int(length)
        self.converter = VideoReformatter()  # kept: a frame's own would build its tables anew for every frame
        self.decoder: Iterator[av.VideoFrame] | None = None
        self.position, self.latest = -1, np.empty(0, np.uint8)

    def image(self, index: int) -> np.ndarray:
        if index == self.position:
            return self.latest
        if not 0 <= index < self.num_frames:
            raise EOFError(f"frame {index} wanted, the file has {self.num_frames}")
        if self.decoder is None or not self.position < index <= self.position + DECODE_AHEAD:
            self.container.seek(int(Fraction(index) / Fraction(self.fps).limit_denominator(100000) / self.tick_s), stream=self.stream)
            self.decoder, self.position = self.container.decode(self.stream), -1
        for frame in self.decoder:
            position = round(float((frame.pts or 0) * self.tick_s) * self.fps)
            if position >= index:
                break
        else:
            self.decoder = None
            raise EOFError(f"the file ends before frame {index}")
        if position > index:
            self.decoder = None
            raise EOFError(f"frame {index} is missing, the next is {position}: is the recording rate really {self.fps:g}?")
        self.position, self.latest = position, self.converter.reformat(frame, format="rgb24").to_ndarray()
        return self.latest


class _PerThread(threading.local):
    def __init__(self) -> None:
        self.videos: OrderedDict[str, _Video] = OrderedDict()
        self.process = os.getpid()


_open_videos = _PerThread()
_inherited: list[OrderedDict[str, _Video]] = []


def _cache() -> OrderedDict[str, _Video]:
    if _open_videos.process != os.getpid():
        # After a fork, the parent's containers share its file positions, and closing one waits for decoder threads that do not
        # exist in this process (dav1d): they are left alone for ever.
        _inherited.append(_open_videos.videos)
        _open_videos.videos, _open_videos.process = OrderedDict(), os.getpid()
    return _open_videos.videos


def _open(path: str, fps: float) -> _Video:
    videos = _cache()
    video = videos.get(path)
    if video is None:
        try:
            video = videos[path] = _Video(path, fps)
        except (FileNotFoundError, IsADirectoryError):
            raise ValueError(f"{path}: the video is missing; copy the dataset again") from None
        except (av.FFmpegError, IndexError) as error:
            raise ValueError(f"{path}: not a readable video ({error}); copy or record the file again") from None
        while len(videos) > MAX_OPEN:
            videos.popitem(last=False)[1].container.close()
    videos.move_to_end(path)
    return video


def encode_clip(
    frames: Sequence[np.ndarray] | np.ndarray, fps: float, keyframes: Sequence[int] = (0,), crf: int = 18, keyint: int = 10
) -> Clip:
    """Encode uint8 (T, H, W, 3) frames as H.264. Deterministic, without B-frames; frames at `keyframes` can be sought to exactly.

    crf: quality, 0 lossless to 51; keyint: at most this many frames between keyframes: random access decodes half of that on average.
    """
    height, width = frames[0].shape[:2]
    if height % 2 or width % 2:
        raise ValueError(f"video frames must have even height and width, got {height} x {width}; choose an even camera size")
    buffer = io.BytesIO()
    starts = set(keyframes) | {0}
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(100000))
        stream.width, stream.height, stream.pix_fmt, stream.gop_size, stream.max_b_frames = width, height, "yuv420p", keyint, 0
        stream.codec_context.thread_count = 1
        stream.options = {"crf": str(crf), "preset": "veryfast", "forced-idr": "1", "x264-params": "scenecut=0:rc-lookahead=0:mbtree=0"}
        for index, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pict_type = PictureType.I if index in starts else PictureType.NONE
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return Clip(buffer.getvalue(), len(frames), height, width)


class ClipFile:
    """An mp4 file to which clips are appended without re-encoding."""

    def __init__(self, path: Path, fps: float) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.num_frames, self.num_bytes = path, 0, 0
        self._period_s = 1 / Fraction(fps).limit_denominator(100000)
        self._container = av.open(str(path), "w", format="mp4")
        self._stream: av.VideoStream | None = None
        self._header = b""

    def append(self, clip: Clip) -> int:
        """Add all frames of `clip`; return the position of its first."""
        first = self.num_frames
        with av.open(io.BytesIO(clip.data), "r") as source:
            template = source.streams.video[0]
            header = bytes(template.codec_context.extradata or b"")
            if self._stream is None:
                self._stream, self._header = self._container.add_stream_from_template(template), header
            if header != self._header:
                raise ValueError(f"{self.path}: clips of one camera must have one size and one encoding, got {clip.width} x {clip.height}")
            assert template.time_base is not None
            ticks = self._period_s / template.time_base
            for packet in source.demux(template):
                if packet.dts is None:
                    continue
                packet.pts = packet.dts = round(self.num_frames * ticks)
                packet.duration = round(ticks)
                packet.stream = self._stream
                self._container.mux(packet)
                self.num_frames += 1
        assert self.num_frames == first + clip.num_frames
        self.num_bytes += len(clip.data)
        return first

    def close(self) -> None:
        """Finish the file."""
        self._container.close()
