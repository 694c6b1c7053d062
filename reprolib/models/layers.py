"""What the layers of any network hold and cost: weights that patterns can prune, FLOPs, modes."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import pandas as pd
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

# Layers that hold weights as convolutions and linear layers do, and that patterns can't prune.
OTHER_LAYERS = (nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
OTHER_LAYERS += (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, nn.Bilinear)
UNCOUNTED = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, nn.Bilinear)  # torch's counter passes over them


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a network by name, each once: without what torch.compile and data parallelism wrap around them."""
    wrappers = nn.DataParallel, nn.parallel.DistributedDataParallel
    while isinstance(model, wrappers) or "_orig_mod" in model._modules:
        model = model._modules.get("_orig_mod") or model.module
    # A part of the network may be compiled by itself: the inner module takes the place of the one around it.
    return {
        ".".join(part for part in name.split(".") if part != "_orig_mod"): module
        for name, module in model.named_modules()
    }


def weight_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that hold weights, of all kinds, by module name, in the order of the network."""
    found, inside = {}, set()
    for name, module in named_modules(model).items():
        if module not in inside and isinstance(module, (nn.Conv2d, nn.Linear, *OTHER_LAYERS)):
            found[name] = module
            inside |= set(module.modules())  # attention holds a linear layer of its own
    return found


def foreign(module: nn.Module) -> str:
    """Why patterns can't prune a layer of this kind; empty where they can."""
    if isinstance(module, OTHER_LAYERS):
        return f"a {type(module).__name__}, which patterns can't prune: they take Conv2d and Linear layers"
    if type(module).forward not in (nn.Conv2d.forward, nn.Linear.forward):
        what = "a forward of its own, which may multiply by other numbers than its weight"
        return f"a {type(module).__name__} with {what}"
    return ""


def weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of all convolutions and linear layers, by module name, in the order of the network.

    Raises ValueError for a layer whose weight can't be pruned in place, and names the remedy: one that is computed anew
    at each forward pass, one that shares its memory, and kinds of layers that patterns don't know.
    """
    layers = weight_layers(model)
    for name, module in layers.items():
        if reason := foreign(module):
            raise ValueError(f"layer {name} is {reason}; give `make_masks` the weights that you want to prune by name")
    return weights_in_place(model, layers)


def weights_in_place(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The weights of some layers of a network. Raises ValueError where a mask would not hold for one layer alone."""
    named = {name: weight_in_place(module, name) for name, module in layers.items()}
    sharers = defaultdict(list)
    for name, module in named_modules(model).items():
        for key, parameter in module.named_parameters(name, recurse=False):
            sharers[parameter.untyped_storage().data_ptr()].append(key)
    for name, weight in named.items():
        keys = sharers[weight.untyped_storage().data_ptr()]
        if len(keys) > 1 and not weight.is_meta:
            raise ValueError(
                f"the weight of layer {name} shares its memory ({', '.join(keys)}), and a mask holds for one layer: "
                "give it its own, as in layer.weight = nn.Parameter(layer.weight.detach().clone())"
            )
    return named


def weight_in_place(module: nn.Module, name: str) -> nn.Parameter:
    """The weight of a layer, where zeros that are written into it stay. Raises ValueError, with the remedy."""
    if "weight" not in module._parameters:
        raise ValueError(
            f"the weight of layer {name} is computed anew at each forward pass, so masks on it would be lost: "
            "make it a plain parameter first, with torch.nn.utils.parametrize.remove_parametrizations, "
            "remove_weight_norm, remove_spectral_norm or prune.remove of torch.nn.utils"
        )
    return module.weight


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """In this context all modules are in training mode, or in eval mode; behind it, each is in its own again."""
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, was_training in modes.items():
            module.training = was_training


def layer_flops(model: nn.Module, image_shape: tuple[int, int, int] = (3, 32, 32)) -> dict[str, int]:
    """FLOPs (2 per multiply-add) of each dense layer that has any, for one image, by module name.

    A layer counts as often as it runs, wherever it stands; "" is what the network multiplies by itself. Only products
    count: convolutions, transposed ones too, and matrix products. Raises ValueError for layers that can't be counted.
    """
    names = {module: name for name, module in named_modules(model).items()}
    for module, name in names.items():
        if isinstance(module, UNCOUNTED):
            raise ValueError(f"FLOPs of layer {name}, a {type(module).__name__}, can't be counted")
    flops, running = dict.fromkeys(names.values(), 0), []  # of each module that runs: FLOPs before it, and inside it

    def enter(module, args):
        running.append([counter.get_total_flops(), 0])

    def leave(module, args, output):
        before, inside = running.pop()
        whole = counter.get_total_flops() - before
        flops[names[module]] += whole - inside
        if running:
            running[-1][1] += whole

    handles = [module.register_forward_pre_hook(enter) for module in names]
    handles += [module.register_forward_hook(leave) for module in names]
    first = next(model.parameters(), torch.zeros(()))
    try:
        with mode(model, training=False), torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, *image_shape, device=first.device, dtype=first.dtype))
    finally:
        for handle in handles:
            handle.remove()
    return {name: count for name, count in flops.items() if count}


def is_finite(model: nn.Module) -> bool:
    """Whether all parameters and statistics are finite."""
    return all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values() if tensor.is_floating_point())


def describe_layers(model: nn.Module, image_shape: tuple[int, int, int] = (3, 32, 32)) -> pd.DataFrame:
    """One row per convolution and linear layer: weight shape, count of weights, FLOPs for one image."""
    named, flops = weights(model), layer_flops(model, image_shape)
    return pd.DataFrame(
        {
            "shape": {name: "×".join(map(str, weight.shape)) for name, weight in named.items()},
            "weights": {name: weight.numel() for name, weight in named.items()},
            "FLOPs": {name: flops.get(name, 0) for name in named},
        }
    ).rename_axis("layer")
