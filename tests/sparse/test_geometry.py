"""What taps read, against the definition of a convolution; and layouts, whose every pixel has a place of its own."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reprolib.sparse.cpu import geometry
from reprolib.sparse.cpu.encoder import MOST_MASKS
from reprolib.sparse.cpu.geometry import Window
from reprolib.sparse.cpu.layout import Layout


def pairs_of(low, high):
    return st.tuples(st.integers(low, high), st.integers(low, high))


windows = st.builds(Window, pairs_of(1, 8), pairs_of(1, 4), pairs_of(0, 5), pairs_of(1, 3))


def defined(window, size, y, x):
    """The pixel that each tap reads for one output, or None outside of the map: the definition."""
    found = []
    for i in range(window.kernel[0]):
        for j in range(window.kernel[1]):
            v = y * window.stride[0] - window.padding[0] + i * window.dilation[0]
            u = x * window.stride[1] - window.padding[1] + j * window.dilation[1]
            found.append((v, u) if 0 <= v < size[0] and 0 <= u < size[1] else None)
    return found


def read(window, size, interleaved, y, x):
    """The same, as `geometry.taps` says where to look."""
    taps, out = geometry.taps(window, size, interleaved), window.out(size)
    found = [None] * (window.kernel[0] * window.kernel[1])
    for number, view, (down, right) in zip(taps.number, taps.view, taps.shift, strict=True):
        if taps.views or not (interleaved or out == (1, 1)):
            v, u = y + down, x + right
            inside = 0 <= v < out[0] and 0 <= u < out[1]  # else zeros, or a lane that is masked
            stride_y, stride_x, first_y, first_x = taps.views[view] if taps.views else (1, 1, 0, 0)
            v, u = v * stride_y + first_y, u * stride_x + first_x
        else:
            v, u, inside = y * window.stride[0] + down, x * window.stride[1] + right, True
        inside = inside and 0 <= v < size[0] and 0 <= u < size[1]
        found[number] = (v, u) if inside else None
    return found


@settings(max_examples=300)
@given(windows, pairs_of(1, 9), st.booleans())
@example(Window((1, 1), (2, 2), (1, 1)), (1, 1), False)  # no tap reads any pixel
@example(Window((3, 3), (2, 2), (1, 1)), (7, 8), False)
@example(Window((7, 7), (2, 2), (3, 3)), (9, 9), False)
@example(Window((1, 8), (1, 1), (0, 4)), (3, 9), False)  # more shifts than masks
def test_taps_read_what_the_definition_says(window, size, interleaved):
    out = window.out(size)
    if min(out) < 1:
        return
    for y in range(out[0]):
        for x in range(out[1]):
            assert read(window, size, interleaved, y, x) == defined(window, size, y, x)
    taps = geometry.taps(window, size, interleaved)
    used = {i for y in range(out[0]) for x in range(out[1])
            for i, pixel in enumerate(defined(window, size, y, x)) if pixel}  # fmt: skip
    assert set(taps.number) == used, "a tap that reads no pixel costs time, and may need a larger halo"
    assert not (interleaved and taps.views)
    shifts = taps.shift[:, 1]
    assert interleaved or out == (1, 1) or len(set(shifts[shifts != 0])) < MOST_MASKS


@settings(max_examples=300)
@given(windows, pairs_of(1, 9), st.booleans())
def test_halos_are_as_wide_as_taps_reach_and_no_wider(window, size, interleaved):
    out = window.out(size)
    if min(out) < 1:
        return
    taps = geometry.taps(window, size, interleaved)
    direct = interleaved or out == (1, 1)
    stride, map_size = (window.stride, size) if direct else ((1, 1), out)
    reach = [0]
    for axis in (0, 1):
        for shift in taps.shift[:, axis]:
            reach += [-shift, shift + stride[axis] * (out[axis] - 1) - (map_size[axis] - 1)]
    assert taps.halo == max(reach)


def test_views_of_a_stride_of_two():
    """Even and odd rows and columns: four views hold all that nine taps read."""
    taps = geometry.taps(Window((3, 3), (2, 2), (1, 1)), (8, 8), interleaved=False)
    assert taps.views == ((2, 2, 0, 0), (2, 2, 0, 1), (2, 2, 1, 0), (2, 2, 1, 1))
    assert taps.view.tolist() == [3, 2, 3, 1, 0, 1, 3, 2, 3]
    assert taps.shift.tolist() == [[-1, -1], [-1, 0], [-1, 0], [0, -1], [0, 0], [0, 0], [0, -1], [0, 0], [0, 0]]
    assert taps.halo == 1


@pytest.mark.parametrize("interleaved", [False, True])
def test_taps_in_the_padding_only_are_left_out(interleaved):
    taps = geometry.taps(Window((3, 3), padding=(1, 1)), (1, 4), interleaved)
    assert taps.number.tolist() == [3, 4, 5] and taps.halo == 1


# --- Layouts ----------------------------------------------------------------------------------------------------------


@st.composite
def layouts(draw):
    lanes, pairs = draw(st.sampled_from([(8, False), (16, False), (16, True)]))
    images = draw(st.sampled_from([1, 2, 3, lanes - 1, lanes]))
    channels, (height, width), halo = draw(st.integers(1, 5)), draw(pairs_of(1, 6)), draw(st.integers(0, 3))
    begin, behind = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    of = begin + -(-channels // (1 + pairs)) + behind if begin or behind else 0
    return Layout(channels, height, width, halo, images, lanes, pairs, begin, of)


def places(layout):
    """Bytes from the start to every number ``[words, H, W, images]``."""
    each = np.indices((layout.words, layout.height, layout.width, layout.images))
    strides = np.array([layout.channel, layout.row, layout.column, 4])
    return layout.first + (each * strides[:, None, None, None, None]).sum(axis=0)


@settings(max_examples=100)
@given(layouts())
def test_each_number_has_a_place_of_its_own_inside(layout):
    at = places(layout)
    assert len(np.unique(at)) == at.size and (at % 4 == 0).all()
    assert at.min() >= 0 and at.max() + 4 <= layout.size and layout.size % 4 == 0
    assert [layout.to_channel(c) for c in range(layout.channels)] == [
        at[c // (1 + layout.pairs), 0, 0, 0] - layout.first for c in range(layout.channels)
    ]


@settings(max_examples=100)
@given(layouts(), st.booleans())
def test_zeros_surround_maps_and_touch_no_number(layout, pooled):
    """Zeros lie wherever a tap of no more than the halo may look; where positions share vectors, above and below only,
    as lanes over the left and right edge are masked."""
    memory = np.full(layout.size // 4, 7, np.int64)
    for start, stop, bits in layout.zeros(-np.inf if pooled else None):
        assert 0 <= start < stop <= layout.size // 4
        memory[start:stop] = bits
    inner = memory[places(layout) // 4]
    floor = 0xFF80FF80 if layout.pairs else 0xFF800000
    assert (inner == (floor if pooled and layout.interleaved else 7)).all()
    h, across = layout.halo, layout.halo if layout.interleaved else 0
    around = Layout(
        layout.channels, layout.height + 2 * h, layout.width + 2 * across, 0, layout.images, layout.lanes, layout.pairs
    )
    each = np.indices((layout.words, around.height, around.width, layout.images))
    each[1] -= h
    each[2] -= across
    strides = np.array([layout.channel, layout.row, layout.column, 4])
    outside = (each[1] < 0) | (each[1] >= layout.height) | (each[2] < 0) | (each[2] >= layout.width)
    at = layout.first + (each * strides[:, None, None, None, None]).sum(axis=0)
    assert (memory[at[outside] // 4] == 0).all()


@settings(max_examples=100)
@given(layouts(), st.integers(1, 5))
def test_neighbours_in_a_buffer_do_not_touch_each_other(one, channels):
    """Channels beside each other: neither numbers nor zeros of one lie where numbers of the other do."""
    of = one.words + -(-channels // (1 + one.pairs))
    shared = (one.height, one.width, one.halo, one.images, one.lanes, one.pairs)
    first = Layout(one.channels, *shared, 0, of)
    second = Layout(channels, *shared, first.words, of)
    assert first.size == second.size == Layout(of * (1 + one.pairs), *shared).size
    numbers = [set(places(layout).ravel() // 4) for layout in (first, second)]
    zeros = [{w for a, b, _ in layout.zeros() for w in range(a, b)} for layout in (first, second)]
    assert not numbers[0] & numbers[1] and not (zeros[0] | zeros[1]) & (numbers[0] | numbers[1])


def test_groups_are_zeros_elsewhere():
    weight = np.arange(1, 9, dtype=np.float32).reshape(4, 2, 1)
    expected = [[1, 2, 0, 0], [3, 4, 0, 0], [0, 0, 5, 6], [0, 0, 7, 8]]
    assert geometry.without_groups(weight, 2)[:, :, 0].tolist() == expected
    assert geometry.without_groups(weight, 1) is weight
