"""Tables of readings and of lifts, from accuracies written by hand."""

import pandas as pd
import pytest

from reprolib.experiments import profiles
from reprolib.paper import comparisons


def test_readings_are_compared_with_rivals_of_their_own_else_with_ours():
    profile = profiles.load("readings")
    accuracy = {
        "ours: hybrid": [80.0, 81.0],
        "ours: block": [78.0, 79.5],
        "ours: balanced": [82.0, 82.0],
        "one-shot: hybrid": [79.0, 80.0],
        "one-shot: block": [79.0, 80.0],
        "bank of 4: hybrid": [83.0, 83.5],
        "fine-tuning: hybrid": [70.0],
    }
    rows = pd.DataFrame(
        {"run_id": profile.pruned(method, "cifar10", seed)[0].run_id, "seed": seed, "accuracy_pct": value}
        for method, values in accuracy.items()
        for seed, value in enumerate(values)
    )
    table = comparisons.readings(profile, rows)
    assert table.loc["ours"].to_list() == [
        "80.50 ± 0.71",
        "78.75 ± 1.06",
        "82.00 ± 0.00",
        "+1.75 [-1.43, +4.93] undecided",  # t(0.975, 1) = 12.71; SD of 2.0 and 1.5 is 0.354; over the root of 2
        "-1.50 [-7.85, +4.85] undecided",
    ]
    assert table.loc["one-shot", "hybrid − block"] == "+0.00 [+0.00, +0.00] undecided"
    assert table.loc["bank of 4", ["block", "hybrid − balanced"]].to_list() == [
        "78.75 ± 1.06",
        "+1.25 [-1.93, +4.43] undecided",
    ]
    assert table.loc["fine-tuning", "hybrid − block"] == "", "its block is not trained: ours was trained otherwise"
    assert table.loc["fine-tuning", "block"] == ""
    assert list(table.index)[:2] == ["ours", "vectors"] and len(table) == 13


@pytest.fixture
def accuracy():
    means = {
        "dense": 90,
        "hybrid": 80,
        "hybrid-distilled": 82,
        "hybrid+": 84,
        "block": 70,
        "block-short-phase": 71,
        "block+": 75,
    }
    return pd.DataFrame(
        {"pattern": name, "seed": seed, "accuracy_pct": mean + (0.5 if name == "hybrid+" else 1.0) * seed}
        for name, mean in means.items()
        for seed in (0, 2)
    )


def test_lifts_are_rows_and_patterns_are_columns(accuracy):
    table = comparisons.lifts(accuracy)
    assert list(table.columns) == ["hybrid", "block"]
    assert table.apply(list, axis=1).to_dict() == {
        "as the paper": ["81.00 ± 1.41", "71.00 ± 1.41"],
        "distilled": ["83.00 ± 1.41", ""],
        "short phase": ["", "72.00 ± 1.41"],
        "all together": ["84.50 ± 0.71", "76.00 ± 1.41"],
    }


def test_what_is_lifted_is_compared_seed_by_seed(accuracy):
    table = comparisons.lifted_against(accuracy, ("hybrid", "block+", "balanced"))
    assert table["points"].to_dict() == {
        "hybrid+ − hybrid": "+3.50 [-2.85, +9.85] undecided",
        "hybrid+ − block+": "+8.50 [+2.15, +14.85] supported",
    }
