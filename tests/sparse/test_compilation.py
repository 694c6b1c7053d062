"""Numba's compiler and its cache: what they say, and what they must not hide."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from reprolib.files import paths
from reprolib.sparse import compilation


@pytest.mark.parametrize("in_notebook", [False, True])
def test_notes_look_like_errors_nowhere(in_notebook, capsys, monkeypatch):
    """A terminal gets them beside the results; a notebook would show them in a red box there."""
    if in_notebook:
        monkeypatch.setitem(sys.modules, "ipykernel", None)
    else:
        monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    compilation._Note().on_start(None)
    compilation._say(f"no folder, told {in_notebook}")
    shown = capsys.readouterr()
    notes, other = (shown.out, shown.err) if in_notebook else (shown.err, shown.out)
    assert notes.splitlines() == [
        "compiling a CPU kernel: some seconds, once on this machine",
        f"no folder, told {in_notebook}",
    ]
    assert other == ""


USE = "import torch; from reprolib.sparse import sparsify; model = torch.nn.Sequential(torch.nn.Conv2d(2, 2, 1)); "
USE += "model = model.eval().requires_grad_(False); model[0].weight[0] = 0; "
USE += "print(sparsify(model)(torch.zeros(1, 2, 3, 3)).shape)"


ALONE = Path(compilation.__file__).parent  # its modules without their package: torch takes long to import


def python(command, path=paths.ROOT, **variables):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA")}
    environment = kept | {"PYTHONPATH": str(path)} | variables
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, env=environment, timeout=300
    )


def test_damaged_cache_is_told_and_mended(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("from compilation import compiled\n\n@compiled()\ndef f(x):\n    return x + 1\n\nprint(f(1))\n")
    cache = tmp_path / "cache"
    assert python([program], ALONE, NUMBA_CACHE_DIR=str(cache)).stderr == ""
    for path in cache.rglob("*.nb*"):
        path.write_bytes(path.read_bytes()[:20])
    damaged, mended = (python([program], ALONE, NUMBA_CACHE_DIR=str(cache)) for _ in range(2))
    assert damaged.stdout == mended.stdout == "2\n"
    assert "a compiled kernel could not be read" in damaged.stderr and "Traceback" not in damaged.stderr
    assert mended.stderr == ""


def test_changes_of_other_files_are_seen(tmp_path):
    """A kernel holds the code of what it calls, and constants: Numba's cache looks at the kernel's own file only."""
    (tmp_path / "inner.py").write_text(
        "from compilation import compiled\n\nN = 1\n\n@compiled()\ndef g(x):\n    return x + N\n"
    )
    (tmp_path / "program.py").write_text(
        "from compilation import compiled\nfrom inner import g\n\n@compiled()\ndef f(x):\n"
        "    return g(x)\n\nprint(f(1), f.stats.cache_hits[f.signatures[0]] if f.stats.cache_hits else 0)\n"
    )
    folder = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    assert [python([tmp_path / "program.py"], ALONE, **folder).stdout for _ in range(2)] == ["2 0\n", "2 1\n"]
    inner = tmp_path / "inner.py"
    inner.write_text(inner.read_text().replace("N = 1", "N = 10"))
    assert python([tmp_path / "program.py"], ALONE, **folder).stdout == "11 0\n"


def test_numba_without_a_folder_for_its_cache(monkeypatch, capsys):
    compilation._say.cache_clear()
    compilation.numba.njit(lambda x: x)(1)  # Numba's own first steps want a cache
    monkeypatch.setattr(compilation.numba, "njit", no_folder(compilation.numba.njit))
    assert compilation.compiled()(lambda x: x + 1)(1) == 2
    assert "no folder for compiled kernels can be written" in capsys.readouterr().err


def no_folder(njit):
    def refuse(cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    return refuse


def test_numba_that_may_not_compile_is_refused():
    done = python(["-c", USE], NUMBA_DISABLE_JIT="1")
    assert "NUMBA_DISABLE_JIT is set, and sparse kernels are compiled by Numba: unset it" in done.stderr
