"""`sparsify`: what it fuses, what it leaves alone, and outputs that are those of the pruned network."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from reprolib.models import vgg16, weights
from reprolib.patterns import NM, Balanced, Block, Unstructured
from reprolib.pruning import apply_masks, make_masks, prunable
from reprolib.sparse import SparseConv2d, SparseLinear, cpu, cuda, describe, layers, sparsify
from reprolib.sparse.cpu import avx512, avx512bf16
from reprolib.sparse.layers import SparseLayer, SparseSequential, run


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


def outline(module):
    """Modules by their short names: ``[..]`` is a `SparseSequential`, ``(..)`` another container."""
    if isinstance(module, SparseLayer):
        return type(module).__name__.removeprefix("Sparse") + "+relu" * module.relu + "+pool" * module.pool
    inside = " ".join(map(outline, module.children()))
    if isinstance(module, SparseSequential):
        return f"[{inside}]"
    return f"({inside})" if inside else f"dense {type(module).__name__}"


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


class ScaledConv2d(nn.Conv2d):
    """Does something else than its parent."""

    def forward(self, x):
        return 2 * super().forward(x)


# --- What is fused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (
            [conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), conv(8, 9), nn.Flatten(), nn.Linear(9 * 12, 5)],
            "[Conv2d+relu+pool Conv2d dense Flatten Linear]",
        ),
        (
            [conv(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(224, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 5)],
            "[Conv2d+relu dense Flatten Linear+relu Linear]",
        ),
        (
            [
                nn.Sequential(conv(3, 8), nn.Dropout(0.5), nn.Sequential(nn.BatchNorm2d(8, affine=False))),
                nn.Identity(),
                nn.Sequential(nn.ReLU(), nn.Sequential(), nn.MaxPool2d(2)),
                conv(8, 8),
            ],
            "[Conv2d+relu+pool Conv2d]",
        ),
        ([conv(3, 8), nn.ReLU(), conv(8, 20, 1), conv(20, 7, 1), nn.ReLU(), conv(7, 8)],
         "[Conv2d+relu Conv2d Conv2d+relu Conv2d]"),
        (
            [conv(3, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)],
            "([Conv2d+relu] dense AdaptiveAvgPool2d dense Flatten [Linear])",
        ),
        ([conv(3, 8), nn.MaxPool2d(2), nn.ReLU(), conv(8, 5)], "([Conv2d+pool] dense ReLU [Conv2d])"),
        (
            [conv(3, 8), nn.ReLU(), nn.BatchNorm2d(8), nn.MaxPool2d(2), conv(8, 5)],
            "([Conv2d+relu] dense BatchNorm2d dense MaxPool2d [Conv2d])",
        ),
        (
            [conv(3, 8), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU(), conv(8, 5)],
            "([Conv2d] dense BatchNorm2d dense ReLU [Conv2d])",
        ),
        (
            [conv(3, 8), nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.ReLU()],
            "([Conv2d] dense BatchNorm2d dense ReLU)",
        ),
        ([conv(3, 8), nn.ReLU6(), conv(8, 5)], "([Conv2d] dense ReLU6 [Conv2d])"),
        ([conv(3, 8, padding="same", bias=False), nn.ReLU(), nn.Flatten()], "[Conv2d+relu dense Flatten]"),
        ([conv(3, 8), nn.Flatten(2), nn.ReLU()], "([Conv2d] dense Flatten dense ReLU)"),
        ([nn.MaxPool2d(2), conv(3, 8)], "(dense MaxPool2d [Conv2d])"),
        ([conv(3, 7), nn.Linear(7, 5)], None),  # without Flatten: along the rows of the map
        ([conv(3, 8), ScaledConv2d(8, 8, 3, padding=1), conv(8, 5)], "([Conv2d] dense ScaledConv2d [Conv2d])"),
        ([conv(3, 8), Residual()],
         "([Conv2d] ([Conv2d+relu Conv2d] Conv2d (Linear Linear)))"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("batch", [3, 19])
def test_outputs_and_structure(layers, expected, batch):
    model = prepared(nn.Sequential(*copy.deepcopy(layers)))
    sparse = sparsify(model)
    x = images(batch, 3, 8, 7)
    if expected is None:
        with pytest.raises(ValueError, match="does not fit SparseLinear"):
            sparse(x)
        return
    assert outline(sparse) == expected
    assert error(sparse, model, x) < 1e-5


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(3),
        nn.MaxPool2d((2, 1)),
        nn.MaxPool2d(2, stride=1),
        nn.MaxPool2d(2, stride=(2, 1)),
        nn.MaxPool2d(2, padding=1),
        nn.MaxPool2d(2, dilation=2),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.AvgPool2d(2),
    ],
    ids=str,
)
def test_another_pool_is_not_fused(pool):
    model = prepared(nn.Sequential(conv(3, 8), nn.ReLU(), pool, conv(8, 4)))
    sparse = sparsify(model)
    assert outline(sparse) == f"([Conv2d+relu] dense {type(pool).__name__} [Conv2d])"
    assert error(sparse, model, images(2, 3, 9, 7)) < 1e-5


def test_pool_that_returns_indices_is_not_fused():
    model = prepared(nn.Sequential(conv(3, 8), nn.MaxPool2d(2, return_indices=True)))
    values, indices = sparsify(model)(images(1, 3, 4, 4))
    assert values.shape == indices.shape == (1, 8, 2, 2)


@pytest.mark.parametrize("pool", [nn.MaxPool2d((2, 2)), nn.MaxPool2d(2, stride=(2, 2), padding=(0, 0))], ids=str)
def test_the_2x2_pool_in_other_words_is_fused(pool):
    model = prepared(nn.Sequential(conv(3, 8), pool))
    assert outline(sparsify(model)) == "[Conv2d+pool]"
    assert error(sparsify(model), model, images(2, 3, 7, 5)) < 1e-5


UNSUPPORTED = [
    (conv(8, 8, stride=2), "stride, dilation and groups must be 1"),
    (conv(8, 8, groups=2), "stride, dilation and groups must be 1"),
    (conv(8, 8, dilation=2, padding=2), "stride, dilation and groups must be 1"),
    (conv(8, 8, 5), r"its kernel is \(5, 5\), 3x3 and 1x1 are supported"),
    (nn.Conv2d(8, 8, (1, 3), padding=(0, 1)), r"its kernel is \(1, 3\)"),
    (conv(8, 8, padding=0), "its padding must keep the size of the map"),
    (conv(8, 8, padding="valid"), "its padding must keep the size of the map"),
    (conv(8, 8, 1, padding=1), "its padding must keep the size of the map"),
    (conv(8, 8, padding_mode="circular"), "padding_mode 'circular' is not supported"),
    (ScaledConv2d(8, 8, 3, padding=1), "ScaledConv2d has a forward of its own"),
]


@pytest.mark.parametrize(("layer", "reason"), UNSUPPORTED, ids=lambda value: str(value)[:60])
def test_unsupported_convolution_stays_dense(layer, reason):
    model = prepared(nn.Sequential(conv(3, 8), nn.ReLU(), copy.deepcopy(layer), nn.BatchNorm2d(8), conv(8, 8)))
    sparse = sparsify(model)
    assert outline(sparse) == f"([Conv2d+relu] dense {type(layer).__name__} dense BatchNorm2d [Conv2d])"
    assert error(sparse, model, images(2, 3, 8, 8)) < 1e-5
    assert outline(sparsify(prepared(nn.ModuleList([copy.deepcopy(layer)])))) == f"(dense {type(layer).__name__})"
    with pytest.raises(ValueError, match=f"SparseConv2d can't take {type(layer).__name__}.*{reason}"):
        SparseConv2d.from_dense(layer)


# --- What stays dense -------------------------------------------------------------------------------------------------


def test_layers_without_zeros_stay_as_they_are():
    model = nn.Sequential(nn.Sequential(conv(3, 8), nn.ReLU()), nn.Dropout(), nn.Flatten(), nn.Linear(128, 4)).eval()
    sparse = sparsify(model)
    assert str(sparse) == str(model)
    assert sparse is not model
    assert describe(sparse).empty
    assert error(sparse, model, images(2, 3, 4, 4)) < 1e-5


def test_dense_packs_layers_without_zeros_too():
    model = prepared(nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8), nn.Flatten(), nn.Linear(128, 4)), density=1)
    sparse = sparsify(model, dense=True)
    assert outline(sparse) == "[Conv2d+relu Conv2d dense Flatten Linear]"
    assert error(sparse, model, images(2, 3, 4, 4)) < 1e-5
    assert outline(sparsify(conv(3, 8).eval(), dense=True)) == "Conv2d"


def test_one_dense_layer_between_pruned_ones_stays_dense():
    model = prepared(nn.Sequential(conv(8, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 8)))
    nn.init.ones_(model[2].weight)
    assert outline(sparsify(model)) == "([Conv2d+relu] dense Conv2d dense ReLU [Conv2d])"


@pytest.mark.parametrize(
    ("channels", "second", "expected"),
    [
        (7, conv(8, 8), "[Conv2d+relu Conv2d]"),  # 63 columns
        (8, conv(8, 8), "(dense Conv2d dense ReLU [Conv2d])"),  # 72
        (7, conv(8, 8, stride=2), "(dense Conv2d dense ReLU dense Conv2d)"),
    ],
)
def test_a_small_dense_layer_is_packed_before_a_pruned_one(channels, second, expected):
    model = prepared(nn.Sequential(conv(channels, 8), nn.ReLU(), copy.deepcopy(second)))
    nn.init.normal_(model[0].weight)
    sparse = sparsify(model)
    assert outline(sparse) == expected
    assert error(sparse, model, images(2, channels, 6, 6)) < 1e-5


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
    relu, pool = "Conv2d+relu ", "Conv2d+relu+pool "
    convolutions = (relu + pool) * 2 + (relu * 2 + pool) * 3
    whole = f"[{convolutions}dense Flatten Linear+relu Linear+relu Linear]"  # the classifier has no zeros and is small
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
    for layer in sparse.modules():
        if isinstance(layer, SparseLayer):
            layer.bias.fill_(9)
            layer.kept.values.fill_(9)
    assert str(pruned_vgg) == text
    assert all(torch.equal(value, state[name]) for name, value in pruned_vgg.state_dict().items())
    assert torch.equal(pruned_vgg(x), before)
    assert not pruned_vgg.training


def test_sparse_model_is_for_inference_and_can_be_sparsified_again(pruned_vgg):
    sparse = sparsify(pruned_vgg)
    assert not any(module.training for module in sparse.modules())
    assert not any(parameter.requires_grad for parameter in sparse.parameters())
    assert str(sparsify(sparse)) == str(sparse)


@pytest.mark.parametrize("part", [slice(None), slice(1, 2)], ids=["all", "one layer"])
def test_training_mode_is_refused(pruned_vgg, part):
    model = copy.deepcopy(pruned_vgg)
    for module in model[part]:
        module.train()
    with pytest.raises(ValueError, match=r"training mode: call model\.eval\(\) first"):
        sparsify(model)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("used", [False, True])
def test_sparse_model_is_copied_and_pickled(pruned_vgg, duplicate, used):
    sparse, x = sparsify(pruned_vgg), images(3, 3, 32, 32)
    if used:
        sparse(x)
    twin = duplicate(sparse)
    assert str(twin) == str(sparse)
    assert torch.equal(twin(x), sparse(x))


def test_sparse_model_is_saved(pruned_vgg):
    file, sparse, x = io.BytesIO(), sparsify(pruned_vgg), images(3, 3, 32, 32)
    torch.save(sparse, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), sparse(x))


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


def test_works_in_and_outside_of_inference_mode(sparse):
    x = images(3, 3, 4, 4)
    with torch.inference_mode():
        inside = sparse(x)
    outside = sparse(x)
    assert torch.equal(inside, outside)
    assert not outside.requires_grad


def test_gradient_is_refused(sparse):
    x = images(3, 3, 4, 4).requires_grad_()
    with pytest.raises(RuntimeError, match=r"no gradient: call them under torch\.inference_mode\(\)"):
        sparse(x)
    with torch.no_grad():
        assert torch.equal(sparse(x), sparse(x.detach()))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 4, 4, 4), r"shape \(2, 4, 4, 4\) does not fit SparseConv2d\(3, 8, 3×3, ReLU, max-pool"),
        (torch.zeros(3, 4, 4), r"shape \(3, 4, 4\) does not fit SparseConv2d"),
        (torch.zeros(2, 3), r"shape \(2, 3\) does not fit SparseConv2d"),
        (torch.zeros(2, 3, 1, 4), "maps of 1x4 pixels are too small for the max-pool of SparseConv2d"),
        (torch.zeros(2, 3, 8, 8), "activations of 128 channels do not fit a layer of 32 input channels"),
        (torch.zeros(20, 3, 2, 2), "activations of 8 channels do not fit a layer of 32 input channels"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), r"input is torch\.uint8, sparse layers take floating-point"),
    ],
    ids=lambda value: str(tuple(value.shape)) if isinstance(value, torch.Tensor) else "",
)
def test_input_that_does_not_fit_is_refused(sparse, x, message):
    with pytest.raises(ValueError, match=message):
        sparse(x)


def test_no_images_give_no_results(dense, sparse):
    x = torch.zeros(0, 3, 4, 4)
    assert sparse(x).shape == dense(x).shape == (0, 5)
    assert sparse[:1](x).shape == (0, 8, 2, 2)
    assert SparseLinear.from_dense(nn.Linear(6, 4))(torch.zeros(0, 6)).shape == (0, 4)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_linear_layer_keeps_leading_dimensions(leading):
    linear = nn.Linear(6, 4)
    x = torch.randn(*leading, 6)
    with torch.inference_mode():
        torch.testing.assert_close(SparseLinear.from_dense(linear)(x), linear(x))


def test_linear_layer_refuses_maps():
    layer = SparseLinear.from_dense(nn.Linear(6, 4))
    for x in (torch.zeros(2, 5), torch.zeros(2, 6, 1, 1), torch.zeros(5)):
        with pytest.raises(ValueError, match=r"does not fit SparseLinear\(6, 4"):
            layer(x)


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


# --- Single layers and tables -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("relu", "pool"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("size", [1, 3])
def test_sparse_convolution_from_dense(size, relu, pool):
    layer = prepared(conv(5, 6, size, bias=relu))
    sparse = SparseConv2d.from_dense(layer, relu=relu, pool=pool)
    expected = nn.Sequential(layer, nn.ReLU() if relu else nn.Identity(), nn.MaxPool2d(2) if pool else nn.Identity())
    assert error(sparse, expected, images(3, 5, 5, 6)) < 1e-5
    assert torch.equal(sparse.weight.unpack(), layer.weight)


def test_sparse_linear_from_dense():
    layer = prepared(nn.Linear(40, 6, bias=False))
    assert error(SparseLinear.from_dense(layer), layer, images(3, 40)) < 1e-5
    assert error(SparseLinear.from_dense(layer, relu=True), nn.Sequential(layer, nn.ReLU()), images(30, 40)) < 1e-5


def test_a_layer_of_zeros_gives_its_bias():
    layer = prepared(conv(3, 4), density=0)
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([1.0, -2, 0, 3]))
    y = SparseConv2d.from_dense(layer, relu=True)(images(2, 3, 3, 3))
    assert torch.equal(y, torch.tensor([1.0, 0, 0, 3])[None, :, None, None].expand(2, 4, 3, 3))


def test_a_layer_of_a_chain_also_works_alone():
    model = prepared(nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4)))
    sparse, x = sparsify(model), images(2, 3, 5, 5)
    assert error(sparse, model, x) < 1e-5  # here the first layer writes a halo, below it does not
    assert error(sparse[0], model[:2], x) < 1e-5
    assert error(sparse, model, x) < 1e-5


def test_sparse_layer_shares_no_memory_with_the_dense_one():
    layer = prepared(nn.Linear(8, 4))
    sparse, x = SparseLinear.from_dense(layer), images(2, 8)
    expected = layer(x)
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    torch.testing.assert_close(sparse(x), expected)


def test_gradients_of_the_dense_layer_do_not_follow():
    layer = prepared(nn.Linear(8, 4))
    sparse = SparseLinear.from_dense(layer)
    assert list(sparse.parameters()) == []
    assert not sparse(images(2, 8)).requires_grad


def test_run_prepares_each_layer_once(sparse, monkeypatch):
    monkeypatch.setattr(cpu, "instruction_sets", lambda pairs=False: ())
    layers = copy.deepcopy(list(sparse))
    for layer in layers[0], layers[2]:
        layer._plans.clear()
    x = images(2, 3, 4, 4)
    assert torch.equal(run(layers, x), run(layers, x))
    assert [len(layer._plans) for layer in (layers[0], layers[2])] == [1, 1]
    before = list(layers[0]._plans.values())
    run(layers, images(30, 3, 4, 4))  # another layout, the same plan
    assert list(layers[0]._plans.values()) == before


def test_text_form():
    with torch.no_grad():
        layer, linear = nn.Conv2d(4, 8, 3, padding=1), nn.Linear(16, 4, bias=False)
        layer.weight.zero_()[3, 2, 1, 1] = 5
        linear.weight.zero_()[:4, :4] = 1
    text = "SparseConv2d(4, 8, 3×3, ReLU, max-pool, ColumnVectors(1), sparsity=0.9965, storage_bytes=42)"
    assert str(SparseConv2d.from_dense(layer, relu=True, pool=True)) == text
    text = "SparseLinear(16, 4, Blocks(4, 4), sparsity=0.7500, storage_bytes=74)"
    assert str(SparseLinear.from_dense(linear)) == text


def test_describe():
    with torch.no_grad():
        model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 4)).eval()
        model[0].weight.zero_()[3, 2, 1, 1] = 5
        model[3].weight.zero_()[:4, :4] = 1
    table = describe(sparsify(model))
    assert table.index.name == "module"
    assert table.to_dict("index") == {
        "0.0": {
            "layer": "8×4×3×3",
            "format": "ColumnVectors(1)",
            "sparsity_pct": pytest.approx(100 * 287 / 288),
            "storage_bytes": 9 * 4 + 2 + 4,
            "dense_bytes": 288 * 4,
            "runs_in": layers._kernels(layers._backend(torch.device("cpu")), torch.float32),
        },
        "3.0": {
            "layer": "4×16",
            "format": "Blocks(4, 4)",
            "sparsity_pct": 75.0,
            "storage_bytes": 2 * 4 + 2 + 16 * 4,
            "dense_bytes": 64 * 4,
            "runs_in": layers._kernels(layers._backend(torch.device("cpu")), torch.float32),
        },
    }


def test_layers_that_torch_runs_faster_stay_there_and_describe_says_so():
    model = nn.Sequential(nn.Linear(300, 400), nn.ReLU(), nn.Linear(400, 300), nn.ReLU(), conv(4, 4, stride=2)).eval()
    with torch.no_grad():
        model[0].weight[0, 0] = 0
        model[2].weight[:, ::4] = 0
        model[4].weight[0] = 0
    table = describe(sparsify(model))
    assert table["runs_in"].tolist() == [
        "torch: 100% of its weights are kept, dense is faster",
        "torch: 75% of its weights are kept, dense is faster",
        "torch: stride, dilation and groups must be 1",
    ]
    model[2].weight.data[:, ::2] = model[2].weight.data[:, 1::4].repeat(1, 2) * 0
    model[2].weight.data[:, 1::4] = 0
    assert not describe(sparsify(model)).loc["2.0", "runs_in"].startswith("torch")


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
    (layer,) = sparsify(model)
    assert (layer.weight.unpack() == 0)[model[0].weight == 0].all()
    assert layer.sparsity >= 0.9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_batch_norm_is_folded_in_float64(dtype):
    model = prepared(nn.Sequential(conv(4, 4), nn.BatchNorm2d(4, eps=1e-12))).to(dtype)
    with torch.no_grad():
        model[1].running_var.zero_()
        model[1].running_mean.zero_()
        model[1].running_var[1] = 1e-7
    folded = sparsify(model)
    assert folded[0].weight.unpack().isfinite().all()
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
    sparse = SparseConv2d.from_dense(layer, relu=relu, pool=True)
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
    for layer, same in zip(model.modules(), other.modules(), strict=True):
        if isinstance(layer, SparseConv2d):
            assert torch.equal(layer.weight.unpack().float(), same.weight.unpack().bfloat16().float())
            assert torch.equal(layer.bias, same.bias)
    assert set(describe(model)["runs_in"]) == {"code made for the weights (AVX-512 with bfloat16)"}
    assert (describe(model)["storage_bytes"] < describe(other)["storage_bytes"]).all()
    assert "bfloat16" in str(model) and "bfloat16" not in str(other)


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
        monkeypatch.setattr(layers, "_backend", lambda device, dtype: cuda)
        logits = sparsify(model)(images)
    assert float((logits - expected).norm() / expected.norm()) < 0.02
    assert torch.equal(logits.argmax(dim=1), expected.argmax(dim=1))


# --- What a layer does besides ----------------------------------------------------------------------------------------


def scaled(kind):
    """A subclass whose output is three times its parent's."""
    return type(f"Scaled{kind.__name__}", (kind,), {"forward": lambda self, x: 3 * kind.forward(self, x)})


