import math

import pandas as pd
import pytest

from reprolib.bench.rivals import SPARSE
from reprolib.paper import claims


def accuracy_frame(values: dict, dataset="cifar10", dense=90.0) -> pd.DataFrame:
    """{(pattern, target): [accuracy per seed]} as a table of results whose achieved sparsity is the target."""
    rows = [
        {
            "dataset": dataset,
            "model": "vgg16",
            "width": 0.25,
            "pattern": pattern,
            "target_sparsity": target,
            "sparsity": target,
            "seed": seed,
            "accuracy_dense_pct": dense,
            "accuracy_pct": accuracy,
            "commit": f"of {pattern}",
        }
        for (pattern, target), accuracies in values.items()
        for seed, accuracy in enumerate(accuracies)
    ]
    return pd.DataFrame(rows)


def deciding(frame: pd.DataFrame, claim: int, comparison: str = "", latency: pd.DataFrame | None = None) -> pd.Series:
    decided = claims.decide(frame, latency)
    rows = decided[(decided["claim"] == claim) & (decided["verdict"] != claims.ORIENTATION)]
    rows = rows[rows["comparison"].str.contains(comparison, regex=False)]
    assert len(rows) == 1
    return rows.iloc[0]


def test_interval_of_one_two_three():
    # SD 1, t(0.975, 2) = 4.302653, half-width 4.302653 / sqrt(3)
    mean, low, high = claims.interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert (low, high) == pytest.approx((2 - 2.4841377, 2 + 2.4841377), abs=1e-6)


@pytest.mark.parametrize("values", [[], [1.5]])
def test_fewer_than_two_differences_have_no_interval(values):
    _, low, high = claims.interval(values)
    assert math.isnan(low) and math.isnan(high)


@pytest.mark.parametrize(
    ("hybrid", "expected"),
    [([85.0, 85.1, 85.2], "supported"), ([79.0, 79.1, 79.2], "contradicted"), ([79.0, 82.1, 82.0], "undecided")],
)
def test_verdict_follows_the_interval(hybrid, expected):
    frame = accuracy_frame({("hybrid", 0.9): hybrid, ("block", 0.9): [82.0, 82.2, 82.1]})
    assert deciding(frame, 1)["verdict"] == expected


def test_two_networks_of_one_method_sparsity_and_seed_decide_nothing():
    """Their mean would be compared, which no network has."""
    frame = accuracy_frame({("hybrid", 0.9): [85.0, 86.0], ("block", 0.9): [82.0, 82.2]})
    specs = frame.assign(spec=["Balanced(4) & Block(4, 4)"] * 2 + ["Block(4, 4)"] * 2)
    other = specs[specs["pattern"] == "hybrid"].assign(spec="Balanced(8) & Block(8, 8)", accuracy_pct=10.0)
    with pytest.raises(ValueError, match=r"one network of hybrid for each .*several \(Balanced\(4\).*, Balanced\(8\)"):
        claims.decide(pd.concat([specs, other]))


def test_networks_that_start_from_different_dense_ones_are_no_pair():
    """As where some rows of a table were trained on another machine."""
    both = {("hybrid", 0.9): [89.5, 89.6], ("block", 0.9): [88.0, 88.2]}
    frame = accuracy_frame(both)
    elsewhere = (frame["pattern"] == "block") & (frame["seed"] == 1)
    frame.loc[elsewhere, "accuracy_dense_pct"] += 0.01
    row = deciding(frame, 1)
    assert (row["seeds"], row["difference"]) == (1, pytest.approx(1.5))
    assert deciding(frame, 3, "block, drop of 1")["seeds"] == 1


def test_differences_are_paired_by_seed():
    # Seeds differ by whole points, the difference of each pair is exactly 0.1 or 0.2.
    frame = accuracy_frame({("hybrid", 0.95): [80.2, 85.2, 90.1], ("block", 0.95): [80.0, 85.0, 90.0]})
    row = deciding(frame, 1)
    assert row["verdict"] == "supported"
    assert row["difference"] == pytest.approx(0.5 / 3)
    shuffled = frame.sample(frac=1, random_state=1)
    assert deciding(shuffled, 1)["low"] == pytest.approx(row["low"])


