"""What is measured and how rows are made of it; no test looks at a duration."""

import itertools
from dataclasses import replace

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from reprolib import experiments, models
from reprolib.bench import latency, rivals, timing
from reprolib.experiments import Dense, profiles, records
from reprolib.files.deadline import OutOfTime
from reprolib.patterns import gemm_view, parse
from reprolib.sparse import cpu, portable
from reprolib.training import Recipe
from reprolib.training.precision import usable

RECIPE = Recipe(epochs=1, batch_size=8, lr=0.1, weight_decay=0.0, precision="fp32")


def network(width, seed=0):
    return Dense("noisy-digits", RECIPE, width, seed=seed, images=16)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """The quick profile's networks, one seed, one batch, two rounds."""
    output = tmp_path_factory.mktemp("latency") / "latency.csv"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "ROUNDS", 2)
        patch.setattr(latency, "SEEDS", 1)
        patch.setattr(latency, "BATCHES", {"cpu": (2,)})
        latency.benchmark(profiles.load("quick"), "cpu", "own", output)
    return records.read_csv(output)


def contest(seed, calls):
    """A contest of one dense rival and one of ours, which notes that it was prepared."""
    name = {"scope": "network", "name": "net", "width": 1.0, "batch": 1, "seed": seed, "device": "cpu"}

    def prepare():
        calls.append(seed)
        names = "dense", latency.SPARSE
        return [timing.Contender(implementation, "fp32", lambda: None) for implementation in names]

    return latency.Contest(name, prepare, effort_s=60.0)


