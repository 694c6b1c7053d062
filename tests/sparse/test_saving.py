"""Files of sparse models: what is saved comes back, and what is wrong with a file is said before anything runs."""

import contextlib
import copy
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision import models

from reprolib.files import paths, tensors
from reprolib.models import vgg16
from reprolib.sparse import SparseNetwork, cpu, describe, load, save, seams, sparsify
from reprolib.sparse.cpu import avx512, avx512bf16


@torch.no_grad()
def pruned(model, density=0.3, seed=0):
    """The model in eval mode, with random numbers everywhere and zeros in the weights of its layers."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / max(1, parameter[0].numel()) ** 0.5)
            if isinstance(module, (nn.Conv2d, nn.Linear)) and parameter is module.weight:
                parameter[torch.rand(parameter.shape, generator=generator) >= density] = 0
        if getattr(module, "running_var", None) is not None:
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
    return model.eval()


def images(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """Two islands, and between them what torch runs: a layer with its weight in a module, and a tensor of its own."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.circular = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.last = nn.Linear(8, 5)

    def forward(self, x, flip: bool = False):
        x = F.relu(self.norm(self.first(x)))
        x = F.max_pool2d(self.circular(x), 2, ceil_mode=True)
        if flip:
            x = x.flip(3)
        return self.last((self.scale * x).mean((2, 3))), {"maps": x[..., None, :1]}


@pytest.fixture
def sparse():
    return sparsify(pruned(Net()))


@pytest.fixture
def file(sparse, tmp_path):
    save(sparse, tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


def text_of(path):
    with safe_open(path, "pt") as opened:
        return json.loads(opened.metadata()["network"])


def change(path, edit, parts=None):
    """Let `edit` change the text of a file, as a stranger could: the checksum is right."""
    text = text_of(path)
    edit(text)
    notes = tensors.notes(path) | {"network": json.dumps(text)}
    tensors.write(path, tensors.read(path) | (parts or {}), notes)


# --- What comes back --------------------------------------------------------------------------------------------------


def test_outputs_and_description_come_back(sparse, file):
    loaded, x = load(file), images(3, 3, 9, 9)
    (y, rest), (z, others) = sparse(x), loaded(x)
    assert torch.equal(y, z) and torch.equal(rest["maps"], others["maps"])
    assert describe(loaded).equals(describe(sparse)) and len(describe(loaded)) == 3
    assert describe(loaded).loc["circular", "runs_in"] == "torch: padding_mode 'circular' is not supported"
    assert set(loaded.state_dict()) == set(sparse.state_dict())
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in sparse.state_dict().items())
    assert not any(module.training for module in loaded.modules())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    with pytest.raises(ValueError, match="flip has a value"):
        loaded(x, flip=True)


def test_file_in_full(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Tanh()).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([3.0, 0])[:, None, None, None])
        model[0].bias.copy_(torch.tensor([1.0, 2]))
    save(sparsify(model), tmp_path / "net.safetensors")
    assert tensors.notes(tmp_path / "net.safetensors").keys() == {"format", "version", "network"}
    assert text_of(tmp_path / "net.safetensors") == {
        "name": "Sequential",
        "nodes": [
            {"op": "placeholder", "target": "input", "args": [], "kwargs": []},
            {"op": "call_module", "target": "island0", "args": [{"node": 0}], "kwargs": []},
            {"op": "call_function", "target": "operator.getitem", "args": [{"node": 1}, 0], "kwargs": []},
            {"op": "call_module", "target": "2", "args": [{"node": 2}], "kwargs": []},
            {"op": "output", "target": "output", "args": [{"node": 3}], "kwargs": []},
        ],
        "modules": {
            "island0": {
                "inputs": [True],
                "operations": [
                    {
                        "kind": "Convolution", "source": 0, "weight": "0", "stride": [1, 1], "padding": [0, 0],
                        "dilation": [1, 1], "groups": 1, "addend": None, "activation": "relu", "pool": False,
                    }
                ],
                "outputs": [1],
                "layers": ["0"],
                "dtype": "float32",
            },
            "2": {"kind": "Tanh", "arguments": {}},
        },
        "tensors": [],
        "types": {"island0/0.weight": "float32", "island0/0.bias": "float32"},
        "shared": {},
        "reasons": {},
    }  # fmt: skip
    parts = {name: part.tolist() for name, part in load_file(tmp_path / "net.safetensors").items()}
    assert parts == {"island0/0.weight.kept": [3], "island0/0.weight.mask": [0b10000000], "island0/0.bias": [1, 2]}


