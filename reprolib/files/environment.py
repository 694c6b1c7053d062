"""Build the environment in .venv: when there is none, and again when it is another checkout's, Python's or lock's.

    python3 -m reprolib.files.environment [--this-python]

Runs on any Python that is at hand, with nothing installed: an old one must get as far as the line that says what is
needed. A copied or moved environment would run the code of the checkout that it was built in.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
STAMP = VENV / ".complete"  # written last: what the environment was built for
INPUTS = ("requirements.lock", "pyproject.toml")


def supported():
    """The oldest supported Python and the first one that is not, (3, n) each; pyproject.toml is the place to say so."""
    text = (ROOT / "pyproject.toml").read_text()
    oldest, end = re.search(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', text).groups()
    return (3, int(oldest)), (3, int(end))


def wanted():
    """What the stamp says of an environment that this Python would build for this checkout."""
    inputs = b"".join((ROOT / name).read_bytes() for name in INPUTS)
    return {
        "checkout": str(ROOT),
        "python": platform.python_version(),
        "interpreter": os.path.realpath(sys.executable),
        "inputs": hashlib.sha256(inputs).hexdigest(),
    }


def fault(this_python):
    """Why the environment must be built (again), in a few words; empty if it can stay.

    An interpreter other than this one may stay, if it runs and unless `this_python` is asked for.
    """
    if not VENV.exists():
        return "there is none yet"
    try:
        stamp, want = json.loads(STAMP.read_text()), wanted()
        if stamp["checkout"] != want["checkout"]:
            return f"the one here was built in {stamp['checkout']}"
        if stamp["inputs"] != want["inputs"]:
            return f"{' or '.join(INPUTS)} changed"
        if this_python and (stamp["interpreter"], stamp["python"]) != (want["interpreter"], want["python"]):
            return f"the one here is of Python {stamp['python']}, {stamp['interpreter']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "the one here is unfinished, or of an earlier version"
    command = [str(VENV / "bin" / "python"), "-I", "-c", "import platform as p; print(p.python_version())"]
    try:
        found = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout.decode().strip()
    except OSError:
        found = ""
    return "" if found == stamp["python"] else f"Python {stamp['python']} of the one here is gone"


def former():
    """The interpreter that the environment here was built with, if it is another one than this and still there."""
    try:
        interpreter = json.loads(STAMP.read_text())["interpreter"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    other = interpreter != os.path.realpath(sys.executable) and os.access(interpreter, os.X_OK)
    return interpreter if other else None


def build():
    """Build the environment from nothing. Raises subprocess.CalledProcessError."""
    if VENV.is_symlink() or VENV.is_file():
        VENV.unlink()
    elif VENV.exists():
        shutil.rmtree(str(VENV))
    python, uv = str(VENV / "bin" / "python"), str(VENV / "bin" / "uv")
    into = ["--quiet", "--python", python]
    for command in (
        [sys.executable, "-m", "venv", str(VENV)],
        [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", "requirements.lock", "uv"],
        [uv, "pip", "install", "--compile-bytecode", "-r", "requirements.lock", *into],
    ):
        subprocess.run(command, check=True, cwd=str(ROOT), env=_outside())
    # The checkout, as seen from there: found from any folder, also from one that holds a folder named reprolib.
    [packages] = VENV.glob("lib/python*/site-packages")
    (packages / "reprolib.pth").write_text(os.path.relpath(str(ROOT), str(packages)) + "\n")
    STAMP.write_text(json.dumps(wanted(), indent=1) + "\n")


def _outside():
    """The user's environment variables, without those that would lead an installer elsewhere."""
    led = ("PYTHON", "VIRTUAL_ENV", "PIP_USER", "PIP_TARGET", "PIP_PREFIX", "UV_SYSTEM", "UV_TARGET", "UV_PREFIX")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(led)}
    if not os.access(os.path.expanduser("~"), os.W_OK):
        kept["UV_NO_CACHE"] = "1"
    return kept


def main():
    parser = argparse.ArgumentParser(description="Build the environment in .venv, where the one there cannot stay.")
    parser.add_argument("--this-python", action="store_true", help="an environment of another Python cannot stay")
    this_python = parser.parse_args().this_python
    why = fault(this_python)
    if not why:
        return
    if not this_python and former():  # what someone chose with make PYTHON= stays chosen
        os.chdir(str(ROOT))
        os.execv(former(), [former(), "-m", "reprolib.files.environment"])
    oldest, end = supported()
    if not oldest <= sys.version_info[:2] < end:
        sys.exit(
            f"error: Python 3.{oldest[1]} to 3.{end[1] - 1} is needed, this is {platform.python_version()}: "
            "name one with make PYTHON=python3.12"
        )
    print(f"building the environment in .venv: {why}", flush=True)
    try:
        build()
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: the environment could not be built: {error}")


if __name__ == "__main__":
    main()
