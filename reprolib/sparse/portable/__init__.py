"""For CPUs that are no x86: Numba kernels for pruned 3x3 and 1x1 convolutions that work for stored weights only.

**Layout.** Activations live in ``[ceil(N / n)][C][H + 2 halo][W + 2 halo][n]``, float32: n images interleaved, around
every map a halo of zeros where a 3x3 convolution reads it. With n = 16 one pixel of 16 images is one SIMD vector; small
batches take n = 1, and one vector is 16 neighbouring pixels. Both ways a weight multiplies whole vectors, found at a
fixed *offset* (channel, tap) from each output vector's *place* (image, pixel):

    out[place] += weight * x[place + offset]        16 lanes at a time, no matter which weights are zero

**Work.** Stored weights come as vectors of V output channels that share an offset (V = 4 where the zeros allow it, else
1). One task is a *band* of output rows times a *block* of 16 output channels; it sums up in a scratch that stays in the
cache, S vectors per output channel in registers at a time. Single weights (V = 1) go through the input channels in
chunks, so that the 16 output channels find a chunk's pixels in the first-level cache. The epilogue adds the bias,
applies ReLU and the 2x2 max-pool and writes the next layer's input, halo included.
"""

from reprolib.sparse.portable.kernels import conv, conv_spec
from reprolib.sparse.portable.layout import LANES, from_layout, interleaved, to_layout
from reprolib.sparse.portable.packing import Plan, plan

__all__ = [
    "LANES",
    "Plan",
    "conv",
    "conv_spec",
    "from_layout",
    "interleaved",
    "plan",
    "to_layout",
]
