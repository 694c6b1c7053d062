"""`sparsify` and `describe`: outputs are those of the pruned network, and the table says what runs where."""

import copy
import operator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

from reprolib.models import vgg16, weights
from reprolib.patterns import NM, Balanced, Block, Unstructured
from reprolib.pruning import apply_masks, make_masks, prunable
from reprolib.sparse import SparseNetwork, cpu, cuda, describe, network, networks, sparsify
from reprolib.sparse.cpu import avx512, avx512bf16


def conv(c_in, c_out, size=3, **options):
    return nn.Conv2d(c_in, c_out, size, **{"padding": size // 2, **options})


@torch.no_grad()
def prepared(model, density=0.3, seed=0):
    """The model in eval mode: its weights pruned at random, its batch norms with every sign of gamma."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.weight.copy_(torch.randn(module.weight.shape, generator=generator) / module.weight[0].numel() ** 0.5)
            module.weight[torch.rand(module.weight.shape, generator=generator) >= density] = 0
            if module.bias is not None:
                module.bias.copy_(torch.randn(module.bias.shape, generator=generator) / 4)
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and module.running_mean is not None:
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.1)
            if module.affine:
                module.weight.copy_(torch.randn(module.num_features, generator=generator))
                module.weight[0] = 0
                module.bias.copy_(torch.randn(module.num_features, generator=generator))
    return model.eval()


def images(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@torch.no_grad()
def error(sparse, dense, x):
    """Largest difference from the dense model in float64, relative to its largest output."""
    expected = copy.deepcopy(dense).double()(x.double())
    y = sparse(x)
    assert (y.dtype, y.shape, y.device) == (x.dtype, expected.shape, x.device)
    return float((y - expected).abs().max() / expected.abs().max())


def outline(model):
    """What runs where: kernels as they are in islands ``[..]``, and seams by the names of their nodes."""

    def inside(network):
        found = []
        for operation in network.graph.operations:
            parts = [type(operation).__name__, getattr(operation, "activation", None)]
            parts += ["sum"] * (getattr(operation, "addend", None) is not None) + ["pool"] * getattr(
                operation, "pool", False
            )
            found.append("+".join(part for part in parts if part))
        return f"[{' '.join(found)}]"

    if not isinstance(model, fx.GraphModule):
        return "dense"
    modules = dict(model.named_modules())
    found = []
    for node in model.graph.nodes:
        if node.op == "call_module":
            module = modules[node.target]
            found.append(inside(module) if isinstance(module, SparseNetwork) else type(module).__name__)
        elif node.op in ("call_function", "call_method") and node.target is not operator.getitem:
            found.append(getattr(node.target, "__name__", node.target))
    return " ".join(found)


class Residual(nn.Module):
    """A parent that is no `nn.Sequential`, and one of its convolutions is registered twice."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(conv(8, 8, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), conv(8, 8))
        self.skip = conv(8, 8, 1)
        self.heads = nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 4)])

    def forward(self, x):
        x = torch.relu(self.body(x) + self.skip(x)).mean(dim=(2, 3))
        return sum(head(x) for head in self.heads)


