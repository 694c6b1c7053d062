"""Profiles list the experiments of a reproduction, and a typo in one shows before anything is trained."""

import json
import re

import pandas as pd
import pytest
import torch

from reprolib import models
from reprolib.experiments import Dense, check_target, epochs, profiles
from reprolib.files import paths
from reprolib.patterns import parse
from reprolib.pruning import make_masks, prunable, uniform_ratios
from reprolib.training import Recipe

SETTINGS = {
    "purpose": "tests",
    "threads": 1,
    "datasets": ["noisy-digits", "cifar10"],
    "width": 0.25,
    "hidden": [8],
    "seeds": [0, 1],
    "recipe": {"epochs": 3, "lr": 0.05},
    "retraining_epochs": 2,
    "sparsities": [0.5, 0.75],
    "methods": {"block": {"pattern": "Block(4, 4)"}, "hybrid": {"pattern": "Balanced(4) & Block(4, 4)", "seeds": [1]}},
    "ablations": {
        "small": {"pattern": "Block(2, 2)", "sparsities": [0.9], "seeds": [0], "datasets": ["cifar10"], "epochs": 1}
    },
}


def method(**fields):
    return {"methods": {"block": {"pattern": "Block(4, 4)"} | fields}}


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads SETTINGS, with changes, as the profile ``mine``; None drops a key."""
    monkeypatch.setattr(paths, "PROFILES", tmp_path)

    def write_and_load(**changes):
        settings = {key: value for key, value in (SETTINGS | changes).items() if value is not None}
        lines = [f"{key}: {json.dumps(value)}" for key, value in settings.items()]  # JSON is YAML
        (tmp_path / "mine.yaml").write_text("\n".join(lines))
        return profiles.load("mine")

    return write_and_load


def test_profile_builds_the_experiments_of_a_method(load):
    profile = load()
    half, three_quarters = profile.pruned("block", "noisy-digits", 1)
    assert (half.sparsity, three_quarters.sparsity) == (0.5, 0.75)
    assert half.dense == three_quarters.dense == profile.dense("noisy-digits", 1)
    assert (half.dense.dataset, half.dense.seed, half.dense.width, half.dense.hidden) == ("noisy-digits", 1, 0.25, (8,))
    assert half.dense.recipe == Recipe(epochs=3, lr=0.05)
    assert (half.pattern, half.epochs) == ("Block(4, 4)", 2)


def test_method_may_restrict_sparsities_seeds_and_data_sets_and_set_fields(load):
    profile = load()
    [only] = profile.pruned("small", "cifar10", 0)
    assert (only.sparsity, only.epochs) == (0.9, 1)
    assert profile.pruned("small", "noisy-digits", 0) == profile.pruned("small", "cifar10", 1) == []


def test_plan_puts_what_tells_most_first(load):
    """Of each seed: dense, then what decides claims, then the rest, then ablations."""
    methods = {"vector": {"pattern": "Vector(4)"}, "block": {"pattern": "Block(4, 4)", "sparsities": [0.5, 0.95]}}
    plan = load(sparsities=[0.9, 0.5], methods=methods).plan()
    short = [
        f"{e.dataset} {e.seed}" if isinstance(e, Dense) else f"{e.dense.dataset} {e.dense.seed} {e.method} {e.sparsity}"
        for e in plan
    ]
    assert short == [
        "noisy-digits 0",
        "cifar10 0",
        "noisy-digits 0 block 0.95",
        "cifar10 0 block 0.95",
        "noisy-digits 0 vector 0.9",
        "cifar10 0 vector 0.9",
        "noisy-digits 0 vector 0.5",
        "noisy-digits 0 block 0.5",
        "cifar10 0 vector 0.5",
        "cifar10 0 block 0.5",
        "cifar10 0 block 0.9",  # the ablation
        "noisy-digits 1",
        "cifar10 1",
        "noisy-digits 1 block 0.95",
        "cifar10 1 block 0.95",
        "noisy-digits 1 vector 0.9",
        "cifar10 1 vector 0.9",
        "noisy-digits 1 vector 0.5",
        "noisy-digits 1 block 0.5",
        "cifar10 1 vector 0.5",
        "cifar10 1 block 0.5",
    ]


def test_methods_of_one_family_keep_their_names(load):
    """What tables call a network is what the profile calls it: ``hybrid`` may be one of several hybrids."""
    methods = {"two-four": {"pattern": "NM(2, 4) & Block(4, 4)"}, "hybrid": {"pattern": "Balanced(4) & Block(4, 4)"}}
    methods["again"] = methods["hybrid"]
    profile = load(methods=methods | {"block": {"pattern": "Block(4, 4)"}}, channels=[0.5])
    names = {getattr(e, "pattern", ""): name for e, name in profile.reported().items()}
    assert names == {
        "": "channels",
        "NM(2, 4) & Block(4, 4)": "two-four",
        "Balanced(4) & Block(4, 4)": "hybrid",
        "Block(4, 4)": "block",
    }
    assert list(profile.reported().values())[:4] == ["dense"] * 4


def test_plan_names_an_experiment_once(load):
    twice = load(ablations={"same": {"pattern": "Block(4, 4)", "sparsities": [0.5]}}).plan()
    assert len(twice) == len(set(twice)) == len(load(ablations={}).plan())


def test_dry_run_has_the_networks_of_its_profile_with_six_steps_each(load):
    profile = load()
    dry = profiles.load("mine-dry-run")
    assert dry == profiles.dry_run(profile) and dry.name == "mine-dry-run"
    assert [(e.pattern, e.sparsity) for e in dry.asked("methods")] == [
        (e.pattern, e.sparsity) for e in profile.asked("methods")
    ]
    for experiment in dry.plan():
        dense = experiment if isinstance(experiment, Dense) else experiment.dense
        assert epochs(experiment) == 3 and dense.images == 2 * dense.recipe.batch_size
    assert not {e.run_id for e in dry.plan()} & {e.run_id for e in profile.plan()}


def test_dry_run_takes_two_seeds_so_that_claims_get_intervals(load):
    load(seeds=[3, 4, 5], methods={"block": {"pattern": "Block(4, 4)"}}, ablations={})
    assert {e.seed for e in profiles.load("mine-dry-run").plan() if isinstance(e, Dense)} == {3, 4}


def test_coverage_counts_what_is_trained_and_estimates_the_rest(load):
    profile = load(datasets=["noisy-digits"], ablations={})
    done = [profile.dense("noisy-digits", 0), *profile.pruned("block", "noisy-digits", 0)]
    rows = [{"run_id": e.run_id, "dataset": "noisy-digits", "epochs": epochs(e), "wall_time_s": 3600.0} for e in done]
    table = profiles.coverage(profile, pd.DataFrame(rows))
    assert table.index.tolist() == [("noisy-digits", "dense"), ("noisy-digits", "block"), ("noisy-digits", "hybrid")]
    assert table["asked"].tolist() == [2, 4, 2] and table["trained"].tolist() == [1, 2, 0]
    assert table["missing"].tolist() == ["seed 1", "seed 1: 50, 75 %", "seed 1: 50, 75 %"]
    # Three hours for 3 + 2 * 2 epochs; 3, 4 and 4 epochs are missing.
    assert table["hours_left"].tolist() == pytest.approx([9 / 7, 12 / 7, 12 / 7])


def test_coverage_keeps_the_rows_of_a_data_set_together(load):
    profile = load(datasets=["noisy-digits", "cifar10"], ablations={})
    empty = pd.DataFrame(columns=["run_id", "dataset", "epochs", "wall_time_s"])
    assert profiles.coverage(profile, empty).index.tolist() == [
        (dataset, method) for dataset in ("noisy-digits", "cifar10") for method in ("dense", "block", "hybrid")
    ]


def test_unknown_profile_is_refused_with_the_choice(load):
    load()
    with pytest.raises(ValueError, match="unknown profile 'huge': known are mine"):
        profiles.load("huge")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.1}, "learning_rate is unknown"),
        ({"name": "other"}, "name is unknown"),
        ({"width": None}, "width is missing"),
        ({"width": "0.25"}, "width must be a number, not '0.25'"),
        ({"datasets": ["mnist"], "ablations": {}}, "unknown data set 'mnist'"),
        ({"datasets": "cifar10"}, "datasets must be a list, such as [a, b], not 'cifar10'"),
        ({"threads": 0}, "threads"),
        ({"methods": {}}, "methods is empty"),
        ({"methods": {"dense": {"pattern": "Block(4, 4)"}}}, "dense and channels are other networks"),
        ({"datasets": []}, "datasets is empty"),
        ({"seeds": [0, 0]}, "seeds: holds 0 twice"),
        ({"seeds": [0.0]}, "seeds[0] must be a whole number, not 0.0"),
        ({"sparsities": ["0.9"]}, "sparsities[0] must be a number, not '0.9'"),
        ({"recipe": {"epoch": 1}}, "recipe.epoch is unknown"),
        ({"recipe": {"epochs": 0}}, "recipe: epochs must be a whole number"),
        ({"methods": {"block": None}}, "methods.block is empty: it must be a mapping"),
        ({"methods": {"block": {}}}, "methods.block.pattern is missing"),
        (method(sparsity=[0.5]), "methods.block.sparsity is unknown"),
        (method(epoch=3), "methods.block.epoch is unknown"),
        (method(pattern="Blok(4, 4)"), "unknown pattern 'Blok'"),
        (method(schedule="slow"), "schedule 'slow' is unknown"),
        (method(prune_ends="false"), "methods.block.prune_ends must be true or false, not 'false'"),
        (method(datasets="cifar10"), "methods.block.datasets must be a list, such as [a, b], not 'cifar10'"),
        (method(datasets=["cifar100"]), "block.datasets: the profile itself has no 'cifar100'"),
        (method(seeds=[0, 7]), "block.seeds: the profile itself has no 7"),
    ],
)
def test_typo_in_a_profile_shows_on_loading(load, changes, message):
    with pytest.raises(ValueError, match=rf"mine\.yaml: .*{re.escape(message)}"):
        load(**changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds: [0]\nseeds: [1]", 'line 2: found duplicate key "seeds"'),
        ("seeds: [0", "line 1: expected"),
        ("- seeds", "it must be a mapping, such as {name: value}, not ['seeds']"),
        ("", "is empty"),
        ("ablations:", "ablations is empty: it must be a mapping"),
    ],
)
def test_file_that_is_no_profile_is_refused(load, tmp_path, text, message):
    load()
    path = tmp_path / "mine.yaml"
    path.write_text(text if len(text) < 10 or "seeds" in text else path.read_text().split("ablations:")[0] + text)
    with pytest.raises(ValueError, match=rf"mine\.yaml.*{re.escape(message)}"):
        profiles.load("mine")


def test_numbers_mean_what_they_say(load, tmp_path):
    load()
    path = tmp_path / "mine.yaml"
    path.write_text(path.read_text().replace('"epochs": 3', '"epochs": 010').replace("0.05", "1e-3"))
    assert profiles.load("mine").recipe == Recipe(epochs=10, lr=0.001)


def test_unknown_method_is_refused_with_the_choice(load):
    with pytest.raises(ValueError, match="unknown method 'blok' in profile mine: known are block, hybrid, small"):
        load().pruned("blok", "noisy-digits", 0)


# --- A profile of the user's own --------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes SETTINGS, with changes, into a file of the user's own; returns its path."""
    monkeypatch.setenv("REPROLIB_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)

    def write(name="mine.yaml", **changes):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(f"{key}: {json.dumps(value)}" for key, value in (SETTINGS | changes).items()))
        return path

    return write


