"""One stored picture, JPEG or PNG bytes, decoded.

JPEG goes through simplejpeg with the fast DCT and smooth chroma upsampling: bit-exact with TensorFlow's decoder, through which published
policies saw their training data (Pillow's differs by up to 12 levels). PNG is lossless: FFmpeg's decoder is the
fastest, and Pillow's takes what that leaves.
"""

import io
import struct
import zlib
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from vla_oft.data import png
from vla_oft.data.pixels import copy_rgb

MAX_PIXELS = 7680 * 4320
"""No camera of a robot has more; a few bytes that claim more are damage, or an attack on memory. Checked before anything is decoded."""

_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, MemoryError, struct.error, zlib.error)  # all that Pillow raises for it
_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_FIRST = b"IHDR"
_PNG_HEADER, _PNG_HEADER_AT = struct.Struct(">IIB"), 16  # width, height, bits a channel
_JPEG_START = b"\xff\xd8"


def decode(data: bytes | memoryview, where: str) -> np.ndarray:
    """Encoded picture -> uint8 (H, W, 3) RGB. Grey becomes three equal channels; transparency is dropped.

    where: the file, and which picture in it, for messages.
    Raises ValueError when the picture is neither JPEG nor PNG, is damaged, is larger than `MAX_PIXELS`, or has more than 8 bits a channel.
    """
    data = bytes(data)
    try:
        if data.startswith(_JPEG_START):
            return _decode_jpeg(data)
        if data.startswith(_PNG_START):
            return _decode_png(data)
        raise ValueError(f"neither JPEG nor PNG: it starts with {data[:8].hex() or 'nothing'}")
    except _DAMAGE as error:
        raise ValueError(_damage(where, error)) from None


def decode_into(data: bytes, out: np.ndarray, where: str, bgr: bool = False) -> bool:
    """Decode a colour picture straight into `out`, uint8 (H, W, 3) contiguous; False, and nothing done, for other sizes and other pictures.

    bgr: red and blue are exchanged, because they were when it was encoded. Raises ValueError as `decode` does.
    """
    if not data.startswith(_JPEG_START):
        return not bgr and _png_into(data, out)
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if (height, width, 3) != out.shape or colours in ("CMYK", "YCCK"):
            return False
        simplejpeg.decode_jpeg(data, colorspace="BGR" if bgr else "RGB", fastdct=True, fastupsample=False, buffer=out)
    except _DAMAGE as error:
        raise ValueError(_damage(where, error)) from None
    return True


def _decode_jpeg(data: bytes) -> np.ndarray:
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    _check_size(int(height), int(width))
    if colours in ("CMYK", "YCCK"):
        raise ValueError(f"{colours} is for printing, not for cameras")
    return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=True, fastupsample=False)


def _decode_png(data: bytes) -> np.ndarray:
    width, height, bits = _PNG_HEADER.unpack_from(data, _PNG_HEADER_AT)
    _check_size(height, width)
    if bits > 8:
        raise ValueError(f"{bits} bits a channel: depth, not colour")
    frame = _plain_png(data)
    if frame is not None:
        image = np.empty((height, width, 3), np.uint8)
        copy_rgb(frame, image)
        return image
    with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
        if picture.size != (width, height):
            raise ValueError("two headers")
        return np.array(picture.convert("RGB"))


def _png_into(data: bytes, out: np.ndarray) -> bool:
    if not data.startswith(_PNG_START) or len(data) < _PNG_HEADER_AT + _PNG_HEADER.size:
        return False
    if _PNG_HEADER.unpack_from(data, _PNG_HEADER_AT)[:2] != out.shape[1::-1]:
        return False
    frame = _plain_png(data)
    if frame is not None:
        copy_rgb(frame, out)
    return frame is not None


def _plain_png(data: bytes) -> Any:
    """A PNG whose header was checked, decoded by FFmpeg; None for what it does not take."""
    width, height, bits = _PNG_HEADER.unpack_from(data, _PNG_HEADER_AT)
    frame = png.decode_rgb(data) if bits == 8 and data.startswith(_PNG_FIRST, len(_PNG_START) + 4) else None
    return frame if frame is not None and (frame.width, frame.height) == (width, height) else None


def _damage(where: str, error: BaseException) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"{where}: unreadable picture ({reason}); copy the dataset again"


def _check_size(height: int, width: int) -> None:
    if not 0 < height * width <= MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels, at most {MAX_PIXELS} are decoded")