# --- What is fused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (
            [conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), conv(8, 9), nn.Flatten(), nn.Linear(9 * 12, 5)],
            "[Convolution+relu+pool Convolution Flatten Linear]",
        ),
        (
            [conv(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(224, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 5)],
            "[Convolution+relu Flatten Linear+relu Linear]",
        ),
        (
            [
                nn.Sequential(conv(3, 8), nn.Sequential(nn.BatchNorm2d(8, affine=False)), nn.Dropout(0.5)),
                nn.Identity(),
                nn.Sequential(nn.ReLU(), nn.Sequential(), nn.MaxPool2d(2)),
                conv(8, 8),
            ],
            "[Convolution+relu+pool Convolution]",
        ),
        ([conv(3, 8), nn.ReLU6(), conv(8, 20, 5, stride=2), nn.SiLU(), conv(20, 7, 1), nn.ReLU(), conv(7, 8, groups=1)],
         "[Convolution+relu6 Convolution+silu Convolution+relu Convolution]"),
        (
            [conv(3, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)],
            "[Convolution+relu Mean Flatten Linear]",
        ),
        ([conv(3, 8), nn.MaxPool2d(2), nn.ReLU(), conv(8, 5)], "[Convolution+pool Activation+relu Convolution]"),
        ([conv(3, 8), nn.MaxPool2d(3, 2, 1), conv(8, 5)], "[Convolution MaxPool Convolution]"),
        ([conv(3, 8), nn.AvgPool2d(2), conv(8, 5)], "[Convolution Convolution Convolution]"),
        ([conv(3, 8), nn.GELU(), conv(8, 5)], "[Convolution] GELU [Convolution]"),
        ([conv(3, 8), Residual()], "[Convolution Convolution+relu Convolution Convolution+sum] relu mean "
         "[Linear] [Linear] add add"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("portable", [False, True])
def test_outputs_and_structure(layers, expected, portable, monkeypatch):
    if portable:
        monkeypatch.setattr(cpu, "instruction_sets", lambda pairs=False: ())
    model = prepared(nn.Sequential(*copy.deepcopy(layers)))
    sparse = sparsify(model)
    if "Residual" not in str(model):
        assert outline(sparse) == expected
    for batch in (1, 3, 19):
        assert error(sparse, model, images(batch, 3, 8, 7)) < 1e-5


@pytest.mark.parametrize("batch", [1, 5, 9])
@pytest.mark.parametrize("pool", [nn.MaxPool2d(3), nn.MaxPool2d((2, 1)), nn.MaxPool2d(2, stride=1),
                                  nn.MaxPool2d(2, stride=(2, 1)), nn.MaxPool2d(2, padding=1), nn.AvgPool2d(3, 2, 1),
                                  nn.MaxPool2d(2, ceil_mode=True), nn.MaxPool2d(2, dilation=2)], ids=str)  # fmt: skip
def test_pools_of_all_kinds(pool, batch):
    model = prepared(nn.Sequential(conv(3, 8), nn.ReLU(), pool, conv(8, 4)))
    assert error(sparsify(model), model, images(batch, 3, 9, 7)) < 1e-5


def test_layers_without_zeros_stay_as_they_are():
    model = nn.Sequential(nn.Sequential(conv(3, 8), nn.ReLU()), nn.Dropout(), nn.Flatten(), nn.Linear(128, 4)).eval()
    sparse = sparsify(model)
    assert outline(sparse) == "dense" and sparse is not model
    assert describe(sparse).empty
    assert error(sparse, model, images(2, 3, 4, 4)) < 1e-5
    assert outline(sparsify(model, dense=True)) == "[Convolution+relu Flatten Linear]"
    assert error(sparsify(model, dense=True), model, images(2, 3, 4, 4)) < 1e-5


def test_single_modules():
    for module, x in (
        (conv(3, 8), images(2, 3, 4, 4)),
        (nn.Linear(6, 4), images(2, 6)),
        (Residual(), images(2, 8, 3, 3)),
    ):
        model = prepared(module)
        assert error(sparsify(model), model, x) < 1e-5
    assert sparsify(nn.ReLU().eval())(torch.tensor([-1.0])) == 0


# --- The whole network ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
@torch.no_grad()
def pruned_vgg():
    """VGG-16 of width 1/8 with two hidden layers, pruned as in the paper, the first and the last layer dense."""
    model = prepared(vgg16(10, width=1 / 8, hidden=(32, 16)), density=1)
    named = prunable(model)
    apply_masks(named, make_masks(named, Balanced(8) & Block(8, 8), dict.fromkeys(named, 0.75)))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model.train()(images(64, 3, 32, 32, seed=1))  # statistics of its own: else images hardly matter after 16 layers
    return model.eval()


@pytest.mark.parametrize("batch", [1, 7, 8, 33])
def test_vgg16(pruned_vgg, batch):
    sparse = sparsify(pruned_vgg)
    assert error(sparse, pruned_vgg, images(batch, 3, 32, 32)) < 1e-5


def test_vgg16_becomes_one_chain(pruned_vgg):
    relu, pool = "Convolution+relu ", "Convolution+relu+pool "
    convolutions = (relu + pool) * 2 + (relu * 2 + pool) * 3
    whole = f"[{convolutions}Flatten Linear+relu Linear+relu Linear]"  # the classifier has no zeros and is small
    assert outline(sparsify(pruned_vgg)) == whole


def test_predictions_stay(pruned_vgg):
    x = images(64, 3, 32, 32)
    with torch.inference_mode():
        expected, predicted = pruned_vgg(x).argmax(dim=1), sparsify(pruned_vgg)(x).argmax(dim=1)
    assert len(expected.unique()) > 1
    assert torch.equal(predicted, expected)


@given(st.lists(st.sampled_from(["conv3", "conv1", "norm", "relu", "pool", "dropout"]), max_size=7), st.integers(0, 99))
def test_any_order_of_layers(names, seed):
    make = {
        "conv3": lambda: conv(6, 6, bias=seed % 2 == 0),
        "conv1": lambda: conv(6, 6, 1),
        "norm": lambda: nn.BatchNorm2d(6),
        "relu": nn.ReLU,
        "pool": lambda: nn.MaxPool2d(2),
        "dropout": nn.Dropout,
    }
    model = prepared(nn.Sequential(conv(6, 6), *(make[name]() for name in names)), seed=seed)
    size = 2 ** names.count("pool")
    x = images(1 + seed % 20, 6, size + seed % 3, size, seed=seed)
    torch.testing.assert_close(sparsify(model)(x), model(x), rtol=1e-4, atol=1e-4)


def test_the_model_is_left_as_it_was(pruned_vgg):
    state, text = copy.deepcopy(pruned_vgg.state_dict()), str(pruned_vgg)
    x = images(2, 3, 32, 32)
    before = pruned_vgg(x)
    sparse = sparsify(pruned_vgg)
    sparse(x)
    for part in networks(sparse):
        for layer in part.layers.values():
            layer.bias.fill_(9), layer.values.fill_(9)
    assert str(pruned_vgg) == text
    assert all(torch.equal(value, state[name]) for name, value in pruned_vgg.state_dict().items())
    assert torch.equal(pruned_vgg(x), before)
    assert not pruned_vgg.training


def test_sparse_model_is_for_inference_and_can_be_sparsified_again(pruned_vgg):
    sparse = sparsify(pruned_vgg)
    assert not any(module.training for module in sparse.modules())
    assert not any(parameter.requires_grad for parameter in sparse.parameters())
    assert outline(sparsify(sparse)) == outline(sparse)


@pytest.mark.parametrize("part", [slice(None), slice(1, 2)], ids=["all", "one layer"])
def test_training_mode_is_refused(pruned_vgg, part):
    model = copy.deepcopy(pruned_vgg)
    for module in model[part]:
        module.train()
    with pytest.raises(ValueError, match=r"training mode: call model\.eval\(\) first"):
        sparsify(model)


# --- Inputs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dense():
    return prepared(nn.Sequential(conv(3, 8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 5)))


@pytest.fixture(scope="module")
def sparse(dense):
    return sparsify(dense)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-5), (torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)],
)
def test_type_of_the_input_is_kept(dense, sparse, dtype, tolerance):
    assert error(sparse, dense, images(3, 3, 4, 4, dtype=dtype)) < tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_type_of_the_model_does_not_matter(dense, dtype):
    model = copy.deepcopy(dense).to(dtype)
    assert error(sparsify(model), model, images(3, 3, 4, 4, dtype=dtype)) < 1e-2
    assert set(describe(sparsify(model))["dense_bytes"]) == {8 * 27 * dtype.itemsize, 160 * dtype.itemsize}


