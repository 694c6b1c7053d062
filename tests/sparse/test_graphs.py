"""Whole graphs in the CPU engine against float64: whole numbers come out exactly."""

import numpy as np
import pytest
from graphs import as_maps, cases, emulated, equal, poisoned
from hypothesis import given, settings
from hypothesis import strategies as st

from reprolib.sparse import cpu, operations
from reprolib.sparse.cpu import avx2, avx512, avx512bf16

needs_engine = pytest.mark.skipif(
    not cpu.instruction_sets(), reason="neither AVX-512 nor AVX2 here, or code made at run time is forbidden"
)
isas = pytest.mark.parametrize("isa", [avx512, avx2, avx512bf16], ids=lambda isa: isa.NAME)
BATCHES = [1, 2, 3, 7, 8, 9, 16, 17, 33]


@needs_engine
@settings(max_examples=150)
@given(cases(), st.lists(st.sampled_from(BATCHES), min_size=1, max_size=3, unique=True), st.integers(1, 3))
def test_random_graphs_are_exact(case, batches, threads):
    engines = [
        cpu.Network(graph, case.arrays(), isa)
        for graph in (case.graph, operations.fused(case.graph))
        for isa in cpu.instruction_sets()
    ]
    for batch in batches:
        inputs = case.images(batch)
        expected = case.expected(inputs)
        for engine in engines:
            engine._arenas[:] = poisoned()
            assert equal(engine([as_maps(x) for x in inputs], threads), expected), (batch, engine.graph)


@needs_engine
@settings(max_examples=60)
@given(cases(pairs=True, top=200), st.sampled_from(BATCHES[:-1]), st.integers(1, 3))
def test_random_graphs_of_pairs_are_exact(case, batch, threads):
    for isa in cpu.instruction_sets(pairs=True):
        inputs = case.images(batch, top=200)
        engine = cpu.Network(case.graph, case.arrays(), isa)
        whole = batch - batch % isa.LANES
        parts = [(0, whole, isa.LANES)] * (whole > 0) + [(whole, batch, batch % isa.LANES)] * (whole < batch)
        expected = [case.expected_of_pairs([x[a:b] for x in inputs], n, isa.LANES) for a, b, n in parts]
        expected = [np.concatenate(each) for each in zip(*expected, strict=True)]
        assert equal(engine([as_maps(x) for x in inputs], threads), expected)


@isas
@settings(max_examples=80)
@given(st.data())
def test_random_graphs_of_every_instruction_set_are_exact(isa, data):
    """Planner, generator and driver together; calls of machine code go to the slow x86, so any machine will do."""
    top = 200 if isa.PAIRS else 3  # of bfloat16, most are rounded
    small = {"most": 6, "size": 4, "channels": (1, 2, 3, 5), "outputs": (1, 3, 8, 33)}
    case = data.draw(cases(pairs=isa.PAIRS, top=top, **small))
    images = data.draw(st.sampled_from([1, 2, 3, isa.LANES - 1, isa.LANES]), "images")
    inputs = case.images(images, top=top)
    expected = case.expected_of_pairs(inputs, images, isa.LANES) if isa.PAIRS else case.expected(inputs)
    assert equal(emulated(case, inputs, images, isa), expected)
