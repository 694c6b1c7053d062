"""From a network to the same one with islands for kernels. One door: ``network, reasons = capture(model, make)``.

`tracing` writes down what the network does, `effects` finds what writes into tensors in place, `recognition` (with
`readers` and `units`) which nodes are operations of ours, `islands` which of these go together, and `network` puts
modules in their place.
"""

from reprolib.sparse.capture.network import capture

__all__ = ["capture"]
