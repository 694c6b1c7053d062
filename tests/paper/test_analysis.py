import numpy as np
import pandas as pd
import pytest

from reprolib.paper import analysis, speed_figures


def measured(implementation="sparse kernels", latency_us=100.0, **other) -> dict:
    """A row of latency.csv."""
    row = {"scope": "network", "name": "VGG-16 ×1", "width": 1.0, "batch": 16, "seed": 0, "device": "cpu"}
    row |= {"dtype": "fp32", "pattern": "dense", "spec": np.nan, "target_sparsity": 0.0, "sparsity": 0.0}
    row |= {"implementation": implementation, "latency_us": latency_us, "latency_q1_us": 0.8 * latency_us}
    row |= {"latency_q3_us": 1.6 * latency_us, "hardware": "a CPU", "threads": 2} | other
    return row | {"speedup": 200 / row["latency_us"]}


HYBRID = {"pattern": "hybrid", "spec": "Balanced(16) & Block(32, 32)", "target_sparsity": 0.9, "sparsity": 0.9}


def test_networks_are_medians_over_seeds_of_the_survey():
    rows = [measured(latency_us=1.0, name="ResNet-18 ×1, 64×64", **HYBRID)]
    rows += [measured(latency_us=us, seed=seed, **HYBRID) for seed, us in enumerate((40.0, 50.0, 1000.0))]
    rows += [measured(latency_us=1.0, scope="layer", **HYBRID)]
    (row,) = analysis.networks(pd.DataFrame(rows)).to_dict("records")
    assert (row["latency_us"], row["latency_q1_us"], row["latency_q3_us"]) == (50, 40, 80)
    assert (row["speedup"], row["speedup_q1"], row["speedup_q3"]) == pytest.approx((4, 2.5, 5))
    assert analysis.networks(pd.DataFrame(rows), "ResNet-18 ×1")["latency_us"].to_list() == [1]
    assert analysis.networks(pd.DataFrame(rows[:1]))["latency_us"].to_list() == [1], "the only one"


def test_of_the_dense_rivals_the_fastest_of_each_type_stays():
    rows = [
        measured("oneDNN, channels first", 300.0),
        measured("oneDNN, channels last", 200.0),
        measured("oneDNN, channels last", 150.0, dtype="bf16"),
        measured("sparse kernels", 250.0),
        measured("OpenVINO 2026.4.1", 180.0),
        measured("OpenVINO 2026.4.1", 90.0, dtype="bf16"),
        measured("torch BSR, with unfold", 10.0, **HYBRID),
        measured("DeepSparse 1.8.0", 20.0, **HYBRID),
    ]
    found = analysis.networks(pd.DataFrame(rows)).set_index(["ours", "dtype"])["latency_us"]
    assert found.to_dict() == {(False, "fp32"): 180, (False, "bf16"): 90, (True, "fp32"): 250}


def test_work_of_a_layer_by_hand():
    layer = {"scope": "layer", "name": "64→128, 16×16", "batch": 2}
    rows = [measured("oneDNN, channels last", 1000.0, **layer), measured(**(HYBRID | layer))]
    dense, pruned = analysis.layers(pd.DataFrame(rows)).to_dict("records")
    assert dense["gflop"] == pytest.approx(2 * 64 * 128 * 9 * 256 * 2 / 1e9)
    assert dense["megabytes"] == pytest.approx(4 * (2 * 256 * (64 + 128) + 64 * 128 * 9) / 1e6)
    assert dense["intensity"] == pytest.approx(dense["gflop"] * 1e9 / (dense["megabytes"] * 1e6))
    assert dense["gflop_per_s"] == pytest.approx(dense["gflop"] / 1e-3)
    assert pruned["gflop"] == pytest.approx(dense["gflop"] / 10)


def test_a_table_without_layers_has_no_work():
    assert analysis.layers(pd.DataFrame([measured()])).empty


def test_accuracies_meet_latencies_of_their_width_and_pattern():
    flops = {"dense": 100.0, "hybrid": 20.0, "random-hybrid": 20.0}
    accuracy = pd.DataFrame(
        {
            "dataset": "cifar10",
            "pattern": pattern,
            "spec": np.nan if pattern == "dense" else HYBRID["spec"],
            "target_sparsity": np.nan if pattern == "dense" else 0.9,
            "accuracy_pct": 90.0 + seed,
            "flops": flops[pattern],
            "model": "vgg16",
            "width": 0.25,
        }
        for pattern in flops
        for seed in (0, 2)
    )
    narrow = {"width": 0.25, "name": "VGG-16 ×0.25"}
    rows = [measured(**HYBRID), measured("oneDNN", 200.0, **narrow), measured(latency_us=50.0, **(HYBRID | narrow))]
    joined = analysis.accuracy_and_latency(accuracy, pd.DataFrame(rows)).set_index("pattern")
    assert set(joined.index) == {"dense", "hybrid"}, "the random control was not timed"
    assert joined.loc["hybrid", ["latency_us", "accuracy_pct", "theoretical_speedup"]].to_list() == [50, 91, 5]
    assert joined.loc["dense", "theoretical_speedup"] == 1
    assert joined["accuracy_sd"].to_list() == pytest.approx([np.sqrt(2)] * 2)


