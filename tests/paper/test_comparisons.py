"""Tables of readings and of lifts, from accuracies written by hand."""

import pandas as pd
import pytest

from reprolib.experiments import profiles
from reprolib.paper import comparisons


def rows_of(profile, accuracy):
    return pd.DataFrame(
        {
            "run_id": profile.pruned(method, "cifar10", seed)[0].run_id,
            "pattern": method,
            "seed": seed,
            "accuracy_pct": value,
        }
        for method, values in accuracy.items()
        for seed, value in enumerate(values)
    )


def test_changes_are_compared_with_rivals_of_their_own_else_with_the_usual_ones():
    profile = profiles.load("readings")
    accuracy = {
        "hybrid": [80.0, 81.0],
        "block": [78.0, 79.5],
        "balanced": [82.0, 82.0],
        "one-shot: hybrid": [79.0, 80.0],
        "one-shot: block": [79.0, 80.0],
        "bank of 4: hybrid": [83.0, 83.5],
        "fine-tuning: hybrid": [70.0],
    }
    table = comparisons.changes_table(profile, rows_of(profile, accuracy))
    assert list(table.columns) == ["balanced", "hybrid", "block", "hybrid − block", "hybrid − balanced"]
    assert table.loc["as usual"].to_list() == [
        "82.00 ± 0.00",
        "80.50 ± 0.71",
        "78.75 ± 1.06",
        "+1.75 [-1.43, +4.93] undecided",  # t(0.975, 1) = 12.71; SD of 2.0 and 1.5 is 0.354; over the root of 2
        "-1.50 [-7.85, +4.85] undecided",
    ]
    assert table.loc["one-shot", "hybrid − block"] == "+0.00 [+0.00, +0.00] undecided"
    assert table.loc["bank of 4", ["block", "hybrid − balanced"]].to_list() == ["", "+1.25 [-1.93, +4.43] undecided"]
    assert table.loc["fine-tuning", "hybrid − block"] == "", "its own block is not trained yet"
    assert list(table.index)[:2] == ["as usual", "vectors"] and len(table) == 13


def test_all_lifts_together_come_last_and_patterns_keep_their_order():
    profile = profiles.load("lifts")
    accuracy = {
        "block": [70.0],
        "block+": [75.0],
        "hybrid+": [84.0],
        "unstructured": [85.0],
        "distilled: hybrid": [82.0],
        "covered channels: block": [71.0],
    }
    table = comparisons.changes_table(profile, rows_of(profile, accuracy))
    assert list(table.columns)[:4] == ["unstructured", "balanced", "hybrid", "block"]
    assert table.index[0] == "as usual" and table.index[-1] == "all together"
    assert table["block"].to_dict() == {
        "as usual": "70.00",
        "distilled": "",
        "shorter pruning phase": "",
        "twice the learning rate": "",
        "permuted channels": "",
        "covered channels": "71.00",
        "all together": "75.00",
    }
    assert table.loc["all together", "hybrid − block"] == "+9.00 (one seed)"
    assert table.loc["permuted channels", "hybrid − block"] == ""


@pytest.mark.parametrize("name", ["laptop", "quick"])
def test_ablations_of_one_pattern_are_no_rows_of_that_table(name):
    assert {change for change, _ in comparisons.changes(profiles.load(name))} == {"as usual"}


def test_what_is_lifted_is_compared_seed_by_seed():
    means = {"hybrid": 80, "hybrid+": 84, "block+": 75}
    accuracy = pd.DataFrame(
        {"pattern": name, "seed": seed, "accuracy_pct": mean + (0.5 if name == "hybrid+" else 1.0) * seed}
        for name, mean in means.items()
        for seed in (0, 2)
    )
    table = comparisons.lifted_against(accuracy, ("hybrid", "block+", "balanced"))
    assert table["points"].to_dict() == {
        "hybrid+ − hybrid": "+3.50 [-2.85, +9.85] undecided",
        "hybrid+ − block+": "+8.50 [+2.15, +14.85] supported",
    }
