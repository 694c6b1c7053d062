"""On a machine that was made for GPUs, with torch and Numba but not all that the paper needs, a first day's runs go."""

import os
import subprocess
import sys

import pytest

from reprolib.files import paths

LACKING = {"ipykernel", "ipywidgets", "jupyterlab", "nbclient", "nbconvert", "nbformat", "papermill", "pydantic"}
LACKING |= {"bokeh", "dask", "distributed", "jinja2", "matplotlib", "ruamel", "seaborn", "snakemake", "torch_pruning"}
TO_TRAIN = {"dask", "distributed", "pydantic", "ruamel"}  # installed there for training alone
HIDE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {lacking}:
            raise ModuleNotFoundError(f"no module named {{name}} on a machine made for GPUs", name=name)

sys.meta_path.insert(0, Hidden())
"""


def python(tmp_path, *arguments, lacking=LACKING):
    (tmp_path / "sitecustomize.py").write_text(HIDE.format(lacking=lacking))
    command = [sys.executable, "-W", "ignore", *arguments]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    return subprocess.run(command, cwd=paths.ROOT, env=environment, capture_output=True, text=True)


def test_what_is_hidden_cannot_be_imported(tmp_path):
    done = python(tmp_path, "-c", "import torch, numba, pandas, hypothesis; import pydantic")
    assert "ModuleNotFoundError: no module named pydantic on a machine made for GPUs" in done.stderr


def test_cuda_tests_need_torch_and_numba_alone(tmp_path):
    done = python(tmp_path, "-m", "pytest", "tests/sparse/test_cuda.py", "--collect-only", "-k", "gpu")
    found = [line for line in done.stdout.splitlines() if "::test_gpu_" in line]
    assert done.returncode == 0 and len(found) >= 30, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("runs", "lacking", "passed"),
    [
        ("moved or graph or kernels", LACKING, 3),
        ("latency", LACKING, 2),
        ("speed or stops", LACKING, 2),
        ("profile", LACKING - TO_TRAIN, 1),
    ],
)
def test_the_runs_of_a_first_day_go_there(tmp_path, runs, lacking, passed):
    command = ["-m", "pytest", "tests/on_pretended_gpu.py", "-p", "no:cacheprovider", "-k", runs]
    done = python(tmp_path, *command, lacking=lacking)
    assert done.returncode == 0 and f"{passed} passed" in done.stdout, done.stdout + done.stderr
