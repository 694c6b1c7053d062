"""Records: one JSON file per finished experiment, written atomically, with its provenance; and their tidy table."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import subprocess
from functools import cache
from pathlib import Path

import pandas as pd
import torch

from reprolib.files import paths
from reprolib.files.atomic import sound, write_atomically
from reprolib.files.processes import environment


def write(path: Path, record: dict) -> None:
    write_atomically(path, to_json(record))


def to_json(record: dict) -> str:
    """A record as it stands in its file, with a fingerprint of itself."""
    record = json.loads(json.dumps(record))
    return json.dumps({"fingerprint": fingerprint(record)} | record, indent=1) + "\n"


def read(path: Path) -> dict:
    """Read a record. Raises ValueError if it is not whole: no record, or not what its fingerprint says."""
    try:
        record = json.loads(path.read_text())
        own = record.pop("fingerprint", None)  # those of former versions have none
        whole = {"experiment", "row", "curve", "provenance"} <= record.keys() and "accuracy_pct" in record["row"]
        if not whole or record["row"]["run_id"] != path.parent.name or own not in (None, fingerprint(record)):
            raise KeyError
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError(f"the record {path} is damaged: make reproduce writes it anew") from None
    return record


def fingerprint(value: dict) -> str:
    """Eight hex digits that tell a JSON-like value from others."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def update(path: Path, rows: pd.DataFrame, asked: list[str]) -> None:
    """Write a table of results in a fixed order of rows; a file that would not change is left alone.

    Rows of the table that is there already stay where `asked` names their run_id and `rows` has none of it. A damaged
    table is set aside.
    """
    if (kept := sound(path, _networks)) is not None:
        rows = pd.concat([rows, kept[kept["run_id"].isin(asked)]], ignore_index=True)
    if rows.empty:
        return
    keys = ["dataset", "pattern", "spec", "target_sparsity", "seed", "run_id"]
    rows = rows.drop_duplicates("run_id").sort_values([key for key in keys if key in rows], na_position="first")
    if not path.exists() or path.read_text() != to_csv(rows):
        write_csv(path, rows)


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    """Write a table atomically; equal tables give equal bytes."""
    write_atomically(path, to_csv(frame))


def to_csv(frame: pd.DataFrame) -> str:
    return frame.to_csv(index=False, float_format="%.10g", lineterminator="\n")


def read_csv(path: Path) -> pd.DataFrame:
    """Read a results table. Raises FileNotFoundError, and ValueError if it is damaged."""
    if not path.exists():
        raise FileNotFoundError(f"no results in {path}: make reproduce computes them")
    try:
        return pd.read_csv(path, dtype={"commit": str, "run_id": str})  # a hash may look like a number
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"the table {path} is damaged ({error}): make reproduce writes it anew") from None


def _networks(path: Path) -> pd.DataFrame:
    """A table with a row for each network, as `read_csv`."""
    table = read_csv(path)
    if missing := {"run_id", "dataset", "pattern", "seed"} - set(table):
        raise ValueError(f"the table {path} is damaged (it lacks {', '.join(sorted(missing))})")
    return table


# --- Provenance -----------------------------------------------------------------------------------------------------


def provenance() -> dict:
    """What a number came from: commit (``+`` marks uncommitted changes of the code), versions, hardware, date."""
    return {
        "commit": commit(),
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


@cache
def commit() -> str:
    """Short commit of the code, with a ``+`` if reprolib or the profiles differ from it.

    ``unknown`` outside git, and where the code lies in the repository of something else.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", paths.ROOT, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment()).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != paths.ROOT:
            return "unknown"
        changed = git("status", "--porcelain", "--", "reprolib", "profiles", "notebooks")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@cache
def hardware(device: str | None = None) -> str:
    """The GPU's name, or the processor's with its cores and vector instructions; of the device that trains by default.

    Cloud machines call processors of several generations by one name; the instructions tell them apart.
    """
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass  # not Linux: the plain name does
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
