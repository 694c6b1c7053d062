"""Build an environment: when there is none, and again when it is another checkout's, Python's or lock's.

    python3 -m reprolib.files.environment [--this-python]
    .venv/bin/python -m reprolib.files.environment --peers

The first is .venv, in which everything runs. The second is .venv-peers, which holds the engines of other makers that
`make bench-peers` times: they want an older Python and older packages.

Runs on any Python that is at hand, with nothing installed: an old one must get as far as the line that says what is
needed. A copied or moved environment would run the code of the checkout that it was built in.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STAMP = ".complete"  # written last: what the environment was built for

ADDRESSES_GB = 6  # that a process must be allowed: one that trains uses four to five

# A folder in the checkout, and the files whose change makes it stale: the lock is the first of them.
Environment = namedtuple("Environment", "folder inputs")
MAIN = Environment(".venv", ("requirements.lock", "pyproject.toml"))
PEERS = Environment(".venv-peers", ("requirements-peers.lock",))
PEERS_PYTHON = "3.11"  # the newest that DeepSparse has files for
PEERS_LICENCE = (
    "DeepSparse is closed source: its licence allows evaluation in development and testing, "
    "no production use and no taking apart"
)


def supported():
    """The oldest supported Python and the first one that is not, (3, n) each; pyproject.toml is the place to say so."""
    text = (ROOT / "pyproject.toml").read_text()
    oldest, end = re.search(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', text).groups()
    return (3, int(oldest)), (3, int(end))


def python_of(environment):
    """The path of an environment's Python, built or not."""
    return ROOT / environment.folder / "bin" / "python"


def wanted(environment):
    """What the stamp says of an environment that would be built for this checkout now, whichever Python builds it."""
    inputs = b"".join((ROOT / name).read_bytes() for name in environment.inputs)
    return {"checkout": str(ROOT), "inputs": hashlib.sha256(inputs).hexdigest()}


def this_interpreter():
    """The rest of the stamp: the Python that runs this."""
    return {"python": platform.python_version(), "interpreter": os.path.realpath(sys.executable)}


def stamp_of(environment):
    """What an environment was built for; raises OSError or ValueError for an unfinished one."""
    return json.loads((ROOT / environment.folder / STAMP).read_text())


def fault(environment, this_python=False):
    """Why the environment must be built (again), in a few words; empty if it can stay.

    An interpreter other than this one may stay, if it runs and unless `this_python` is asked for.
    """
    if not (ROOT / environment.folder).exists():
        return "there is none yet"
    try:
        stamp, want = stamp_of(environment), wanted(environment)
        if stamp["checkout"] != want["checkout"]:
            return f"the one here was built in {stamp['checkout']}"
        if stamp["inputs"] != want["inputs"]:
            return f"{' or '.join(environment.inputs)} changed"
        if this_python and any(stamp[key] != value for key, value in this_interpreter().items()):
            return f"the one here is of Python {stamp['python']}, {stamp['interpreter']}"
        found = _version(python_of(environment))
        return "" if found == stamp["python"] else f"Python {stamp['python']} of the one here is gone"
    except (OSError, ValueError, KeyError, TypeError):
        return "the one here is unfinished, or of an earlier version"


def _version(python):
    """The version of an interpreter, such as 3.11.9; empty if it does not run."""
    command = [str(python), "-I", "-c", "import platform as p; print(p.python_version())"]
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout.decode().strip()
    except OSError:
        return ""


