"""Inference that is faster because of its zeros. One door: ``sparse_model = sparsify(model)``.

`capture` traces a network and finds the parts that are `operations` with kernels; `network` runs such a part, in `cpu`,
`cuda` or `portable`; `saving` keeps all of it in a file; `timings` says where its time goes; `formats` describes how a
pruned weight can be stored.
"""

from reprolib.sparse.formats import pack
from reprolib.sparse.network import SparseNetwork
from reprolib.sparse.saving import load, save
from reprolib.sparse.sparsify import describe, networks, sparsify
from reprolib.sparse.timings import timings

__all__ = ["SparseNetwork", "describe", "load", "networks", "pack", "save", "sparsify", "timings"]
