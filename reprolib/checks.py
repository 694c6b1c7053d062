"""Strict checks of what people write into parameters: each gives the value back in its one normal form.

``"false"`` is no flag, ``true`` no number and ``2.5`` no count, so that a value never means another than it says, and
``1`` and ``1.0`` are one rate. All raise ValueError with the name, the value and what is possible.
"""

from __future__ import annotations

import math
from numbers import Integral, Real


def whole(name: str, value: object, least: int = 1) -> int:
    """A whole number of at least `least`."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
    return int(value)


def number(name: str, value: object, least: float = 0.0) -> float:
    """A finite number of at least `least`."""
    try:
        if isinstance(value, Real) and not isinstance(value, bool) and least <= value and math.isfinite(value):
            return float(value) + 0.0  # -0.0 is 0.0
    except OverflowError:  # a whole number that no float holds
        pass
    raise ValueError(f"{name} must be a number of at least {least:g}, not {value!r}")


def flag(name: str, value: object) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, not {value!r}")
    return value


def choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    """One of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} {value!r} is unknown: use {', '.join(choices)}")
    return choices[choices.index(value)]  # a plain str, also where value is of a subclass
