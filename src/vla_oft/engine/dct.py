"""The integer cosine transforms of JPEG as matrices: the accurate forward one (libjpeg's "islow") and the fast inverse one ("ifast").

libjpeg computes either as a net of integer additions, multiplications and shifts, along one axis of an 8 x 8 block, then the other. Between
two roundings all of that is linear. So a pass is a product with a matrix, a rounding, and for the inverse another product:

    forward   8 samples       --FORWARD_*-->  8 coefficients (plus a half, floor)
    inverse   8 coefficients  --TERMS-->      19 terms (floor)                     --SAMPLES_*-->  8 samples

The matrices are scaled by powers of two so that every shift is a floor. In float64 all this is exact, in whatever order a product is added
up: the numbers are integers, or few bits more, far below 2^53. float32 would be too short, and is shortened further where TF32 is on.

The inverse is that of libjpeg-turbo's SIMD code. It computes in 16 bits, and a black and white chequerboard of 4 x 4 pixels overflows them:
the result is visibly broken, and it is what the reference saw. Sums may overflow at any time, if that is made up for once, at the end;
factors of products must be brought back before. With x = factor / 2^16, floor(x + 1/2) times 2^16 is too much, and that is
floor(2 x) - floor(x): two more terms for each.
"""

import numpy as np

_EVEN = [[8192, 8192, 8192, 8192], [10703, 4433, -4433, -10703], [8192, -8192, -8192, 8192], [4433, -10704, 10704, -4433]]
_ODD = [[11363, 9633, 6437, 2260], [9633, -2259, -11362, -6436], [6437, -11362, 2261, 9633], [2260, -6436, 9633, -11363]]
"""First halves of the rows of the cosine matrix, times 2^13: sums of the rounded constants that libjpeg multiplies by."""
_COSINES = np.empty((8, 8))
_COSINES[0::2] = np.hstack([_EVEN, np.fliplr(_EVEN)])
_COSINES[1::2] = np.hstack([_ODD, np.negative(np.fliplr(_ODD))])

FORWARD_ROWS = _COSINES / 2**11
"""(8, 8) along rows, first: the result is 4 times what it should be, for precision."""
FORWARD_COLUMNS = _COSINES / 2**15
"""(8, 8) along columns, second; the result is 8 times the coefficients."""

SCALES = np.array([1, *(np.sqrt(2) * np.cos(np.arange(1, 8) * np.pi / 16))])
"""(8,) by which the inverse wants coefficients multiplied, along either axis."""
INVERSE_BITS = 2
"""Bits behind the point in its coefficients."""

_SUMS = np.array([[1, 0, 0, 0, 1, 0, 0, 0], [1, 0, 0, 0, -1, 0, 0, 0], [0, 0, 1, 0, 0, 0, 1, 0], [0, 1, 0, 1, 0, 1, 0, 1]])
_FACTORS = np.array(
    [
        [0, 0, 1, 0, 0, 0, -1, 0],
        [0, 1, 0, -1, 0, -1, 0, 1],
        [0, 1, 0, -1, 0, 1, 0, -1],
        [0, 0, 0, -1, 0, 1, 0, 0],
        [0, 1, 0, 0, 0, 0, 0, -1],
    ]
)
_CONSTANTS = np.array([362, 362, 473, -413, 277])[:, None]
"""What the factors are multiplied by, times 2^8: 1.414 twice, 1.848, -1.613, 1.082."""
_PRODUCTS = (_CONSTANTS - [[0], [0], [0], [256], [0]]) / 2**8  # -2.613 is meant; the SIMD code subtracts the fourth factor once more
_OVERFLOW = 2**14  # two bits of the 16 are behind the point
TERMS = np.vstack([_SUMS, _FACTORS * _PRODUCTS, _FACTORS / (_OVERFLOW / 2), _FACTORS / _OVERFLOW])
"""(19, 8) of the inverse, to be floored: sums, products, and 2 x and x of each factor."""


def _samples() -> np.ndarray:
    """(8, 19): from terms, by additions and what overflows take away."""
    unit = np.eye(len(TERMS))
    sums, products, twice, once = unit[:4], unit[4:9], unit[9:14], unit[14:]
    root_even, root_odd, common, left, right = products - (twice - once) * _CONSTANTS * (_OVERFLOW / 2**8)
    even = [sums[0] + sums[2], sums[1] + root_even - sums[2], sums[1] - root_even + sums[2], sums[0] - sums[2]]
    second = left + common - sums[3]
    third = root_odd - second
    odd = [sums[3], second, third, common - right - third]
    return np.array([e + o for e, o in zip(even, odd, strict=True)] + [e - o for e, o in zip(even[::-1], odd[::-1], strict=True)])


SAMPLES_COLUMNS = _samples()
"""(8, 19) along columns, first."""
SAMPLES_ROWS = _samples() / 2 ** (3 + INVERSE_BITS)
"""(8, 19) along rows, second; the result is to be floored, and overflows at +-1024."""
