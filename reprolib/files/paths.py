"""Every file name of the project, in one place and independent of the working directory.

``$REPROLIB_HOME`` moves what is written (results and figures) somewhere else, a scratch disk for example;
``$REPROLIB_DATA`` names the folder that holds the data sets.
"""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
PROFILES = ROOT / "profiles"


def home() -> Path:
    """Folder that holds ``results/`` and ``figures/``."""
    return Path(os.environ.get("REPROLIB_HOME") or ROOT).resolve()


def data() -> Path:
    """Folder that holds ``cifar-10-batches-py/`` and ``cifar-100-python/``."""
    return Path(os.environ.get("REPROLIB_DATA") or ROOT / "data").resolve()


def results(profile: str) -> Path:
    return home() / "results" / profile


def runs(profile: str) -> Path:
    return results(profile) / "runs"


def accuracy_csv(profile: str) -> Path:
    return results(profile) / "accuracy.csv"


def ablations_csv(profile: str) -> Path:
    return results(profile) / "ablations.csv"


def latency_csv(profile: str) -> Path:
    return results(profile) / "latency.csv"


def claims_csv(profile: str) -> Path:
    return results(profile) / "claims.csv"


def figures(profile: str) -> Path:
    return home() / "figures" / profile


def notebook(number: str) -> Path:
    """The notebook that a number (``02``), a name or a path means; raises FileNotFoundError with the choice."""
    path = Path(number)
    if path.suffix == ".ipynb":
        found = [path.resolve()] if path.exists() else []
    else:
        found = sorted(NOTEBOOKS.glob(f"{path.name}*.ipynb"))
    if len(found) != 1:
        names = ", ".join(path.stem for path in sorted(NOTEBOOKS.glob("*.ipynb")))
        raise FileNotFoundError(f"no notebook {number!r}: there are {names}")
    return found[0]
