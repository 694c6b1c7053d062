"""Every file name of the project, in one place and independent of the working directory.

``$REPROLIB_HOME`` moves what is written (results and figures) somewhere else, a scratch disk for example;
``$REPROLIB_DATA`` names the folder that holds the data sets. Relative ones start at the checkout, wherever they are
read; ``~`` is the home folder.
"""

import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
PROFILES = ROOT / "profiles"


def home() -> Path:
    """Folder that holds ``results/`` and ``figures/``."""
    return _named_by("REPROLIB_HOME", ROOT)


def data() -> Path:
    """Folder that holds ``cifar-10-batches-py/`` and ``cifar-100-python/``."""
    return _named_by("REPROLIB_DATA", ROOT / "data")


def _named_by(variable: str, default: Path) -> Path:
    return (ROOT / Path(os.environ.get(variable) or default).expanduser()).resolve()


def results(profile: str) -> Path:
    return home() / "results" / profile


def runs(profile: str) -> Path:
    return results(profile) / "runs"


def trained(profile: str) -> Path:
    """A note that is there as long as every network of the profile has its record."""
    return results(profile) / "trained.txt"


def accuracy_csv(profile: str) -> Path:
    return results(profile) / "accuracy.csv"


def ablations_csv(profile: str) -> Path:
    return results(profile) / "ablations.csv"


def latency_csv(profile: str) -> Path:
    return results(profile) / "latency.csv"


def short_latency_csv(profile: str) -> Path:
    """What ``make bench-peers SHORT=1`` measures: apart, so that a whole table stays."""
    return results(profile) / "latency-short.csv"


def networks_latency_csv(profile: str) -> Path:
    """What ``make bench-networks`` measures."""
    return results(profile) / "latency-networks.csv"


def trained_latency_csv(profile: str) -> Path:
    """What ``make bench-trained`` measures."""
    return results(profile) / "latency-trained.csv"


def training_csv(profile: str) -> Path:
    """What ``make bench-train`` measures."""
    return results(profile) / "training.csv"


def claims_csv(profile: str) -> Path:
    return results(profile) / "claims.csv"


def figures(profile: str) -> Path:
    return home() / "figures" / profile


def own_profile(profile: str) -> Path:
    """The copy of a profile that the user gave by its path."""
    return results(profile) / "profile.yaml"


def report(profile: str) -> Path:
    """The page that ``make report`` writes."""
    return results(profile) / "report.html"


def site() -> Path:
    """Folder of the pages that ``make site`` writes."""
    return ROOT / "site"


def executed(profile: str) -> Path:
    """Folder of the notebooks that the graph has run."""
    return results(profile) / "notebooks"


def drawn(profile: str) -> Path:
    """Folder that these notebooks draw into, each into one named by its number; what is done moves to its place."""
    return results(profile) / "drawn"


def notebooks() -> list[Path]:
    """The notebooks of the project: not the copies that JupyterLab's "Duplicate" leaves beside them."""
    return sorted(path for path in NOTEBOOKS.glob("*.ipynb") if re.fullmatch(r"\d\d_\w+", path.stem))


def notebook(number: str) -> Path:
    """The notebook that a number (``02``), a name or a path means; raises FileNotFoundError with the choice."""
    path = Path(number)
    if path.suffix == ".ipynb":
        found = [path.resolve()] if path.exists() else []
    else:
        found = [each for each in notebooks() if each.stem == number or each.stem.startswith(f"{number}_")]
    if len(found) != 1:
        names = ", ".join(path.stem for path in notebooks())
        raise FileNotFoundError(f"{'more than one' if found else 'no'} notebook {number!r}: there are {names}")
    return found[0]
