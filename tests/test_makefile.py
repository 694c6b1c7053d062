"""The front door, where it does more than call Python."""

import subprocess
import sys

import nbformat
import pytest

from reprolib.files import paths


@pytest.fixture
def make(tmp_path):
    """Call make in a folder of its own, with the environment that runs this test."""

    def call(target):
        command = ["make", "-f", paths.ROOT / "Makefile", "-C", tmp_path, "-o", "env", f"VENV={sys.prefix}", target]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return call


def test_notebook_with_outputs_fails_lint_which_names_the_remedy(tmp_path, make):
    (tmp_path / "notebooks").mkdir()
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 + 1", execution_count=1)])
    notebook.cells[0].outputs = [nbformat.v4.new_output("stream", text="2")]
    nbformat.write(notebook, tmp_path / "notebooks" / "a.ipynb")
    refused = make("lint")
    assert refused.returncode and "error: these notebooks hold outputs: make strip removes them" in refused.stdout
    assert make("strip").returncode == 0
    assert make("lint").returncode == 0, make("lint").stdout
