"""The code of every instruction set, run by a slow x86 of our own: on machines that lack the instructions, too."""

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from x86 import Processor

from reprolib.sparse.cpu import avx2, avx512, avx512bf16, generator, geometry
from reprolib.sparse.cpu.geometry import Window
from reprolib.sparse.cpu.layout import Layout

SETS = {isa.NAME: isa for isa in (avx512, avx2, avx512bf16)}


def run(stage, isa, taps, size, inputs, addends=None):
    """The maps ``[images, C, H, W]`` that a layer's code makes of others; all other memory must stay as it was."""
    code = generator.generate(stage, isa)
    masks = isa.mask_table(stage.masks)
    layouts = [stage.source, stage.target, stage.addend or replace(stage.target, channels=0)]
    sizes = [*(layout.size for layout in layouts), code.weights.nbytes, 32 * 64, masks.nbytes]
    starts = np.cumsum([0, *(-(-size // 64) * 64 for size in sizes)])
    source_at, target_at, addend_at, weights_at, sums_at, masks_at = map(int, starts[:-1])
    memory = np.full(starts[-1], 0xFF, np.uint8)  # NaN everywhere
    floats = memory.view(np.float32)
    fill(floats, source_at, stage.source.zeros())
    for i, view in enumerate(taps.views or [None]):
        found = inputs if view is None else viewed(inputs, view, (stage.source.height, stage.source.width))
        words = -(-inputs.shape[1] // 2) if isa.PAIRS else inputs.shape[1]
        put(floats, replace(stage.source, channels=inputs.shape[1], begin=stage.source.begin + i * words,
                            of=stage.source.of or stage.source.words), source_at, found)  # fmt: skip
    if stage.addend:
        put(floats, stage.addend, addend_at, addends)
    memory[weights_at:][: code.weights.nbytes] = code.weights.view(np.uint8)
    memory[masks_at:][: masks.nbytes] = masks.ravel()
    if stage.pool:
        floor = stage.target.zeros(0.0 if stage.relu else -np.inf)
        fill(floats, target_at, floor)
    before = memory.copy()
    processor = Processor(memory, isa.REGISTERS)
    for group, first in enumerate(code.first_rows[:-1]):
        for i, (source, to, added) in enumerate(stage.places):
            for start, weights, count in code.chunks[code.first_chunks[group] : code.first_chunks[group + 1]]:
                processor.call(
                    code.code[start : start + count], rdi=source_at + source, rsi=weights_at + 4 * weights, rdx=sums_at,
                    rcx=target_at + to + stage.target.to_channel(first), r8=masks_at + i * masks.shape[1],
                    r9=addend_at + added + (stage.addend.to_channel(first) if stage.addend else 0),
                )  # fmt: skip
    result = unpaired(maps(floats, stage.target, target_at), stage.target)
    memory[sums_at:masks_at], before[sums_at:masks_at] = 0, 0
    for each in (floats, before.view(np.float32)):
        maps(each, stage.target, target_at).view(np.int32)[:] = 0
    assert np.array_equal(memory, before)
    return result[:, : stage.target.channels]


def fill(floats, at, ranges):
    for start, stop, bits in ranges:
        floats[at // 4 + start : at // 4 + stop].view(np.uint32)[:] = bits


def viewed(inputs, view, size):
    """Pixels at the view's stride, zeros where there are none."""
    (stride_y, stride_x, first_y, first_x), (height, width) = view, size
    found = np.zeros((*inputs.shape[:2], height, width), np.float32)
    for y in range(height):
        for x in range(width):
            v, u = stride_y * y + first_y, stride_x * x + first_x
            if 0 <= v < inputs.shape[2] and 0 <= u < inputs.shape[3]:
                found[:, :, y, x] = inputs[:, :, v, u]
    return found


def maps(floats, layout, at):
    """The maps ``[images, words of 32 bits, H, W]`` of a layout in memory, to read and to write."""
    strides = (4, layout.channel, layout.row, layout.column)
    start = (at + layout.first) // 4
    shape = (layout.images, layout.words, layout.height, layout.width)
    return np.lib.stride_tricks.as_strided(floats[start:], shape, strides)


def put(floats, layout, at, inputs):
    inputs = np.pad(inputs, ((0, 0), (0, inputs.shape[1] % 2 * layout.pairs), (0, 0), (0, 0)))
    maps(floats, layout, at)[:] = paired(inputs) if layout.pairs else inputs


def paired(maps):
    """Maps ``[N, C, H, W]`` as bfloat16, two channels in 32 bits: ``[N, C / 2, H, W]``."""
    halves = torch.from_numpy(maps).bfloat16().view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
    return (halves[:, ::2] | halves[:, 1::2] << 16).view(np.float32)


def unpaired(words, layout):
    if not layout.pairs:
        return words.copy()
    bits = words.view(np.uint32)
    return np.stack([bits << 16, bits >> 16 << 16], axis=2).view(np.float32).reshape(len(words), -1, *words.shape[2:])


def rounded(numbers, isa):
    return torch.from_numpy(numbers).bfloat16().float().numpy() if isa.PAIRS else numbers


def stage_of(isa, weight, bias, window, size, images, groups=1, relu=False, pool=False, **where):
    """A layer where the planner would put it; `where`: the halo of the target, channels beside it, and more."""
    taps = geometry.taps(window, size, images == isa.LANES)
    out = window.out(size)
    channels, words = weight.shape[1] * groups, -(-weight.shape[1] * groups // 2)
    if taps.views:
        several = len(taps.views) * (2 * words if isa.PAIRS else channels)
        source = Layout(several, *out, taps.halo, images, isa.LANES, isa.PAIRS)
    else:
        source = Layout(channels, *size, taps.halo + where.get("more_halo", 0), images, isa.LANES, isa.PAIRS)
    target_size = tuple(length // (1 + pool) for length in out)
    target = where.get("target") or Layout(
        len(weight), *target_size, where.get("halo", 0), images, isa.LANES, isa.PAIRS and where.get("pairs", True),
        where.get("begin", 0), where.get("of", 0),
    )  # fmt: skip
    addend = where.get("addend") and Layout(
        len(weight), *out, where.get("halo", 0), images, isa.LANES, isa.PAIRS, where.get("begin", 0), where.get("of", 0)
    )
    whole = geometry.without_groups(weight, groups)
    return geometry.stage(whole, bias, window, taps, (source, target, addend), relu, pool, out), taps


def reference(isa, stage, weight, bias, window, inputs, groups, addends=None):
    inputs, weight, bias = (torch.from_numpy(array).double() for array in (rounded(inputs, isa), weight, bias))
    y = F.conv2d(inputs, weight, bias, window.stride, window.padding, window.dilation, groups)
    y = y if addends is None else y + torch.from_numpy(rounded(addends, isa)).double()
    y = y.relu() if stage.relu else y
    y = (F.max_pool2d(y, 2) if stage.pool else y).float().numpy()
    return rounded(y, isa) if stage.target.pairs else y


def whole_numbers(rng, top, *shape):
    return rng.integers(-top, top + 1, shape).astype(np.float32)


few = st.sampled_from([1, 1, 2, 3])


@settings(max_examples=120)
@given(st.data())
@pytest.mark.parametrize("name", SETS)
def test_layers_are_exact(name, data):
    """Sums are whole numbers; bfloat16 must round most of them."""
    isa, draw = SETS[name], data.draw
    images = draw(st.sampled_from([1, 2, 3, isa.LANES - 1, isa.LANES]), "images")
    size = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)), "size")
    window = Window(
        draw(st.sampled_from([(1, 1), (3, 3), (3, 3), (2, 2), (1, 3), (5, 2), (1, 7)]), "kernel"),
        draw(st.tuples(few, few), "stride"), draw(st.tuples(*[st.integers(0, 3)] * 2), "padding"),
        draw(st.tuples(few, few), "dilation"),
    )  # fmt: skip
    out = window.out(size)
    if min(out) < 1:
        return
    groups = draw(st.sampled_from([1, 1, 2, 3]), "groups")
    c_in, c_out = (draw(st.integers(1, top)) * groups for top in (4, 40 // groups))
    relu, density = draw(st.booleans(), "relu"), draw(st.sampled_from([0, 0.1, 0.1, 1]), "density")
    pool = images == isa.LANES and min(out) > 1 and draw(st.booleans(), "pool")
    add = draw(st.booleans(), "add")
    begin = draw(st.integers(0, 3), "begin")
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    shape = (c_out, c_in // groups, *window.kernel)
    weight, bias = whole_numbers(rng, 3, *shape) * (rng.random(shape) < density), whole_numbers(rng, 99, c_out)
    where = {"halo": draw(st.integers(0, 2), "halo"), "begin": begin, "of": begin + c_out + 1, "addend": add}
    where |= {"more_halo": draw(st.integers(0, 1)), "pairs": draw(st.booleans(), "pairs")}
    if pool:
        where |= {"begin": 0, "of": 0}
    stage, taps = stage_of(isa, weight.astype(np.float32), bias, window, size, images, groups, relu, pool, **where)
    inputs = whole_numbers(rng, 300, images, c_in, *size)
    addends = whole_numbers(rng, 999, images, c_out, *out) if add else None
    expected = reference(isa, stage, weight.astype(np.float32), bias, window, inputs, groups, addends)
    with mock.patch.object(generator, "MANY_CHANNELS", draw(st.sampled_from([1, 16]), "loops from so many channels")):
        assert np.array_equal(run(stage, isa, taps, size, inputs, addends), expected)


@pytest.mark.parametrize("density", [0.5, 0.95, 1])
@pytest.mark.parametrize("name", SETS)
def test_layers_with_few_zeros_are_loops(name, density):
    """With a weight as long as its words, and code that does not grow with them."""
    isa, rng, window = SETS[name], np.random.default_rng(0), Window((3, 3), padding=(1, 1))
    sizes = []
    for channels in (32, 64):
        weight = np.where(rng.random((50, channels, 3, 3)) < density, whole_numbers(rng, 3, 50, channels, 3, 3), 0)
        weight[rng.random(weight.shape) < density] += 4
        bias = whole_numbers(rng, 9, 50)
        stage, taps = stage_of(isa, weight.astype(np.float32), bias, window, (2, 3), 1, relu=True)
        made = generator.generate(stage, isa)
        sizes.append(len(made.code))
        assert len(made.weights) <= 50 + weight.size / (1 + isa.PAIRS) + 16 * len(made.chunks)
        inputs = whole_numbers(rng, 9, 1, channels, 2, 3)
        expected = reference(isa, stage, weight.astype(np.float32), bias, window, inputs, 1)
        assert np.array_equal(run(stage, isa, taps, (2, 3), inputs), expected)
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("name", SETS)
def test_sums_wait_between_chunks(name, add, monkeypatch):
    isa = SETS[name]
    monkeypatch.setattr(isa, "CHUNK", 20), monkeypatch.setattr(isa, "CHUNK_OF_FEW", 30)
    rng = np.random.default_rng(0)
    weight, bias, window = whole_numbers(rng, 3, 20, 6, 3, 3), whole_numbers(rng, 3, 20), Window((3, 3), padding=(1, 1))
    for images in (1, isa.LANES):
        stage, taps = stage_of(isa, weight, bias, window, (3, 3), images, relu=True, addend=add)
        assert len(generator.generate(stage, isa).chunks) > 2
        inputs, addends = whole_numbers(rng, 9, images, 6, 3, 3), whole_numbers(rng, 99, images, 20, 3, 3)
        expected = reference(isa, stage, weight, bias, window, inputs, 1, addends if add else None)
        assert np.array_equal(run(stage, isa, taps, (3, 3), inputs, addends), expected)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("name", SETS)
def test_nan_reaches_the_pool_that_sees_it(name, relu):
    isa = SETS[name]
    weight, bias, window = np.ones((2, 1, 1, 1), np.float32), np.zeros(2, np.float32), Window((1, 1))
    stage, taps = stage_of(isa, weight, bias, window, (2, 2), isa.LANES, relu=relu, pool=True)
    for missing in range(4):  # the pixel, of one image
        inputs = whole_numbers(np.random.default_rng(0), 3, isa.LANES, 1, 2, 2)
        inputs[3].reshape(-1)[missing] = np.nan
        expected = reference(isa, stage, weight, bias, window, inputs, 1)
        assert np.isnan(expected).sum() == 2
        assert np.array_equal(run(stage, isa, taps, (2, 2), inputs), expected, equal_nan=True)


@pytest.mark.parametrize("name", SETS)
def test_lanes_over_the_edge_read_nothing(name):
    """NaN and infinity in the first column must not reach what lies behind the last one, nor the other way round."""
    isa, window = SETS[name], Window((1, 3), padding=(0, 1))
    weight = np.array([[[[1, 0, 2]]]], np.float32)
    stage, taps = stage_of(isa, weight, np.zeros(1, np.float32), window, (4, 3), 1)
    for column, bad in ((0, np.nan), (2, np.inf)):
        inputs = whole_numbers(np.random.default_rng(0), 9, 1, 1, 4, 3)
        inputs[:, :, :, column] = bad
        made = run(stage, isa, taps, (4, 3), inputs)[0, 0]
        assert np.array_equal(made[:, column], 2 * inputs[0, 0, :, 1] if column == 0 else inputs[0, 0, :, 1])


@pytest.mark.parametrize("name", SETS)
def test_wrong_plans_are_refused(name):
    isa, window = SETS[name], Window((3, 3), padding=(1, 1))
    weight, bias = np.ones((8, 8, 3, 3), np.float32), np.zeros(8, np.float32)
    for images in (1, isa.LANES):
        stage, _ = stage_of(isa, weight, bias, window, (6, 6), images, addend=True)
        generator.generate(stage, isa)
        for what, change in (
            ("read", {"places": stage.places + np.array([10**6, 0, 0])}),
            ("read", {"places": stage.places - np.array([10**5, 0, 0])}),
            ("write", {"places": stage.places + np.array([0, 10**6, 0])}),
            ("write", {"places": stage.places - np.array([0, 10**5, 0])}),
            ("add", {"places": stage.places + np.array([0, 0, 10**6])}),
            ("add", {"places": stage.places - np.array([0, 0, 10**5])}),
            ("read", {"source": replace(stage.source, channels=2)}),
            ("write", {"target": replace(stage.target, channels=4)}),
            ("add", {"addend": replace(stage.addend, channels=4)}),
        ):
            with pytest.raises(ValueError, match=f"code would {what} bytes .*the plan is wrong"):
                generator.generate(replace(stage, **change), isa)


@pytest.mark.parametrize("name", SETS)
def test_maps_beyond_what_an_instruction_reaches_are_refused(name):
    isa = SETS[name]
    weight = np.ones((1, 124 * (1 + isa.PAIRS), 1, 1), np.float32)
    weight[0, ::2] = weight[0, 1::4] = 0
    stage, _ = stage_of(isa, weight, np.zeros(1, np.float32), Window((1, 1)), (4190, 4190), 1)
    with pytest.raises(ValueError, match=r"displacement .* does not fit"):
        generator.generate(stage, isa)


@settings(max_examples=40)
@given(st.data())
@pytest.mark.parametrize("name", SETS)
def test_right_plans_are_not_refused(name, data):
    """Whole vectors are read: their buffers must have room for the last one, however few of its lanes count."""
    isa, draw = SETS[name], data.draw
    images = draw(st.integers(1, isa.LANES))
    size, kernel = (draw(st.tuples(st.integers(1, top), st.integers(1, top))) for top in (9, 12))
    window = Window(kernel, draw(st.tuples(few, few)), draw(st.tuples(st.integers(0, 9), st.integers(0, 9))))
    if min(window.out(size)) > 0:
        weight = np.ones((2, 2, *kernel), np.float32)
        stage, _ = stage_of(isa, weight, np.zeros(2, np.float32), window, size, images, addend=True)
        assert len(generator.generate(stage, isa).code)