FRESH = """
import sys, torch
torch.set_num_threads(1)
from reprolib.sparse import load
model = load(sys.argv[1])
assert not {"torchvision", "tests", "reprolib.training"} & set(sys.modules)
torch.save(model(torch.load(sys.argv[2])), sys.argv[3])
"""


def test_a_fresh_process_gives_the_same_bits(tmp_path):
    sparse, x = sparsify(pruned(models.resnet18(num_classes=10), 0.1)), images(2, 3, 64, 64)
    save(sparse, tmp_path / "net.safetensors")
    torch.save(x, tmp_path / "x.pt")
    names = [str(tmp_path / name) for name in ("net.safetensors", "x.pt", "y.pt")]
    subprocess.run(
        [sys.executable, "-c", FRESH, *names], cwd=paths.ROOT, check=True, env=os.environ | {"PYTHONPATH": ""}
    )
    assert torch.equal(torch.load(names[2]), sparse(x))
    state = sum(tensor.nbytes for tensor in models.resnet18(num_classes=10).state_dict().values())
    size = (tmp_path / "net.safetensors").stat().st_size
    assert 0.10 + 1 / 32 < size / state < 0.15
    save(sparse, tmp_path / "net.safetensors", dtype=torch.float16)
    assert 0.05 + 1 / 32 < (tmp_path / "net.safetensors").stat().st_size / state < 0.09


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_weights(sparse, tmp_path, dtype):
    save(sparse, tmp_path / "net.safetensors", dtype=dtype)
    rounded = copy.deepcopy(sparse)
    with torch.no_grad():
        for name, tensor in rounded.state_dict().items():
            if tensor.dim() > 1 or name.endswith("values"):
                tensor.copy_(tensor.to(dtype))
    loaded, x = load(tmp_path / "net.safetensors"), images(2, 3, 8, 8)
    assert {name: t.dtype for name, t in loaded.state_dict().items()} == {
        name: t.dtype for name, t in sparse.state_dict().items()
    }
    assert torch.equal(loaded(x)[0], rounded(x)[0]) and not torch.equal(loaded(x)[0], sparse(x)[0])


def test_weights_too_large_for_float16(tmp_path):
    model = pruned(nn.Sequential(nn.Conv2d(3, 4, 3)))
    with torch.no_grad():
        model[0].weight[0, 0] = 70_000
    with pytest.raises(ValueError, match=r"island0/0\.weight has weights up to 7e\+04, too large .*: take bfloat16"):
        save(sparsify(model), tmp_path / "net.safetensors", dtype=torch.float16)
    assert not list(tmp_path.iterdir())
    save(sparsify(model), tmp_path / "net.safetensors", dtype=torch.bfloat16)


def test_a_model_in_bfloat16_stays_one(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "instruction_sets", lambda pairs=False: (avx512bf16,) if pairs else (avx512,))
    sparse = sparsify(pruned(Net()), dtype=torch.bfloat16)
    save(sparse, tmp_path / "net.safetensors")
    loaded = load(tmp_path / "net.safetensors")
    assert loaded.island0.dtype == torch.bfloat16 and loaded.island0.layer("first").values.dtype == torch.bfloat16
    assert describe(loaded).equals(describe(sparse))
    monkeypatch.setattr(cpu, "instruction_sets", lambda pairs=False: () if pairs else (avx512,))
    with pytest.raises(RuntimeError, match="bfloat16 needs a CPU with the instructions avx512_bf16"):
        load(tmp_path / "net.safetensors")