def test_stopped_benchmark_goes_on_where_it_stopped(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(latency, "_contests", lambda *_: [contest(seed, calls) for seed in range(3)])
    monkeypatch.setattr(latency.time, "time", lambda: len(calls))
    monkeypatch.setattr(latency.records, "commit", lambda: "abc")
    output = tmp_path / "latency.csv"
    with pytest.raises(OutOfTime, match=r"kept in .*latency\.csv\.\w+\.partial; ask again"):
        latency.benchmark(profiles.load("quick"), "cpu", "own", output, deadline=1.5)
    assert calls == [0, 1] and not output.exists()
    latency.benchmark(profiles.load("quick"), "cpu", "own", output)
    assert calls == [0, 1, 2]
    assert records.read_csv(output)["seed"].tolist() == [0, 0, 1, 1, 2, 2]
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("commits", [("abc", "def"), ("abc+", "abc+")], ids=["another commit", "changed code"])
def test_benchmark_of_other_code_starts_anew(commits, tmp_path, monkeypatch):
    calls, output = [], tmp_path / "latency.csv"
    monkeypatch.setattr(latency, "_contests", lambda *_: [contest(seed, calls) for seed in range(2)])
    monkeypatch.setattr(latency.time, "time", lambda: len(calls))
    monkeypatch.setattr(latency.records, "commit", lambda: commits[0])
    with pytest.raises(OutOfTime):
        latency.benchmark(profiles.load("quick"), "cpu", "own", output, deadline=0.5)
    monkeypatch.setattr(latency.records, "commit", lambda: commits[1])
    latency.benchmark(profiles.load("quick"), "cpu", "own", output)
    assert calls == [0, 0, 1]


def test_other_contests_do_not_continue_these(tmp_path, monkeypatch):
    calls, output = [], tmp_path / "latency.csv"
    monkeypatch.setattr(latency, "_contests", lambda *_: [contest(seed, calls) for seed in range(2)])
    monkeypatch.setattr(latency.time, "time", lambda: len(calls))
    monkeypatch.setattr(latency.records, "commit", lambda: "abc")
    with pytest.raises(OutOfTime):
        latency.benchmark(profiles.load("quick"), "cpu", "own", output, deadline=0.5)
    latency.benchmark(profiles.load("quick"), "cpu", "all", output)
    assert calls == [0, 0, 1]


class Company:
    """Peers by name."""

    def __init__(self, name, calls):
        self.name, self.calls = name, calls

    def __str__(self):
        return self.name

    def release(self):
        self.calls.append("released")


@pytest.mark.parametrize("others", [None, "DeepSparse 1.9", "DeepSparse 1.8, OpenVINO 2026"])
def test_contests_with_other_peers_do_not_continue_these(others, tmp_path, monkeypatch):
    """All rows of a table were measured beside the same rivals."""
    calls, output = [], tmp_path / "latency.csv"
    monkeypatch.setattr(latency, "_contests", lambda *_: [contest(seed, calls) for seed in range(2)])
    monkeypatch.setattr(latency.time, "time", lambda: len(calls))
    monkeypatch.setattr(latency.records, "commit", lambda: "abc")
    with pytest.raises(OutOfTime):
        latency.benchmark(profiles.load("quick"), "cpu", "own", output, 0.5, Company("DeepSparse 1.8", calls))
    assert calls == [0, "released"], "what a contest compiled is let go"
    latency.benchmark(profiles.load("quick"), "cpu", "own", output, peers=others and Company(others, []))
    assert calls == [0, "released", 0, 1]


def test_best_dense_is_over_all_engines_in_the_type_of_the_kernels():
    rows = pd.DataFrame(
        [
            ("oneDNN, channels last", "fp32", "dense", 300.0),
            ("OpenVINO 2026.4.1", "fp32", "dense", 200.0),
            ("OpenVINO 2026.4.1", "bf16", "dense", 100.0),
            (latency.SPARSE, "fp32", "dense", 150.0),
            ("DeepSparse 1.8.0", "fp32", "dense", 250.0),
            ("DeepSparse 1.8.0", "fp32", "hybrid", 50.0),
            (latency.SPARSE, "fp32", "hybrid", 60.0),
        ],
        columns=["implementation", "dtype", "pattern", "latency_us"],
    )
    assert latency._best_dense_us(rows, "cpu") == 200


def test_short_extent_is_one_sparsity_of_one_full_network():
    contests = list(latency._contests(profiles.load("laptop"), "cpu", "short"))
    named = [(c.name["scope"], c.name["width"], c.name["seed"], c.name["batch"]) for c in contests]
    assert named == [(scope, 1.0, 0, batch) for scope in ("network", "conditions") for batch in (1, 16, 64)]
    specs = contests[0].prepare.args[-1]
    assert {pattern for pattern, _, _ in specs} == set(latency.PATTERNS) and {spec[2] for spec in specs} == {0.9}


@pytest.mark.parametrize(("name", "spec"), [("laptop", "Balanced(8) & Block(8, 8)"), ("paper", None)])
def test_most_telling_contests_come_first(name, spec):
    """A user sees hybrid at 90 % for one image, then each network once, and further seeds and single layers last."""
    contests = list(latency._contests(profiles.load(name), "cpu", "all"))
    first, *others = contests
    assert (first.name["scope"], first.name["batch"], first.name["seed"]) == ("first look", 1, 0)
    [(pattern, text, sparsity)] = first.prepare.args[-1]
    assert (pattern, sparsity) == ("hybrid", 0.9) and text == (spec or text)
    assert first.effort_s == min(contest.effort_s for contest in contests if contest.name["scope"] != "ceiling")
    scopes = [contest.name["scope"] for contest in others]
    assert scopes == sorted(scopes, key=["network", "layer", "conditions", "ceiling"].index)
    networks = [(c.name["seed"], c.name["width"], c.name["batch"]) for c in others if c.name["scope"] == "network"]
    seeds = [seed for seed, _, _ in networks]
    assert seeds == sorted(seeds) and {width for seed, width, _ in networks if seed == 0} == {
        1.0,
        contests[0].name["width"],
    }
    assert [batch for _, _, batch in networks] == [1, 16, 64] * (len(networks) // 3), "networks are pruned once for all"


def test_conditions_are_threads_and_swept_caches(monkeypatch):
    """On one thread the kernels give what they give on all, and afterwards all are used again."""
    threads, seen = torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        with torch.inference_mode():
            found = rivals.condition_contenders(network(0.125), 1, (("block", "Block(4, 4)", 0.5),))
            for contender in found:
                contender.call(), seen.append(torch.get_num_threads())
            assert rivals._on_threads(torch.get_num_threads, 2)() == 2
            assert all(us > 0 for us in (c.time_us() for c in found if c.time_us))
    finally:
        torch.set_num_threads(threads)
    assert set(seen) == {3}
    ways = ["oneDNN, channels last", latency.SPARSE]
    names = [f"{way}, {condition}" for condition in ("1 thread", "2 threads", rivals.SWEPT) for way in ways]
    assert [c.implementation for c in found] == names


def test_the_network_of_the_profile_is_timed_for_its_images(monkeypatch):
    """ResNet-18, and a data set whose images have another size; its name says so, and so does what it may cost."""
    profile = replace(profiles.load("resnet"), datasets=["folder:pets@64"])
    shape = latency.data.shape
    monkeypatch.setattr(latency.data, "shape", lambda name: (2, 64) if name == "folder:pets@64" else shape(name))
    contests = list(latency._contests(profile, "cpu", "own"))
    assert {contest.name["name"] for contest in contests} == {"ResNet-18 ×0.25, 64×64"}
    assert {contest.prepare.args[0].model for contest in contests} == {"resnet18"}
    size = latency._size(profile.dense("folder:pets@64", 0))
    assert (
        size.layers == 21 and size.macs == sum(models.layer_flops(models.resnet18(2, 0.25), (3, 64, 64)).values()) / 2
    )
    [model, *pruned] = rivals._networks(profile.dense("folder:pets@64", 0), "cpu", (("block", "Block(4, 4)", 0.5),))
    assert model.masked(torch.zeros(1, 3, 64, 64)).shape == (1, 2) and len(pruned) == 1


def test_trained_networks_meet_torch_masks_and_networks_without_channels(tmp_path, monkeypatch):
    """One seed's networks, as they were trained; each with the size of its file."""
    monkeypatch.setenv("REPROLIB_HOME", str(tmp_path))
    profile = replace(
        profiles.load("resnet"),
        datasets=["noisy-digits"],
        images=16,
        recipe=RECIPE,
        retraining_epochs=1,
        sparsities=[0.5, 0.8],  # the one nearest to 90 % is timed
        methods={"unstructured": {"pattern": "Unstructured()"}, "mine": {"pattern": "Block(8, 8)"}},
        channels=[0.5],
    )
    with pytest.raises(FileNotFoundError, match="are not trained here: make reproduce PROFILE=resnet"):
        list(latency._contests(profile, "cpu", "trained"))
    runs = tmp_path / "results" / "resnet" / "runs"
    for experiment in profile.plan():
        if experiment.label.split(", ")[1] == "seed 0":
            experiments.run(experiment, runs)
    first, *_ = latency._contests(profile, "cpu", "trained")
    assert first.name["scope"] == "trained network" and first.name["batch"] == 1
    with torch.inference_mode():
        found = first.prepare()
        logits = {(c.implementation, c.pattern): torch.as_tensor(c.call()) for c in found if c.dtype == "fp32"}
    bytes_ = {(c.implementation, c.pattern): c.file_bytes for c in found}
    dense, masks = bytes_["oneDNN, channels last", "dense"], bytes_[rivals.TORCH_MASKS, "unstructured"]
    assert {c.target_sparsity for c in found if c.pattern == "mine"} == {0.8}
    assert 0 < bytes_[latency.SPARSE, "mine"] < bytes_["oneDNN, channels last", "channels"] < dense < masks
    for way in ((latency.SPARSE, "dense"), ("oneDNN, channels first", "dense")):
        torch.testing.assert_close(logits[way], logits["oneDNN, channels last", "dense"], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(
        logits[rivals.TORCH_MASKS, "unstructured"], logits[latency.SPARSE, "unstructured"], atol=1e-3, rtol=1e-3
    )


def test_profile_without_hybrid_has_a_first_look_too():
    assert latency.first_look((("mine", "Block(2, 2)", 0.5), ("mine", "Block(2, 2)", 0.8))) == (
        ("mine", "Block(2, 2)", 0.8),
    )


def test_time_left_learns_from_what_is_done():
    efforts = [30.0, 60.0, 240.0]
    assert latency.left(efforts, 0, 0.0) == "about 6 min left", "before anything is measured: as the numbers say"
    assert latency.left(efforts, 1, 30.0) == "about 5 min left", "as fast as expected"
    assert latency.left(efforts, 2, 330.0) == "about 12 min left", "three times slower"
    assert latency.left(efforts, 2, 30.0) == "about 2 min left"
    assert latency.left(efforts, 3, 330.0) == "about 0 s left"


def test_effort_grows_with_what_is_prepared_and_computed():
    size = latency.Size(1, 1e6, 1e9)
    once = latency.effort_s(size, 16, "cpu", 10)
    assert latency.effort_s(size, 16, "cpu", 10, again=True) < once
    for more in [(2, 1e6, 1e9), (1, 2e6, 1e9), (1, 1e6, 2e9)]:
        assert once < latency.effort_s(latency.Size(*more), 16, "cpu", 10)
    for more in [(64, "cpu", 10), (16, "cpu", 20)]:
        assert once < latency.effort_s(size, *more)


def test_each_contest_says_what_came_out_and_what_time_is_left(tmp_path, monkeypatch, capsys):
    """An estimate before anything is measured, and a line as soon as each row is there."""
    calls, output = [], tmp_path / "latency.csv"
    monkeypatch.setattr(latency, "_contests", lambda *_: [contest(seed, calls) for seed in range(2)])
    monkeypatch.setattr(latency.time, "perf_counter", lambda: 60.0 * len(calls))
    latency.benchmark(profiles.load("quick"), "cpu", "own", output)
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "latency on cpu: 2 contests, about 2 min left"
    assert [line.split(":")[0] for line in lines] == ["net, batch 1, seed 0", "net, batch 1, seed 1"]
    assert [line.split("; ")[1] for line in lines] == ["about 60 s left", "about 0 s left"]


def test_line_of_a_contest_names_the_best_dense_and_hybrid_nearest_90():
    rows = pd.DataFrame(
        [
            ("oneDNN, channels last", "dense", 0.0, 12000.0, 1.0),
            (latency.SPARSE, "dense", 0.0, 9000.0, 1.3),
            (latency.SPARSE, "hybrid", 0.9, 4000.0, 3.0),
            (latency.SPARSE, "hybrid", 0.5, 8000.0, 1.5),
            ("DeepSparse 1.8.0", "hybrid", 0.9, 5000.0, 2.4),
        ],
        columns=["implementation", "pattern", "target_sparsity", "latency_us", "speedup"],
    ).assign(name="net", batch=16, seed=2, dtype="fp32")
    assert latency.result(rows, "cpu") == ("net, batch 16, seed 2: best dense 12 ms, hybrid at 90 % 4 ms (3.00×)")
    assert latency.result(rows[:2], "cpu") == (
        "net, batch 16, seed 2: oneDNN, channels last 12 ms, sparse kernels 9 ms"
    )


@pytest.mark.parametrize(("spins", "look_s"), [(True, 0.01), (False, 0.001)])
def test_long_rests_come_only_after_threads_that_spin(spins, look_s, monkeypatch):
    looks = []
    monkeypatch.setattr(timing.engine, "rest", looks.append)
    one = timing.Contender("engine", "fp32", lambda: None, spins=spins)
    timing.measure([one], "cpu")
    assert looks == [look_s] * timing.ROUNDS


def test_our_own_threads_alone_are_known_not_to_spin(monkeypatch):
    """Numba's threads, that run our kernels on other processors, do."""
    specs = (("block", "Block(4, 4)", 0.5),)

    def resting():
        found = rivals.network_contenders(network(0.0625), 1, "cpu", specs) + rivals.layer_contenders(
            8, 8, 4, 1, "cpu", specs
        )
        return {contender.implementation for contender in found if not contender.spins}

    ways = {latency.SPARSE: cpu.instruction_sets(), rivals.SPARSE_BF16: cpu.instruction_sets(pairs=True)}
    assert resting() == {name for name, sets in ways.items() if sets}
    monkeypatch.setattr(rivals.cpu, "instruction_sets", lambda pairs=False: [])
    assert resting() == set()


def test_peers_run_whole_networks_only():
    company = Company("DeepSparse 1.8", [])
    for contest in latency._contests(profiles.load("laptop"), "cpu", "all", company):
        assert (contest.prepare.keywords.get("others") is company) == (contest.name["scope"] == "network")


def test_distinct_masks_of_a_profile():
    specs = latency.profile_specs(profiles.load("quick"))
    methods = {method for method, _, _ in specs}
    assert methods == {"unstructured", "block", "balanced", "vector", "hybrid"}, "controls share the masks of others"
    assert len(specs) == len(set(specs)) == 5 * 2


@pytest.mark.parametrize("settings", [{"ratios": "global"}, {"prune_ends": True}], ids=str)
def test_networks_that_are_pruned_in_another_way_are_not_timed_as_theirs(settings):
    profile = profiles.load("quick")
    methods = profile.methods | {"mine": {"pattern": "Balanced(2)&Block(2,2)"} | settings}
    assert latency.profile_specs(replace(profile, methods=methods)) == latency.profile_specs(profile)
    plain = latency.profile_specs(replace(profile, methods={"mine": {"pattern": "Balanced(2)&Block(2,2)"}}))
    assert {spec[:2] for spec in plain} == {("mine", "Balanced(2) & Block(2, 2)")}  # as accuracy.csv names it


def test_one_row_per_implementation(table):
    assert (table["kind"] == "measured").all() and (table["latency_us"] > 0).all()
    assert not table.duplicated(["name", "batch", "seed", "spec", "target_sparsity", "implementation", "dtype"]).any()
    dense = table[table["pattern"] == "dense"]
    assert set(zip(dense["implementation"], dense["dtype"], strict=True)) == {
        ("oneDNN, channels first", "fp32"),
        ("oneDNN, channels last", "fp32"),
        ("oneDNN, channels last", usable("bf16", "cpu")),  # no rival that the processor would emulate
        (latency.SPARSE, "fp32"),
    }
    assert len(table) == len(dense) + 10 * (1 + bool(cpu.instruction_sets(pairs=True)))  # in bf16, too


def test_speedup_is_over_the_fastest_dense_of_the_same_type(table):
    dense = table[table["implementation"].str.startswith("oneDNN") & (table["dtype"] == "fp32")]
    assert dense["speedup"].max() == 1
    best = dense["latency_us"].min()
    assert (table["speedup"] * table["latency_us"]).tolist() == pytest.approx([best] * len(table))


def test_achieved_sparsity_is_stored(table):
    pruned = table[table["pattern"] != "dense"]
    assert (pruned["sparsity"] - pruned["target_sparsity"]).abs().max() < 0.02
    assert (table[table["pattern"] == "dense"]["sparsity"] == 0).all()


def test_quartiles_enclose_the_median(table):
    assert (table["latency_q1_us"] <= table["latency_us"]).all() and (
        table["latency_us"] <= table["latency_q3_us"]
    ).all()


def test_contenders_of_a_layer_compute_the_same():
    specs = tuple((label, spec, 0.5) for label, spec in latency.PATTERNS.items())
    contenders = rivals.layer_contenders(64, 32, 4, 2, "cpu", specs)
    outputs = [contender.call() for contender in contenders]
    first, last = outputs[:2]
    [no_zeros] = [c for c in contenders if (c.implementation, c.pattern) == (latency.SPARSE, "dense")]
    torch.testing.assert_close(first, last, atol=1e-4, rtol=1e-4)
    # The second call of the sparse layer at 0 % is that of the second input, as the second call of the dense one is.
    dense, own = contenders[0].call(), no_zeros.call()
    own = torch.from_numpy(own()[0]) if cpu.instruction_sets() else portable.from_layout(own[:, :, 1:-1, 1:-1], 2)
    torch.testing.assert_close(dense, own, atol=1e-4, rtol=1e-4)


def test_measuring_leaves_the_global_random_numbers_alone():
    before = torch.get_rng_state()
    rivals.network_contenders(network(0.0625, seed=3), 1, "cpu", ())
    rivals.layer_contenders(8, 8, 4, 1, "cpu", ())
    assert torch.equal(torch.get_rng_state(), before)


def test_rivals_are_compiled_for_each_size_of_images():
    """Eleven in a row: torch would take the second for any size, and give up compiling behind the eighth."""
    sizes = []

    def backend(module, inputs):
        sizes.extend(x.shape[0] for x in inputs if x.dim() == 4 and x.shape[1:] == (3, 5, 5))
        return module

    for count in range(2, 13):
        model = torch.nn.Sequential(torch.nn.Conv2d(3, count, 3)).eval()
        rivals.compiled_for_one_size(model, backend=backend)(torch.zeros(count, 3, 5, 5))
    assert sizes == list(range(2, 13)) and all(type(size) is int for size in sizes)


def test_a_rival_that_is_compiled_in_part_only_is_an_error():
    class Broken(torch.nn.Module):
        def forward(self, x):
            torch._dynamo.graph_break()
            return x + 1

    with pytest.raises(torch._dynamo.exc.Unsupported):
        rivals.compiled_for_one_size(Broken(), backend="eager")(torch.zeros(2))


def test_unfolding_fits_the_gemm_view():
    x, weight = torch.randn(2, 3, 5, 4, dtype=torch.double), torch.randn(6, 3, 3, 3, dtype=torch.double)
    product = gemm_view(weight) @ rivals.unfolded_columns(x)
    expected = F.conv2d(x, weight, padding=1)
    torch.testing.assert_close(product.reshape(6, 2, 5, 4).transpose(0, 1), expected)


def test_survey_covers_all_patterns_and_shapes():
    contests = [contest.name for contest in latency._contests(profiles.load("laptop"), "cpu", "all")]
    assert {(c["scope"], c["width"]) for c in contests} == {
        ("first look", 0.25),
        ("network", 0.25),
        ("network", 1.0),
        ("layer", 1.0),
        ("conditions", 1.0),
        ("ceiling", 1.0),
    }
    layers = {(c["name"], c["batch"]) for c in contests if c["scope"] == "layer"}
    assert len(layers) == len(latency.LAYERS) and {batch for _, batch in layers} == {64}, "what figures of layers show"
    for spec, sparsity in itertools.product(latency.PATTERNS.values(), latency.SPARSITIES):
        achieved = 1 - parse(spec).mask(torch.randn(256, 256, 3, 3), sparsity).float().mean().item()
        assert achieved == pytest.approx(sparsity, abs=0.01), f"{spec} can't express {sparsity}"


def test_survey_joins_the_networks_of_a_full_width_profile():
    contests = latency._contests(profiles.load("paper"), "cpu", "all")
    specs = next(contest.prepare.args[-1] for contest in contests if contest.name["scope"] == "network")
    timed = [(pattern, sparsity) for pattern, _, sparsity in specs]
    assert len(timed) == len(set(timed)), "one name and sparsity, one mask"
    assert {("two-four-block", 0.9), ("hybrid", 0.75), ("block", 0.98)} <= set(timed)
    assert ("balanced", "Balanced(96)", 0.9) in specs and ("balanced", "Balanced(64)", 0.75) in specs


def test_without_a_profile_the_survey_alone_is_timed():
    first, *contests = latency._contests(None, "cuda", "all")
    assert first.prepare.args[-1] == (("hybrid", latency.PATTERNS["hybrid"], 0.9),)
    assert {(c.name["scope"], c.name["width"]) for c in contests} == {("network", 1), ("layer", 1), ("ceiling", 1)}
    networks = [c for c in contests if c.name["scope"] == "network"]
    assert len(networks) == latency.SEEDS * len(latency.BATCHES["cuda"])
    assert {c.prepare.args[-1] for c in networks} == {latency.SURVEY}
    short = list(latency._contests(None, "cuda", "short"))
    assert [c.name["batch"] for c in short] == list(latency.BATCHES["cuda"])


def test_gpu_results_lie_below_the_name_of_the_gpu(monkeypatch):
    monkeypatch.setattr(latency.records, "hardware", lambda device: "NVIDIA H100 80GB HBM3")
    assert latency.folder("paper", "cuda").name == latency.folder("", "cuda").name == "h100"
    assert latency.folder("quick", "cpu").name == "quick"


def test_cuda_without_a_gpu_says_what_is_missing(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match="CPU kernels"):
        latency.benchmark(profiles.load("quick"), "cuda", "own", tmp_path / "latency.csv")