def test_sparsities_below_ninety_decide_nothing():
    frame = accuracy_frame(
        {
            ("hybrid", 0.8): [99.0, 99.1],
            ("block", 0.8): [50.0, 50.0],
            ("hybrid", 0.9): [70.0, 70.1],
            ("block", 0.9): [80.0, 80.0],
        }
    )
    assert deciding(frame, 1)["verdict"] == "contradicted"
    at_80 = claims.decide(frame).query("comparison == 'hybrid − block at 80 %'").iloc[0]
    assert at_80["verdict"] == claims.ORIENTATION and at_80["difference"] == pytest.approx(49.05)


def test_one_seed_is_undecided_and_says_so():
    row = deciding(accuracy_frame({("hybrid", 0.9): [85.0], ("block", 0.9): [80.0]}), 1)
    assert row["verdict"] == "undecided" and "one seed" in row["remark"]


def test_a_single_sparsity_has_one_row_that_names_it():
    one = claims.decide(accuracy_frame({("hybrid", 0.95): [85.0, 85.1], ("block", 0.95): [80.0, 80.0]}))
    assert one.loc[one["claim"] == 1, ["comparison", "remark"]].to_numpy().tolist() == [
        ["hybrid − block", "at 95 % sparsity"]
    ]


def test_missing_rival_is_no_data():
    row = deciding(accuracy_frame({("hybrid", 0.9): [85.0, 85.1]}), 2)
    assert row["verdict"] == "no data" and "balanced" in row["remark"]


def test_a_seed_without_its_partner_does_not_count():
    frame = accuracy_frame({("hybrid", 0.9): [85.0, 85.1, 10.0], ("block", 0.9): [80.0, 80.0]})
    row = deciding(frame, 1)
    assert row["seeds"] == 2 and row["verdict"] == "supported"


def test_reached_sparsity_interpolates_in_log_density():
    # Drop 1: spare +0.5 at 75 %, -0.5 at 93.75 %: half way in log density, from 1/4 to 1/16, is 1/8.
    rows = accuracy_frame({("hybrid", 0.75): [89.5], ("hybrid", 0.9375): [88.5]})
    assert claims.reached_sparsity(rows, 1.0) == pytest.approx(0.875)


def test_reached_sparsity_at_the_ends():
    rows = accuracy_frame({("hybrid", 0.8): [89.9], ("hybrid", 0.9): [89.8]})
    assert claims.reached_sparsity(rows, 0.5) == 0.9
    assert math.isnan(claims.reached_sparsity(rows, 0.05))


def test_claim_3_compares_what_is_reached():
    frame = accuracy_frame(
        {
            ("hybrid", 0.75): [89.5, 89.6],
            ("hybrid", 0.9375): [88.5, 88.4],
            ("block", 0.75): [89.1, 89.1],
            ("block", 0.9375): [80.0, 80.0],
        }
    )
    row = deciding(frame, 3, "block, drop of 1")
    assert row["unit"] == "points of sparsity" and row["difference"] > 10 and row["seeds"] == 2


def test_claim_3_where_both_fall_short_is_no_data():
    frame = accuracy_frame({("hybrid", 0.9): [70.0, 71.0], ("block", 0.9): [60.0, 61.0]})
    row = deciding(frame, 3, "block, drop of 0.5")
    assert row["verdict"] == "no data" and "already at 90 %, the lowest tested" in row["remark"]


def test_claim_3_where_neither_falls_short_is_no_data():
    # What the masks reach of the target differs a little from pattern to pattern, and says nothing about accuracy.
    frame = accuracy_frame({("hybrid", 0.9): [89.9, 89.9], ("block", 0.9): [89.9, 89.9]})
    frame.loc[frame["pattern"] == "block", "sparsity"] = 0.899
    row = deciding(frame, 3, "block, drop of 0.5")
    assert row["verdict"] == "no data" and row["remark"].endswith("drop by less even at 90 %, the highest tested")


def test_claim_3_compares_sparsities_that_both_have_and_seeds_that_have_all_of_them():
    frame = accuracy_frame(
        {
            ("hybrid", 0.75): [89.5, 89.5, 89.5],
            ("hybrid", 0.9375): [88.5, 88.5, 88.5],
            ("hybrid", 0.98): [88.0, 88.0, 88.0],  # block has not come so far yet
            ("block", 0.75): [89.1, 89.1, 89.1],
            ("block", 0.9375): [80.0, 80.0, 80.0],
        }
    )
    partial = frame[~((frame["pattern"] == "block") & (frame["seed"] == 2) & (frame["target_sparsity"] == 0.9375))]
    row, whole = deciding(partial, 3, "block, drop of 1"), deciding(frame, 3, "block, drop of 1")
    assert row["seeds"] == 2 and row["difference"] == pytest.approx(whole["difference"])
    assert row["remark"] == "points of sparsity, not of accuracy"