def test_memory_of_the_input_does_not_matter_and_is_not_written_to(sparse):
    x = images(9, 3, 4, 4)
    before, expected = x.clone(), sparse(x)
    assert torch.equal(sparse(x.to(memory_format=torch.channels_last)), expected)
    assert torch.equal(sparse(x.transpose(2, 3).contiguous().transpose(2, 3)), expected)
    assert torch.equal(sparse(x[:1].expand(9, -1, -1, -1))[8:], sparse(x[:1].repeat(9, 1, 1, 1))[:1])
    assert torch.equal(x, before)


def test_outputs_of_two_calls_do_not_share_memory(sparse):
    first = sparse(images(3, 3, 4, 4))
    kept = first.clone()
    sparse(images(3, 3, 4, 4, seed=1))
    assert torch.equal(first, kept)


# --- Devices ----------------------------------------------------------------------------------------------------------


def test_unknown_device_is_refused(dense, sparse):
    with pytest.raises(RuntimeError, match="no sparse kernels for device meta: use cpu or cuda"):
        sparse(torch.zeros(2, 3, 4, 4, device="meta"))
    with pytest.raises(RuntimeError, match="no sparse kernels for device meta"):
        sparsify(dense, "meta")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused_with_the_remedy(dense):
    with pytest.raises(RuntimeError, match=r"no NVIDIA GPU.*sparsify\(model, device='cpu'\)"):
        sparsify(dense, "cuda")