@pytest.mark.parametrize("kind", [torch.float16, torch.float64])
def test_types_stay(tmp_path, kind):
    model = pruned(Net()).to(kind)
    save(sparsify(model), tmp_path / "net.safetensors")
    loaded, x = load(tmp_path / "net.safetensors"), images(2, 3, 8, 8).to(kind)
    assert torch.equal(loaded(x)[0], sparsify(model)(x)[0]) and loaded(x)[0].dtype == kind


def test_a_loaded_model_is_a_model(sparse, file, tmp_path):
    x = images(2, 3, 8, 8)
    expected, loaded = sparse(x)[0], load(str(file), device="cpu")
    for again in (loaded, torch.compile(loaded)):
        save(again, tmp_path / "again.safetensors")
        assert tensors.notes(tmp_path / "again.safetensors") == tensors.notes(file)
        stored, others = load_file(file), load_file(tmp_path / "again.safetensors")
        assert stored.keys() == others.keys() and all(torch.equal(stored[name], others[name]) for name in stored)
    for twin in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded)), sparsify(loaded)):
        assert torch.equal(twin(x)[0], expected)
    loaded.island0.layer("first").bias += 1
    assert not torch.equal(loaded(x)[0], expected)


def test_tensors_that_are_one_are_stored_once(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.a, self.b = nn.Conv2d(3, 8, 3), nn.LayerNorm(6), nn.LayerNorm(6)
            self.b.weight, self.b.bias = self.a.weight, self.a.bias

        def forward(self, x):
            return self.b(self.a(self.conv(x)))

    sparse = sparsify(pruned(Tied()))
    save(sparse, tmp_path / "net.safetensors")
    assert set(load_file(tmp_path / "net.safetensors")) >= {"a.weight", "a.bias"}
    assert not {"b.weight", "b.bias"} & set(load_file(tmp_path / "net.safetensors"))
    loaded = load(tmp_path / "net.safetensors")
    assert loaded.a.weight.data_ptr() == loaded.b.weight.data_ptr()
    assert torch.equal(loaded(images(1, 3, 8, 8)), sparse(images(1, 3, 8, 8)))


@pytest.mark.parametrize("seed", range(3))
def test_random_numbers_are_left_alone(file, seed):
    torch.manual_seed(seed)
    before = torch.get_rng_state()
    load(file)
    assert torch.equal(torch.get_rng_state(), before)


def between(part):
    """What a seam does with maps of four channels, between two islands."""

    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.part = part if isinstance(part, nn.Module) else None

        def forward(self, x):
            x = self.a(x)
            return self.b(part(x) if self.part is None else self.part(x))

    return pruned(Between())


SEAMS = [
    lambda x: x[:, [1, 0, 3, 2]],
    lambda x: x[:, :, ::2, ...],
    lambda x: torch.einsum("nchw,cd->ndhw", x, x[0, :, 0, :4]),
    lambda x: torch.cat((x.chunk(2, 1)[1], torch.split(x, 2, dim=1)[0]), 1),
    lambda x: (
        x.view(x.shape[0], 2, 2, x.shape[2], x.shape[3]).transpose(1, 2).reshape(x.size(0), -1, x.size(2), x.size(3))
    ),
    lambda x: x.masked_fill(x < 0, float("-inf")).clamp(min=-9.0),
    lambda x: x.to(torch.float64).to(x.dtype),
    lambda x: x.to(memory_format=torch.channels_last),
    lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"),
    lambda x: F.pad(x, (1, 0, 2, 1), value=0.5),
    lambda x: F.gelu(x) * torch.softmax(x, 1),
    lambda x: F.adaptive_max_pool2d(x, 3),
    lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    lambda x: x.mT.transpose(2, 3),
    lambda x: torch.where(x > 0, x, 1 / (2 - x) ** 2),
    lambda x: x.clone().add_(1).index_select(1, torch.tensor([3, 2, 1, 0])),
    nn.GroupNorm(2, 4),
    nn.InstanceNorm2d(4, affine=True),
    nn.LocalResponseNorm(3),
    nn.ConvTranspose2d(4, 4, 2, stride=2),
    nn.Conv2d(4, 4, 3, padding="same", padding_mode="reflect", bias=False),
    nn.BatchNorm2d(4, track_running_stats=False),
    nn.PReLU(4),
    nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
    nn.PixelUnshuffle(1),
    nn.AvgPool2d(3, 1, 1, count_include_pad=False),
    nn.LPPool2d(2, 2),
    nn.Hardtanh(-2, 2),
    nn.ZeroPad2d((1, 2, 0, 1)),
    nn.Softmax(dim=1),
    nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    nn.Threshold(0.1, -1.0),
]


@pytest.mark.parametrize("part", SEAMS, ids=lambda part: type(part).__name__)
def test_seams_come_back(tmp_path, part):
    sparse, x = sparsify(between(part)), images(2, 3, 8, 8)
    save(sparse, tmp_path / "net.safetensors")
    assert torch.equal(load(tmp_path / "net.safetensors")(x), sparse(x))
    assert len([module for module in sparse.modules() if isinstance(module, SparseNetwork)]) == 2


def test_attention_comes_back(tmp_path):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows, self.norm, self.last = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.other = nn.MultiheadAttention(8, 2, bias=False, add_bias_kv=True, kdim=8, vdim=8, batch_first=True)

        def forward(self, x):
            x = self.norm(self.rows(x))
            x = x + self.attention(x, x, x, need_weights=False)[0]
            return self.last(x + self.other(x, x, x)[0])

    sparse, x = sparsify(pruned(Attention())), images(2, 5, 6)
    save(sparse, tmp_path / "net.safetensors")
    assert torch.equal(load(tmp_path / "net.safetensors")(x), sparse(x))
    assert describe(load(tmp_path / "net.safetensors")).equals(describe(sparse))


@pytest.mark.parametrize("kind", seams.MODULES)
def test_every_module_on_the_list_is_made_again_from_its_attributes(kind):
    given = {
        "num_features": 4, "in_channels": 4, "out_channels": 4, "kernel_size": 2, "output_size": 3, "num_channels": 4,
        "num_groups": 2, "normalized_shape": (4, 4), "padding": 1, "in_features": 4, "out_features": 3, "groups": 2,
        "in1_features": 3, "in2_features": 2, "num_embeddings": 5, "embedding_dim": 3, "embed_dim": 4, "num_heads": 2,
        "dim": 1, "unflattened_size": (2, 2), "upscale_factor": 2, "downscale_factor": 2, "size": 4, "value": 0.5,
        "threshold": 0.5, "norm_type": 2.0, "affine": True, "bias": True, "eps": 0.25, "inplace": True, "p": 0.25,
    }  # fmt: skip
    names = set(seams._parameters(getattr(nn, kind)))
    module = getattr(nn, kind)(**{name: value for name, value in given.items() if name in names}).eval()
    written = json.loads(json.dumps(seams.written_module(module, "m")))
    again = seams.module_of(written)
    assert repr(again) == repr(module) and again.state_dict().keys() == module.state_dict().keys()


def test_all_names_on_the_lists_are_of_torch():
    assert {name for name in seams.CALCULATIONS if not (hasattr(torch, name) or hasattr(torch.Tensor, name))} == set()
    assert {name for name in seams.FUNCTIONAL if not hasattr(F, name)} == set()
    assert {name for name in seams.METHODS if not hasattr(torch.Tensor, name)} == set()
    assert not seams.METHOD_NAMES & {"set_", "resize_", "as_strided", "as_strided_", "apply_", "map_", "numpy", "type"}


# --- What can't be saved ----------------------------------------------------------------------------------------------


class Doubled(nn.ReLU):
    def forward(self, x):
        return 2 * super().forward(x) if bool((x > 100).any()) else super().forward(x)


def hooked():
    module = nn.Tanh()
    module.register_forward_hook(lambda module, args, y: y + 1)
    return module


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Doubled(), "module part can't be written to a file: Doubled is no module of torch.nn on the list"),
        (hooked(), "module part can't be written to a file: it has hooks"),
        (nn.LSTM(8, 8), r"(module part|node \w+) can't be written to a file"),
        (
            lambda x: torch.linalg.inv(x),
            r"node linalg_inv can't be written to a file: .*inv is no function of torch on",
        ),
        (lambda x: x.cholesky(), "node cholesky can't be written to a file: method cholesky is not on the list"),
        (lambda x: x.grad_fn, "node getattr_1 can't be written to a file: attribute grad_fn is not on the list"),
    ],
)
def test_a_seam_that_cant_be_written_is_named(tmp_path, part, message):
    sparse = sparsify(between(part))
    with pytest.raises(ValueError, match=rf"{message}.*; keep it with torch\.save"):
        save(sparse, tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


def test_what_is_no_sparse_model_is_refused(tmp_path, sparse):
    for model in (
        nn.Sequential(sparse),
        nn.Conv2d(3, 4, 3),
        sparsify(nn.Conv2d(3, 4, 3).eval()),
        torch.fx.symbolic_trace(nn.ReLU()),
    ):
        with pytest.raises(ValueError, match="has no sparse part of its own: give save what sparsify returned"):
            save(model, tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match=r"dtype torch\.float64 is not supported"):
        save(sparse, tmp_path / "net.safetensors", dtype=torch.float64)
    with pytest.raises(OSError):
        save(sparse, tmp_path)
    assert not list(tmp_path.iterdir())


# --- Files that are wrong ---------------------------------------------------------------------------------------------


def test_damaged_foreign_and_newer_files(file, tmp_path):
    whole = file.read_bytes()
    for length in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"net\.safetensors is damaged.*: write it again"):
            load(file)
    flipped = bytearray(whole)
    flipped[-3] ^= 4
    file.write_bytes(flipped)
    with pytest.raises(ValueError, match=r"net\.safetensors is damaged.*checksum"):
        load(file)
    save_file({"w": torch.ones(3)}, file)
    with pytest.raises(ValueError, match=r"net\.safetensors is no sparse model: give load a file that"):
        load(file)
    file.write_bytes(whole)
    tensors.write(file, tensors.read(file), tensors.notes(file) | {"version": "2"})
    with pytest.raises(ValueError, match=r"is of version 2, and this reprolib reads version 1: install a newer"):
        load(file)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "other.safetensors")


