"""What a network does, as a graph of torch: `torch.fx` runs its code once, with values that stand for tensors.

Code that asks such a value for what only a tensor knows can't be traced. Then the module whose code it is stays one
node, which torch calls as it is; so does a module with hooks, or they would not be called.
"""

from __future__ import annotations

import copy
import dis
import operator
import random
import sys
from collections import OrderedDict
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, fx, nn

from reprolib.models import weight_in_place

HOOKS = "its hooks would not be called"
IN_PLACE_OPERATORS = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor")


class Untraceable(Exception):
    """A network that can't be traced as a whole; the text says why."""


def copied(model: nn.Module) -> nn.Module:
    """A copy of a network that tracing can take, in which modules share what they shared.

    Raises ValueError for weights that are not there (on the meta device, or of lazy modules), for weights that are
    computed anew at each forward pass, and for a ScriptModule.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("the model is a ScriptModule, which can't be traced: give the model before torch.jit.script")
    for name, parameter in model.named_parameters():
        if torch.nn.parameter.is_lazy(parameter):
            raise ValueError(f"parameter {name} has no shape yet: call the model once before")
        if parameter.is_meta:
            raise ValueError(f"parameter {name} is on the meta device and has no values: load the weights first")
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            weight_in_place(module, name)
    attributes = [value for module in model.modules() for value in vars(module).values()]
    kept = [value for value in attributes if isinstance(value, Tensor) and not value.is_leaf]  # deepcopy refuses these
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in kept})


def traced(model: nn.Module) -> tuple[fx.Graph, dict[str, str]]:
    """The graph of a network in eval mode, and for each module in it that stays whole the reason, by name.

    Arguments whose default is None, a bool or a string are taken to have it: see `check_arguments`. Tensors that the
    code makes become attributes of `model`. Raises Untraceable.
    """
    if has_hooks(model):
        raise Untraceable(HOOKS)
    if "forward" in vars(model):
        raise Untraceable("its forward was replaced")
    tensors = [*model.parameters(), *model.buffers()]
    # Code may keep values in the modules: these are thrown away.
    scratch = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    opaque = {name: HOOKS for name, module in model.named_modules() if has_hooks(module)}
    before = _state(tensors)
    while True:
        graph, failure, constants = _traced(scratch, opaque)
        if failure is None:
            break
        name, reason = failure
        if not name:
            raise Untraceable(reason)
        opaque[name] = f"it can't be traced: {reason}"
    again, failure, others = _traced(scratch, opaque)
    if _state(tensors) != before:
        _restore(before)
        raise Untraceable("its forward draws random numbers or changes its buffers")
    if failure or _lines(graph) != _lines(again) or any(not torch.equal(constants[key], others[key]) for key in others):
        raise Untraceable("it does something else each time")
    if constants and opaque:  # they may be what a hook has kept from an earlier call
        raise Untraceable("it uses a tensor that is no parameter or buffer, beside modules that can't be traced")
    for name, value in constants.items():
        owner, _, attribute = name.rpartition(".")
        if not hasattr(model.get_submodule(owner), attribute):
            setattr(model.get_submodule(owner), attribute, value)
    return graph, opaque


def check_arguments(given: dict[str, Any], fixed: dict[str, Any]) -> None:
    """Raise ValueError for an argument that is not what it was taken to be while tracing."""
    for name, value in given.items():
        if name in fixed and not (value is fixed[name] or (type(value) is type(fixed[name]) and value == fixed[name])):
            raise ValueError(
                f"{name} has a value, and the network was traced with {name}={fixed[name]!r}: wrap it in a module "
                f"whose forward gives it that {name}, in eval mode, and take that"
            )
        if name not in fixed and value is None:
            raise ValueError(f"{name} is None, and the network was traced for a value: leave it out in a module around")


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody listens to the calls of a module."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def short(error: Exception) -> str:
    """The first line of an error."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= 120 else f"{line[:117]}..."


def _traced(model: nn.Module, opaque: dict[str, str]) -> tuple[fx.Graph | None, tuple[str, str] | None, dict]:
    """A graph, or the module that failed and why; and the tensors in the graph that are no parameter or buffer."""
    tracer = _Tracer(opaque)
    graph = None
    try:
        with torch.no_grad():
            graph = tracer.trace(model)
        graph.lint()
    except Exception as error:
        tracer.note(error)
    if tracer.failure is not None:
        return None, tracer.failure, {}
    own = {name for name, _ in [*model.named_parameters(), *model.named_buffers(), *model.named_modules()]}
    constants = {}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in own:
            constants[node.target] = operator.attrgetter(node.target)(model)
    for name in constants:
        if name.startswith("_tensor_constant"):
            delattr(model, name)  # the next one is called so again
    if not all(isinstance(value, Tensor) for value in constants.values()):
        return None, ("", "it uses an object that is no tensor"), {}
    return graph, None, constants


def _lines(graph: fx.Graph) -> list[tuple]:
    return [(node.op, node.name, node.target, str(node.args), str(node.kwargs)) for node in graph.nodes]


def _state(tensors: list[Tensor]) -> tuple:
    """What a forward pass must not change: generators of random numbers, and tensors of the network."""
    versions = [tensor._version for tensor in tensors if not tensor.is_inference()]
    name, keys, *rest = np.random.get_state()
    return random.getstate(), (name, tuple(keys), *rest), torch.get_rng_state().tolist(), versions


def _restore(state: tuple) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(torch.tensor(state[2], dtype=torch.uint8))


