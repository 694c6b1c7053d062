"""On a machine that was made for GPUs, with torch and Numba but not all that the paper needs, the CUDA tests run."""

import os
import subprocess
import sys

from reprolib.files import paths

LACKING = ("ipykernel", "ipywidgets", "jupyterlab", "nbclient", "nbconvert", "nbformat", "papermill", "pydantic")
LACKING += ("ruamel", "snakemake", "torch_pruning")
HIDE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {lacking}:
            raise ModuleNotFoundError(f"no module named {{name}} on a machine made for GPUs", name=name)

sys.meta_path.insert(0, Hidden())
"""


def python(tmp_path, *arguments):
    (tmp_path / "sitecustomize.py").write_text(HIDE.format(lacking=set(LACKING)))
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
