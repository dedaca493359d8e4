"""The checksum of a page: 64 bits that tell whether it is the page that was expected, wherever it lies.

The NumPy twin of checksum_pages.cu, for frames that the CPU reaches and for what is expected of others; both give the same
number. It stands for nothing in the kernel. Leaves out any defence against somebody who wants two pages to be equal.

Word j of a page (64 bits, little endian) is mixed with its place, and the mixed words are added up modulo 2**64: so the words
can be taken in any order, and no two of them can change places unnoticed.
"""

import numpy as np

from offload.kernels.base import FRAME_SIZE

__all__ = ("checksum_pages", "STEP", "FACTORS", "SHIFTS")

STEP = 0x9E3779B97F4A7C15
"""What the place of a word is multiplied with."""
FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
SHIFTS = (30, 27, 31)
"""The finalizer of splitmix64."""

PIECE_PAGES = 256
"""Pages taken at a time: they and what is made of them stay in the cache."""
WORDS = FRAME_SIZE // 8
PLACES = (np.arange(1, WORDS + 1, dtype=np.uint64) * np.uint64(STEP))


def checksum_pages(pages, rows=None):
    """Checksums (uint64) of ``pages``, uint8 of shape (nr, 4096), or of its ``rows`` alone, in their order."""
    words = np.ascontiguousarray(pages).view("<u8")
    nr = len(words) if rows is None else len(rows)
    sums = np.empty(nr, np.uint64)
    for start in range(0, nr, PIECE_PAGES):
        stop = min(start + PIECE_PAGES, nr)
        x = words[start:stop] + PLACES if rows is None else words[rows[start:stop]] + PLACES
        for shift, factor in zip(SHIFTS, FACTORS):
            x ^= x >> np.uint64(shift)
            x *= np.uint64(factor)
        x ^= x >> np.uint64(SHIFTS[-1])
        sums[start:stop] = x.sum(axis=1, dtype=np.uint64)
    return sums
