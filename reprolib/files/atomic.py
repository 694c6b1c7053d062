"""Files that are there whole or not at all, and what is done with one that was damaged later."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file that is there whole or not at all, creating its folder. Raises OSError, which names the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)  # mkstemp makes it private
        os.replace(partial, path)
    except BaseException as failed:
        Path(partial).unlink(missing_ok=True)
        if isinstance(failed, OSError):
            failed.filename = failed.filename or str(path)  # a full disk does not say where
        raise


def sound(path: Path, read: Callable[[Path], T]) -> T | None:
    """What `read` makes of a file; None if there is none, or if `read` raises ValueError, for it is damaged: then it is
    renamed to ``<name>.damaged``, and a line says so. What was in it can be made anew, and nothing is deleted.
    """
    try:
        return read(path)
    except FileNotFoundError:
        return None
    except ValueError:
        with contextlib.suppress(FileNotFoundError):  # another process was first
            path.replace(path.with_name(f"{path.name}.damaged"))
            print(f"{path} is damaged: set aside as {path.name}.damaged, made anew", file=sys.stderr, flush=True)
        return None
