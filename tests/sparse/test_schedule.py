"""The order of the work, and memory: what is needed at the same time never overlaps, and nothing is done twice."""

from itertools import combinations

import numpy as np
import pytest
import torch
from graphs import cases
from hypothesis import given, settings
from hypothesis import strategies as st

from reprolib.sparse.cpu import planner, schedule
from reprolib.sparse.cpu.planner import FILL, INPUT, LAYER, OUTPUT
from reprolib.sparse.cpu.schedule import LATE, OWN, STRETCH
from reprolib.sparse.operations import Convolution, Flatten, Graph, Linear


@st.composite
def plans(draw):
    pairs = draw(st.booleans())
    case = draw(cases())
    lanes = 16 if pairs else draw(st.sampled_from([8, 16]))
    inputs = [(*shape, 1, 1)[: max(3, len(shape))] for shape in case.inputs]
    images = draw(st.sampled_from([1, 3, lanes]))
    return planner.plan(case.graph, case.arrays(), inputs, images, lanes, pairs)


def lives(plan):
    """When each buffer is first and last touched."""
    found = {}
    for i, work in enumerate(plan.work):
        for place in {work.source, work.other, work.target} - {-1}:
            first, _ = found.get(plan.places[place][1], (i, i))
            found[plan.places[place][1]] = first, i
    return found


@settings(max_examples=60)
@given(plans(), st.data())
def test_what_lives_at_the_same_time_lies_apart(plan, data):
    deep, again = data.draw(st.integers(0, len(plan.work)), "deep"), data.draw(st.booleans(), "again")
    places, sizes = schedule._places(plan, deep, again)
    size_of = {buffer: layout.size for layout, buffer in plan.places}
    start_of = {buffer: tuple(place) for (_, buffer), place in zip(plan.places, places, strict=True)}
    for buffer, (area, start) in start_of.items():
        assert start >= 0 and start % 4 == 0 and start + size_of[buffer] <= sizes[area]
    known = lives(plan)
    for a, b in combinations(known, 2):
        together = again or (known[a][0] <= known[b][1] and known[b][0] <= known[a][1])
        if together and start_of[a][0] == start_of[b][0]:
            below, above = sorted((a, b), key=lambda buffer: start_of[buffer])
            assert start_of[below][1] + size_of[below] <= start_of[above][1]
    for buffer, (_, last) in known.items():
        assert start_of[buffer][0] == (OWN if last < deep else LATE), "a later step may be done by another thread"
    for place, (_, buffer) in zip(places, plan.places, strict=True):
        assert tuple(place) == start_of[buffer]


@given(st.integers(1, 9), st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9))))
def test_room_is_the_first_that_is_free(size, ranges):
    taken = [(start, start + length) for start, length in ranges]
    start = schedule._room(size, taken)

    def free(at):
        return all(b <= at or at + size <= a for a, b in taken)

    assert free(start) and not any(map(free, range(start)))


@settings(max_examples=60)
@given(plans(), st.integers(1, 40), st.integers(1, 5), st.data())
def test_all_work_is_done_once_for_every_bundle(plan, bundles, threads, data):
    """And each task of a step has work that no other one has."""
    groups = {i: data.draw(st.integers(1, 9)) for i, work in enumerate(plan.work) if work.kind == LAYER}
    order = schedule.schedule(plan, groups, bundles, threads)
    done = []
    for step in order.steps:
        if step.kind == STRETCH:
            assert step.bundle == 0 and step.tasks == step.bundles
            done += [(i, bundle) for bundle in range(step.bundles) for i in range(step.work)]
            continue
        work = plan.work[step.work]
        assert step.kind == work.kind
        done += [(step.work, bundle) for bundle in range(step.bundle, step.bundle + step.bundles)]
        if work.kind == LAYER:
            vectors, bands = step.bundles * len(work.stage.places), step.tasks // step.parts
            assert step.tasks == bands * step.parts and step.parts in (1, groups[step.work])
            assert step.band % 4 == 0, "a max-pool takes four vectors, which one task must see"
            assert (bands - 1) * step.band < vectors <= bands * step.band
        else:
            assert step.tasks == step.bundles * step.parts
    assert sorted(done) == [(i, bundle) for i in range(len(plan.work)) for bundle in range(bundles)]
    deep = schedule.stretch(plan)
    for bundle in range(bundles):  # in order, but what goes through the stretch alone is first
        numbers = [i for i, other in done if other == bundle]
        assert numbers == sorted(numbers)
    shared = [step for step in order.steps if step.kind != STRETCH and step.work < deep]
    assert all(step.bundles < threads for step in shared), "memory of threads is enough for them"
    assert order.size == order.areas[1, 0] + bundles * order.areas[1, 1]
    assert order.areas[1, 0] == threads * order.areas[0, 1]


