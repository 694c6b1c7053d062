import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reprolib import experiments
from reprolib.experiments import profiles, records
from reprolib.files import paths
from reprolib.files.deadline import seconds
from reprolib.workflow import graph, runner, sweeps


def make(*arguments, **environment):
    """What the Makefile calls."""
    return subprocess.run(
        [sys.executable, "-m", "reprolib.workflow.graph", "--cores", "2", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """Ask in this process for what is refused: the lines that the user sees."""
    monkeypatch.setenv("REPROLIB_HOME", str(tmp_path))
    monkeypatch.setattr(graph.signal, "signal", lambda *_: None)

    def ask(*arguments):
        monkeypatch.setattr(sys, "argv", ["graph", "--cores", "2", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            graph.main()
        assert stop.value.code not in (0, None)
        told = capsys.readouterr().err + (stop.value.code if isinstance(stop.value.code, str) else "")
        return told.strip().splitlines()

    return ask


@pytest.fixture
def notebook(tmp_path, write_notebook):
    """A notebook with two parameters that writes its table and fails for n = 13."""
    return write_notebook(
        tmp_path / "50_product.ipynb",
        'n: int = 1  # number\nk: int = 1  # factor\ntable: str = ""  # result',
        'if n == 13:\n    raise ValueError("unlucky number")',
        'if table:\n    open(table, "w").write(f"product\\n{n * k}\\n")',
    )


def write_grid(folder, **grid):
    (folder / "grid.yaml").write_text(json.dumps(grid))  # JSON is YAML
    return folder / "grid.yaml"


def test_sweep_keeps_what_it_has_and_joins_the_tables(notebook, tmp_path):
    def sweep(**grid):
        return make(
            "sweep", "--notebook", notebook, "--grid", write_grid(tmp_path, **grid), REPROLIB_HOME=str(tmp_path)
        )

    folder = tmp_path / "results" / "sweeps" / "50-grid"
    failed = sweep(n=[2, 13], k=[5])
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-2:] == [
        "error: n=13, k=5: ValueError: unlucky number",
        "1 of 2 points failed: all others are kept, and asking again tries these only",
    ]
    assert pd.read_csv(folder.with_suffix(".csv"))["product"].to_list() == [10], "what succeeded is in the table"
    [table] = folder.glob("*.csv")
    assert table.name.startswith("k=5,n=2-")
    executed = table.with_suffix(".ipynb").stat().st_mtime_ns

    done = sweep(k=[5, 7], n=[2])
    assert done.returncode == 0, done.stderr
    assert table.with_suffix(".ipynb").stat().st_mtime_ns == executed, "what was done is not run again"
    joined = pd.read_csv(folder.with_suffix(".csv"))
    assert joined["product"].to_list() == [10, 14]
    assert joined["sweep_n"].to_list() == [2, 2] and joined["sweep_k"].to_list() == [5, 7]


texts = st.text(max_size=30) | st.integers() | st.floats(allow_nan=False) | st.booleans() | st.none()
points = st.dictionaries(
    st.from_regex(r"[a-z_]{1,12}", fullmatch=True), texts | st.lists(texts, max_size=4), min_size=1
)


@given(points, points)
def test_points_have_readable_names_that_tell_them_apart(one, other):
    name = sweeps.point_name(one)
    assert re.fullmatch(r"[A-Za-z0-9_.,=+-]+", name) and len(name) <= 140 and not name.startswith((".", "-"))
    assert (name == sweeps.point_name(other)) == (json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True))
    assert name == sweeps.point_name(dict(reversed(one.items()))), "whatever their order in the grid"


def test_a_name_shows_the_parameters():
    name = sweeps.point_name({"seed": 0, "pattern": "Balanced(4) & Filter()", "sparsities": [0.75]})
    assert re.fullmatch(r"pattern=Balanced-4-Filter,seed=0,sparsities=0.75-[0-9a-f]{8}", name)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"m": [1]}, "error: 50_product has no parameter m: it knows n, k, table"),
        ({"n": 1}, "grid.yaml: n must be a list, such as [a, b], not 1"),
        ({}, "grid.yaml: it is empty"),
        ({"n": []}, "grid.yaml: n is empty"),
        ({"n": [1, 1]}, "grid.yaml: n: holds 1 twice"),
        ({"n": ["1"]}, "n must be a whole number, not '1'; its default is 1"),
        ({"k": [[1, 2]]}, "k must be a whole number, not [1, 2]; its default is 1"),
    ],
)
def test_wrong_grid_gets_one_clear_line(grid, message, notebook, tmp_path, refused):
    [line] = refused("sweep", "--notebook", notebook, "--grid", write_grid(tmp_path, **grid))
    assert message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["reproduce", "--profile", "huge"],
            f"error: unknown profile 'huge': known are {', '.join(profiles.names())}",
        ),
        (["figures", "--profile", "quick"], "error: no results in "),
        (["sweep", "--notebook", "02", "--grid", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_wrong_call_gets_one_clear_line(arguments, message, refused):
    [line] = refused(*arguments)
    assert message in line


def test_refusal_ends_the_command_with_an_error(tmp_path):
    done = make("figures", "--profile", "quick", REPROLIB_HOME=str(tmp_path))
    assert done.returncode == 1 and done.stderr.startswith("error: no results in ")


def test_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch, refused):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REPROLIB_HOME", str(tmp_path / "file"))
    assert str(tmp_path / "file") in refused("reproduce", "--profile", "quick")[-1]


PLANNING = """
import json, sys
from pathlib import Path
from snakemake.cli import main

for folder in map(Path, sys.argv[2:]):
    config = {"profile": folder.name, "latency": (folder / "latency.csv").exists()}
    (folder / "graph.json").write_text(json.dumps(config))
    arguments = ["all", "--summary", "--cores", "1", "--snakefile", sys.argv[1], "--directory", str(folder)]
    print("in", folder.name)
    try:
        main([*arguments, "--configfile", str(folder / "graph.json")])
    except SystemExit as end:
        if end.code:
            sys.exit(f"{folder.name} cannot be planned")
"""


def test_graph_of_every_profile_can_be_planned_and_makes_nothing_that_git_tracks(tmp_path):
    """Snakemake deletes what a job makes before it runs: it must be what .gitignore names, or marked as updated."""
    folders = [tmp_path / "results" / profile for profile in profiles.names()]
    for folder in folders:
        folder.mkdir(parents=True)
        for table in ("accuracy.csv", "ablations.csv", "latency.csv"):
            if (folder.name, table) != ("resnet", "latency.csv"):  # its networks are not timed
                (folder / table).write_text("")
    command = [sys.executable, "-c", PLANNING, paths.ROOT / "Snakefile", *folders]
    environment = os.environ | {"REPROLIB_HOME": str(tmp_path)}
    planned = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, env=environment)
    assert planned.returncode == 0, planned.stdout + planned.stderr
    made, profile = [], ""
    for line in planned.stdout.splitlines():
        profile = line.removeprefix("in ") if line.startswith("in ") else profile
        if "\t" in line and not line.startswith("output_file"):
            made.append(os.path.normpath(f"results/{profile}/{line.split()[0]}"))
    assert {f"results/{name}/drawn/07" for name in profiles.names()} <= set(made)
    assert {"results/laptop/drawn/05", "results/laptop/drawn/06", "results/resnet/notebooks/02.ipynb"} <= set(made)
    assert not {"results/resnet/drawn/05", "results/resnet/drawn/06"} & set(made)
    check = ["git", "-C", paths.ROOT, "check-ignore", "--no-index", "--stdin"]
    ignored = subprocess.run(check, input="\n".join(made), capture_output=True, text=True, check=False).stdout
    tracked = {os.path.basename(path) for path in set(made) - set(ignored.splitlines())}
    updated = re.findall(r"update\((\w+)\)", (paths.ROOT / "Snakefile").read_text())
    assert tracked == {"accuracy.csv", "ablations.csv", "latency.csv"} and updated == ["ACCURACY", "name", "LATENCY"]


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """A folder with the committed tables of a profile, of which the accuracy figure is all that is drawn."""
    home = tmp_path / "a # {b}"
    monkeypatch.setenv("REPROLIB_HOME", str(home))
    monkeypatch.setattr(graph, "DRAWING", {"accuracy_figure": [paths.accuracy_csv]})
    shutil.copytree(paths.ROOT / "results" / "laptop-cifar100", paths.results("laptop-cifar100"), ignore=only_csv)
    return profiles.load("laptop-cifar100")