def node(kind, target):
    return lambda text: next(node for node in text["nodes"] if node["op"] == kind and node["target"] == target)


def set_node(kind, name, **values):
    return lambda text: node(kind, name)(text).update(values)


def set_operation(**values):
    return lambda text: text["modules"]["island0"]["operations"][0].update(values)


def call_module(name):
    """Call a module that needs no tensors under this name."""

    def edit(text):
        text["modules"][name] = {"kind": "Tanh", "arguments": {}}
        node("call_module", "circular")(text)["target"] = name

    return edit


WRONG = {
    "a function of Python": set_node("call_function", "functional.max_pool2d", target="os.system"),
    "eval": set_node("call_function", "functional.max_pool2d", target="builtins.eval"),
    "a method that is not on the list": set_node("call_method", "mean", target="set_"),
    "a private attribute": set_node(
        "call_function", "operator.mul", target="getattr", args=[{"node": 0}, "__class__"]
    ),
    "an attribute that is a value": set_node(
        "call_function", "operator.mul", target="getattr", args=[{"node": 0}, {"node": 0}]
    ),
    "code as an argument's name": set_node("placeholder", "x", target="x=__import__('os').system('true')"),
    "code as a keyword": set_node("call_method", "mean", kwargs=[["dim=(print(1))", 1]]),
    "code as a module's name": call_module('a", print(1)) or ("'),
    "a name of Python's": call_module("__class__"),
    "a name of torch.fx": call_module("forward"),
    "an attribute of torch.fx": call_module("meta"),
    "a name below one of torch.fx": call_module("_modules.a"),
    "a class name that is code": lambda text: text.update(name="A; print(1)"),
    "a module of somebody": lambda text: text["modules"]["circular"].update(kind="os.system"),
    "a module that is none": lambda text: text["modules"]["circular"].update(kind="Module"),
    "an argument that is not there": lambda text: text["modules"]["circular"]["arguments"].update(device="cuda"),
    "another shape": lambda text: text["modules"]["circular"]["arguments"].update(out_channels=9),
    "a node from the future": set_node("call_method", "mean", args=[{"node": 99}]),
    "a negative node": set_node("call_method", "mean", args=[{"node": -1}]),
    "an argument twice": set_node("placeholder", "flip", target="x"),
    "no output": lambda text: text["nodes"].pop(),
    "an unknown kind of node": set_node("call_method", "mean", op="call"),
    "an unknown kind of value": set_node("call_method", "mean", args=[{"node": 0}, {"code": "1"}]),
    "a type that is none": lambda text: text["types"].update({"scale": "__class__"}),
    "an operation that is none": set_operation(kind="Graph"),
    "a source behind": set_operation(source=1),
    "a source before": set_operation(source=-1),
    "a source that is a bool": set_operation(source=True),
    "an addend behind": set_operation(addend=7),
    "a stride of zero": set_operation(stride=[0, 1]),
    "a large stride": set_operation(stride=[1, 1 << 40]),
    "three strides": set_operation(stride=[1, 1, 1]),
    "a padding below zero": set_operation(padding=[-1, 1]),
    "a large padding": set_operation(padding=[1 << 31, 1]),
    "a dilation that is a fraction": set_operation(dilation=[1.5, 1]),
    "groups that do not divide": set_operation(groups=3),
    "no groups": set_operation(groups=0),
    "an activation that is none": set_operation(activation="exec"),
    "a pool that is a number": set_operation(pool=1),
    "a weight that is not there": set_operation(weight="other"),
    "rows where maps are": lambda text: text["modules"]["island0"].update(inputs=[False]),
    "inputs that are numbers": lambda text: text["modules"]["island0"].update(inputs=[1]),
    "an output that is not there": lambda text: text["modules"]["island0"].update(outputs=[5]),
    "no inputs": lambda text: text["modules"]["island0"].update(inputs=[]),
    "a type without kernels": lambda text: text["modules"]["island0"].update(dtype="int64"),
    "integers as weights": lambda text: text["types"].update({"island0/first.weight": "int32"}),
    "nothing": lambda text: text.clear(),
}  # fmt: skip