def test_device_cpu(dense):
    assert error(sparsify(dense, "cpu"), dense, images(2, 3, 4, 4)) < 1e-5


# --- Numbers and tables -----------------------------------------------------------------------------------------------


def test_a_layer_of_zeros_gives_its_bias():
    layer = prepared(conv(3, 4), density=0)
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([1.0, -2, 0, 3]))
    y = sparsify(nn.Sequential(layer, nn.ReLU()).eval())(images(2, 3, 3, 3))
    assert torch.equal(y, torch.tensor([1.0, 0, 0, 3])[None, :, None, None].expand(2, 4, 3, 3))


def runs_in():
    return f"code made for the weights ({cpu.instruction_sets()[0].NAME})" if cpu.instruction_sets() else "Numba"


def test_describe():
    with torch.no_grad():
        model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(128, 4)).eval()
        model[0].weight.zero_()[3, 2, 1, 1] = 5
        model[3].weight.zero_()[:4, :4] = 1
    table = describe(sparsify(model))
    assert table.index.name == "module"
    assert table.to_dict("index") == {
        "0": {
            "layer": "8×4×3×3",
            "format": "ColumnVectors(1)",
            "sparsity_pct": pytest.approx(100 * 287 / 288),
            "storage_bytes": 9 * 4 + 2 + 4,
            "dense_bytes": 288 * 4,
            "runs_in": runs_in(),
        },
        "3": {
            "layer": "4×128",
            "format": "Blocks(4, 4)",
            "sparsity_pct": pytest.approx(100 * (1 - 16 / 512)),
            "storage_bytes": 2 * 4 + 2 + 16 * 4,
            "dense_bytes": 512 * 4,
            "runs_in": runs_in(),
        },
    }


def test_layers_that_torch_runs_faster_stay_there_and_describe_says_so():
    model = nn.Sequential(
        nn.Linear(300, 400), nn.ReLU(), nn.Linear(400, 300), conv(4, 4, padding_mode="circular")
    ).eval()
    with torch.no_grad():
        model[0].weight[0, 0] = 0
        model[2].weight[:, ::4] = 0
        model[3].weight[0] = 0
    table = describe(sparsify(model))
    assert table["runs_in"].tolist() == [
        "torch: 100% of its weights are kept, dense is faster",
        "torch: 75% of its weights are kept, dense is faster",
        "torch: padding_mode 'circular' is not supported",
    ]
    with torch.no_grad():
        model[2].weight[:, 100:] = 0
    assert describe(sparsify(model)).loc["2", "runs_in"] == runs_in()


def test_describe_says_what_a_device_without_kernels_for_a_layer_does(monkeypatch):
    model = prepared(nn.Sequential(conv(3, 8), conv(8, 8, stride=2)))
    sparse = sparsify(model)
    monkeypatch.setattr(cpu, "instruction_sets", lambda pairs=False: ())
    assert describe(sparse)["runs_in"].tolist() == ["Numba", "torch: stride, dilation and groups must be 1"]


def test_describe_counts_what_the_masks_pruned(pruned_vgg):
    table = describe(sparsify(pruned_vgg))
    assert len(table) == 16  # the first layer and the classifier among them, which have no zeros
    assert table.index[0] == "0"
    gamma_zero = 100 / 64  # one channel of each layer's first batch norm scales its weights to zero
    assert table["sparsity_pct"].iloc[1:13].between(75 - 5, 75 + 5 + gamma_zero * 4).all()
    assert table["dense_bytes"].sum() == 4 * sum(weight.numel() for weight in weights(pruned_vgg).values())


def test_folding_keeps_pruned_weights_zero():
    model = prepared(nn.Sequential(conv(16, 16, bias=False), nn.BatchNorm2d(16)), density=1)
    with torch.no_grad():
        model[0].weight[~Unstructured().mask(model[0].weight, 0.9)] = 0
    layer = networks(sparsify(model))[0].layer("0")
    assert (layer.weight() == 0)[model[0].weight == 0].all()
    assert layer.sparsity >= 0.9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_batch_norm_is_folded_in_float64(dtype):
    model = prepared(nn.Sequential(conv(4, 4), nn.BatchNorm2d(4, eps=1e-12))).to(dtype)
    with torch.no_grad():
        model[1].running_var.zero_()
        model[1].running_mean.zero_()
        model[1].running_var[1] = 1e-7
    folded = sparsify(model)
    assert networks(folded)[0].layer("0").weight().isfinite().all()
    exact = copy.deepcopy(model).double()(images(2, 4, 3, 3).double()).detach()
    y = folded(images(2, 4, 3, 3))
    torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("batch", [2, 9, 16])
