"""A process that must not outlive the one that started it."""

import os
import threading
import time


def end_with_parent(parent: int | None = None) -> None:
    """End this process when the process that started it is gone, however that one ended.

    `parent` is the id of that process, for who can tell it: it may be gone before this one asks for the first time.
    """
    parent = parent or os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