@settings(max_examples=30)
@given(plans(), st.integers(1, 5))
def test_parts_apart_are_all_the_work(plan, bundles):
    groups = {i: 1 for i, work in enumerate(plan.work) if work.kind == LAYER}
    come, layers, out = schedule.apart(plan, groups, bundles, 2)
    numbers = [step.work for part in (come, layers, out) for step in part.steps]
    assert numbers == list(range(len(plan.work)))
    assert {step.kind for step in come.steps} <= {INPUT, FILL} and {step.kind for step in out.steps} <= {OUTPUT}
    assert not {step.kind for step in layers.steps} & {INPUT, OUTPUT}


# --- Depth first ------------------------------------------------------------------------------------------------------


def plan_of(*operations, weights, size=(3, 32, 32), images=8):
    graph = Graph((True,), operations, (len(operations),))
    return planner.plan(graph, weights, [size], images, 8)


def layer_weights(*shapes):
    return {str(i): (np.ones(shape, np.float32), np.zeros(shape[0], np.float32)) for i, shape in enumerate(shapes)}


def test_the_stretch_ends_before_small_maps_with_many_weights():
    small = Convolution(1, "1", (8, 8), (1, 1))  # 4x4 maps of 8 images: 128 numbers
    weights = layer_weights((16, 3, 3, 3), (128, 16, 3, 3), (10, 128 * 16))
    plan = plan_of(Convolution(0, "0", padding=(1, 1)), small, Flatten(2), Linear(3, "2"), weights=weights)
    stop = schedule.stretch(plan)
    assert [work.operation for work in plan.work[:stop]] == [-1, -1, 1, 1], "images, then a layer, both in zeros"
    assert plan.work[stop].operation == 2


@pytest.mark.parametrize(("kept", "whole"), [(schedule.FEW_WEIGHTS, True), (schedule.FEW_WEIGHTS + 1, False)])
def test_few_weights_go_on_depth_first(kept, whole):
    weight = torch.zeros(256, 3 * 32).numpy()
    weight.reshape(-1)[:kept] = 1
    plan = plan_of(Flatten(0), Linear(1, "0"), weights={"0": (weight, weight[:, 0])}, size=(3, 8, 4))
    assert (schedule.stretch(plan) == len(plan.work)) == whole


@pytest.mark.parametrize(("side", "whole"), [(6, True), (5, False)])
def test_large_maps_go_on_depth_first(side, whole):
    """6 x 6 numbers of 8 images are 288, 5 x 5 are 200."""
    assert 8 * 25 < schedule.SMALL_MAP <= 8 * 36
    plan = plan_of(Convolution(0, "0"), weights=layer_weights((200, 100, 1, 1)), size=(100, side, side))
    assert (schedule.stretch(plan) == len(plan.work)) == whole


def test_images_that_share_no_vectors_go_through_all_layers_one_for_each_thread():
    plan = plan_of(Convolution(0, "0"), weights=layer_weights((4, 3, 1, 1)), images=1)
    for bundles, threads, alone in ((1, 2, 0), (3, 2, 2), (4, 2, 4), (5, 1, 5)):
        steps = schedule.schedule(plan, {1: 1}, bundles, threads).steps
        assert sum(step.bundles for step in steps if step.kind == STRETCH) == alone
        shared = {(step.bundle, step.bundles) for step in steps if step.kind != STRETCH}
        assert shared == ({(alone, bundles - alone)} if alone < bundles else set())