def stack(**changed):
    """Convolution, batch norm, ReLU, max-pool, all of which would be fused, but for what is `changed`."""
    torch.manual_seed(0)
    parts = {"conv": nn.Conv2d(4, 4, 3, padding=1), "norm": nn.BatchNorm2d(4), "relu": nn.ReLU()}
    parts |= {"identity": nn.Identity(), "pool": nn.MaxPool2d(2)} | changed
    with torch.no_grad():
        parts["conv"].weight[:, ::2] = 0
    return nn.Sequential(*parts.values()).eval()


SUBCLASSES = {
    "norm": lambda: scaled(nn.BatchNorm2d)(4),
    "relu": scaled(nn.ReLU),
    "identity": scaled(nn.Identity),
    "pool": lambda: scaled(nn.MaxPool2d)(2),
}


@pytest.mark.parametrize("part", SUBCLASSES)
def test_subclass_of_what_is_fused_does_what_it_does(part):
    model, x = stack(**{part: SUBCLASSES[part]()}), images(2, 4, 6, 6)
    torch.testing.assert_close(sparsify(model)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", range(5))
@pytest.mark.parametrize("before", [True, False], ids=["before", "behind"])
def test_hooks_are_called(part, before):
    model, x = stack(), images(2, 4, 6, 6)
    if before:
        model[part].register_forward_pre_hook(lambda module, args: (2 * args[0] - 1,))
    else:
        model[part].register_forward_hook(lambda module, args, y: 2 * y - 1)
    torch.testing.assert_close(sparsify(model)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "reparametrize",
    [
        torch.nn.utils.weight_norm,
        torch.nn.utils.parametrizations.weight_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weight_that_is_computed_anew_is_refused(reparametrize):
    model = stack()
    reparametrize(model[0])
    with pytest.raises(ValueError, match=r"weight of layer 0 is computed anew .* make it a plain parameter first"):
        sparsify(model.eval())
