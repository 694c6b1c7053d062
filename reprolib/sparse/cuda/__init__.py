"""Pruned convolutions and linear layers on an NVIDIA GPU, and their proof without one.

`backend` is what others call; `packing` says what the packed arrays hold, and computes in NumPy what the `kernels`
compute, which are Numba CUDA with instructions of their own (`ptx`); `tuning` finds how to cut a layer into blocks;
`assembler` checks their machine code.
"""

from reprolib.sparse.cuda.backend import IMAGES, conv, from_layout, plan, require, to_layout, warm_up

__all__ = ["IMAGES", "conv", "from_layout", "plan", "require", "to_layout", "warm_up"]
