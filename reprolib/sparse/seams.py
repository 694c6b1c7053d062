"""What torch runs between islands, as data: a graph of torch.fx in lists and texts of JSON, and back.

A file may come from a stranger. So whatever it names is on a list here: functions and methods that calculate with
tensors, and modules of `torch.nn` with the arguments that make them. Names that torch.fx writes into Python code are
words, and nothing is imported or looked up for them.
"""

from __future__ import annotations

import inspect
import keyword
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from reprolib.sparse.capture.network import Again, two_dimensional
from reprolib.sparse.capture.tracing import IN_PLACE_OPERATORS, check_arguments, has_hooks

REMEDY = "keep it with torch.save(sparse_model, path), which needs its code when it is loaded"


def _words(text: str) -> list[str]:
    return text.split()


OPERATORS = _words("""
    add sub mul truediv floordiv mod pow matmul neg pos abs invert and_ or_ xor lshift rshift eq ne lt le gt ge
    getitem setitem
""")
# Of torch and of its tensors, where these have them. None gives memory that nobody has written, or a view beyond it.
CALCULATIONS = _words("""
    abs acos acosh add addbmm addcdiv addcmul addmm addmv addr all allclose amax amin aminmax angle any argmax argmin
    argsort asin asinh atan atan2 atanh baddbmm bitwise_and bitwise_not bitwise_or bitwise_xor block_diag bmm
    broadcast_tensors broadcast_to cat cdist ceil celu channel_shuffle chunk clamp clamp_max clamp_min clip clone
    column_stack complex concat concatenate conj constant_pad_nd conv1d conv2d conv3d conv_transpose1d
    conv_transpose2d conv_transpose3d cos cosh cosine_similarity count_nonzero cross cummax cummin cumprod cumsum
    deg2rad detach diag diag_embed diagonal diff dist div divide dot dsplit dstack einsum eq equal erf erfc erfinv exp
    exp2 expm1 flatten flip fliplr flipud float_power floor floor_divide fmax fmin fmod frac full_like gather ge
    greater greater_equal group_norm gt hardshrink heaviside hsplit hstack hypot imag index_add index_copy index_fill
    index_put index_select inner isclose isfinite isinf isnan kron kthvalue layer_norm le lerp less less_equal log
    log10 log1p log2 log_softmax logaddexp logical_and logical_not logical_or logical_xor logit logsumexp lt
    masked_fill masked_scatter masked_select matmul max max_pool1d max_pool2d max_pool3d maximum mean median meshgrid
    min minimum mm mode moveaxis movedim mul multiply mv nan_to_num nanmean nansum narrow ne neg negative nonzero norm
    not_equal numel ones_like outer permute pixel_shuffle pixel_unshuffle polar positive pow prelu prod quantile
    rad2deg ravel real reciprocal relu remainder renorm repeat_interleave reshape rms_norm roll rot90 round rsqrt rsub
    scatter scatter_add searchsorted select selu sgn sigmoid sign sin sinc sinh softmax sort split split_with_sizes
    sqrt square squeeze stack std std_mean sub subtract sum swapaxes swapdims t take take_along_dim tan tanh
    tensor_split tensordot threshold tile topk trace transpose tril triu true_divide trunc unbind unflatten unsqueeze
    var var_mean view_as_complex view_as_real vsplit vstack where xlogy zeros_like _assert
""")
METHODS = _words("""
    bfloat16 bool contiguous copy_ cpu cuda dim double element_size expand expand_as fill_ float half index int
    is_floating_point long masked_fill_ new_full new_ones new_zeros repeat reshape_as size stride sum_to_size to
    type_as unfold view view_as zero_
""")
FUNCTIONAL = _words("""
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d affine_grid alpha_dropout avg_pool1d avg_pool2d avg_pool3d batch_norm bilinear celu
    cosine_similarity dropout dropout1d dropout2d dropout3d elu embedding feature_alpha_dropout fold gelu glu
    grid_sample group_norm hardshrink hardsigmoid hardswish hardtanh instance_norm interpolate layer_norm leaky_relu
    linear local_response_norm log_softmax logsigmoid lp_pool1d lp_pool2d max_pool1d max_pool2d max_pool3d
    max_pool2d_with_indices mish normalize one_hot pad pixel_shuffle pixel_unshuffle prelu relu relu6 rms_norm
    scaled_dot_product_attention selu sigmoid silu softmax softmin softplus softshrink softsign tanh tanhshrink
    threshold unfold
""")
ATTRIBUTES = ("shape", "dtype", "device", "ndim", "T", "mT", "H", "mH", "real", "imag", "is_cuda", "itemsize", "nbytes")
MODULES = _words("""
    AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d
    AlphaDropout AvgPool1d AvgPool2d AvgPool3d BatchNorm1d BatchNorm2d BatchNorm3d Bilinear CELU ChannelShuffle
    CircularPad1d CircularPad2d CircularPad3d ConstantPad1d ConstantPad2d ConstantPad3d Conv1d Conv2d Conv3d
    ConvTranspose1d ConvTranspose2d ConvTranspose3d CosineSimilarity Dropout Dropout1d Dropout2d Dropout3d ELU
    Embedding FeatureAlphaDropout Flatten Fold GELU GLU GroupNorm Hardshrink Hardsigmoid Hardswish Hardtanh Identity
    InstanceNorm1d InstanceNorm2d InstanceNorm3d LayerNorm LeakyReLU Linear LocalResponseNorm LogSigmoid LogSoftmax
    LPPool1d LPPool2d MaxPool1d MaxPool2d MaxPool3d Mish MultiheadAttention PReLU PixelShuffle PixelUnshuffle RMSNorm
    RReLU ReLU ReLU6 ReflectionPad1d ReflectionPad2d ReflectionPad3d ReplicationPad1d ReplicationPad2d
    ReplicationPad3d SELU SiLU Sigmoid Softmax Softmax2d Softmin Softplus Softshrink Softsign Tanh Tanhshrink
    Threshold Unflatten Unfold Upsample UpsamplingBilinear2d UpsamplingNearest2d ZeroPad1d ZeroPad2d ZeroPad3d
""")


