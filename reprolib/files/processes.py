"""Processes that we start: what they know of their surroundings, and when they end."""

import getpass
import os
import threading
import time

from reprolib.files import paths

# Variables that make Python, Jupyter, Matplotlib, Snakemake or git look elsewhere than in this checkout.
FOREIGN = ("PYTHON", "JUPYTER", "IPYTHON", "MPL", "MATPLOTLIB", "SNAKEMAKE", "GIT_")


def environment() -> dict[str, str]:
    """The environment variables of every process that we start: a run depends on this checkout and nothing else.

    Settings and kernels of the user have no effect, and what these programs keep for themselves lies in ``.cache/``
    beside the results: a home folder need not be writable, or be there.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    cache = paths.home() / ".cache"
    folders = ("IPYTHONDIR", "MPLCONFIGDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")
    ours = {name: str(cache / name.lower()) for name in folders}
    ours |= {"XDG_CACHE_HOME": str(cache), "JUPYTER_PREFER_ENV_PATH": "1", "PYTHONPATH": str(paths.ROOT)}
    ours |= {"REPROLIB_HOME": str(paths.home()), "REPROLIB_DATA": str(paths.data()), "LOGNAME": _user()}
    return kept | ours


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # in a container, an id may have no name
        return str(os.getuid())


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