def former():
    """The interpreter that the environment here was built with, if it is another one than this and still there."""
    try:
        interpreter = stamp_of(MAIN)["interpreter"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    other = interpreter != os.path.realpath(sys.executable) and os.access(interpreter, os.X_OK)
    return interpreter if other else None


def build():
    """Build .venv from nothing, with this Python. Raises subprocess.CalledProcessError."""
    _remove(MAIN)
    python, uv = str(python_of(MAIN)), str(python_of(MAIN).with_name("uv"))
    _run(sys.executable, "-m", "venv", str(ROOT / MAIN.folder))
    _run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", MAIN.inputs[0], "uv")
    _install(uv, MAIN)
    # The checkout, as seen from there: found from any folder, also from one that holds a folder named reprolib.
    [packages] = (ROOT / MAIN.folder).glob("lib/python*/site-packages")
    (packages / "reprolib.pth").write_text(os.path.relpath(str(ROOT), str(packages)) + "\n")
    _finish(MAIN, this_interpreter())


def build_peers():
    """Build .venv-peers from nothing, with the uv of .venv. Raises subprocess.CalledProcessError.

    Where Python 3.11 is neither here nor to be had, this Python serves, without DeepSparse.
    """
    _remove(PEERS)
    uv, folder = str(python_of(MAIN).with_name("uv")), str(ROOT / PEERS.folder)
    try:
        _run(uv, "venv", "--quiet", "--python", PEERS_PYTHON, folder, stderr=subprocess.DEVNULL)
    except subprocess.CalledProcessError:
        print(f"no Python {PEERS_PYTHON} here or to be had: going on with this one, without DeepSparse", flush=True)
        _remove(PEERS)
        _run(uv, "venv", "--quiet", "--python", sys.executable, folder)
    _install(uv, PEERS)
    if list(Path(folder).glob("lib/python*/site-packages/deepsparse")):
        print(PEERS_LICENCE, flush=True)
    python = python_of(PEERS)
    _finish(PEERS, {"python": _version(python), "interpreter": os.path.realpath(str(python))})


def _remove(environment):
    folder = ROOT / environment.folder
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(str(folder))


def _install(uv, environment):
    """Install what the environment's lock says."""
    into = ["--quiet", "--python", str(python_of(environment))]
    _run(uv, "pip", "install", "--compile-bytecode", "-r", environment.inputs[0], *into)


def _finish(environment, interpreter):
    stamp = dict(wanted(environment), **interpreter)
    (ROOT / environment.folder / STAMP).write_text(json.dumps(stamp, indent=1) + "\n")


def _run(*command, **streams):
    subprocess.run(command, check=True, cwd=str(ROOT), env=_outside(), **streams)


def _outside():
    """The user's environment variables, without those that would lead an installer elsewhere."""
    led = ("PYTHON", "VIRTUAL_ENV", "PIP_USER", "PIP_TARGET", "PIP_PREFIX", "UV_SYSTEM", "UV_TARGET", "UV_PREFIX")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(led)}
    if not os.access(os.path.expanduser("~"), os.W_OK):
        kept["UV_NO_CACHE"] = "1"
    return kept


def main():
    parser = argparse.ArgumentParser(description="Build an environment, where the one there cannot stay.")
    parser.add_argument("--this-python", action="store_true", help="an environment of another Python cannot stay")
    parser.add_argument("--peers", action="store_true", help="the one of other makers' engines; run this from .venv")
    arguments = parser.parse_args()
    allowed = resource.getrlimit(resource.RLIMIT_AS)[0]
    if allowed != resource.RLIM_INFINITY and allowed < ADDRESSES_GB * 1e9:
        sys.exit(
            f"error: a process may use {allowed / 1e9:.1f} GB of addresses here (ulimit -v), and {ADDRESSES_GB} GB are "
            "needed: ulimit -v unlimited"
        )
    environment = PEERS if arguments.peers else MAIN
    this_python = arguments.this_python and environment is MAIN
    why = fault(environment, this_python)
    if not why:
        return
    if environment is MAIN:
        if not this_python and former():  # what someone chose with make PYTHON= stays chosen
            os.chdir(str(ROOT))
            os.execv(former(), [former(), "-m", "reprolib.files.environment"])
        oldest, end = supported()
        if not oldest <= sys.version_info[:2] < end:
            sys.exit(
                f"error: Python 3.{oldest[1]} to 3.{end[1] - 1} is needed, this is {platform.python_version()}: "
                "name one with make PYTHON=python3.12"
            )
    print(f"building the environment in {environment.folder}: {why}", flush=True)
    try:
        build_peers() if environment is PEERS else build()
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: the environment could not be built: {error}")


if __name__ == "__main__":
    main()
