"""Inference that is faster because of its zeros. One door: ``sparse_model = sparsify(model)``.

`formats` stores a pruned weight, `cpu` and `cuda` hold the kernels, `layers` puts them in place of dense layers.
"""

from reprolib.sparse.formats import pack
from reprolib.sparse.layers import SparseConv2d, SparseLinear, describe, sparsify

__all__ = ["SparseConv2d", "SparseLinear", "describe", "pack", "sparsify"]
