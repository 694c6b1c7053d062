"""Which parts are timed, and in which order; no test looks at a duration."""

import pytest
import torch
from torch import nn

from reprolib.pruning import Pruner
from reprolib.sparse import load, save, sparsify, timings


class Two(nn.Module):
    """Two convolutions with a seam between them, a function of torch, and a classifier without zeros."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.linear = nn.Linear(32, 4)

    def forward(self, x):
        x = nn.functional.gelu(self.first(x))
        return self.linear(self.second(x).mean((2, 3)))


@pytest.fixture
def pruned():
    torch.manual_seed(0)
    model = Two().eval()
    Pruner(model, "Unstructured()", 0.9, 1, layers=["first", "second"], schedule="one-shot")
    return model


def test_sparse_parts_and_seams_in_the_order_in_which_they_run(pruned, tmp_path):
    sparse = sparsify(pruned)
    images = torch.randn(2, 3, 8, 8)
    table = timings(sparse, images)
    kinds = table["kind"].to_list()
    assert [kind for kind in kinds if kind == "SparseNetwork"] == ["SparseNetwork"] * 2
    assert 0 == kinds.index("SparseNetwork") < kinds.index("gelu") < len(kinds) - 1 - kinds[::-1].index("SparseNetwork")
    assert table["layers"].sum() >= 2 and set(table["runs_in"]) == {"sparse kernels", "torch"}
    assert (table["ms"] > 0).all() and table["share_pct"].sum() == pytest.approx(100) and table.index.is_unique
    save(sparse, tmp_path / "net.safetensors")
    assert timings(load(tmp_path / "net.safetensors"), images)["kind"].to_list() == kinds


def test_model_that_was_not_traced_is_one_part(pruned):
    table = timings(pruned, torch.randn(2, 3, 8, 8))
    assert table[["kind", "runs_in", "layers"]].to_dict("index") == {
        "network": {"kind": "Two", "runs_in": "torch", "layers": 0}
    }