def test_claim_3_without_a_pair_says_so():
    row = deciding(accuracy_frame({("hybrid", 0.9): [89.9, 89.9]}), 3, "block, drop of 1")
    assert row["verdict"] == "no data" and row["remark"] == "no pair of hybrid and block"


def test_claim_3_takes_achieved_sparsities_at_both_ends():
    """Hybrid does not end, block falls short: each counts with what it achieved, not with what was asked for."""
    accuracy = accuracy_frame({("hybrid", 0.9): [89.9], ("block", 0.9): [80.0]})
    accuracy["sparsity"] = accuracy["pattern"].map({"hybrid": 0.91, "block": 0.88})
    decided = claims.decide(accuracy)
    row = decided[(decided["claim"] == 3) & decided["comparison"].str.contains("block, drop of 1")].iloc[0]
    assert row["difference"] == pytest.approx(3.0)


def test_claim_3_counts_who_falls_short_with_the_lowest_tested_sparsity():
    # Block is below 75 % in both seeds; hybrid reaches 87.5 % (half way in log density) and 93.75 %.
    frame = accuracy_frame(
        {
            ("hybrid", 0.75): [89.5, 89.5],
            ("hybrid", 0.9375): [88.5, 89.5],
            ("block", 0.75): [80.0, 80.0],
            ("block", 0.9375): [70.0, 70.0],
        }
    )
    row = deciding(frame, 3, "block, drop of 1")
    assert row["difference"] == pytest.approx((12.5 + 18.75) / 2)
    assert row["remark"].split("; ") == [
        "points of sparsity, not of accuracy",
        "block with seeds 0, 1 drops by more already at 75 %, the lowest tested: counted with 75 %",
        "hybrid with seed 1 drops by less even at 93.75 %, the highest tested: counted with 93.75 %",
    ]


def test_each_data_set_gets_its_own_verdict():
    one = accuracy_frame({("hybrid", 0.9): [85.0, 85.1], ("block", 0.9): [80.0, 80.0]})
    two = accuracy_frame({("hybrid", 0.9): [60.0, 60.1], ("block", 0.9): [70.0, 70.0]}, dataset="cifar100")
    decided = claims.decide(pd.concat([one, two]))
    verdicts = decided[(decided["claim"] == 1) & (decided["verdict"] != claims.ORIENTATION)]
    assert dict(zip(verdicts["dataset"], verdicts["verdict"], strict=True)) == {
        "cifar10": "supported",
        "cifar100": "contradicted",
    }


def test_seeds_needed_shrinks_the_interval_past_zero():
    frame = accuracy_frame({("hybrid", 0.9): [81.0, 82.0, 83.0], ("block", 0.9): [81.0, 81.0, 81.0]})
    # mean 1, SD 1: t(n - 1) / sqrt(n) < 1 first holds for n = 7 (2.447 / 2.646)
    assert claims.seeds_needed(frame)["seeds_needed"].to_list() == ["7"]


def test_seeds_needed_covers_the_claim_on_speed():
    needed = claims.seeds_needed(ACCURACY, speeds([100, 100], [99, 110], [150, 152]))
    assert (needed["claim"] == 4).any()


# --- Claim 4: speed -------------------------------------------------------------------------------------------------

ACCURACY = accuracy_frame({("hybrid", 0.9): [80.0, 80.0], ("block", 0.9): [79.0, 79.0]})


def latency_frame(latencies, width=0.25, device="cpu", scope="network", implementation=SPARSE) -> pd.DataFrame:
    """{(pattern, batch, target): [latency_us per seed]} as a table of latencies."""
    rows = [
        {
            "scope": scope,
            "name": f"VGG-16 ×{width:g}",
            "width": width,
            "device": device,
            "pattern": pattern,
            "batch": batch,
            "target_sparsity": target,
            "seed": seed,
            "latency_us": latency,
            "implementation": implementation,
            "commit": f"of {pattern}",
        }
        for (pattern, batch, target), values in latencies.items()
        for seed, latency in enumerate(values)
    ]
    return pd.DataFrame(rows)