def _functions() -> dict[str, Callable]:
    found = {f"torch.{name}": getattr(torch, name, None) for name in CALCULATIONS}
    found |= {
        f"torch.{name}_": getattr(torch, f"{name}_", None) for name in ("relu", "sigmoid", "tanh", "celu", "selu")
    }
    found |= {f"functional.{name}": getattr(F, name, None) for name in FUNCTIONAL}
    found |= {f"operator.{name}": getattr(operator, name) for name in (*OPERATORS, *IN_PLACE_OPERATORS)}
    found |= {
        "getattr": getattr,
        "reprolib.two_dimensional": two_dimensional,
        "reprolib.check_arguments": check_arguments,
    }
    return {name: function for name, function in found.items() if function is not None}


FUNCTIONS = _functions()
NAMES = {id(function): name for name, function in reversed(FUNCTIONS.items())}
METHOD_NAMES = {name for name in CALCULATIONS if hasattr(Tensor, name)}
METHOD_NAMES |= {f"{name}_" for name in CALCULATIONS if hasattr(Tensor, f"{name}_")} | set(METHODS)
DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
LAYOUTS = {str(value).removeprefix("torch."): value for value in (torch.contiguous_format, torch.channels_last)}
LAYOUTS |= {"preserve_format": torch.preserve_format, "channels_last_3d": torch.channels_last_3d}
# Arguments of constructors that modules keep under another name.
KEPT_AS = {"add_bias_kv": "bias_k"}


class Unwritable(ValueError):
    """What is on no list; the text says what."""


# --- Graphs -----------------------------------------------------------------------------------------------------------


def written(graph: fx.Graph) -> list[dict[str, Any]]:
    """The nodes of a graph. Raises ValueError that names the first node that can't be written, and says what to do."""
    numbers: dict[fx.Node, int] = {}
    nodes = []
    for node in graph.nodes:
        try:
            nodes.append(_written(node, numbers))
        except Unwritable as problem:
            raise ValueError(f"node {node.name} can't be written to a file: {problem}; {REMEDY}") from None
        numbers[node] = len(numbers)
    return nodes


