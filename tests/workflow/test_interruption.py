"""What git tracks survives whatever happens to a drawing: Ctrl-C, a killed process group, a job that fails.

The graph is the real one, with small notebooks, in a git repository with committed results and figures. To be fast, the
graph and Snakemake are forked from this process, which has imported what they need.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import snakemake.cli

from reprolib.files import paths
from reprolib.files.processes import end_with_parent
from reprolib.workflow import graph, runner

PROFILE = "laptop-cifar100"
DRAWN = ["claims.svg", "claims.md", "claims.csv"]  # by notebook 07
CELLS = (
    'profile: str = ""  # name\nfolder: str = ""  # where files go',
    """
import os, shutil, time
os.makedirs(folder, exist_ok=True)
for name in {names}:
    open(f"{{folder}}/{{name}}", "w").write("unfinished")
    time.sleep(0.1)
    shutil.copy(f"{originals}/{{name}}", folder)
assert not os.path.exists("{originals}/fail"), "as it was told"
""",
)


def git(folder, *arguments):
    command = ["git", "-c", "user.name=a", "-c", "user.email=b", "-C", folder, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory, write_notebook):
    """A git repository with committed results and figures, and notebooks that draw the same ones again."""
    folder, originals = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("originals")
    shutil.copy(paths.ROOT / ".gitignore", folder)
    for name in ["accuracy.csv", *DRAWN]:
        kind = "results" if name.endswith(".csv") else "figures"
        (folder / kind / PROFILE).mkdir(parents=True, exist_ok=True)
        for place in (folder / kind / PROFILE, originals):
            shutil.copy(paths.ROOT / kind / PROFILE / name, place)
    (folder / "notebooks").mkdir()
    for path in paths.notebooks():
        cell = CELLS[1].format(names=DRAWN, originals=originals)
        write_notebook(folder / "notebooks" / path.name, CELLS[0], cell)
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message=all")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REPROLIB_HOME", str(folder))
        patch.setattr(paths, "NOTEBOOKS", folder / "notebooks")
        patch.setattr(graph, "DRAWING", {"claims": []})
        yield SimpleNamespace(folder=folder, fail=originals / "fail", log=originals / "log")


class Fork:
    """A forked process that calls and ends; as much of `subprocess.Popen` as the graph uses."""

    def __init__(self, call):
        self.returncode, self.pid = None, os.fork()
        if not self.pid:
            code = 1
            try:
                call()
                code = 0
            except SystemExit as end:
                if isinstance(end.code, str):
                    print(end.code, file=sys.stderr, flush=True)
                code = end.code if isinstance(end.code, int) else int(bool(end.code))
            finally:
                os._exit(code)

    def poll(self, how=os.WNOHANG):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, how)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self):
        return self.poll(0)


def onto(log):
    """What this forked process and its children print goes to a file."""
    for number in (1, 2):
        os.dup2(log.fileno(), number)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)


def snakemake_fork(command, stdout, env, **_):
    def call():
        os.setpgid(0, 0)
        end_with_parent(int(command[3]))
        onto(stdout)
        os.environ.clear()
        os.environ.update(env)
        snakemake.cli.main(command[4:])

    fork = Fork(call)
    with contextlib.suppress(ProcessLookupError, PermissionError):  # whoever of both is first
        os.setpgid(fork.pid, fork.pid)
    return fork


def drawing(home):
    """`make figures`, in a process group of its own."""

    def call():
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with home.log.open("w") as log:
            onto(log)
            runner.subprocess = SimpleNamespace(
                Popen=snakemake_fork, run=lambda *command, **kind: snakemake_fork(*command, **kind).wait()
            )
            sys.argv = ["graph", "--cores", "2", "figures", "--profile", PROFILE]
            graph.main()

    return Fork(call)


def end_of_group(number):
    """Wait until no process of the group is left."""
    while True:
        try:
            os.killpg(number, 0)
        except (ProcessLookupError, PermissionError):
            return
        time.sleep(0.02)


def test_ten_interruptions_leave_what_is_committed_as_it_was(home):
    started = time.monotonic()
    assert drawing(home).wait() == 0, home.log.read_text()
    duration_s = time.monotonic() - started
    assert "redrawn: 3 files" in home.log.read_text()
    assert git(home.folder, "status", "--porcelain") == ""
    for moment in range(10):
        process = drawing(home)
        time.sleep((moment + 0.5) / 10 * duration_s)
        os.killpg(process.pid, signal.SIGKILL if moment % 3 == 1 else signal.SIGINT)
        process.wait()
        end_of_group(process.pid)
        assert git(home.folder, "status", "--porcelain") == "", f"moment {moment} of {duration_s:.1f} s"


def test_a_drawing_that_fails_leaves_what_is_committed_as_it_was(home):
    home.fail.touch()
    try:
        assert drawing(home).wait() == 1
    finally:
        home.fail.unlink()
    assert "error: 07: AssertionError: as it was told" in home.log.read_text()
    assert git(home.folder, "status", "--porcelain") == ""