def speeds(block: list, hybrid: list, balanced: list, **where) -> pd.DataFrame:
    triple = {"block": block, "hybrid": hybrid, "balanced": balanced}
    return latency_frame({(pattern, 16, 0.9): values for pattern, values in triple.items()}, **where)


@pytest.mark.parametrize(
    ("block", "hybrid", "balanced", "verdict"),
    [
        ([100, 102], [150, 152], [200, 203], "supported"),
        ([200, 203], [150, 152], [100, 102], "supported"),  # between, whichever end is the faster one
        ([100, 102], [200, 203], [150, 152], "contradicted"),
        ([100, 102], [50, 51], [150, 152], "contradicted"),
        ([100, 100], [90, 110], [150, 152], "undecided"),
    ],
)
def test_hybrid_is_between_or_not(block, hybrid, balanced, verdict):
    assert deciding(ACCURACY, 4, latency=speeds(block, hybrid, balanced))["verdict"] == verdict


def test_distance_to_the_nearer_end_in_percent_of_latency():
    row = deciding(ACCURACY, 4, latency=speeds([100, 100], [100 * math.e**0.1] * 2, [100 * math.e**0.5] * 2))
    assert (row["dataset"], row["unit"], row["seeds"]) == ("cpu", "% of latency", 2)
    assert row["difference"] == pytest.approx(10.0)


def test_speed_is_the_mean_over_batches_and_high_sparsities():
    table = latency_frame(
        {
            ("block", 1, 0.9): [100, 100],
            ("hybrid", 1, 0.9): [110, 110],
            ("balanced", 1, 0.9): [200, 200],
            ("block", 64, 0.9): [100, 100],
            ("hybrid", 64, 0.9): [130, 130],
            ("balanced", 64, 0.9): [200, 200],
            ("block", 64, 0.5): [900, 900],  # below 90 %: decides nothing
            ("hybrid", 64, 0.5): [100, 100],
            ("balanced", 64, 0.5): [800, 800],
        }
    )
    row = deciding(ACCURACY, 4, latency=table)
    assert row["difference"] == pytest.approx(100 * (math.log(1.1) + math.log(1.3)) / 2)
    assert "batches of 1, 64" in row["remark"]
    shown = claims.decide(ACCURACY, table).set_index("comparison")
    assert shown.loc["hybrid − block at batch 64", "difference"] == pytest.approx(100 * math.log(1.3))
    assert shown.loc["hybrid − block at batch 64", "verdict"] == claims.ORIENTATION


@pytest.mark.parametrize(
    "latency",
    [
        None,
        speeds([100, 100], [150, 150], [200, 200], width=1.0),  # another network
        speeds([100, 100], [150, 150], [200, 200], scope="layer"),
        speeds([100, 100], [150, 150], [200, 200], implementation="another engine"),
        latency_frame({("hybrid", 16, 0.9): [1, 2], ("block", 16, 0.9): [1, 2]}),
    ],
)
def test_no_verdict_on_speed_without_latencies_of_all_three(latency):
    row = deciding(ACCURACY, 4, latency=latency)
    assert row["verdict"] == "no data" and "make bench" in row["remark"]


def test_the_row_on_speed_names_its_network():
    assert deciding(ACCURACY, 4, latency=speeds([100, 101], [150, 151], [200, 202]))["comparison"] == (
        "hybrid between block and balanced, VGG-16 ×0.25"
    )
    assert deciding(ACCURACY, 4)["comparison"].endswith("VGG-16 ×0.25")


@pytest.mark.parametrize(
    ("hybrid", "told"),
    [([150, 151], "hybrid is slower"), ([50, 51], "hybrid is faster"), ([90, 110], "not decided")],
)
def test_remarks_on_speed_have_the_sign_of_their_interval(hybrid, told):
    decided = claims.decide(ACCURACY, speeds([100, 100], hybrid, [200, 203])).set_index("comparison")
    row = decided[decided["claim"] == 4].loc["hybrid − block"]
    by_sign = "hybrid is slower" if row["low"] > 0 else "hybrid is faster" if row["high"] < 0 else "not decided"
    assert row["remark"] == told == by_sign


