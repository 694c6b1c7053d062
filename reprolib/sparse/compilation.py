"""Numba's compiler with its cache on disk, which may be missing or damaged: then there is one line, and compilation."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path

import numba
from numba.core import event


def compiled(**options) -> Callable:
    """Like ``numba.njit(cache=True, **options)``, where a cache can be kept; else without."""

    def compile_function(function: Callable) -> Callable:
        try:
            dispatcher = numba.njit(cache=True, **options)(function)
        except RuntimeError:  # no folder for it: the package's is read-only, and there is no home
            _say("no folder for compiled kernels can be written: they are compiled anew in every process")
            return numba.njit(**options)(function)
        if not numba.config.DISABLE_JIT:
            dispatcher._cache._cache_file._source_stamp = _stamp(Path(function.__code__.co_filename).parent)
            dispatcher._cache = _Forgiving(dispatcher._cache)
        return dispatcher

    return compile_function


@cache
def _stamp(folder: Path) -> tuple:
    """Of all files whose code or constants a function of this folder may hold: Numba looks at the function's own only,
    and would go on with what others once were.
    """
    files = sorted({path for near in (folder, Path(__file__).parent) for path in near.rglob("*.py")})
    return tuple((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in files)


class _Forgiving:
    """A cache of Numba whose files may be damaged, or cannot be written."""

    def __init__(self, inner):
        self._inner = inner

    def __getattr__(self, name: str):
        return getattr(self._inner, name)

    def load_overload(self, *arguments):
        try:
            return self._inner.load_overload(*arguments)
        except Exception as error:  # of a file cut short nearly any comes
            _say(f"a compiled kernel could not be read ({type(error).__name__}): it is compiled again")
            self._try(self._inner.flush)
            return None

    def save_overload(self, *arguments):
        self._try(self._inner.save_overload, *arguments)

    def _try(self, function: Callable, *arguments) -> None:
        try:
            function(*arguments)
        except Exception as error:
            _say(f"compiled kernels could not be kept ({error}): they are compiled anew in every process")


@cache
def _say(message: str) -> None:
    _note(message)


def _note(message: str) -> None:
    """On a terminal to stderr, as what is no result. In a notebook that would look like an error: there to stdout."""
    print(message, file=sys.stdout if "ipykernel" in sys.modules else sys.stderr)


class _Note(event.Listener):
    """Says so when Numba begins to compile; what comes from its cache stays silent."""

    told = False

    def on_start(self, _event):
        if not self.told:
            _note("compiling a CPU kernel: some seconds, once on this machine")
        self.told = True

    def on_end(self, _event):
        pass


def told() -> AbstractContextManager:
    """While this lasts, compilation says what takes so long."""
    return event.install_listener("numba:compile", _Note())


def require() -> None:
    """Raises RuntimeError where Numba is told not to compile."""
    if numba.config.DISABLE_JIT:
        raise RuntimeError("NUMBA_DISABLE_JIT is set, and sparse kernels are compiled by Numba: unset it")