class _Tracer(fx.Tracer):
    """Leaves modules of torch.nn whole, and those that are `opaque`; notes the first module whose code fails."""

    proxy_buffer_attributes = True

    def __init__(self, opaque: dict[str, str]):
        super().__init__()
        self.opaque, self.running = opaque, [""]
        self.failure: tuple[str, str] | None = None
        self.autocast = _autocast()

    def note(self, error: Exception) -> None:
        self.failure = self.failure or (self.running[-1], short(error))

    def refuse(self, reason: str) -> NoReturn:
        """Stop, even where the code would catch the error."""
        error = fx.proxy.TraceError(reason)
        self.note(error)
        raise error

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.opaque or isinstance(m, torch.jit.ScriptModule):
            return True
        return super().is_leaf_module(m, module_qualified_name) and "forward" not in vars(m)

    def call_module(self, m: nn.Module, forward: Any, args: tuple, kwargs: dict) -> Any:
        name = self.path_of_module(m)
        if self.is_leaf_module(m, name):
            if any("__call__" in vars(kind) for kind in type(m).__mro__[: type(m).__mro__.index(nn.Module)]):
                self.refuse(f"{type(m).__name__} has a __call__ of its own")
            return super().call_module(m, forward, args, kwargs)
        self.running.append(name)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:
            self.note(error)
            raise
        finally:
            self.running.pop()

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list]:
        function, values = super().create_args_for_root(root_fn, is_module, concrete_args)
        return function, [_given(value) if isinstance(value, fx.Proxy) else value for value in values]

    def create_node(self, kind: str, target: Any, args: tuple, kwargs: dict, *rest: Any, **options: Any) -> fx.Node:
        if _autocast() != self.autocast:
            self.refuse("it switches autocast")
        return super().create_node(kind, target, args, kwargs, *rest, **options)

    def create_arg(self, a: Any) -> Any:
        if type(a) is OrderedDict:  # else it would become a dict
            return self.create_node("call_function", OrderedDict, (self.create_arg(list(a.items())),), {})
        if isinstance(a, dict) and type(a).__name__ not in ("dict", "immutable_dict"):
            self.refuse(f"it makes a {type(a).__name__}")
        return super().create_arg(a)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.refuse("its control flow depends on values or shapes")

    def iter(self, obj: fx.Proxy) -> Any:
        self.refuse("it iterates over a value")


def _given(value: fx.Proxy) -> Any:
    """An argument, or its default where that decides which way the code goes."""
    default = value.node.args
    return default[0] if default and is_fixed(default[0]) else value


def is_fixed(default: Any) -> bool:
    """Whether a default decides which way the code goes: None, a bool or a string."""
    return default is None or isinstance(default, (bool, str))


def _autocast() -> tuple[bool, ...]:
    return tuple(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))


class _Value(fx.Proxy):
    """Stands for a value, and gives no answer where torch.fx would give one that may be wrong."""

    @property
    def __class__(self) -> type:
        caller = sys._getframe(1)
        if not _asks_for_types(caller):
            return type(self)
        self.tracer.refuse("it asks for the type of a value")

    def __getattr__(self, k: str) -> fx.Proxy:
        if not hasattr(Tensor, k):
            self.tracer.refuse(f"it asks a value for its attribute {k}, which tensors don't have")
        return _Attribute(self, k)

    def __bool__(self) -> bool:
        if not _is_assertion(sys._getframe(1)):
            return self.tracer.to_bool(self)
        self.tracer.create_proxy("call_function", torch._assert, (self, "an assertion of the model does not hold"), {})
        return True

    def __len__(self) -> int:
        self.tracer.refuse("it asks for the length of a value")

    def __contains__(self, item: Any) -> bool:
        self.tracer.refuse("it searches in a value")

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


class _Attribute(_Value, fx.proxy.Attribute):
    """An attribute of a value; called, it is a method."""


def _in_place(name: str) -> Any:
    def method(self: _Value, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return method


for _name in IN_PLACE_OPERATORS:  # without these, Python takes `+` for `+=`, and nobody learns that a value changes
    setattr(_Value, f"__{_name}__", _in_place(_name))


def _asks_for_types(frame: Any) -> bool:
    """Whether the code that looks at the class of a value may go another way for it; torch and its C code do not."""
    code = frame.f_code
    module = frame.f_globals.get("__name__", "")
    if module == __name__ or module.partition(".")[0] == "torch":
        return code.co_name == "is_tensor"
    names = {*code.co_names, *code.co_freevars}
    return bool(names & {"isinstance", "__class__"}) or dis.opmap["MATCH_CLASS"] in code.co_code[::2]


def _is_assertion(frame: Any) -> bool:
    """Whether the code asks for the truth of a value only to raise AssertionError where it is false."""
    instructions = [instruction for instruction in dis.get_instructions(frame.f_code) if instruction.opname != "CACHE"]
    offsets = [instruction.offset for instruction in instructions]
    here = offsets.index(frame.f_lasti) if frame.f_lasti in offsets else len(offsets)
    names = [instruction.opname for instruction in instructions[here : here + 5]]
    names = [name for name in names if name not in ("TO_BOOL", "EXTENDED_ARG", "NOT_TAKEN", "COMPARE_OP")]
    jumps = len(names) > 1 and names[0].startswith("POP_JUMP") and names[0].endswith("IF_TRUE")
    return jumps and names[1] == "LOAD_ASSERTION_ERROR"