def test_profile_by_path_is_known_by_its_name_from_then_on(own, monkeypatch, tmp_path):
    path = own(datasets=["folder:pets@64"], model="resnet20", width=1.0, hidden=[], ablations={})
    with pytest.raises(ValueError, match=r"unknown profile 'mine': known are .* is the path of a \.yaml file"):
        profiles.load("mine")
    profile = profiles.load("mine.yaml")
    assert (profile.name, profile.model, profile.datasets) == ("mine", "resnet20", ["folder:pets@64"])
    monkeypatch.chdir("/")
    assert profiles.load("mine") == profiles.load(str(path)) == profile
    assert profiles.load(f"{path}-dry-run") == profiles.load("mine-dry-run")
    assert paths.own_profile("mine") == tmp_path / "home" / "results" / "mine" / "profile.yaml"
    own(seeds=[5], **method(), ablations={})
    assert profiles.load("mine").seeds == [0, 1], "a change counts where the file is named"
    assert profiles.load(str(path)).seeds == profiles.load("mine").seeds == [5]


def test_path_of_a_profile_of_the_project_means_that_one():
    assert profiles.load(str(paths.PROFILES / "laptop.yaml")) == profiles.load("laptop")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("laptop.yaml", "results/laptop belongs to the project: give your profile another name"),
        ("sweeps.yaml", "results/sweeps belongs to the project"),
        ("{mine}.yaml", "call it by letters, digits, _, . and -"),
        ("mine-dry-run.yaml", "call it by"),
        ("my mine.yaml", "call it by"),
    ],
)
def test_names_that_results_cannot_have_are_refused(own, name, message):
    with pytest.raises(ValueError, match=message):
        profiles.load(str(own(name)))
    assert not paths.home().exists()


