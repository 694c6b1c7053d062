"""Functions of the user's own, by name: ``module:function``."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable

from reprolib.files import paths


def is_named(text: str) -> bool:
    """Whether a text has the form ``module:function``; ``a.b:f`` is `f` in the module `b` of the package `a`."""
    return bool(re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", text))


def function(text: str) -> Callable:
    """The function that ``module:function`` names, in a module that Python finds: in the checkout, or installed.

    Raises ValueError, with the remedy, where there is none.
    """
    module_name, _, name = text.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as missing:
        if not f"{module_name}.".startswith(f"{missing.name}."):  # something that the user's module imports
            raise ValueError(f"{text}: {module_name} cannot be imported: {missing}") from None
        file = module_name.replace(".", "/") + ".py"
        raise ValueError(f"{text}: there is no module {module_name}: put {file} into {paths.ROOT}") from None
    found = getattr(module, name, None)
    if not callable(found):
        raise ValueError(f"{text}: there is no function {name} in {module.__file__}")
    return found
