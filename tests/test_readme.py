"""What the README says is what the committed results say."""

import re

import pytest

from reprolib.bench import throughput
from reprolib.experiments import records
from reprolib.files import paths
from reprolib.paper import accuracy_figures, analysis, claims, speed_figures

README = (paths.ROOT / "README.md").read_text()


RESULTS = paths.ROOT / "results"
LAPTOP = RESULTS / "laptop"


@pytest.mark.parametrize(("profile", "without_data"), [("laptop", 0), ("laptop-cifar100", 5)])
def test_table_of_claims_holds_the_committed_verdicts(profile, without_data):
    accuracy, latency = (records.read_csv(RESULTS / profile / name) for name in ("accuracy.csv", "latency.csv"))
    table = accuracy_figures.claims_table(claims.decide(accuracy, latency), claims.CLAIMS)
    has_data = table["verdict"] != "no data"
    assert (~has_data).sum() == without_data  # the README tells of these in prose
    for claim, row in table[has_data].iterrows():
        numbers = row["difference, 95 % interval"].removesuffix(" points")
        line = f"| {claim} | {row['data']} | {row['comparison']} | {numbers} | **{row['verdict']}** | "
        assert line in README, line


def test_table_of_speeds_holds_the_committed_latencies():
    table = speed_figures.latency_table(analysis.networks(records.read_csv(LAPTOP / "latency.csv")))
    lines = [line for line in README.splitlines() if line.startswith("| batch ")]
    assert len(lines) >= 10
    for line in lines:
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        assert cells == table.loc[name].to_list(), name


def test_table_of_training_speeds_holds_the_committed_ones():
    for row in throughput.speed_table(records.read_csv(LAPTOP / "training.csv")).itertuples(index=False):
        assert f"| {' | '.join(row)} |" in README


def test_table_of_the_full_network_holds_the_committed_accuracies():
    accuracy = records.read_csv(RESULTS / "evening" / "accuracy.csv")
    for name, row in accuracy_figures.accuracy_table(accuracy).iterrows():
        assert f"| {name} | {' | '.join(row)} |" in README


def test_files_that_the_readme_names_exist():
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert len(targets) > 10
    assert [target for target in targets if not (paths.ROOT / target).exists()] == []
