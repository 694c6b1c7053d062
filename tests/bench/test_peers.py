"""Engines in other processes: a tiny one of our own stands in for them, so nothing needs to be installed."""

import io
import json
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reprolib.bench import engine, latency, peers, rivals, timing
from reprolib.experiments import profiles
from reprolib.files import environment
from reprolib.models import vgg16

FAKE = """
    import json, sys
    import numpy as np

    name, threads = sys.argv[1:]
    if name == "OpenVINO":
        print(json.dumps({"error": "ModuleNotFoundError: No module named 'openvino'"}), flush=True)
        sys.exit()
    if name == "ONNX Runtime":
        sys.exit(3)
    print(json.dumps({"version": "0.1"}), flush=True)
    networks = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["do"] == "load":
            with np.load(asked["weights"]) as arrays:
                networks[asked["network"]] = arrays["images"][0].mean(axis=(1, 2, 3))
            answer = {}
        elif asked["do"] == "run":
            answer = {"logits": networks[asked["network"]].tolist()}
        elif asked["do"] == "time":
            answer = {"us": 12.5} if asked["network"] in networks else {"error": "KeyError: gone"}
        else:
            networks.clear()
            answer = {}
        print(json.dumps(answer), flush=True)
"""


class Mean(nn.Flatten):
    """What the stand-in computes, whatever the layers are."""

    def forward(self, x):
        return x.mean(dim=(1, 2, 3))