def only_csv(folder, names):
    return [name for name in names if not name.endswith(".csv")]


def test_table_from_the_future_is_drawn_whatever_snakemake_is_told(tables, tmp_path, monkeypatch, capsys):
    """It was copied from a machine whose clock is ahead: Snakemake would delete what is made of it."""
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile" / "config.yaml").write_text("dry-run: true")
    monkeypatch.setenv("SNAKEMAKE_PROFILE", str(tmp_path / "profile"))
    ahead = time.time() + 86400
    os.utime(paths.accuracy_csv(tables.name), (ahead, ahead))
    graph.figures(tables, 1)
    drawn = sorted(path.name for path in paths.figures(tables.name).iterdir())
    assert drawn == ["accuracy.md", "accuracy.tex", "accuracy_vs_sparsity.png", "accuracy_vs_sparsity.svg"]
    assert f"redrawn: 4 files in {paths.figures(tables.name)}" in capsys.readouterr().out


def test_nothing_drawn_is_not_called_redrawn(tables, monkeypatch, capsys):
    monkeypatch.setattr(graph, "draw", lambda *_: None)
    with pytest.raises(RuntimeError, match=r"error: nothing was drawn into .*, see .*snakemake\.log"):
        graph.figures(tables, 1)
    assert "redrawn" not in capsys.readouterr().out


