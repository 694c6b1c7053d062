"""Shared by all tests: one thread, repeatable hypothesis examples, small data and small networks."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # also of notebooks and commands that tests start: two tests run side by side

from dataclasses import replace

import pytest
import torch
from hypothesis import settings
from torch import nn

from reprolib.training import data
from reprolib.training.data import Split

settings.register_profile("reprolib", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("reprolib")
torch.set_num_threads(1)  # results are bit-identical for equal thread counts


@pytest.fixture(scope="session")
def digits():
    return data.load("noisy-digits")


@pytest.fixture(scope="session")
def few_digits(digits):
    """96 training, 32 validation and 32 test images."""

    def first(split, count):
        return Split(split.images[:count], split.labels[:count])

    return replace(
        digits, train=first(digits.train, 96), validation=first(digits.validation, 32), test=first(digits.test, 32)
    )


@pytest.fixture(scope="session")
def computed():
    """What networks of a profile reached, as text, without what tells of the run."""
    from reprolib.experiments import records  # here: tests of CUDA kernels do without

    def read(home, profile):
        found = records.read_csv(home / "results" / profile / "accuracy.csv")
        return records.to_csv(found.drop(columns=["wall_time_s", "commit"]))

    return read


@pytest.fixture
def small_net():
    """Builds a fresh network of two convolutions and a classifier; the same weights at every call."""

    def build():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(
                nn.Conv2d(3, 8, 4, stride=4),
                nn.ReLU(),
                nn.Conv2d(8, 8, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Flatten(),
                nn.Linear(128, 10),
            )

    return build


@pytest.fixture(scope="session")
def write_notebook():
    """Write a notebook with these code cells, the first of them tagged as its parameters; return its path."""
    import nbformat  # here: tests of the CUDA kernels run on machines without it

    def write(path, *sources):
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
        notebook.cells = [nbformat.v4.new_code_cell(source) for source in sources]
        notebook.cells[0].metadata["tags"] = ["parameters"]
        nbformat.write(notebook, path)
        return path

    return write