@pytest.mark.parametrize("edit", WRONG.values(), ids=WRONG.keys())
def test_a_text_that_asks_for_something_else_is_refused(file, edit):
    change(file, edit)
    with pytest.raises(ValueError, match=r"net\.safetensors is damaged .*: save the model again"):
        load(file)


@pytest.mark.parametrize(
    "parts",
    [
        {"island0/first.weight": torch.ones(8, 3, 3)},
        {"island0/first.weight": torch.ones(8, 0, 3, 3)},
        {"island0/first.bias": torch.ones(7)},
        {"circular.weight": torch.ones(8, 8, 5, 5)},
        {"circular.weight": torch.ones(8, 8, 3, 3, dtype=torch.int64)},
        {"stranger": torch.ones(1)},
    ],
    ids=lambda parts: str({name: tuple(tensor.shape) for name, tensor in parts.items()}),
)
def test_tensors_that_do_not_fit_are_refused(file, parts):
    types = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in parts.items() if name != "stranger"}
    change(file, lambda text: text["types"].update(types), parts)
    with pytest.raises(ValueError, match=r"net\.safetensors is damaged"):
        load(file)


VALUES = [
    None,
    True,
    -1,
    0,
    1,
    2,
    3,
    7,
    1 << 40,
    0.5,
    "",
    "x",
    "relu",
    [],
    [1, 1],
    [0],
    {},
    {"node": 0},
    {"tuple": [3]},
]


