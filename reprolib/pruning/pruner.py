"""Pruning inside any training loop: masks that hold behind every step, renewed while a schedule rises."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

import pandas as pd
import torch
from torch import Tensor, distributed, nn

from reprolib import checks
from reprolib.models import foreign, weight_in_place, weight_layers, weights_in_place
from reprolib.patterns import Pattern, check_sparsity, parse
from reprolib.pruning.masks import MASKS, SCORES, achieved_sparsity, make_masks
from reprolib.pruning.ratios import global_ratios, uniform_ratios
from reprolib.pruning.schedules import PRUNING_PHASE, SCHEDULES, check_phase, sparsity_at

LAYERS = ("inner", "all")
SHOWN = 3  # layers that a warning names
TOLERANCE = 0.005  # half a point: how far given ratios may lie from the sparsity over all layers


class Pruner:
    """Prunes a network while it trains. Its masks are those of the start at once; `step` belongs behind each step of
    the optimizer, and any number of steps may follow the last one of the schedule.

    * `pattern`: a pattern or its text form
    * `sparsity`: the fraction of weights, in [0, 1), that is pruned in the end, over all layers that are taken
    * `steps`: how many steps of the optimizer the schedule spans
    * `layers`: ``"inner"`` takes all convolutions and linear layers but the first and the last layer of the network,
      ``"all"`` takes these too, and names of modules take just those. `describe` says which are left, and why.
    * `schedule`: ``"gradual"``, ``"one-shot"`` or ``"iterative"``, see `sparsity_at`
    * `phase`: the share of the steps, in (0, 1], in which a gradual schedule prunes
    * `ratios`: ``"uniform"``, ``"global"``, or each layer's own sparsity by name, as `sensitivity_ratios` gives it
    * `score`: ``"magnitude"``, or ``"random"`` for the control, whose numbers follow from `seed`
    * `masks`: ``"nested"`` keeps pruned what is pruned, ``"refitted"`` ranks all weights anew at each change

    The network may be wrapped by torch.compile and DistributedDataParallel, before or behind: names are those without
    the wrappers. Where torch.distributed runs, the masks of rank 0 hold on all ranks.

    Warns of layers in which less than half of the outputs will keep a weight, as with blocks in depthwise convolutions.
    Raises ValueError for arguments that make no sense, and for weights that a mask would not hold for: those that are
    computed anew at each forward pass, and those that share their memory.
    """

    def __init__(
        self,
        model: nn.Module,
        pattern: Pattern | str,
        sparsity: float,
        steps: int,
        *,
        layers: str | Iterable[str] = "inner",
        schedule: str = "gradual",
        phase: float = PRUNING_PHASE,
        ratios: str | Mapping[str, float] = "uniform",
        score: str = "magnitude",
        masks: str = "nested",
        seed: int = 0,
    ):
        if not isinstance(model, nn.Module):
            raise ValueError(f"the model must be a torch.nn.Module, not {model!r}")
        if not isinstance(pattern, (Pattern, str)):
            raise ValueError(f"pattern must be one, or its text form such as 'Block(32, 32)', not {pattern!r}")
        check_sparsity(sparsity := checks.number("sparsity", sparsity))
        self._layers = weight_layers(model)
        self._left = _left(self._layers, layers)
        self._taken = {name: module for name, module in self._layers.items() if name not in self._left}
        named = weights_in_place(model, self._taken)
        self._pattern = parse(pattern) if isinstance(pattern, str) else pattern
        self._targets = _targets(ratios, named, self._pattern, sparsity)
        self._of = {  # what tells this pruner from others
            "pattern": str(self._pattern),
            "sparsity": sparsity,
            "steps": checks.whole("steps", steps),
            "layers": list(self._taken),
            "schedule": checks.choice("schedule", schedule, SCHEDULES),
            "phase": check_phase(phase),
            "ratios": ratios if isinstance(ratios, str) else self._targets,
            "score": checks.choice("score", score, SCORES),
            "masks": checks.choice("masks", masks, MASKS),
            "seed": checks.whole("seed", seed, 0),
        }
        self._warn_of_lost_outputs(named)
        self._step, self._due = 0, self._due_at(0)
        self._gone: dict[str, Tensor] = {}  # written in place: a captured step of CUDA sees what changes
        self._renew()

    # --- In the loop ------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Behind a step of the optimizer: what is pruned is zero again, and new masks are made where they are due."""
        self.hold()
        self.advance()

    @torch.no_grad()
    def hold(self) -> None:
        """The half of `step` that may be part of a captured step: set what is pruned to exactly 0.0, in place."""
        for name, gone in self._gone.items():
            weight = self._weight(name)
            if gone.device != weight.device:  # the network has been moved
                gone = self._gone[name] = gone.to(weight.device)
            weight.masked_fill_(gone, 0.0)

    def advance(self) -> None:
        """The other half of `step`: count it, and make new masks where another sparsity is due."""
        self._step += 1
        if (due := self._due_at(self._step)) != self._due:
            self._due = due
            self._renew()

    # --- What it does -----------------------------------------------------------------------------------------------

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks that hold now, by module name: bool, shaped like the weight, True = kept."""
        return {name: ~gone for name, gone in self._gone.items()}

    @property
    def sparsity(self) -> float:
        """The fraction of weights that is pruned now, over the layers that are taken."""
        return achieved_sparsity(self.masks)

    @property
    def targets(self) -> dict[str, float]:
        """The sparsity at the end of the schedule, by module name."""
        return dict(self._targets)

    def describe(self) -> pd.DataFrame:
        """One row per layer that holds weights, by module name: their shape and count, whether the layer is `taken`,
        its `target_sparsity` and its `sparsity` now, as fractions, and for those that are left the `reason`.
        """
        rows = {}
        for name, module in self._layers.items():
            taken = name in self._taken
            held = [self._weight(name)] if taken else [p for p in module.parameters() if p.dim() > 1]
            rows[name] = {
                "shape": ", ".join("×".join(map(str, weight.shape)) for weight in held),
                "weights": sum(weight.numel() for weight in held),
                "taken": taken,
                "target_sparsity": self._targets.get(name, 0.0),
                "sparsity": int(self._gone[name].sum()) / self._gone[name].numel() if taken else 0.0,
                "reason": self._left.get(name, ""),
            }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("layer")

    # --- Stopping and going on --------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """All that `load_state_dict` needs, in plain numbers, texts and tensors (`weights_only` of torch.load)."""
        return {"of": dict(self._of), "step": self._step, "targets": self.targets, "masks": self.masks}

    def load_state_dict(self, state: dict) -> None:
        """Go on where the pruner of `state_dict` stood, with the same masks. They are applied to the network.

        Build the pruner on the network as it was when training began, and load the state of the network behind it:
        masks of the start would prune trained weights. Raises ValueError for the state of a pruner with other
        arguments, or of another network.
        """
        try:
            of, step, targets, masks = (state[key] for key in ("of", "step", "targets", "masks"))
        except (KeyError, TypeError):
            raise ValueError("this is not the state of a Pruner: give what its state_dict() returned") from None
        of = {"phase": PRUNING_PHASE} | of  # states of earlier versions have none
        for key, mine in self._of.items():
            if of.get(key) != mine:
                theirs = f"the state is of a pruner with {key}={of.get(key)!r}, and this one has {key}={mine!r}"
                raise ValueError(f"{theirs}: build it with the same arguments")
        for name, gone in self._gone.items():
            if name not in masks or masks[name].shape != gone.shape or masks[name].dtype != torch.bool:
                shape = "×".join(map(str, gone.shape))
                raise ValueError(f"the state holds no mask for layer {name}, whose weight is {shape}")
        self._step, self._targets = step, dict(targets)
        self._due = self._due_at(step)
        for name, gone in self._gone.items():
            gone.copy_(~masks[name])
        self.hold()

    # --- Inside -----------------------------------------------------------------------------------------------------

    def _weight(self, name: str) -> nn.Parameter:
        return weight_in_place(self._taken[name], name)

    def _due_at(self, step: int) -> dict[str, float]:
        progress = min(step / self._of["steps"], 1.0)
        when = self._of["schedule"], self._of["phase"]
        return {name: sparsity_at(when[0], target, progress, when[1]) for name, target in self._targets.items()}

    def _warn_of_lost_outputs(self, named: dict[str, Tensor]) -> None:
        masks = make_masks(named, self._pattern, self._targets, self._of["score"], self._of["seed"])
        left = {name: mask.flatten(1).any(dim=1) for name, mask in masks.items()}
        few = [
            f"{name} ({int(rows.sum())} of {len(rows)})" for name, rows in left.items() if 2 * rows.sum() < len(rows)
        ]
        if few:
            more = f" and {len(few) - SHOWN} more layers" if len(few) > SHOWN else ""
            warnings.warn(
                f"{self._pattern} will leave weights to few outputs of {', '.join(few[:SHOWN])}{more}; the others "
                "become the same for all images: take smaller units, such as Unstructured(), or name the layers to "
                "prune with layers=[..]",
                stacklevel=3,
            )

    def _renew(self) -> None:
        named = {name: self._weight(name) for name in self._taken}
        nesting = {"alive": self.masks, "targets": self._targets} if self._of["masks"] == "nested" else {}
        masks = make_masks(named, self._pattern, self._due, self._of["score"], self._of["seed"], **nesting)
        for name, mask in masks.items():
            gone = self._gone.setdefault(name, torch.empty_like(named[name], dtype=torch.bool, requires_grad=False))
            gone.copy_(~_of_rank_0(mask))
        self.hold()


def _left(found: dict[str, nn.Module], layers: str | Iterable[str]) -> dict[str, str]:
    """Which layers are left, by name, and why. Raises ValueError for names of no layer, and where none is taken."""
    if isinstance(layers, str):
        checks.choice("layers", layers, LAYERS)
        ends = {"first": list(found)[:1], "last": list(found)[-1:]} if layers == "inner" else {}
        left = {name: f"the {end} layer, dense unless layers='all'" for end, names in ends.items() for name in names}
        left |= {name: reason for name, module in found.items() if (reason := foreign(module))}
    else:
        asked = set(layers) if isinstance(layers, Iterable) else {layers}
        if unknown := asked - found.keys():
            raise ValueError(
                f"layers must be {' or '.join(map(repr, LAYERS))}, or names of layers ({', '.join(found)}); "
                f"no such layer: {', '.join(sorted(map(repr, unknown)))}"
            )
        for name in asked:
            if not isinstance(found[name], (nn.Conv2d, nn.Linear)):
                raise ValueError(f"layer {name} is {foreign(found[name])}; leave it out of layers")
        left = {name: "not named in layers" for name in found if name not in asked}
    if len(left) == len(found):
        reasons = "; ".join(f"{name} is {reason}" for name, reason in left.items())
        raise ValueError(f"nothing to prune: of {len(found)} layers with weights none is taken ({reasons})")
    return left


def _targets(
    ratios: str | Mapping[str, float], named: dict[str, Tensor], pattern: Pattern, sparsity: float
) -> dict[str, float]:
    """Each layer's own sparsity. Raises ValueError for ratios that do not fit the layers and the `sparsity` of all."""
    if not isinstance(ratios, Mapping):
        if checks.choice("ratios", ratios, ("uniform", "global")) == "uniform":
            return uniform_ratios(named, sparsity)
        found = global_ratios(named, pattern, sparsity)
        values = torch.tensor(list(found.values()), dtype=torch.float64, device=next(iter(named.values())).device)
        return dict(zip(found, _of_rank_0(values).tolist(), strict=True))
    if differ := ratios.keys() ^ named.keys():
        raise ValueError(
            "ratios must name the layers that are taken, and no others (layers=ratios takes just those): "
            f"they differ in {', '.join(sorted(map(repr, differ)))}"
        )
    for name, ratio in ratios.items():
        if checks.number(f"the ratio of layer {name}", ratio) >= 1:
            raise ValueError(f"the ratio of layer {name} must lie in [0, 1), not {ratio!r}")
    targets = {name: float(ratios[name]) for name in named}
    count = sum(weight.numel() for weight in named.values())
    mean = sum(targets[name] * weight.numel() for name, weight in named.items()) / count
    if abs(mean - sparsity) > TOLERANCE:
        raise ValueError(f"these ratios prune {mean:.4f} of all weights, not sparsity={sparsity:g}: give {mean:.4f}")
    return targets


def _of_rank_0(tensor: Tensor) -> Tensor:
    """The tensor that rank 0 has here, on all ranks; each makes its own, so that an error is raised on all of them."""
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        tensor = tensor.contiguous()
        distributed.broadcast(tensor, src=0)
    return tensor