@pytest.fixture
def tables():
    """Dense in fp32 and bf16, and two pruned networks: 90, 88 and 80 % right in 200 (bf16: 120), 100 and 50 µs."""
    specs = {"hybrid": HYBRID, "block": HYBRID | {"pattern": "block", "spec": "Block(32, 32)"}}
    right = {"dense": 90.0, "hybrid": 88.0, "block": 80.0}
    accuracy = pd.DataFrame(
        {
            "dataset": "cifar10",
            "model": "vgg16",
            "width": 1.0,
            "pattern": pattern,
            "spec": specs.get(pattern, {}).get("spec"),
            "target_sparsity": 0.9 if pattern in specs else np.nan,
            "accuracy_pct": value,
            "flops": 1.0,
        }
        for pattern, value in right.items()
    )
    rows = [measured("oneDNN", 200.0), measured("oneDNN", 120.0, dtype="bf16")]
    rows += [measured(latency_us=100.0, **specs["hybrid"]), measured(latency_us=50.0, **specs["block"])]
    return pd.DataFrame(rows), accuracy


@pytest.mark.parametrize(
    ("budget_us", "pattern", "latency_us"),
    [(60, "block", 50), (100, "hybrid", 100), (119, "hybrid", 100), (150, "dense", 120), (1e6, "dense", 120)],
)
def test_recommended_is_the_most_accurate_within_the_budget(tables, budget_us, pattern, latency_us):
    found = analysis.recommend(*tables, 16, budget_us)
    assert (found["pattern"], found["latency_us"]) == (pattern, latency_us), "of equally accurate ones the faster"


def test_nothing_is_recommended_where_nothing_fits(tables):
    latency, accuracy = tables
    with pytest.raises(ValueError, match="nothing keeps to 40 µs: the fastest takes 50 µs"):
        analysis.recommend(latency, accuracy, 16, 40)
    with pytest.raises(ValueError, match="no batch of 8 was timed: there are 16"):
        analysis.recommend(latency, accuracy, 8, 40)
    two = pd.concat([accuracy, accuracy.assign(dataset="cifar100")])
    with pytest.raises(ValueError, match=r"accuracies of 2 data sets \(cifar10, cifar100\): choose one"):
        analysis.recommend(latency, two, 16, 40)


def front(*points):
    found = analysis.pareto_front(pd.DataFrame(points, columns=["latency_us", "accuracy_pct"], dtype=float))
    return [tuple(point) for point in found.to_numpy()]


def test_front_leaves_out_what_is_beaten():
    assert front((4, 92), (1, 80), (2, 90), (3, 85), (5, 92)) == [(1, 80), (2, 90), (4, 92)]


def test_front_of_one_point_is_the_point():
    assert front((3, 70)) == [(3, 70)]


def test_ties_on_the_front():
    assert front((1, 80), (1, 85)) == [(1, 85)], "equally fast: the more accurate"
    assert front((1, 80), (2, 80)) == [(1, 80)], "equally accurate: the faster"
    assert front((1, 80), (1, 80), (2, 70)) == [(1, 80), (1, 80)], "equal in both: both"


def test_ceilings_from_their_times():
    rows = [measured("matrix product", 2 * 2048**3 / 1e5, scope="ceiling")]  # at 100 GFLOP/s
    rows += [measured("copy", 2 * 4 * 2**25 / 2e4, scope="ceiling"), measured()]  # 268 MB at 20 GB/s
    assert analysis.ceilings(pd.DataFrame(rows)) == pytest.approx((100, 20))
    assert analysis.ceilings(pd.DataFrame([measured()])) is None


def test_networks_for_budgets_stand_in_one_table(tables):
    table = speed_figures.budget_table(*tables, {16: [60, 150, 1000]})
    assert table.T.to_dict("list") == {
        "16 images, 60.0 µs": ["block, 90 %", "fp32", "50.0 µs", "80.00"],
        "16 images, 150 µs": ["dense", "bf16", "120 µs", "90.00"],
        "16 images, 1.00 ms": ["dense", "bf16", "120 µs", "90.00"],
    }