@settings(max_examples=60)
@given(data=st.data())
def test_any_change_of_the_text_is_refused_or_runs(tmp_path_factory, data):
    """Whatever a stranger writes: an error of Python, or a result; the process lives."""
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    if not path.exists():
        save(sparsify(pruned(Net())), path)

    def edit(text):
        here, key = {"text": text}, "text"
        while isinstance(here[key], (dict, list)) and len(here[key]) and data.draw(st.integers(0, 9)):
            here = here[key]
            key = data.draw(st.sampled_from(sorted(here) if isinstance(here, dict) else range(len(here))))
        here[key] = data.draw(st.sampled_from(VALUES))

    whole = path.read_bytes()
    try:
        change(path, edit)
        model = load(path)
    except ValueError as problem:
        assert "is damaged" in str(problem) or "'__metadata__'" in str(problem)
        return
    finally:
        path.write_bytes(whole)
    with contextlib.suppress(Exception):  # what torch says of such calls
        model(images(2, 3, 8, 8))


# --- The command ------------------------------------------------------------------------------------------------------


def command(*arguments, cwd):
    call = [sys.executable, "-m", "reprolib.sparse", *map(str, arguments)]
    return subprocess.run(
        call, cwd=cwd, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(paths.ROOT)}
    )


def test_from_a_checkpoint_to_a_file(tmp_path):
    model, x = pruned(vgg16(7, width=1 / 16), 0.1), images(2, 3, 32, 32)
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "c.pt")
    made = "reprolib.models:vgg16", "c.pt", "net.safetensors", "num_classes=7", "width=0.0625"
    done = command(*made, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert torch.equal(load(tmp_path / "net.safetensors")(x), sparsify(model)(x))
    size, dense = (tmp_path / "net.safetensors").stat().st_size, sum(t.nbytes for t in model.state_dict().values())
    assert f"net.safetensors: {size / 1e6:.2f} MB, {size / dense:.1%} of the {dense / 1e6:.2f} MB" in done.stdout
    assert "code made for the weights" in done.stdout or "Numba" in done.stdout


def test_checkpoints(tmp_path):
    from reprolib.sparse.__main__ import fill, state_dict

    model = pruned(vgg16(7, width=1 / 16), 0.1)
    state = model.state_dict()
    tensors.write(tmp_path / "run.safetensors", state)  # as a run of an experiment keeps it
    save_file(state, tmp_path / "plain.safetensors")
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"model": state, "optimizer": {"lr": 0.1}}, tmp_path / "inside.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("run.safetensors", "plain.safetensors", "plain.pt", "inside.pt", "old.pt"):
        other = vgg16(7, width=1 / 16)
        fill(other, state_dict(tmp_path / name), tmp_path / name)
        assert all(torch.equal(tensor, other.state_dict()[key]) for key, tensor in state.items()), name


