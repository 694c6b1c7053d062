"""What the README and the pages of docs/ say is what the committed results say."""

import re

import pandas as pd
import pytest

from reprolib.bench import throughput
from reprolib.experiments import profiles, records
from reprolib.files import paths
from reprolib.paper import accuracy_figures, analysis, claims, comparisons, peer_figures, speed_figures

PAGES = [paths.ROOT / "README.md", *sorted((paths.ROOT / "docs").glob("*.md"))]
TEXTS = {path.name: path.read_text() for path in PAGES}
RESULTS = paths.ROOT / "results"
LAPTOP = RESULTS / "laptop"
VERDICT = re.compile(r"([-+]\d+\.\d+ \[[-+]\d+\.\d+, [-+]\d+\.\d+\]) \*\*(\w+)\*\*")


def committed_claims(profile):
    accuracy, latency = (records.read_csv(RESULTS / profile / name) for name in ("accuracy.csv", "latency.csv"))
    return accuracy_figures.claims_table(claims.decide(accuracy, latency), claims.CLAIMS)


@pytest.mark.parametrize(("profile", "without_data"), [("laptop", 0), ("laptop-cifar100", 7)])
def test_page_of_results_holds_the_committed_verdicts(profile, without_data):
    table = committed_claims(profile)
    has_data = table["verdict"] != "no data"
    assert (~has_data).sum() == without_data  # the page tells of these in prose
    for claim, row in table[has_data].iterrows():
        cells = [claim, row["data"], row["comparison"], row["difference, 95 % interval"], str(row["seeds"])]
        line = f"| {' | '.join(cells)} | **{row['verdict']}** |"
        assert line in TEXTS["results.md"], line


def test_verdicts_of_the_readme_are_the_committed_ones():
    committed = {
        (row["difference, 95 % interval"].split("]")[0] + "]", row["verdict"])
        for profile in ("laptop", "laptop-cifar100")
        for _, row in committed_claims(profile).iterrows()
    }
    said = VERDICT.findall(TEXTS["README.md"])
    assert len(said) >= 9
    assert [verdict for verdict in said if verdict not in committed] == []


@pytest.mark.parametrize(("page", "fewest"), [("README.md", 6), ("speed.md", 19)])
def test_tables_of_engines_hold_the_committed_latencies(page, fewest):
    rows = peer_figures.peer_rows(records.read_csv(LAPTOP / "latency-short.csv"))
    check_lines(page, r"\| (?:dense \w+|[\w:& -]+, 90 %): ", peer_figures.peer_table(rows), fewest)


def test_networks_for_a_budget_are_those_of_the_committed_tables():
    accuracy, latency = (records.read_csv(LAPTOP / name) for name in ("accuracy.csv", "latency.csv"))
    budgets_us = {1: [310, 300], 64: [8000, 4000, 2000, 1500, 1000]}
    check_lines("README.md", r"\| \d+ images?, ", speed_figures.budget_table(latency, accuracy, budgets_us), 7)


def changes(profile):
    accuracy, ablations = (records.read_csv(RESULTS / profile / f"{name}.csv") for name in ("accuracy", "ablations"))
    return accuracy, comparisons.changes_table(profiles.load(profile), pd.concat([accuracy, ablations]))


def test_readings_of_the_paper_are_what_the_committed_tables_say():
    _, table = changes("readings")
    rows = f"\\| (?:{'|'.join(table.index)}) "
    check_lines("README.md", rows, table[["hybrid − block", "hybrid − balanced"]], 13, after="save claim 2?")
    check_lines("choices.md", rows, table, 13)


def test_what_lifts_a_pattern_is_what_the_committed_tables_say():
    accuracy, table = changes("lifts")
    shown = table[["hybrid", "block", "balanced", "unstructured"]]
    check_lines("README.md", f"\\| (?:{'|'.join(table.index)}) ", shown, 7, after="## What makes a pattern")
    rivals = ("hybrid", "block", "block+", "balanced", "balanced+", "unstructured", "unstructured+")
    for comparison, points in comparisons.lifted_against(accuracy, rivals)["points"].items():
        assert f"over {comparison.split(' − ')[1]} {points}" in TEXTS["choices.md"]


def test_table_of_speeds_holds_the_committed_latencies():
    table = speed_figures.latency_table(analysis.networks(records.read_csv(LAPTOP / "latency.csv")))
    check_lines("speed.md", r"\| batch \d+, ", table, 10)


def test_table_of_threads_and_caches_holds_the_committed_latencies():
    table = speed_figures.condition_table(records.read_csv(LAPTOP / "latency-short.csv"))
    check_lines("speed.md", r"\| [^|]+, batch \d+ \| ", table, len(table))


def test_tables_of_larger_networks_hold_the_committed_latencies():
    rows = peer_figures.peer_rows(records.read_csv(LAPTOP / "latency-networks.csv"))
    for name, table in peer_figures.network_tables(rows).items():
        check_lines("networks.md", r"\| [^|]+: ", table, len(table), after=f"### {name}\n")


def test_table_of_trained_networks_holds_the_committed_numbers():
    table = peer_figures.measured_trained("resnet").fillna("")
    check_lines("networks.md", r"\| [^|]+: [^|]+ \| ", table, len(table), after="### ResNet-18, trained\n")


def check_lines(page, start, table, fewest, after=""):
    """The lines of a page that begin so are rows of the table; of the section `after` a heading, if one is named."""
    text = TEXTS[page].split(after)[1].split("\n#")[0] if after else TEXTS[page]
    lines = [line for line in text.splitlines() if re.match(start, line)]
    assert len(lines) >= fewest
    for line in lines:
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        assert cells == table.loc[name].to_list(), name


def test_table_of_training_speeds_holds_the_committed_ones():
    for row in throughput.speed_table(records.read_csv(LAPTOP / "training.csv")).itertuples(index=False):
        assert f"| {' | '.join(row)} |" in TEXTS["training.md"]


def test_table_of_the_full_network_holds_the_committed_accuracies():
    accuracy = records.read_csv(RESULTS / "evening" / "accuracy.csv")
    for name, row in accuracy_figures.accuracy_table(accuracy).iterrows():
        assert f"| {name} | {' | '.join(row)} |" in TEXTS["results.md"]


def test_readme_is_short():
    """Words outside of tables and code."""
    text = re.sub(r"```.*?```", "", TEXTS["README.md"], flags=re.DOTALL)
    assert sum(len(line.split()) for line in text.splitlines() if not line.startswith("|")) <= 950


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_files_that_a_page_names_exist(path):
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text())
    assert [target for target in targets if not (path.parent / target).exists()] == []
    if path.name == "README.md":
        pages = {target for target in targets if target.startswith("docs/")}
        assert pages == {f"docs/{name}" for name in TEXTS if name != "README.md"}  # each page can be found
