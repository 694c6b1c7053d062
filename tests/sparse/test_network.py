"""Where a sparse model must live: in other modules, types, modes, threads and processes, with all that torch does."""

import concurrent.futures
import copy
import io
import multiprocessing
import pickle
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from reprolib.sparse import SparseNetwork, cpu, cuda, describe, network, sparsify


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
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) / 4)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
    return model.eval()


def images(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@torch.no_grad()
def error(sparse, dense, x):
    """Largest difference from the dense model in float64, relative to its largest output."""
    expected, y = copy.deepcopy(dense).double()(x.double()), sparse(x)
    assert (y.dtype, y.shape, y.device) == (x.dtype, expected.shape, x.device)
    return float((y - expected).abs().max() / expected.abs().max())


class Every(nn.Module):
    """All kinds of operations: strides, groups, dilation, sums, products, concatenations, pools, activations, rows."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.SiLU())
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, padding=2, dilation=2, groups=8)
        self.short = nn.Conv2d(8, 8, 1, stride=2)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.rows, self.last = nn.Linear(16 * 4, 12), nn.Linear(12, 5)

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(self.b(F.relu(self.a(x))) + x)
        x = F.hardswish(self.depthwise(x) + self.short(x))
        x = torch.cat((x, F.max_pool2d(F.relu6(x), 3, 1, 1)), 1)
        x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.last(F.relu(self.rows(torch.flatten(x, 1))))


class Seams(nn.Module):
    """Two islands, a seam between them with weights of its own, and an argument that is taken to be None."""

    def __init__(self):
        super().__init__()
        self.keys, self.circular = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
        self.last, self.norm = nn.Linear(8, 5), nn.BatchNorm1d(5)

    def forward(self, x, mask=None):
        return self.norm(self.last(F.max_pool2d(self.circular(self.keys(x)), 2, ceil_mode=True).mean((2, 3))))


@pytest.fixture(scope="module")
def dense():
    return pruned(Every())


@pytest.fixture
def sparse(dense):
    return sparsify(dense)


@pytest.fixture
def x():
    return images(3, 3, 4, 4)


def island(model):
    (found,) = (module for module in model.modules() if isinstance(module, SparseNetwork))
    return found


# --- Backends ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 17])
def test_every_operation(dense, sparse, batch):
    assert error(sparse, dense, images(batch, 3, 4, 4)) < 1e-5
    assert len(island(sparse).names) == 9 and sparse.graph.find_nodes(op="call_module", target="island0")


@pytest.mark.parametrize("batch", [1, 2, 17])
def test_every_operation_on_other_cpus(dense, sparse, batch, monkeypatch):
    monkeypatch.setattr(cpu, "instruction_sets", lambda pairs=False: ())
    assert error(sparse, dense, images(batch, 3, 4, 4)) < 1e-5
    runs_in = describe(sparse)["runs_in"]
    assert runs_in["a"] == runs_in["last"] == "Numba"
    assert runs_in["short"] == "torch: stride, dilation and groups must be 1"


@pytest.mark.parametrize("batch", [1, 2, 17])
def test_every_operation_through_the_gpu_kernels_specification(dense, batch, monkeypatch):
    monkeypatch.setattr(network, "backend_of", lambda device, dtype=torch.float32: cuda)
    assert error(sparsify(dense), dense, images(batch, 3, 4, 4)) < 1e-2


def chain(*layers):
    return pruned(nn.Sequential(*layers), seed=1)


@pytest.mark.parametrize("portable", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda: chain(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 5)),
        lambda: chain(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)),
        lambda: chain(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 1)),
        lambda: chain(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(128, 7), nn.ReLU(), nn.Linear(7, 5)),
    ],
)
def test_layers_whose_activations_stay_packed(make, portable, monkeypatch):
    model, x = make(), images(5, 3, 4, 4)
    if portable:
        monkeypatch.setattr(cpu, "instruction_sets", lambda pairs=False: ())
        assert error(sparsify(model), model, x) < 1e-5
    else:
        monkeypatch.setattr(network, "backend_of", lambda device, dtype=torch.float32: cuda)
        assert error(sparsify(model), model, x) < 1e-2


# --- State ------------------------------------------------------------------------------------------------------------


def test_state_dict_of_another_one_with_other_zeros(sparse, x):
    other = sparsify(pruned(Every(), density=0.5, seed=7))
    expected, before = other(x), sparse(x)
    assert set(sparse.state_dict()) == {
        f"island0.layers.{n.replace('.', '/')}.{part}"
        for n in island(sparse).names
        for part in ("bits", "values", "bias")
    }
    sparse.load_state_dict(other.state_dict())
    assert not torch.equal(before, expected) and torch.equal(sparse(x), expected)
    assert torch.equal(island(sparse).layer("a").weight(), island(other).layer("a").weight())


def test_state_dict_that_does_not_fit(sparse, x):
    before, state = sparse(x), sparse.state_dict()
    name = "island0.layers.a."
    for part, wrong in (("values", state[f"{name}values"][1:]), ("bits", state[f"{name}bits"] ^ 128)):
        message = r"island0\.layers\.a\.bits keep \d+ weights, and island0\.layers\.a\.values are \(\d+,\)"
        with pytest.raises(RuntimeError, match=message):
            sparse.load_state_dict(state | {name + part: wrong})
    with pytest.raises(RuntimeError, match=r"size mismatch for island0\.layers\.a\.bits"):
        sparse.load_state_dict(state | {f"{name}bits": state[f"{name}bits"][1:]})
    with pytest.raises(RuntimeError, match=r"Missing key.*island0\.layers\.a\.bias"):
        sparse.load_state_dict({key: value for key, value in state.items() if key != f"{name}bias"})
    assert torch.equal(sparse(x), before)


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("part", ["values", "bias"])
def test_what_is_written_counts_from_the_next_call_on(dense, sparse, x, part, mode, portable, monkeypatch):
    if portable:
        monkeypatch.setattr(cpu, "instruction_sets", lambda pairs=False: ())
    sparse(x)
    twin = copy.deepcopy(dense)
    with mode():
        getattr(island(sparse).layer("rows"), part).mul_(-2)
        (twin.rows.weight if part == "values" else twin.rows.bias).mul_(-2)
        assert error(sparse, twin, x) < 1e-5
    assert error(sparse, twin, x) < 1e-5


DUPLICATES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: torch.load(io.BytesIO(saved(model)), weights_only=False),
}


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()


@pytest.mark.parametrize("duplicate", DUPLICATES.values(), ids=DUPLICATES.keys())
@pytest.mark.parametrize("make", [Every, Seams])
@pytest.mark.parametrize("used", [False, True])
def test_copies(make, duplicate, used):
    sparse, x = sparsify(pruned(make())), images(3, 3, 4, 4)
    expected, size = sparse(x), len(pickle.dumps(sparsify(pruned(make()))))
    twin = duplicate(sparse if used else sparsify(pruned(make())))
    assert abs(len(pickle.dumps(sparse)) - size) < 1_000
    assert torch.equal(twin(x), expected) and describe(twin).equals(describe(sparse))
    for module in twin.modules():
        if isinstance(module, SparseNetwork):
            for layer in module.layers.values():
                layer.bias.fill_(9)
    assert torch.equal(sparse(x), expected) and not torch.equal(twin(x), expected)
    again = duplicate(twin)
    assert torch.equal(again(x), twin(x)) and len(describe(again)) == len(describe(sparse))


@pytest.mark.parametrize("name", ["keys", "values", "items", "layers", "a/b", "/", "//a"])
def test_layers_of_any_name(name, x):
    model = pruned(nn.Sequential(OrderedDict({name: nn.Conv2d(3, 4, 3), "last": nn.Sequential(nn.Conv2d(4, 4, 1))})))
    sparse = sparsify(model)
    assert error(sparse, model, x) < 1e-5
    assert list(island(sparse).names) == list(describe(sparse).index) == [name, "last.0"]
    copy.deepcopy(sparse).load_state_dict(sparse.state_dict())


# --- Types and devices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 1e-2), (torch.float64, 1e-5)])
@pytest.mark.parametrize("before", [True, False])
def test_half_bfloat16_and_double(dense, dtype, tolerance, before):
    change = {torch.float16: nn.Module.half, torch.bfloat16: nn.Module.bfloat16, torch.float64: nn.Module.double}[dtype]
    model = change(copy.deepcopy(dense))
    sparse, x = sparsify(model) if before else change(sparsify(dense)), images(3, 3, 4, 4, dtype=dtype)
    assert sparse(x).dtype == dtype
    if not before:  # a batch norm is folded first, and then rounded
        layer = island(sparse).layer("stem.0")
        assert torch.equal(layer.values, island(sparsify(dense)).layer("stem.0").values.to(dtype))
    assert {layer.values.dtype for layer in island(sparse).layers.values() if layer.shape[0] != 8} == {dtype}
    assert error(sparse, model, x) < tolerance * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.float16, torch.bfloat16])
def test_autocast_decides_the_type(dense, sparse, x, dtype, given):
    with torch.no_grad(), torch.autocast("cpu", dtype):
        y, expected = sparse(x.to(given)), dense(x.to(given))
    assert y.dtype == expected.dtype == dtype
    assert (y - expected).float().norm() < 0.1 * expected.float().norm()


def test_devices(sparse, x):
    with pytest.raises(RuntimeError, match="no sparse kernels for device meta: use cpu or cuda"):
        sparse(x.to("meta"))
    with pytest.raises(RuntimeError, match="the input is on device cpu, the sparse model on meta"):
        copy.deepcopy(sparse).to("meta")(x)
    expected = sparse(x)
    twin = copy.deepcopy(sparse).to("meta").to_empty(device="cpu")
    twin.load_state_dict(sparse.state_dict())
    assert torch.equal(twin(x), expected)


# --- Modes ------------------------------------------------------------------------------------------------------------


def test_train_is_refused_and_eval_is_not(sparse):
    assert not sparse.eval().training
    with pytest.raises(RuntimeError, match="for inference only: train the dense one"):
        sparse.train()
    with pytest.raises(RuntimeError, match="for inference only: train the dense one"):
        nn.Sequential(sparse).train()


def test_gradient_is_refused(sparse, x):
    x.requires_grad_()
    with pytest.raises(RuntimeError, match=r"no gradient: call them under torch\.inference_mode\(\)"):
        sparse(x)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(sparse(x), sparse(x.detach()))
    assert not sparse(x.detach()).requires_grad


@pytest.mark.parametrize("make", [Every, Seams])
def test_inference_mode_at_any_time(make, x):
    model = pruned(make())
    expected = sparsify(model)(x)
    with torch.inference_mode():
        made = [sparsify(model), copy.deepcopy(sparsify(model)), sparsify(model).double().float()]
        assert all(torch.equal(sparse(x), expected) for sparse in made)
    for sparse in made:
        assert torch.equal(sparse(x), expected)
        for name, bias in sparse.named_buffers():
            if name.endswith("island1.layers.last.bias") or name.endswith("island0.layers.last.bias"):
                bias += 1
        assert not torch.equal(sparse(x), expected)
        with torch.inference_mode():
            assert not torch.equal(sparse(x), expected)


# --- Inputs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(4, 5), (1, 1), (2, 7)])
def test_unbatched_and_empty_maps(size):
    model = chain(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1, stride=2))
    sparse, x = sparsify(model), images(1, 3, *size)
    assert error(sparse, model, x[0]) < 1e-5 and error(sparse, model, x) < 1e-5
    assert sparse(x[:0]).shape == model(x[:0]).shape


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (0, 3, 0, 4), (2, 3, 0, 0), (2, 3, 1, 4)])
def test_maps_without_pixels_are_as_in_torch(shape):
    model, x = chain(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 5)), torch.zeros(shape)
    try:
        expected = model(x)
    except RuntimeError as problem:
        with pytest.raises(RuntimeError) as found:
            sparsify(model)(x)
        assert str(found.value) == str(problem)
    else:
        assert torch.equal(sparsify(model)(x), expected.detach())


@pytest.mark.parametrize("shape", [(6,), (2, 6), (2, 3, 6), (2, 3, 4, 6), (0, 6), (2, 0, 6)])
def test_rows_of_any_dimensions(shape):
    model = chain(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    sparse, x = sparsify(model), images(*shape)
    torch.testing.assert_close(sparse(x), model(x).detach(), rtol=1e-5, atol=1e-5)


def test_batch_norm_behind_a_linear_layer_takes_rows_of_two_dimensions():
    model = chain(nn.Linear(6, 4), nn.BatchNorm1d(4))
    assert error(sparsify(model), model, images(3, 6)) < 1e-5
    for shape in ((6,), (2, 4, 6)):
        with pytest.raises(ValueError, match=r"is not \[N, features\]: a batch norm is folded"):
            sparsify(model)(images(*shape))


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(2, 4, 4, 4),
        torch.zeros(2, 3, 9, 9),
        torch.zeros(2, 3),
        torch.zeros(1, 2, 3, 4, 4),
        torch.zeros(2, 3, 4, 4, dtype=torch.int64),
        torch.zeros(2, 3, 4, 4, dtype=torch.bool),
    ],
    ids=lambda x: f"{tuple(x.shape)} {x.dtype}",
)
def test_wrong_inputs_raise_what_torch_raises(x):
    model = chain(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 5))
    with pytest.raises(RuntimeError) as expected:
        model(x)
    with pytest.raises(RuntimeError) as found:
        sparsify(model)(x)
    assert str(found.value) == str(expected.value)


# --- Threads and processes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("portable", [False, True])
def test_several_threads_at_once(dense, portable, monkeypatch):
    if portable:
        monkeypatch.setattr(cpu, "instruction_sets", lambda pairs=False: ())
    batches = [images(1 + i % 3, 3, 4, 4, seed=i) for i in range(24)]
    expected = [sparsify(dense)(x) for x in batches]
    sparse = sparsify(dense)  # a fresh one: all threads find it unprepared
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for y, right in zip(pool.map(sparse, batches), expected, strict=True):
            assert torch.equal(y, right)


def test_a_forked_process(sparse, x):
    expected = sparse(x)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=lambda: queue.put(sparse(x).tolist()))
    process.start()
    found = queue.get()
    process.join()
    assert found == expected.tolist()


class Outputs(Dataset):
    def __init__(self, model, x):
        self.model, self.x = model, x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.model(self.x[index : index + 1])[0]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_worker_of_a_data_loader(sparse, x, method):
    expected = torch.cat([sparse(x[i : i + 1]) for i in range(3)])
    loader = DataLoader(Outputs(sparse, x), batch_size=3, num_workers=1, multiprocessing_context=method)
    assert torch.equal(next(iter(loader)), expected)


# --- Compiled and exported --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("make", [Every, Seams])
def test_compiled_without_breaks(make, backend):
    sparse = sparsify(pruned(make()))
    around = nn.Sequential(nn.ReflectionPad2d(1), sparse, nn.Tanh())
    torch._dynamo.reset()
    for model, size in ((sparse, 4), (around, 2)):
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        for batch in (3, 1, 5, 2):
            x = images(batch, 3, size, size)
            with torch.no_grad():
                torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)


def test_a_compiled_copy_is_its_own(sparse, x):
    torch._dynamo.reset()
    twin = copy.deepcopy(sparse)
    island(twin).layer("last").bias += 1
    first, second = (torch.compile(model, fullgraph=True, backend="eager") for model in (sparse, twin))
    assert torch.equal(first(x), sparse(x)) and torch.equal(second(x), twin(x))
    assert not torch.equal(first(x), second(x))
    island(sparse).layer("last").bias += 1
    assert torch.equal(first(x), second(x))


def test_exported(sparse, x):
    """In the process that has the model: the operator finds it there."""
    batch = torch.export.Dim("batch")
    program = torch.export.export(sparse, (x,), dynamic_shapes=((({0: batch}),)))
    assert torch.equal(program.module()(x), sparse(x))
    assert torch.equal(program.module()(x[:2]), sparse(x[:2]))
    assert "reprolib.sparse_network" in str(program.graph)


def test_a_dense_network_is_exported_with_its_zeros(dense, x):
    program = torch.export.export(dense, (x,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    state = dense.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict.items())
    assert {name for name, tensor in loaded.state_dict.items() if not tensor.all()} >= {"a.weight", "rows.weight"}
    assert torch.equal(loaded.module()(x), dense(x))