def test_a_row_names_the_commits_that_it_rests_on():
    frame = accuracy_frame({("hybrid", 0.9): [85.0, 85.1], ("block", 0.9): [80.0, 80.0], ("vector", 0.9): [1.0, 1.0]})
    assert deciding(frame, 1)["commits"] == "of block, of hybrid"
    assert deciding(frame, 2)["commits"] == ""


def test_every_device_gets_its_verdict():
    both = pd.concat(
        [speeds([100, 101], [150, 151], [200, 202]), speeds([100, 101], [250, 251], [200, 202], device="cuda")]
    )
    decided = claims.decide(ACCURACY, both)
    rows = decided[(decided["claim"] == 4) & (decided["verdict"] != claims.ORIENTATION)].set_index("dataset")
    assert rows["verdict"].to_dict() == {"cpu": "supported", "cuda": "contradicted"}


# --- Claim 6: accuracy at equal latency -------------------------------------------------------------------------------

TWO_SPARSITIES = {
    ("hybrid", 0.9): [80.0, 81.0],
    ("hybrid", 0.95): [76.0, 76.0],
    ("block", 0.9): [78.0, 80.0],
    ("block", 0.95): [70.0, 72.0],
}


def at_latencies(hybrid: list[float], block: list[float]) -> pd.DataFrame:
    """Latencies at 90 and at 95 %, of three timed networks each: their median counts."""
    times = {"hybrid": hybrid, "block": block}
    return latency_frame(
        {
            (name, 1, s): [us, us / 2, us * 3]
            for name, two in times.items()
            for s, us in zip((0.9, 0.95), two, strict=True)
        }
    )


def test_accuracy_at_the_latency_of_the_rival_is_linear_in_its_logarithm():
    # Block takes 400 us at 90 % and 100 us at 95 %; hybrid takes 200 us, half way, and 100 us.
    latency = at_latencies([200, 100], [400, 100])
    row = deciding(accuracy_frame(TWO_SPARSITIES), 6, "block", latency)
    assert (
        row["comparison"] == "hybrid − block at batch 1, CPU"
        and row["remark"] == "mean over hybrids of 90, 95 % sparsity"
    )
    # Block's accuracy half way is 74 and 76: hybrid is better by 6 and 5 there, by 6 and 4 at 100 us.
    assert (row["seeds"], row["difference"]) == (2, pytest.approx((6 + 4.5) / 2))
    assert row["commits"] == "of block, of hybrid"


def test_hybrids_beyond_the_latencies_of_the_rival_are_left_out_and_named():
    frame = accuracy_frame(TWO_SPARSITIES)
    row = deciding(frame, 6, "block", at_latencies([200, 90], [400, 100]))
    assert row["difference"] == pytest.approx(5.5)
    assert row["remark"] == "mean over hybrids of 90 % sparsity; hybrid of 95 % is faster than any block"
    row = deciding(frame, 6, "block", at_latencies([500, 90], [400, 100]))
    assert row["verdict"] == "no data"
    assert row["remark"] == "hybrid of 95 % is faster than any block; hybrid of 90 % is slower than any block"


@pytest.mark.parametrize(
    ("latency", "remark"),
    [
        (None, "no latency.csv: make bench measures it"),
        (
            latency_frame({("block", 1, 0.9): [100], ("hybrid", 1, 0.9): [100]}),
            "block at two sparsities or more, trained",
        ),
        (latency_frame({("block", 1, 0.9): [100], ("block", 1, 0.95): [80]}), "hybrid was not timed"),
        (at_latencies([200, 100], [400, 100]).assign(name="VGG-16 ×1"), "block at two sparsities or more, trained"),
    ],
)
def test_equal_latency_needs_a_curve_of_the_rival_and_hybrids(latency, remark):
    row = deciding(accuracy_frame(TWO_SPARSITIES), 6, "block", latency)
    assert row["verdict"] == "no data" and row["remark"].startswith(remark)


def test_equal_latency_is_decided_for_each_batch_and_device():
    one = at_latencies([200, 100], [400, 100])
    latency = pd.concat([one, one.assign(batch=64), one.assign(device="cuda")])
    decided = claims.decide(accuracy_frame(TWO_SPARSITIES), latency)
    rows = decided[(decided["claim"] == 6) & decided["comparison"].str.contains("block")]
    assert rows["comparison"].tolist() == [
        f"hybrid − block at batch {where}" for where in ("1, CPU", "64, CPU", "1, CUDA")
    ]