def test_nan_reaches_every_pool_that_sees_it(portable, relu, batch, monkeypatch):
    if portable:
        monkeypatch.setattr(cpu, "instruction_sets", lambda pairs=False: ())
    layer = nn.Conv2d(1, 1, 1)
    nn.init.ones_(layer.weight), nn.init.zeros_(layer.bias)
    sparse = sparsify(nn.Sequential(layer, *[nn.ReLU()] * relu, nn.MaxPool2d(2)).eval(), dense=True)
    for missing in (torch.nan, -torch.nan):
        for place in range(16):
            x = images(batch, 1, 4, 4, seed=place)
            x[batch // 2].view(-1)[place] = missing
            expected = torch.nn.functional.max_pool2d(x.relu() if relu else x, 2)
            torch.testing.assert_close(sparse(x), expected, equal_nan=True)


@pytest.mark.parametrize("portable", [False, True])
def test_default_type_and_device_do_not_matter(dense, portable, monkeypatch):
    if portable:
        monkeypatch.setattr(cpu, "instruction_sets", lambda pairs=False: ())
    x = images(9, 3, 4, 4)
    expected = sparsify(dense)(x)
    model = sparsify(dense)
    try:
        torch.set_default_dtype(torch.float64)
        assert torch.equal(model(x), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert torch.equal(sparsify(dense)(x), expected)
    assert torch.equal(model(x), expected)


def test_bfloat16_keeps_rounded_weights_and_says_so(dense, monkeypatch):
    monkeypatch.setattr(cpu, "instruction_sets", lambda pairs=False: (avx512bf16,) if pairs else (avx512,))
    model, other = sparsify(dense, dtype=torch.bfloat16), sparsify(dense)
    for few, many in zip(networks(model), networks(other), strict=True):
        for layer, same in zip(few.layers.values(), many.layers.values(), strict=True):
            assert torch.equal(layer.weight().float(), same.weight().bfloat16().float())
            assert torch.equal(layer.bias, same.bias)
    assert set(describe(model)["runs_in"]) == {"code made for the weights (AVX-512 with bfloat16)"}
    assert (describe(model)["storage_bytes"] < describe(other)["storage_bytes"]).all()


@pytest.mark.skipif(not cpu.instruction_sets(pairs=True), reason="this CPU has no instructions for bfloat16")
@pytest.mark.parametrize("batch", [1, 5, 16, 40])
def test_bfloat16_is_near_float32(dense, batch):
    x = images(batch, 3, 4, 4)
    expected = sparsify(dense)(x)
    result = sparsify(dense, dtype=torch.bfloat16)(x)
    assert result.dtype == torch.float32
    assert (result - expected).norm() < 0.02 * expected.norm()


def test_bfloat16_without_instructions_for_it_is_refused(dense, monkeypatch):
    monkeypatch.setattr(cpu, "instruction_sets", lambda pairs=False: () if pairs else (avx512,))
    for device in (None, "cpu", "cuda"):
        with pytest.raises(RuntimeError, match=r"avx512_bf16.*leave dtype out"):
            sparsify(dense, device, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"dtype torch\.float16 is not supported"):
        sparsify(dense, dtype=torch.float16)


def test_network_through_the_gpu_kernels_specification(monkeypatch):
    """The chain that a GPU would run, layer by layer in NumPy on CPU tensors: plans, halos, pools, fp16."""
    torch.manual_seed(0)
    model = vgg16(10, 0.25)
    named = prunable(model)
    apply_masks(named, make_masks(named, NM(2, 4) & Block(8, 8), dict.fromkeys(named, 0.75)))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # batch norm takes the statistics of one batch: activations of ordinary size
    images = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        model(images.repeat(3, 1, 1, 1) + 0.1 * torch.randn(9, 3, 32, 32))
        model.eval()
        expected = model(images)
        monkeypatch.setattr(network, "backend_of", lambda device, dtype: cuda)
        logits = sparsify(model)(images)
    assert float((logits - expected).norm() / expected.norm()) < 0.02
    assert torch.equal(logits.argmax(dim=1), expected.argmax(dim=1))