DENSE = vgg16(3, width=0.0625).state_dict()


@pytest.mark.parametrize(
    ("network", "written", "message"),
    [
        ("torchvision.models:resnet99", {}, "there is no 'torchvision.models:resnet99' .*MODULE:FUNCTION"),
        ("nowhere:net", {}, "there is no 'nowhere:net' .*must be in this folder or installed"),
        ("vgg16", {}, "there is no 'vgg16'"),
        (
            "reprolib.models:vgg16 classes=3",
            {},
            r"could not be called \(.*'classes'\): give its arguments as name=value",
        ),
        ("reprolib.models:vgg16 3", {}, "argument '3' of the network is not name=value"),
        ("reprolib.models:NAMES", {}, "could not be called"),
        ("builtins:dict", {}, "builtins:dict gives a dict, and a torch.nn.Module is needed"),
        ("torch.nn:Identity", {"w": torch.ones(1)}, "does not fit the network, are its arguments right?"),
        ("torch.nn:Identity", {"model": 7}, r"c\.pt has no state_dict \(int\)"),
        (
            "torch.nn:Identity",
            vgg16,
            r"c\.pt is damaged, or holds more than tensors .*: write torch\.save\(model\.state",
        ),
        ("reprolib.models:vgg16 num_classes=3 width=0.0625", DENSE, r"c\.pt has no zeros: prune the network first"),
        ("torch.nn:Identity", {}, r"c\.pt has no zeros: prune the network first"),
    ],
)
def test_errors_of_the_command(tmp_path, monkeypatch, network, written, message):
    from reprolib.sparse import __main__ as module

    torch.save(written, tmp_path / "c.pt")
    name, *arguments = network.split()
    monkeypatch.setattr(
        sys, "argv", ["sparse", name, str(tmp_path / "c.pt"), str(tmp_path / "net.safetensors"), *arguments]
    )
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        module.main()
    assert not (tmp_path / "net.safetensors").exists()