class Doubled(Mean):
    """What it does not compute."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """The peers, with a script that knows nothing but one engine; and what users are told."""
    script = tmp_path / "fake.py"
    script.write_text(textwrap.dedent(FAKE))
    told = []
    monkeypatch.setattr(peers.tqdm, "write", told.append)
    monkeypatch.setattr(peers, "compiler_fault", lambda: "InvalidCxxCompiler: no working C++ compiler found")
    monkeypatch.setattr(
        peers, "write_network", lambda path, _, inputs: np.savez(path, images=torch.stack(inputs).numpy())
    )
    with peers.running(2, Path(sys.executable), script) as found:
        yield found, told


def images(batch=2):
    return [torch.full((batch, 3, 4, 4), float(n)) for n in range(1, 3)]


def test_one_line_says_of_each_engine_why_it_is_left_out(fake):
    found, told = fake
    assert str(found) == "DeepSparse 0.1"
    assert told == [
        "left out: OpenVINO: ModuleNotFoundError: No module named 'openvino'",
        "left out: ONNX Runtime ended without an answer, with status 3",
        environment.PEERS_LICENCE,
        "left out: torch.compile: InvalidCxxCompiler: no working C++ compiler found",
    ]


def test_contender_in_another_process_takes_its_turns_with_the_others(fake):
    found, _ = fake
    about = {"pattern": "hybrid", "spec": "Balanced(4) & Block(4, 4)", "target_sparsity": 0.9, "sparsity": 0.9}
    contender = peers.peer_contender(found.engines[0], nn.Sequential(Mean()), images(), **about)
    own = timing.Contender("sparse kernels", "fp32", lambda: None)
    theirs, _ = timing.measure([contender, own], "cpu")
    assert theirs["latency_us"] == 12.5 and theirs["implementation"] == "DeepSparse 0.1"
    assert theirs["dtype"] == "fp32" and theirs["pattern"] == "hybrid" and theirs["spec"] == about["spec"]


def test_dense_network_is_for_all_engines_in_the_types_that_are_usable(fake, monkeypatch):
    found, _ = fake
    monkeypatch.setitem(peers.TYPES, "DeepSparse", ("fp32", "bf16"))
    for multiplies_bf16, expected in ((False, ["fp32"]), (True, ["fp32", "bf16"])):
        monkeypatch.setattr(peers, "usable", lambda dtype, _, has=multiplies_bf16: dtype if has else "fp32")
        contenders = list(peers.dense_contenders(nn.Sequential(Mean()), images(), found))
        assert [contender.dtype for contender in contenders] == expected


@pytest.mark.parametrize("wrong", [False, True])
def test_compiled_network_is_held_against_torch_too(wrong, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **_: (lambda x: 2 * model(x)) if wrong else model)
    monkeypatch.setattr(peers, "usable", lambda dtype, _: dtype)
    found = peers.dense_contenders(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten()), images(), peers.Peers((), True))
    if wrong:
        with pytest.raises(RuntimeError, match=r"torch\.compile, fp32, dense"):
            list(found)
    else:
        assert [(each.implementation, each.dtype) for each in found] == [(peers.COMPILED, t) for t in ("fp32", "bf16")]


def test_missing_compiler_is_told_in_one_line(monkeypatch):
    def compile(function):
        raise RuntimeError("No working C++ compiler found\nand a long story")

    monkeypatch.setattr(torch, "compile", compile)
    assert peers.compiler_fault() == "RuntimeError: No working C++ compiler found"


def test_wrong_answer_is_an_error_that_names_the_engine(fake):
    found, _ = fake
    with pytest.raises(RuntimeError, match=r"DeepSparse 0\.1, fp32, dense: its logits are not torch's, by 5\.0e-01"):
        peers.peer_contender(found.engines[0], nn.Sequential(Doubled()), images())


def test_tolerance_is_that_of_the_type():
    expected = torch.tensor([[100.0, -50.0]])

    def contender(dtype, error):
        return timing.Contender("X 1", dtype, lambda: np.array([[100.0, -50.0 + error]]))

    for dtype, error in (("fp32", 0.05), ("bf16", 2.0)):
        peers.checked(contender(dtype, error), expected)
    for dtype, error in (("fp32", 2.0), ("bf16", 8.0), ("fp32", np.nan)):
        with pytest.raises(RuntimeError, match=f"X 1, {dtype}"):
            peers.checked(contender(dtype, error), expected)


def test_error_of_an_engine_is_ours_and_named(fake):
    found, _ = fake
    with pytest.raises(RuntimeError, match=r"^DeepSparse: KeyError: gone$"):
        found.engines[0].ask(do="time", network=7)


def test_released_networks_are_gone_and_processes_end_with_the_block(fake):
    found, _ = fake
    [peer] = found.engines
    contender = peers.peer_contender(peer, nn.Sequential(Mean()), images())
    found.release()
    with pytest.raises(RuntimeError, match="gone"):
        contender.time_us()
    peer.process.kill()
    peer.process.wait()
    with pytest.raises(RuntimeError, match="DeepSparse ended without an answer"):
        peer.release()


def test_processes_end_with_the_block(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "compiler_fault", lambda: "none")
    script = tmp_path / "fake.py"
    script.write_text(textwrap.dedent(FAKE))
    with peers.running(1, Path(sys.executable), script) as found:
        [peer] = found.engines
        assert peer.process.poll() is None
    assert peer.process.poll() is not None


def test_missing_environment_names_the_command(tmp_path):
    with (
        pytest.raises(RuntimeError, match=r"there is no \.venv-peers: make bench-peers builds it"),
        peers.running(1, tmp_path / "python"),
    ):
        pass


def test_pruned_networks_go_to_the_engine_that_uses_zeros_where_asked(fake, monkeypatch):
    found, _ = fake
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 10)).eval()
    networks = [rivals.Network({}, model, model), rivals.Network({"pattern": "block"}, model, model)]
    asked = []
    monkeypatch.setattr(rivals, "_dense_contenders", lambda *_: [])
    monkeypatch.setattr(rivals.sparse, "sparsify", lambda model, **_: model)
    monkeypatch.setattr(peers, "dense_contenders", lambda *_: [])
    monkeypatch.setattr(peers, "peer_contender", lambda *_, pattern: asked.append(pattern))
    for company, pruned_peers, expected in ((found, True, ["block"]), (found, False, []), (None, True, [])):
        asked.clear()
        rivals._contenders(networks, images(), "cpu", company, pruned_peers)
        assert asked == expected


def test_full_width_and_the_first_seed_are_for_pruned_peers():
    contests = latency._contests(profiles.load("laptop"), "cpu", "all", peers.Peers((), False))
    found = {
        (c.name["width"], c.name["seed"]): c.prepare.keywords["pruned_peers"]
        for c in contests
        if c.name["scope"] == "network"
    }
    assert {key for key, value in found.items() if value} == {(1.0, 0)} and (0.25, 1) in found


# --- The other end of the pipe ----------------------------------------------------------------------------------------


def talk(monkeypatch, load, *commands):
    answers = []
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(json.dumps(command) + "\n" for command in commands)))
    engine.serve(load, answers.append)
    return answers


def test_engine_does_what_it_is_told_and_answers(monkeypatch):
    calls = []

    def load(weights, dtype):
        if dtype == "bf16":
            raise ValueError("no bf16 here")
        return lambda: calls.append(weights) or np.ones((1, 2), np.float32)

    answers = talk(
        monkeypatch,
        load,
        {"do": "load", "network": 0, "weights": "a.npz", "dtype": "fp32"},
        {"do": "run", "network": 0},
        {"do": "time", "network": 0},
        {"do": "load", "network": 1, "weights": "a.npz", "dtype": "bf16"},
        {"do": "release"},
        {"do": "run", "network": 0},
    )
    assert answers[:2] == [{}, {"logits": [[1.0, 1.0]]}]
    assert answers[2]["us"] > 0 and calls == ["a.npz"] * 3, "one call to look, one uncounted, one timed"
    assert answers[3:] == [{"error": "ValueError: no bf16 here"}, {}, {"error": "KeyError: 0"}]


def test_missing_engine_is_an_error_and_no_crash(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepsparse", None)
    with pytest.raises(ImportError):
        engine.networks_of("DeepSparse", 2)


def test_turn_ends_when_the_threads_are_idle(monkeypatch):
    now = {"cpu": 0.0, "slept": 0.0}
    spins_s = 0.055

    def sleep(seconds):
        now["cpu"] += max(0.0, min(seconds, spins_s - now["slept"]))
        now["slept"] += seconds

    monkeypatch.setattr(engine.time, "process_time", lambda: now["cpu"])
    monkeypatch.setattr(engine.time, "sleep", sleep)
    engine.rest()
    assert spins_s < now["slept"] < spins_s + 3 * engine.REST_S
    now["slept"], spins_s = 0.0, 0.0005
    engine.rest(engine.BRIEF_REST_S)
    assert spins_s < now["slept"] < spins_s + 3 * engine.BRIEF_REST_S
    now["slept"] = 0.1
    spins_s = 1e9  # never: patience ends
    engine.rest()
    assert now["slept"] < 0.1 + engine.LONGEST_REST_S + 2 * engine.REST_S


class Branches(nn.Module):
    """All operations that engines get."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(), nn.MaxPool2d(3, 2, 1)
        )
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2), nn.Conv2d(8, 8, 1)
        self.gate, self.head = nn.Conv2d(8, 8, 1), nn.Sequential(nn.Conv2d(16, 6, 1), nn.ReLU(), nn.MaxPool2d(2))
        self.classifier = nn.Linear(6, 5)

    def forward(self, x):
        x = self.stem(x)
        y = torch.relu(self.left(x) + self.right(x))
        y = y * torch.sigmoid(self.gate(nn.functional.adaptive_avg_pool2d(y, 1)))
        x = self.head(torch.cat([nn.functional.hardsigmoid(x), y], dim=1))
        return self.classifier(x.mean((2, 3)))