def _written(node: fx.Node, numbers: Mapping[fx.Node, int]) -> dict[str, Any]:
    target = node.target
    if node.op == "call_function":
        target = NAMES.get(id(target))
        if target is None:
            raise Unwritable(f"{getattr(node.target, '__qualname__', node.target)} is no function of torch on the list")
        if target == "getattr" and node.args[1] not in ATTRIBUTES:
            raise Unwritable(f"attribute {node.args[1]} is not on the list")
    elif node.op == "call_method" and target not in METHOD_NAMES:
        raise Unwritable(f"method {target} is not on the list")
    elif node.op in ("get_attr", "call_module") and not all(map(_is_free, target.split("."))):
        raise Unwritable(f"{target!r} is no name of letters, digits and underscores, or torch.fx has it: rename it")
    args, kwargs = to_json(node.args, numbers), to_json(node.kwargs, numbers)
    return {"op": node.op, "target": target, "args": args["tuple"], "kwargs": kwargs["dict"]}


def graph_of(nodes: list[dict[str, Any]], known: set[str]) -> fx.Graph:
    """The graph of these nodes, which may name modules and tensors that are `known`. Raises ValueError."""
    graph = fx.Graph(tracer_cls=Again)
    made: list[fx.Node] = []
    for number, written in enumerate(nodes):
        op, name = written["op"], written["target"]
        target = FUNCTIONS.get(name) if op == "call_function" else name
        args = tuple(from_json(value, made) for value in written["args"])
        kwargs = {word(key): from_json(value, made) for key, value in written["kwargs"]}
        match op:
            case "placeholder":
                word(name.lstrip("*"))
                fits = len(args) <= 1 and not any(isinstance(value, fx.Node) for value in args)
            case "call_function":
                fits = target is not None and (target is not getattr or (len(args) == 2 and args[1] in ATTRIBUTES))
            case "call_method":
                fits = name in METHOD_NAMES and args and isinstance(args[0], fx.Node)
            case "get_attr" | "call_module":
                fits = name in known and all(map(_is_free, name.split(".")))
            case "output":
                fits = name == "output" and number == len(nodes) - 1
            case _:
                fits = False
        if not fits:
            raise ValueError(f"{op} {name} is not what a file may ask for")
        made.append(graph.create_node(op, target, args, kwargs))
    if not made or made[-1].op != "output":
        raise ValueError("its graph has no output")
    graph.lint()
    return graph


def word(name: str) -> str:
    """A name that may stand in Python code. Raises ValueError for another one."""
    if not (isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name) and name != "self"):
        raise ValueError(f"{name!r} is no name")
    return name


def _is_free(name: str) -> bool:
    """Whether this is a word under which a module can keep another one or a tensor."""
    return re.fullmatch(r"\w+", name) is not None and not hasattr(fx.GraphModule, name) and name not in _OWN


_OWN = set(vars(fx.GraphModule(nn.Module(), fx.Graph())))


# --- Modules ----------------------------------------------------------------------------------------------------------


def written_module(module: nn.Module, name: str) -> dict[str, Any]:
    """Kind and arguments of a module of torch. Raises ValueError, with the remedy, if they would not make it again."""
    kind = type(module).__name__
    try:
        if kind not in MODULES or type(module) is not getattr(nn, kind):
            raise Unwritable(f"{kind} is no module of torch.nn on the list")
        if has_hooks(module) or "forward" in vars(module):
            raise Unwritable("it has hooks or a forward of its own")
        if any(child.training for child in module.modules()):
            raise Unwritable("it is in training mode")
        arguments = {}
        for argument in _parameters(getattr(nn, kind)):
            kept_as = KEPT_AS.get(argument, argument)
            if kind == "MultiheadAttention" and argument == "bias":
                kept_as = "in_proj_bias"
            if hasattr(module, kept_as):
                value = getattr(module, kept_as)
                is_there = argument in ("bias", "add_bias_kv") and (value is None or isinstance(value, Tensor))
                arguments[argument] = to_json(value is not None if is_there else value)
        written = {"kind": kind, "arguments": arguments}
        if not _alike(module_of(written), module):
            raise Unwritable(f"its arguments do not make this {kind} again")
        return written
    except Unwritable as problem:
        raise ValueError(f"module {name} can't be written to a file: {problem}; {REMEDY}") from None