def test_wrong_or_missing_profile_of_the_users_own_is_named(own, tmp_path):
    with pytest.raises(ValueError, match=r"mine\.yaml: unknown data set 'pets'.* your own are folder:PATH"):
        profiles.load(str(own(datasets=["pets"], ablations={})))
    with pytest.raises(ValueError, match=r"mine\.yaml: hidden linear layers are for vgg16, not resnet18"):
        profiles.load(str(own(model="resnet18")))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        profiles.load("nowhere.yaml")
    assert not paths.own_profile("mine").exists()


# --- The profiles that come with the project --------------------------------------------------------------------------


@pytest.mark.parametrize("name", profiles.names())
def test_profile_of_the_project_loads_and_starts_from_one_dense_network_per_seed(name):
    profile = profiles.load(name)
    experiments = [*profile.asked("methods"), *profile.asked("ablations")]
    assert len({e.run_id for e in experiments}) >= len(profile.methods) * len(profile.seeds)
    assert len({e.dense for e in experiments}) == len(profile.seeds) * len(profile.datasets)


@pytest.mark.parametrize("name", profiles.names())
def test_every_pattern_of_a_profile_can_express_its_sparsities(name):
    profile = profiles.load(name)
    torch.manual_seed(0)
    layers = prunable(models.build(profile.model, 10, profile.width, tuple(profile.hidden)))
    shapes = {weight.shape: weight for weight in layers.values()}  # equal shapes keep equally many
    asked = {(e.pattern, e.sparsity) for e in [*profile.asked("methods"), *profile.asked("ablations")]}
    for pattern, sparsity in sorted(asked):
        masks = make_masks(shapes, parse(pattern), uniform_ratios(shapes, sparsity))
        check_target(parse(pattern), sparsity, {name: masks[weight.shape] for name, weight in layers.items()})