def by_operators(operations, arrays, images):
    """What the nodes of the ONNX file mean, by hand."""
    values = {"x0": images, "zero": 0.0, "six": 6.0} | arrays
    for number, operation in enumerate(operations, 1):
        y = None
        for operator, inputs, settings in engine._nodes(operation):
            a, *others = (y if name == "" else values[name] for name in inputs)
            pads, strides = settings.get("pads", [0, 0])[:2], settings.get("strides")
            y = {
                "Conv": lambda: F.conv2d(a, *others, strides, pads, settings["dilations"], settings["group"]),  # noqa: B023
                "Gemm": lambda: F.linear(a, *others),  # noqa: B023
                "MaxPool": lambda: F.max_pool2d(a, settings["kernel_shape"], strides, pads),  # noqa: B023
                "GlobalAveragePool": lambda: a.mean((2, 3), keepdim=True),  # noqa: B023
                "Flatten": lambda: a.flatten(1),  # noqa: B023
                "Add": lambda: a + others[0],  # noqa: B023
                "Mul": lambda: a * others[0],  # noqa: B023
                "Concat": lambda: torch.cat([a, *others], dim=settings["axis"]),  # noqa: B023
                "Relu": lambda: a.relu(),  # noqa: B023
                "Clip": lambda: a.clamp(*others),  # noqa: B023
                "Sigmoid": lambda: a.sigmoid(),  # noqa: B023
                "HardSigmoid": lambda: (settings["alpha"] * a + settings["beta"]).clamp(0, 1),  # noqa: B023
            }[operator]()
        values[f"x{number}"] = y
    return y


@pytest.mark.parametrize(("model", "size"), [(vgg16(10, 0.0625), 32), (Branches(), 20)], ids=["VGG-16", "branches"])
def test_written_network_holds_all_that_torch_computes(model, size, tmp_path):
    torch.manual_seed(0)
    model = model.eval().requires_grad_(False)
    inputs = [torch.randn(2, 3, size, size) for _ in range(2)]
    peers.write_network(tmp_path / "network.npz", model, inputs)
    with np.load(tmp_path / "network.npz") as found:
        operations = json.loads(str(found["operations"]))
        arrays = {name: torch.from_numpy(found[name]) for name in found if name != "operations"}
    torch.testing.assert_close(by_operators(operations, arrays, arrays["images"][1]), model(inputs[1]))


def test_folded_network_computes_the_same():
    torch.manual_seed(0)
    model, x = Branches().eval(), torch.randn(2, 3, 20, 20)
    folded = rivals._folded(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(x), model(x))


@pytest.mark.parametrize(
    "model", [nn.Sequential(nn.Conv2d(3, 4, 1), nn.GELU(), nn.Conv2d(4, 4, 1)), nn.GELU()], ids=str
)
def test_network_that_torch_runs_a_part_of_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="all of them"):
        peers.write_network(tmp_path / "network.npz", model.eval(), images())


def test_activation_without_an_operator_is_refused():
    with pytest.raises(ValueError, match="activation silu has no ONNX operator"):
        engine._activation("silu", "x0")