def module_of(written: dict[str, Any]) -> nn.Module:
    """A module on the meta device, in eval mode. Raises ValueError for a kind that is not on the list."""
    kind, arguments = written["kind"], {key: from_json(value) for key, value in written["arguments"].items()}
    if kind not in MODULES or not arguments.keys() <= set(_parameters(getattr(nn, kind))):
        raise ValueError(f"{kind} is not what a file may ask for")
    with torch.device("meta"):
        return getattr(nn, kind)(**arguments).eval()


def _parameters(kind: type) -> list[str]:
    found = inspect.signature(kind).parameters.values()
    named = [p.name for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return [name for name in named if name not in ("device", "dtype", "_weight", "_freeze")]


def _alike(made: nn.Module, module: nn.Module) -> bool:
    """Whether `module` has the attributes of `made`, and tensors of the same names and shapes."""
    for name, value in vars(made).items():
        other = vars(module).get(name)
        if name in ("_parameters", "_buffers"):
            shapes = [{key: None if t is None else t.shape for key, t in held.items()} for held in (value, other)]
            if shapes[0] != shapes[1]:
                return False
        elif name == "_modules":
            if value.keys() != other.keys() or not all(_alike(value[key], other[key]) for key in value):
                return False
        elif "hooks" not in name and value != other:
            return False
    return type(made) is type(module) and not module._non_persistent_buffers_set


# --- Arguments --------------------------------------------------------------------------------------------------------


def to_json(value: Any, numbers: Mapping[fx.Node, int] | None = None) -> Any:
    """Numbers, texts and None are themselves and lists are lists; all else is an object that says what it is."""
    inner = lambda part: to_json(part, numbers)  # noqa: E731
    match value:
        case None | bool() | int() | str() if type(value) in (type(None), bool, int, str):
            return value
        case float():
            return value if math.isfinite(value) else {"float": str(value)}
        case fx.Node() if numbers is not None:
            return {"node": numbers[value]}
        case tuple() if type(value) in (tuple, torch.Size):
            return {"tuple": [inner(part) for part in value]}
        case list():
            return [inner(part) for part in value]
        case dict() if all(type(key) is str for key in value):
            return {"dict": [[key, inner(part)] for key, part in value.items()]}
        case slice():
            return {"slice": [inner(part) for part in (value.start, value.stop, value.step)]}
        case torch.dtype():
            return {"dtype": str(value).removeprefix("torch.")}
        case torch.memory_format():
            return {"layout": str(value).removeprefix("torch.")}
        case torch.device():
            return {"device": str(value)}
    if value is Ellipsis:
        return {"ellipsis": True}
    raise Unwritable(f"it is given {value!r}, a {type(value).__name__}")


def from_json(value: Any, nodes: list[fx.Node] | tuple = ()) -> Any:
    """What `to_json` was given. Raises ValueError."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [from_json(part, nodes) for part in value]
    [(kind, inner)] = value.items()
    match kind:
        case "node" if type(inner) is int and 0 <= inner < len(nodes):
            return nodes[inner]
        case "float":
            return float(inner)
        case "tuple":
            return tuple(from_json(part, nodes) for part in inner)
        case "dict":
            return {str(key): from_json(part, nodes) for key, part in inner}
        case "slice":
            return slice(*(from_json(part, nodes) for part in inner))
        case "dtype":
            return DTYPES[inner]
        case "layout":
            return LAYOUTS[inner]
        case "device":
            return torch.device(inner)
        case "ellipsis":
            return Ellipsis
    raise ValueError(f"{kind} {inner!r} is not what a file may hold")
