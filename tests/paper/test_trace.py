"""What a trace shows is what the number rests on, and nothing else."""

import sys

import pandas as pd
import pytest

from reprolib.experiments import records
from reprolib.files import paths
from reprolib.paper import claims, trace

COMMITTED = ["laptop", "laptop-cifar100", "evening"]


def tables(profile):
    return records.read_csv(paths.accuracy_csv(profile)), records.read_csv(paths.latency_csv(profile))


@pytest.mark.parametrize("profile", COMMITTED)
def test_the_rows_behind_a_verdict_alone_give_the_same_verdict(profile):
    accuracy, latency = tables(profile)
    decided = [d for d in claims.decisions(accuracy, latency) if d.decides and len(d.differences)]
    assert len(decided) >= 3
    for decision in decided:
        rows = [decision.accuracies, decision.latencies]
        alone = [of if len(of) else all_of for of, all_of in zip(rows, (accuracy, None), strict=True)]
        again = {(d.claim, d.dataset, d.comparison): d for d in claims.decisions(*alone)}
        same = again[decision.claim, decision.dataset, decision.comparison]
        assert same.as_row() == pytest.approx(decision.as_row(), nan_ok=True)


@pytest.mark.parametrize("profile", COMMITTED)
def test_every_number_rests_on_rows_and_commits(profile):
    for decision in claims.decisions(*tables(profile)):
        behind = decision.latencies if decision.claim == 4 else decision.accuracies
        assert bool(decision.commits) == (len(behind) > 0) == (len(decision.differences) > 0)
        assert set(behind["seed"]) == set(decision.differences.index)


@pytest.mark.parametrize("profile", COMMITTED)
def test_committed_claims_are_those_of_the_committed_tables(profile):
    assert paths.claims_csv(profile).read_text() == records.to_csv(claims.decide(*tables(profile)))


@pytest.mark.parametrize("number", claims.CLAIMS)
def test_a_claim_is_traced_to_rows_formula_seeds_commits_hardware_and_command(number):
    text = trace.claim("laptop", number)
    decided = [d for d in claims.decisions(*tables("laptop")) if d.claim == number and d.decides]
    assert text.startswith(f"Claim {number}. {claims.CLAIMS[number]}")
    parts = text.split("\n\n")[1:]
    assert len(parts) == len(decided)
    for part, decision in zip(parts, decided, strict=True):
        row = decision.as_row()
        lines = [line.strip() for line in part.splitlines()]
        assert f"{row['difference']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}] {decision.unit}: " in part
        assert trace.FORMULAS[number] in part and row["remark"] in part
        assert all(commit in part for commit in decision.commits)
        for seed, difference in decision.differences.items():
            assert f"{seed}: {difference:+.2f}" in part
        for rows, key, command, machine in (
            (decision.accuracies, "run_id", "reproduce", "Intel(R) Xeon(R) Processor"),
            (decision.latencies, "latency_us", "bench", "AMD EPYC"),
        ):
            again = [line for line in lines if line.startswith(f"again     make {command} PROFILE=laptop")]
            assert len(again) == (len(rows) > 0)
            assert all(f"{value:.10g}" if key == "latency_us" else value in part for value in rows.get(key, []))
            hardware = f"{machine}, 2 cores, AVX512"
            assert set(rows.get("hardware", [])) <= {hardware}
            assert (f"hardware  {hardware}" in lines) == (len(rows) > 0)


def test_a_cell_is_traced_to_its_networks():
    accuracy, _ = tables("laptop")
    text = trace.cell("laptop", "hybrid@95")
    rows = accuracy[(accuracy["pattern"] == "hybrid") & (accuracy["target_sparsity"] == 0.95)]
    assert len(rows) == 3 and all(run_id in text for run_id in rows["run_id"])
    assert f"CIFAR-10: {rows['accuracy_pct'].mean():.2f} ± {rows['accuracy_pct'].std():.2f} %" in text
    assert trace.cell("laptop", "dense").count("-dense-") == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--claim", "7"], "error: there is no claim 7: there are 1, 2, 3, 4, 5, 6"),
        (["--claim", ""], "error: there is no claim '': there are 1, 2, 3, 4, 5, 6"),
        (
            ["--claim", "5", "--profile", "evening"],
            "error: claim 5 has no data in evening: no pair of hybrid",
        ),
        (["--claim", "1", "--profile", "huge"], "error: unknown profile 'huge': known are evening"),
        (["--cell", "hybrid@96"], "error: there is no cell 'hybrid@96' in laptop: there are balanced@50, balanced@80"),
    ],
)
def test_what_is_not_there_gets_one_clear_line(arguments, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["trace", *arguments])
    with pytest.raises(SystemExit) as stop:
        trace.main()
    assert stop.value.code.startswith(message) and "\n" not in stop.value.code


def test_a_profile_may_be_a_path(monkeypatch, capsys):
    path = str(paths.PROFILES / "laptop.yaml")
    monkeypatch.setattr("sys.argv", ["trace", "--profile", path, "--cell", "dense"])
    trace.main()
    assert capsys.readouterr().out.startswith("dense\nCIFAR-10: ")


def test_a_profile_without_results_says_what_computes_them(tmp_path, monkeypatch):
    monkeypatch.setenv("REPROLIB_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="make reproduce computes them"):
        trace.claim("laptop", 1)


def test_without_latencies_only_the_claim_on_speed_has_no_data(tmp_path, monkeypatch):
    accuracy, _ = tables("laptop")
    monkeypatch.setenv("REPROLIB_HOME", str(tmp_path))
    records.write_csv(paths.accuracy_csv("laptop"), pd.DataFrame(accuracy))
    assert "+3.98" in trace.claim("laptop", 1)
    with pytest.raises(ValueError, match=r"claim 4 has no data in laptop: no latency\.csv: make bench measures it"):
        trace.claim("laptop", 4)
