"""From a number to its proof: the rows behind it, how it is computed, where, and the command that makes it again.

python -m reprolib.paper.trace --profile laptop --claim 1
python -m reprolib.paper.trace --profile laptop --cell hybrid@95
"""

from __future__ import annotations

import argparse
import sys

import pandas as pd

from reprolib.experiments import profiles, records
from reprolib.files import paths
from reprolib.paper import claims, drawing

INTERVAL = "mean over the n seeds ± t(0.975, n − 1) · SD / √n"
AT_EQUAL = "of each seed: accuracy of hybrid − that of the rival, mean over the sparsities of 90 % and more"
FORMULAS = {
    1: AT_EQUAL,
    2: AT_EQUAL,
    3: "of each network: the highest sparsity at which accuracy stays within the drop of its dense network, linear in "
    "log(density) between tested ones; of each seed: hybrid − rival",
    4: "of each seed: log(latency) of hybrid − that of block and of balanced, means over sparsities of 90 % and more "
    "and batches; distance of hybrid to the nearer of the two, negative outside",
    5: AT_EQUAL,
    6: "of each seed: accuracy of hybrid − that of the rival at hybrid's latency, which is linear in log(latency) "
    "between tested sparsities; mean over hybrids of 90 % and more within its latencies (medians over networks)",
}
SHOWN = {
    "accuracy.csv": ["run_id", "spec", "sparsity", "seed", "accuracy_dense_pct", "accuracy_pct", "commit"],
    "latency.csv": ["name", "pattern", "spec", "target_sparsity", "batch", "seed", "latency_us", "commit"],
}


def claim(profile_name: str, number: int) -> str:
    """All that a claim's verdicts in a profile rest on. Raises ValueError for an unknown claim or one without data."""
    if number not in claims.CLAIMS:
        raise ValueError(f"there is no claim {number}: there are {', '.join(map(str, claims.CLAIMS))}")
    accuracy = records.read_csv(paths.accuracy_csv(profile_name))
    table = paths.latency_csv(profile_name)
    found = claims.decisions(accuracy, records.read_csv(table) if table.exists() else None)
    found = [decision for decision in found if decision.claim == number and decision.decides]
    if all(decision.differences.empty for decision in found):
        why = "; ".join(dict.fromkeys(decision.remark for decision in found))
        raise ValueError(f"claim {number} has no data in {profile_name}: {why}")
    parts = [f"Claim {number}. {claims.CLAIMS[number]}"]
    return "\n\n".join([*parts, *(_decision(profile_name, decision) for decision in found)])


def cell(profile_name: str, name: str) -> str:
    """All that a cell of the accuracy table rests on: ``hybrid@95``, or ``dense``. Raises ValueError for others."""
    accuracy = records.read_csv(paths.accuracy_csv(profile_name))
    at = ("@" + (100 * accuracy["target_sparsity"]).map("{:g}".format)).where(accuracy["target_sparsity"].notna(), "")
    cells = accuracy["pattern"] + at
    rows = accuracy[cells == name]
    if rows.empty:
        raise ValueError(f"there is no cell {name!r} in {profile_name}: there are {', '.join(sorted(cells.unique()))}")
    numbers = [
        f"{drawing.data_title(dataset)}: {drawing.mean_sd(group['accuracy_pct'])} % of the test images"
        for dataset, group in rows.groupby("dataset", sort=False)
    ]
    formula = "  formula   mean ± SD of accuracy_pct over seeds"
    return "\n".join([name, *numbers, formula, _evidence(profile_name, rows, "accuracy.csv")])


def _decision(profile_name: str, decision: claims.Decision) -> str:
    row = decision.as_row()
    lines = [f"{drawing.data_title(decision.dataset)}: {decision.comparison}"]
    if decision.differences.empty:
        return f"{lines[0]}\n  no data   {row['remark']}"
    bounds = "" if pd.isna(row["low"]) else f" [{row['low']:+.2f}, {row['high']:+.2f}]"
    per_seed = ", ".join(f"{seed}: {value:+.2f}" for seed, value in decision.differences.items())
    lines += [
        f"  result    {row['difference']:+.2f}{bounds} {decision.unit}: {decision.verdict}",
        f"  remark    {row['remark']}",
        f"  formula   {FORMULAS[decision.claim]}; then {INTERVAL}",
        f"  by seed   {per_seed}",
    ]
    tables = {"accuracy.csv": decision.accuracies, "latency.csv": decision.latencies}
    return "\n".join([*lines, *(_evidence(profile_name, rows, table) for table, rows in tables.items() if len(rows))])


def _evidence(profile_name: str, rows: pd.DataFrame, table: str) -> str:
    """Rows of a table, where and by which code they were computed, and how to compute them again."""
    if table == "latency.csv":
        again = f"make bench PROFILE={profile_name}" + " DEVICE=cuda" * (set(rows["device"]) == {"cuda"})
    else:
        again = f"make reproduce PROFILE={profile_name}"
    text = rows[SHOWN[table]].to_string(index=False, na_rep="", float_format="{:.10g}".format)
    return "\n".join(
        [
            f"  commits   {', '.join(sorted(rows['commit'].unique()))}",
            f"  hardware  {'; '.join(sorted(rows['hardware'].unique()))}",
            f"  again     {again}; for exactly the code of a row, git checkout its commit first",
            f"  rows      {len(rows)} of {paths.results(profile_name) / table}:",
            *(f"    {line}" for line in text.splitlines()),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="What a number of the paper rests on.")
    parser.add_argument("--profile", default="laptop")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--claim", help=f"1 to {max(claims.CLAIMS)}")
    what.add_argument("--cell", help="of the accuracy table: a method, @ and a sparsity in percent, such as hybrid@95")
    arguments = parser.parse_args()
    try:
        name = profiles.load(arguments.profile).name
        if arguments.cell:
            print(cell(name, arguments.cell))
        elif arguments.claim.isdecimal():
            print(claim(name, int(arguments.claim)))
        else:
            raise ValueError(f"there is no claim {arguments.claim!r}: there are {', '.join(map(str, claims.CLAIMS))}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