@pytest.mark.parametrize("profile", ["2024", "1e3", "true", "a=b"])
def test_names_reach_the_graph_as_they_are(profile, tmp_path, monkeypatch):
    """To Snakemake's command line, these are no texts. And a graph that fails gives its reason."""
    with (tmp_path / "run.lock").open("w") as lock, pytest.raises(RuntimeError) as failed:
        monkeypatch.setattr(runner, "SNAKEFILE", tmp_path / "Snakefile")
        runner.SNAKEFILE.write_text('name = config["profile"]\n\nraise ValueError(f"profile {name!r}")\n')
        runner.snakemake([], tmp_path, 1, lock, {"profile": profile})
    [line] = str(failed.value).splitlines()
    assert line.startswith("error: the graph failed: ") and f"profile {profile!r}" in line
    assert line.endswith(f", see {tmp_path / 'snakemake.log'}")


# --- Reproducing ------------------------------------------------------------------------------------------------------


def test_budget_trains_draws_and_goes_on(tmp_path, monkeypatch, capsys):
    """A dry run of the quick profile, in two parts: rows of the first part stay, whatever becomes of its folders."""
    profile, budget_s = profiles.load("quick-dry-run"), 900
    results, drawn = tmp_path / "results" / profile.name, tmp_path / "figures" / profile.name
    plan = profile.plan()
    monkeypatch.setenv("REPROLIB_HOME", str(tmp_path))
    with monkeypatch.context() as first:
        first.setattr(graph, "DRAWING", {"anatomy": []})
        graph.reproduce(profile, 2, budget_s)
    accuracy = pd.read_csv(results / "accuracy.csv")
    assert len(accuracy) + len(pd.read_csv(results / "ablations.csv")) >= len(plan)
    assert [path.name for path in sorted(drawn.iterdir())] == ["mask_anatomy.png", "mask_anatomy.svg"]
    assert f"numbers: {results / 'accuracy.csv'}" in capsys.readouterr().out

    shutil.rmtree(results / "runs" / plan[-1].run_id)
    shutil.rmtree(results / "runs" / accuracy["run_id"][0])
    done = make("reproduce", "--profile", profile.name, "--budget", f"{budget_s}s")
    assert done.returncode == 0, done.stderr
    assert len(pd.read_csv(results / "accuracy.csv")) == len(accuracy)
    assert all(experiments.is_done(experiment, results / "runs") for experiment in plan)
    assert (drawn / "accuracy_vs_sparsity.svg").exists()
    assert not (drawn / "latency_vs_sparsity.svg").exists() and not (drawn / "roofline.svg").exists()
    claims = pd.read_csv(results / "claims.csv").set_index("claim")
    assert claims.loc[4, "verdict"] == "no data" and "make bench" in claims.loc[4, "remark"]

    # Snakemake alone sees the same: nothing to do, and behind a record that is gone everything that hangs on it.
    assert snakemake_alone(profile.name, "trained.txt", "accuracy.csv", "drawn/03", "--dry-run") == []
    (results / "latency.csv").write_text("measured\n")
    (results / "runs" / accuracy["run_id"][0] / "record.json").unlink()
    ran = snakemake_alone(profile.name, "trained.txt", "accuracy.csv", "latency.csv")
    assert sorted(ran) == ["latencies", "networks", "tables"]
    assert all(experiments.is_done(experiment, results / "runs") for experiment in plan)
    assert (results / "latency.csv").read_text() == "measured\n", "what was measured stays"
    assert snakemake_alone(profile.name, "trained.txt", "accuracy.csv", "--dry-run") == []


