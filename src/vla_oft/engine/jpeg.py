"""JPEG compression and decompression of uint8 images on the device: `images.jpeg_round_trip`, to the bit, without files or the host.

    RGB --> Y, Cb, Cr --> Cb and Cr at half the size --> 8 x 8 blocks: cosines, quantise, multiply back, inverse --> full size --> RGB

Entropy coding loses nothing, so it is left out. The three channels become one picture, whose blocks are all treated alike but for their
quantisation table; then a step for all of them is one operation:

       W                 Every step is the encoder's or decoder's, in its integers, which float64 holds exactly (see `engine/dct.py`):
    +-----+              products with matrices may add in any order. Images are extended to multiples of 16 by repeating their last
    |  Y  | H            row and column, as the encoder does.
    |     |
    +--+--+              The decoder is libjpeg-turbo's SIMD code for x86. On other processors `jpeg_round_trip` itself may answer
    |Cb|Cr| H/2          differently; this does not.
    +--+--+
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vla_oft.engine import dct

_QUALITY_PERCENT = 10
"""Of the standard tables' steps, at quality 95."""
_LUMA = """16 11 10 16 24 40 51 61  12 12 14 19 26 58 60 55  14 13 16 24 40 57 69 56  14 17 22 29 51 87 80 62
           18 22 37 56 68 109 103 77  24 35 55 64 81 104 113 92  49 64 78 87 103 121 120 101  72 92 95 98 112 100 103 99"""
_CHROMA = """17 18 24 47 99 99 99 99  18 21 26 66 99 99 99 99  24 26 56 99 99 99 99 99  47 66 99 99 99 99 99 99""" + " 99" * 32
_TO_YCC = np.array([[19595, 38470, 7471], [-11059, -21709, 32768], [32768, -27439, -5329]]) / 2**16
_YCC_OFFSET = np.array([[0.5 - 128], [32767 / 2**16], [32767 / 2**16]])  # to be floored: an integer, in -128..127
_TO_RGB = np.array([[65536, 0, 91881], [65536, -22554, -46802], [65536, 116130, 0]]) / 2**16
_PERIOD, _ZERO = 2048, 1024
"""Samples overflow as 16 bits with five behind the point do: there are so many, and this one stands for 0."""
_RGB_OFFSET = 128.5 - _ZERO * _TO_RGB.sum(1)
_NUDGE = 1 + 2.0**-30


