"""The code of every instruction set, run by a slow x86 of our own: on machines that lack the instructions, too."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from x86 import Processor

from reprolib.sparse.cpu import Layer, avx2, avx512, avx512bf16, generator, planner

SETS = {isa.NAME: isa for isa in (avx512, avx2, avx512bf16)}


def run(stage, isa, inputs):
    """The maps ``[images, C, H, W]`` that a layer's code makes of others; what surrounds them must stay as it was."""
    code = generator.generate(stage, isa)
    target = stage.raw if stage.pools_apart else stage.target
    sizes = [stage.source.size, code.weights.nbytes, 64 * 32, target.size, max(1, len(stage.masks)) * isa.MASK_BYTES]
    source_at, weights_at, sums_at, target_at, masks_at = np.cumsum([0, *sizes[:-1]])
    memory = np.full(sum(sizes), 0xFF, np.uint8)  # NaN everywhere
    floats = memory.view(np.float32)
    for start, stop, value in (stage.source.zeros(None)).astype(int):
        floats[source_at // 4 + start : source_at // 4 + stop] = value
    channels = inputs.shape[1] + inputs.shape[1] % 2 * stage.source.pairs
    inputs = np.pad(inputs, ((0, 0), (0, channels - inputs.shape[1]), (0, 0), (0, 0)))
    places(floats, stage.source, source_at)[:] = paired(inputs) if stage.source.pairs else inputs
    memory[weights_at:sums_at].view(np.float32)[:] = code.weights
    memory[masks_at:][: stage.masks.shape[0] * isa.MASK_BYTES] = isa.mask_table(stage.masks).ravel()
    if stage.layer.pool and not stage.pools_apart:
        for start, stop, bits in target.zeros(0.0 if stage.layer.relu else -np.inf)[-target.height :]:
            memory[target_at + 4 * start : target_at + 4 * stop].view(np.uint32)[:] = bits
    processor = Processor(memory, isa.REGISTERS)
    for group, first in enumerate(code.first_rows[:-1]):
        for i, (source, to) in enumerate(stage.places):
            for start, weights, size in code.chunks[code.first_chunks[group] : code.first_chunks[group + 1]]:
                processor.call(
                    code.code[start : start + size], rdi=source_at + source, rsi=weights_at + 4 * weights, rdx=sums_at,
                    rcx=target_at + to + target.to_channel(first), r8=masks_at + i * isa.MASK_BYTES,
                )  # fmt: skip
    made = places(floats, target, target_at)
    result = made.copy()
    made.view(np.int32)[:] = -1
    assert (memory[target_at:masks_at] == 0xFF).all()
    return unpaired(result)[:, : len(stage.layer.weight)] if target.pairs else result


def places(floats, layout, at):
    """The maps ``[images, words of 32 bits, H, W]`` of a layout in memory, to read and to write."""
    strides = (4, layout.channel, layout.row, layout.column)
    start = (at + layout.first) // 4
    shape = (layout.images, layout.words, layout.height, layout.width)
    return np.lib.stride_tricks.as_strided(floats[start:], shape, strides)


def paired(maps):
    """Maps ``[N, C, H, W]`` as bfloat16, two channels in 32 bits: ``[N, C / 2, H, W]``."""
    halves = torch.from_numpy(maps).bfloat16().view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
    return (halves[:, ::2] | halves[:, 1::2] << 16).view(np.float32)


def unpaired(words):
    bits = words.view(np.uint32)
    return np.stack([bits << 16, bits >> 16 << 16], axis=2).view(np.float32).reshape(len(words), -1, *words.shape[2:])


def first_stage(layer, size, images, isa, follower=None):
    """Of `layer`, followed by another one or not."""
    return planner.stages([layer, *([follower] if follower else [])], size, size, images, isa.LANES, isa.PAIRS)[0]


@settings(max_examples=25)
@given(st.data())
@pytest.mark.parametrize("name", SETS)
def test_layers_are_exact(name, data):
    isa = SETS[name]
    images = data.draw(st.sampled_from([1, 2, 3, isa.LANES - 1, isa.LANES]))
    c_in, c_out, size = (data.draw(st.integers(1, top)) for top in (6, 40, 5))
    kernel, relu, density = (
        data.draw(st.sampled_from([1, 3])),
        data.draw(st.booleans()),
        data.draw(st.sampled_from([0, 0.1, 1])),
    )
    pool = size > 1 and data.draw(st.booleans())
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    weight = rng.integers(-3, 4, (c_out, c_in, kernel, kernel)) * (rng.random((c_out, c_in, kernel, kernel)) < density)
    layer = Layer(weight.astype(np.float32), rng.integers(-3, 4, c_out).astype(np.float32), relu, pool, kernel // 2)
    following = data.draw(st.sampled_from([0, 1, 3]))
    follower = Layer(np.ones((1, c_out, following, following), np.float32), layer.bias[:1], 0, 0, following // 2)
    stage = first_stage(layer, size, images, isa, follower if following else None)
    inputs = rng.integers(-3, 4, (images, c_in, size, size)).astype(np.float32)
    expected = F.conv2d(*map(torch.from_numpy, (inputs, layer.weight, layer.bias)), padding=layer.padding)
    expected = expected.relu() if relu else expected
    expected = F.max_pool2d(expected, 2) if pool and not stage.pools_apart else expected
    if isa.PAIRS and following and not stage.pools_apart:
        expected = expected.bfloat16().float()
    assert np.array_equal(run(stage, isa, inputs)[:, :c_out], expected.numpy())


@pytest.mark.parametrize("name", SETS)
def test_sums_wait_between_chunks(name, monkeypatch):
    isa = SETS[name]
    monkeypatch.setattr(isa, "CHUNK", 20), monkeypatch.setattr(isa, "CHUNK_OF_FEW", 30)
    rng = np.random.default_rng(0)
    layer = Layer(rng.integers(-3, 4, (20, 6, 3, 3)).astype(np.float32), np.ones(20, np.float32), True, False, 1)
    for images in (1, isa.LANES):
        stage = first_stage(layer, 3, images, isa)
        inputs = rng.integers(-3, 4, (images, 6, 3, 3)).astype(np.float32)
        expected = F.conv2d(*map(torch.from_numpy, (inputs, layer.weight, layer.bias)), padding=1).relu()
        assert np.array_equal(run(stage, isa, inputs), expected.numpy())


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("name", SETS)
def test_nan_reaches_the_pool_that_sees_it(name, relu):
    isa = SETS[name]
    layer = Layer(np.ones((1, 1, 1, 1), np.float32), np.zeros(1, np.float32), relu, True)
    stage = first_stage(layer, 2, isa.LANES, isa, replace(layer, pool=False))
    for missing in range(4):  # the pixel, of one image
        inputs = np.random.default_rng(0).integers(-3, 4, (isa.LANES, 1, 2, 2)).astype(np.float32)
        inputs[3].reshape(-1)[missing] = np.nan
        x = torch.from_numpy(inputs)
        expected = F.max_pool2d(x.relu() if relu else x, 2).numpy()
        assert np.array_equal(run(stage, isa, inputs)[:, :1], expected, equal_nan=True)