def snakemake_alone(profile_name, *arguments):
    """The rules that Snakemake runs, or would run, when a user calls it in the checkout."""
    command = ["-m", "snakemake", "--cores", "2", "--config", f"profile={profile_name}", "--directory"]
    done = subprocess.run(
        [sys.executable, *command, str(paths.results(profile_name)), "--snakefile", "Snakefile", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return list(dict.fromkeys(re.findall(r"^(?:local)?rule (\w+):", done.stdout + done.stderr, re.MULTILINE)))


@pytest.mark.parametrize(("text", "expected"), [("90s", 90), ("20m", 1200), ("1h30m", 5400), ("2h", 7200)])
def test_budget_is_a_time(text, expected):
    assert seconds(text) == expected


def test_no_cores_are_refused(refused):
    assert refused("--cores", "0", "figures")[-1].endswith("'0' is no number of cores: write 1 or more")


@pytest.mark.parametrize(
    ("budget", "message"),
    [("20", "'20' is not understood: write 90s, 20m or 1h30m"), ("2m", "a budget of 120 s is too short")],
)
def test_wrong_budget_is_refused(budget, message, refused):
    assert message in refused("reproduce", "--profile", "quick", "--budget", budget)[-1]


def test_data_come_first_and_are_asked_for_once(tmp_path, monkeypatch, refused):
    """Without network: one message, and no network is tried."""

    def no_network(*arguments, **kinds):
        raise OSError("no route to host")

    monkeypatch.setenv("REPROLIB_DATA", str(tmp_path / "data"))
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setattr(graph.scheduling, "train", None)
    lines = refused("reproduce", "--profile", "laptop")
    assert [line for line in lines if "no route to host" in line] == [
        f"error: cifar-10-batches-py is not in {tmp_path / 'data'}, and it could not be downloaded: no route to host"
    ]
    assert sum(line.startswith("  * ") for line in lines) == 3


def test_tables_hold_what_has_a_record_and_keep_earlier_rows(tmp_path, monkeypatch):
    monkeypatch.setenv("REPROLIB_HOME", str(tmp_path))
    profile = profiles.load("quick-dry-run")
    dense, pruned = profile.plan()[0], next(iter(profile.asked("methods")))
    graph.write_tables(profile)
    assert not paths.accuracy_csv(profile.name).exists()
    experiments.run(dense, paths.runs(profile.name))
    graph.write_tables(profile)
    shutil.rmtree(paths.runs(profile.name) / dense.run_id)
    experiments.run(pruned, paths.runs(profile.name))
    shutil.rmtree(paths.runs(profile.name) / dense.run_id)
    graph.write_tables(profile)
    table = records.read_csv(paths.accuracy_csv(profile.name))
    assert table["run_id"].tolist() == [dense.run_id, pruned.run_id]
    assert table["pattern"].tolist() == ["dense", next(iter(profile.methods))]
    assert not paths.ablations_csv(profile.name).exists()


def test_networks_of_other_profiles_are_not_trained_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("REPROLIB_HOME", str(tmp_path))
    profile, trained = profiles.load("quick-dry-run"), []
    dense, *rest = profile.plan()
    experiments.run(dense, paths.runs("another"))

    def train(plan, runs, **_):
        trained.extend(experiment for experiment in plan if not experiments.is_done(experiment, runs))
        raise RuntimeError("enough")

    monkeypatch.setattr(graph.scheduling, "train", train)
    with pytest.raises(RuntimeError, match="enough"):
        graph.reproduce(profile, 2)
    assert trained == rest
    assert f"1 of {len(rest) + 1} networks are there already, from other profiles" in capsys.readouterr().out


def test_only_what_the_tables_allow_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setenv("REPROLIB_HOME", str(tmp_path))
    asked = []
    monkeypatch.setattr(
        graph.runner, "snakemake", lambda targets, folder, cores, lock, config: asked.append((targets, config))
    )

    def add(table, *patterns):
        rows = [{"run_id": pattern, "pattern": pattern} for pattern in patterns]
        records.write_csv(table("quick"), pd.DataFrame(rows))
        graph.draw("quick", 1, None)
        targets, config = asked[-1]
        return targets[: targets.index("--forcerun")], config["latency"]

    assert add(paths.accuracy_csv, "dense", "hybrid") == (["anatomy"], False)  # nothing to compare yet
    drawn = ["anatomy", "accuracy_figure", "claims"]
    assert add(paths.accuracy_csv, "dense", "hybrid", "block") == (drawn, False)
    drawn[2:2] = ["kernel_figures", "latency_figure"]
    assert add(paths.latency_csv, "dense") == (drawn, True)


def test_progress_counts_epochs_and_tells_of_networks_that_got_done(tmp_path, capsys):
    profile = profiles.load("quick-dry-run")
    plan = [profile.plan()[0], next(iter(profile.asked("methods")))]
    done = graph._epochs_done(plan, tmp_path)
    assert done() == 0
    experiments.run(plan[1], tmp_path)  # and the dense one before it
    assert done() == 6
    told = capsys.readouterr().err
    assert "noisy-digits, seed 0, dense: accuracy" in told
    assert "noisy-digits, seed 0, unstructured at 75.0 %: accuracy" in told
    assert graph._epochs_done(plan, tmp_path)() == 6
    assert "unstructured" not in capsys.readouterr().err  # known before


def test_progress_looks_at_what_ran_alone_and_tells_of_each_network_once(tmp_path, capsys):
    plan = profiles.load("quick-dry-run").plan()[:2]
    done = graph._epochs_done(plan, tmp_path)
    experiments.run(plan[0], tmp_path)
    assert done([]) == 0, "nobody looked"
    assert done(plan[:1]) == experiments.epochs(plan[0]) == done(plan[:1]) == done()
    assert capsys.readouterr().err.count("dense: accuracy") == 1


def test_a_second_run_follows_the_first_and_then_gets_the_lock(tmp_path):
    looks = []
    with (tmp_path / "run.lock").open("w") as first:
        fcntl.flock(first, fcntl.LOCK_EX)

        def look():
            looks.append(1)
            if len(looks) == 2:
                fcntl.flock(first, fcntl.LOCK_UN)

        with runner.only_run(tmp_path, look) as second:
            assert len(looks) == 2
            with (tmp_path / "run.lock").open("w") as third, pytest.raises(BlockingIOError):
                fcntl.flock(third, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert second.closed


def test_profile_follows_the_hardware(monkeypatch, capsys):
    chosen = []
    for usable in (False, True):
        monkeypatch.setattr(graph.torch.cuda, "is_available", lambda usable=usable: usable)
        chosen.append(graph._profile("").name)
    assert chosen == ["quick", "paper"]
    assert "PROFILE=quick, because no GPU is usable here" in capsys.readouterr().out