class JpegRoundTrip:
    """uint8 (N, H, W, 3) -> the same shape, after compression at quality 95, 4:2:0, for one size of images."""

    def __init__(self, height: int, width: int, device: torch.device) -> None:
        def table(values: np.ndarray | list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64, device=device)

        self._size, self._padded = (height, width), (-(-height // 16) * 16, -(-width // 16) * 16)
        self._half_size = (-(-height // 2), -(-width // 2))
        self._edges = [_repeat_last(a, b, device) if a != b else None for a, b in zip(self._size, self._padded, strict=True)]
        self._chroma_edge = None if self._edges[0] is None else _repeat_last(self._half_size[0], self._padded[0] // 2, device)
        self._to_ycc, self._ycc_offset = table(_TO_YCC), table(_YCC_OFFSET)
        self._to_rgb, self._rgb_offset = table(_TO_RGB).T, table(_RGB_OFFSET)
        self._halving = table(np.resize([1 / 4, 2 / 4], self._padded[1] // 2))  # so does the encoder round, to be fair on average
        self._doubling = table(np.resize([8 / 16, 7 / 16], width)).float()  # and the decoder
        self._forward = table(dct.FORWARD_ROWS).T, table(dct.FORWARD_COLUMNS)
        self._divide, self._restore = (table(values) for values in _quantisation(self._padded[0]))
        self._terms, self._columns, self._rows = table(dct.TERMS), table(dct.SAMPLES_COLUMNS), table(dct.SAMPLES_ROWS).T
        self._half, self._positive = table([0.5]), table([float(_ZERO + 64 * _PERIOD)])

    def __call__(self, images: Tensor) -> Tensor:
        for axis, edge in enumerate(self._edges, 1):
            images = images if edge is None else images.index_select(axis, edge)
        return self._decode(self._blocks(self._planes(images)))

    def _planes(self, images: Tensor) -> Tensor:
        """uint8 (N, H, W, 3) -> float64 (N, 3 H / 2, W), integers in -128..127."""
        num, (height, width) = len(images), self._padded
        rgb = images.double().view(num, height * width, 3).mT
        ycc = torch.baddbmm(self._ycc_offset, self._to_ycc.expand(num, 3, 3), rgb).view(num, 3, height, width)
        planes = ycc.new_empty(num, height + height // 2, width)
        torch.floor(ycc[:, 0], out=planes[:, :height])
        quarters = ycc[:, 1:].floor().view(num, 2, height // 2, 2, width // 2, 2)
        chroma = quarters.mean((3, 5)).add_(self._halving).floor_()
        if self._chroma_edge is not None:  # below the image the encoder repeats what it has halved already
            chroma = chroma.index_select(2, self._chroma_edge)
        planes[:, height:].unflatten(2, (2, width // 2)).copy_(chroma.transpose(1, 2))
        return planes

    def _blocks(self, planes: Tensor) -> Tensor:
        """Cosines, quantisation and back: float64 (N, 3 H / 2, W) -> int32, the same shape, in _ZERO - 128.._ZERO + 127."""
        shape, stripes = planes.shape, (-1, 8, planes.shape[2])
        across, down = self._forward
        values = torch.addmm(self._half, planes.view(-1, 8), across).floor_().view(stripes)
        values = torch.baddbmm(self._half, down.expand(len(values), -1, -1), values).floor_()
        values = values.view(shape[0], -1, 8, shape[2] // 8, 8)
        values = (values * self._divide).round_().mul_(self._restore).view(stripes)
        terms = torch.bmm(self._terms.expand(len(values), -1, -1), values).floor_()
        values = torch.bmm(self._columns.expand(len(values), -1, -1), terms)
        terms = torch.mm(values.view(-1, 8), self._terms.T).floor_()
        samples = torch.addmm(self._positive, terms, self._rows).to(torch.int32)  # truncated: a floor, they are positive
        return samples.bitwise_and_(_PERIOD - 1).clamp_(_ZERO - 128, _ZERO + 127).view(shape)

    def _decode(self, planes: Tensor) -> Tensor:
        """int32 (N, 3 H / 2, W), in _ZERO - 128.._ZERO + 127 -> uint8 (N, H, W, 3)."""
        (height, width), padded, (rows, columns) = self._size, self._padded, self._half_size
        chroma = planes[:, padded[0] :].unflatten(2, (2, padded[1] // 2)).transpose(1, 2)[:, :, :rows, :columns]
        chroma = chroma.to(torch.float32, memory_format=torch.contiguous_format)  # 11 bits and 4 behind the point: exact
        mode = "bilinear" if columns > 2 else "nearest"  # so few are not interpolated
        chroma = F.interpolate(chroma, scale_factor=2.0, mode=mode)[:, :, :height, :width]
        ycc = self._to_ycc.new_empty(len(planes), 3, height, width)
        ycc[:, 0].copy_(planes[:, :height, :width])
        torch.add(chroma, self._doubling, out=ycc[:, 1:]).floor_()
        rgb = torch.baddbmm(self._rgb_offset, ycc.flatten(2).mT, self._to_rgb.expand(len(ycc), -1, -1))
        return rgb.clamp_(0, 255).to(torch.uint8).view(-1, height, width, 3)  # truncated: a floor


def _repeat_last(size: int, padded: int, device: torch.device) -> Tensor:
    return torch.arange(padded, device=device).clamp_(max=size - 1)


def _quantisation(height: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors that divide by the quantisation steps, and that multiply by them again and scale for the inverse: (rows of blocks, 8, 1, 8).

    The encoder rounds half away from zero, `round` half to even: the factors for dividing are 2^-30 too large, so that no half is one.
    """
    scales = np.rint(np.outer(dct.SCALES, dct.SCALES) * 2**14).astype(int)
    shift = 14 - dct.INVERSE_BITS
    divide, restore = [], []
    for table, rows in ((_LUMA, height // 8), (_CHROMA, height // 16)):
        steps = (np.array(table.split(), int).reshape(8, 8) * _QUALITY_PERCENT + 50) // 100
        divide += [_NUDGE / (8 * steps)] * rows  # FORWARD_COLUMNS gives 8 times the coefficients
        restore += [(steps * scales + (1 << (shift - 1))) >> shift] * rows
    return np.stack(divide)[:, :, None], np.stack(restore)[:, :, None]
