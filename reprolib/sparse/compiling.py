"""A word to whoever waits for a kernel to be compiled."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE_S = 1.0


@contextmanager
def announced(note: str) -> Iterator[None]:
    """Print `note` to stderr if the block takes longer than a second: what comes from a cache stays silent."""
    timer = threading.Timer(PATIENCE_S, print, [note], {"file": sys.stderr})
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
