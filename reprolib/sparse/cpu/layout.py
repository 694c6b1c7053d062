"""How activations lie in memory.

Either as many images as a vector has lanes share it, ``[y][x][channel][image]`` with a halo of zeros around every map;
or, with fewer images, a vector holds neighbouring positions, ``[channel][y][x][image]`` with rows of zeros between
channels. Both ways a number lies at ``first + c * channel + y * row + x * column + 4 * image``.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

LARGE_MAP_BYTES = 1024  # such maps begin with a line of the cache

# Columns of the table of layouts, in words.
CHANNELS, HEIGHT, WIDTH, IMAGES, WORDS, FIRST, CHANNEL, ROW, COLUMN, PAIRS, INTERLEAVED = range(11)


@dataclass(frozen=True)
class Layout:
    """Maps ``[images, channels, height, width]``; strides and sizes in bytes.

    They may be a part of the channels of a buffer: from its word `begin` on, `of` words in all. A *word* is 32 bits:
    one channel, or a pair of them in bfloat16.
    """

    channels: int
    height: int
    width: int
    halo: int
    images: int  # as many as `lanes`: they share a vector; fewer: positions do
    lanes: int
    pairs: bool = False  # bfloat16 numbers of two channels, an even and the next one, share a word
    begin: int = 0
    of: int = 0  # 0: no other channels

    @property
    def words(self) -> int:
        """Words that hold the channels of a pixel."""
        return -(-self.channels // 2) if self.pairs else self.channels

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def interleaved(self) -> bool:
        return self.images == self.lanes

    @property
    def column(self) -> int:
        return 4 * ((self.of or self.words) * self.lanes if self.interleaved else self.images)

    @property
    def row(self) -> int:
        return self.column * (self.width + 2 * self.halo if self.interleaved else self.width)

    @property
    def channel(self) -> int:
        if self.interleaved:
            return 4 * self.lanes
        size = self.row * (self.height + self.halo)
        return size if self.row * self.height < LARGE_MAP_BYTES else -(-size // 64) * 64

    @property
    def first(self) -> int:
        """Where the pixel 0, 0 of channel 0 lies."""
        lead = self.halo * (self.row + self.column)
        return self.begin * self.channel + (lead if self.interleaved else -(-lead // 64) * 64)

    @property
    def size(self) -> int:
        """Of the whole buffer."""
        if self.interleaved:
            return self.row * (self.height + 2 * self.halo)
        end = self.first + ((self.of or self.words) - self.begin) * self.channel
        return -(-(end + self.halo * self.column) // 64) * 64 + 64  # the last vector may reach beyond

    def to_channel(self, channel):
        """Bytes from channel 0 to another."""
        return channel // (1 + self.pairs) * self.channel

    def zeros(self, interior: float | None = None) -> np.ndarray:
        """``[ranges, 3]``: start and stop in words, and 32 bits to fill in: zeros around maps, `interior` inside."""
        ranges = []
        if not self.interleaved and self.halo:
            above = self.halo * self.row
            ends = self.first + np.arange(self.words) * self.channel + self.height * self.row
            below = max(above, self.channel - self.height * self.row)
            ranges = [(self.first - above, self.first, 0), *((end, end + below, 0) for end in ends)]
        elif self.interleaved:
            line = self.width * self.column
            inner = [self.halo * (self.row + self.column) + y * self.row for y in range(self.height)]
            ends = [0, *itertools.chain(*((start, start + line) for start in inner)), self.size]
            ranges = [(a, b, 0) for a, b in zip(ends[::2], ends[1::2], strict=True)] if self.halo else []
            if interior is not None:
                bits = int(np.float32(interior).view(np.uint32))  # 0 or infinity: its upper half is the bfloat16
                ranges += [(start, start + line, bits | bits >> 16 if self.pairs else bits) for start in inner]
        return np.array([(a // 4, b // 4, bits) for a, b, bits in ranges if b > a], np.int64).reshape(-1, 3)


def table(layouts: list[Layout]) -> np.ndarray:
    """Layouts ``[layouts, 11]`` as compiled loops read them."""
    rows = [
        (at.channels, at.height, at.width, at.images, at.words, at.first // 4, at.channel // 4, at.row // 4,
         at.column // 4, at.pairs, at.interleaved)
        for at in layouts
    ]  # fmt: skip
    return np.array(rows, np.int64)
