"""Random frames of a video without its container: packets are read from where the file's index says that they lie.

    packets    K . . . K . . . K        place, size and time of each, from the file's header
    wanted         x                    read K . x with `pread`, decode them, keep the last one's frame

By way of the container, every frame costs a seek, a buffer that is filled anew and a demuxer, and every file that is not at hand has to be
opened. Here one decoder serves all files that were encoded alike.

Only for mp4 files whose frames are stored in the order in which they are shown; `Track.of` is None for others. Whatever goes wrong is
`frame` being None: `video.py` then goes by way of the container, and knows what to say.
"""

import os
import threading
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from vla_oft.data.pieces import Pieces

LANES, FAR = 4, 8
"""Files that each thread can read in order side by side, where keyframes are more than so many packets apart. Elsewhere one decoder
jumps from file to file: what it works with then stays in the processor's cache."""

MAX_DECODERS = 16
"""Of each thread."""

Key = tuple[Hashable, ...]
"""Names a file and its version."""


@dataclass(frozen=True)
class Track:
    """Where the packets of a file lie: offsets, sizes, times int64 (N,); times in ticks after the first. keyframes: their numbers, sorted.

    encoding: files of equal ones can share a decoder. tick_s: of `times`. tolerance: ticks by which a frame's time may differ.
    """

    path: str
    key: Key
    encoding: Key
    offsets: np.ndarray
    sizes: np.ndarray
    times: np.ndarray
    keyframes: np.ndarray
    tick_s: float
    tolerance: float

    @property
    def num_bytes(self) -> int:
        """Memory that it takes, about."""
        return 1000 + 4 * self.offsets.nbytes

    @staticmethod
    def of(container: Any, path: str, key: Key, tolerance: float) -> "Track | None":
        """The track of an open container; None where frames cannot be found by their packets alone."""
        stream = container.streams.video[0]
        context, entries = stream.codec_context, list(stream.index_entries)
        if "mp4" not in container.format.name or context.has_b_frames or not entries or len(entries) != stream.frames:
            return None
        if any(entry.is_discard or entry.size <= 0 for entry in entries) or not entries[0].is_keyframe:
            return None
        offsets, sizes, times = (np.array([getattr(e, name) for e in entries], np.int64) for name in ("pos", "size", "timestamp"))
        if (np.diff(times) <= 0).any():
            return None
        colours = (context.color_range, context.color_primaries, context.color_trc, context.colorspace)
        encoding = (context.codec.name, bytes(context.extradata or b""), context.width, context.height, context.pix_fmt, *colours)
        keyframes = np.flatnonzero([entry.is_keyframe for entry in entries])
        return Track(path, key, encoding, offsets, sizes, times - times[0], keyframes, float(stream.time_base), tolerance)


def frame(track: Track, time_s: float) -> av.VideoFrame | None:
    """The frame at a time after the file's first, in rgb24; None where that needs the container."""
    target = round(time_s / track.tick_s)
    number = int(track.times.searchsorted(target - track.tolerance))
    if number == len(track.times) or abs(int(track.times[number]) - target) > track.tolerance:
        return None
    decoders = _decoders()
    if track.encoding in decoders.unfit:
        return None
    try:
        keyframe = int(track.keyframes[track.keyframes.searchsorted(number, side="right") - 1])
        return decoders.for_track(track).frame(track, number, keyframe)
    except (av.FFmpegError, ValueError, OSError):  # the decoder may be in any state
        decoders.forget()
        return None


class _Decoder:
    """A decoder that goes from file to file. number: of the packet that it has decoded last, in file `key`."""

    def __init__(self, track: Track) -> None:
        self.encoding, self.key, self.number = track.encoding, track.key, -1
        self.container = av.open(track.path)  # for its decoder, which knows what the file says about colours
        self.context = self.container.streams.video[0].codec_context
        self.context.thread_count = 1  # loaders run many processes; a second thread only decodes ahead in vain
        self.converter = VideoReformatter()  # kept: a frame's own would build its tables anew for every frame
        self.latest: av.VideoFrame | None = None

    def frame(self, track: Track, number: int, keyframe: int) -> av.VideoFrame | None:
        """The frame of packet `number`; `keyframe` is the last one up to there."""
        here = self.number if self.key == track.key and self.latest is not None else -1
        if here == number:
            return self.latest
        goes_on = 0 <= here < number and keyframe <= here + 1
        if not goes_on:
            self.context.flush_buffers()
        self.latest, found = None, None
        for packet in range(here + 1 if goes_on else keyframe, number + 1):
            found = self._decode(track, packet, is_keyframe=packet == keyframe)
            if found is None:
                return None
        assert found is not None
        # one thread: more are started for every frame otherwise, and cost three times as long for small images
        self.latest = self.converter.reformat(found, format="rgb24", threads=1)
        self.key, self.number = track.key, number
        return self.latest

    def _decode(self, track: Track, number: int, is_keyframe: bool) -> av.VideoFrame | None:
        data = _pieces.read(track.path, int(track.offsets[number]), int(track.sizes[number]), track.path, track.key)
        packet = av.Packet(data)
        packet.pts, packet.is_keyframe = number, is_keyframe
        frames = self.context.decode(packet)
        if not frames:
            _decoders().unfit.add(track.encoding)  # it waits for more before it shows anything
        intact = len(frames) == 1 and frames[0].pts == number and not frames[0].is_corrupt
        return frames[0] if intact else None


class _PerThread(threading.local):
    def __init__(self) -> None:
        self.decoders: list[_Decoder] = []  # the one used last comes last
        self.unfit: set[Key] = set()
        self.process = os.getpid()

    def for_track(self, track: Track) -> _Decoder:
        """The decoder that is in this file already, or another one for files of its encoding; it moves to the end."""
        far = len(track.offsets) > FAR * len(track.keyframes)
        alike = [number for number, decoder in enumerate(self.decoders) if decoder.encoding == track.encoding]
        inside = next((number for number in alike if self.decoders[number].key == track.key), None)
        if inside is None and len(alike) < (LANES if far else 1):
            found = _Decoder(track)
            del self.decoders[: len(self.decoders) + 1 - MAX_DECODERS]
        else:
            found = self.decoders.pop(inside if inside is not None else alike[0] if far else alike[-1])
        self.decoders.append(found)
        return found

    def forget(self) -> None:
        """Drop the decoder used last."""
        if self.decoders:
            self.decoders.pop().container.close()


_threads = _PerThread()
_inherited: list[list[_Decoder]] = []
_pieces = Pieces()


def _decoders() -> _PerThread:
    if _threads.process != os.getpid():
        _inherited.append(_threads.decoders)  # after a fork they are left alone for ever: see `video.py`
        _threads.decoders, _threads.process = [], os.getpid()
    return _threads
