"""The process of one engine of another maker: what it is told on its input, it does, and answers.

    .venv-peers/bin/python -I reprolib/bench/engine.py DeepSparse 2

Run by its path, in an environment that has neither torch nor reprolib: only the standard library, NumPy, onnx and the
engine itself are imported, and nothing but the clock is imported from here. A line of JSON comes in, a line of JSON
goes out; the first line out says which version is there, or what is missing:

    {"do": "load", "network": 0, "weights": "net.npz", "dtype": "fp32"}
    {"do": "run", "network": 0}        ->  {"logits": [[...], ...]}, of the next of the inputs
    {"do": "time", "network": 0}       ->  {"us": 1234.5}
    {"do": "release"}                      all networks go

An answer is {"error": "..."} where something failed.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np

Call = Callable[[], object]

# --- The clock of all contenders, in whichever process --------------------------------------------------------------

REST_S, RESTED, LONGEST_REST_S = 0.01, 0.1, 0.3  # a look at the CPU clock; its share that is rest; the end of patience
BRIEF_REST_S = 0.001  # a look at threads that do not spin for long


def time_us(call: Call) -> float:
    """One call, in microseconds, right after another one that is not counted."""
    call()
    started = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - started) / 1e3


def rest(look_s: float = REST_S) -> None:
    """Wait until the threads of this process are idle: the next contender is to have the cores for itself.

    Threads of a pool look for more work in a loop before they sleep: in ONNX Runtime for 50 ms after a call, in OpenMP
    (torch, Numba) for 4 to 8 ms, in TBB (OpenVINO) for 1 ms, in DeepSparse not at all (CPU time, measured with two
    threads). So a contender's turn ends when its process uses no CPU time any more, for `look_s` seconds. The wait is
    not part of any time. A look of 10 ms also sees a spinning thread that other programs keep from running for a while.
    """
    for _ in range(round(LONGEST_REST_S / look_s)):
        used = time.process_time()
        time.sleep(look_s)
        if time.process_time() - used < RESTED * look_s:
            return


# --- The network as an ONNX file ------------------------------------------------------------------------------------


def to_onnx(operations: list[dict], arrays: dict[str, np.ndarray], input_shape: tuple[int, ...]) -> bytes:
    """The content of an ONNX file for a network of one input, of a fixed batch.

    `operations` are those of `reprolib.sparse.operations`, as dictionaries with their ``kind``; value 0 is the input,
    value i what operation i - 1 gives. A layer's weight and bias are ``weight <name>`` and ``bias <name>`` of `arrays`.
    """
    from onnx import TensorProto, helper, numpy_helper

    nodes, constants = (
        [],
        [numpy_helper.from_array(np.float32(6), "six"), numpy_helper.from_array(np.float32(0), "zero")],
    )
    for number, operation in enumerate(operations, 1):
        stages = _nodes(operation)
        names = [f"x{number}.{i}" for i in range(len(stages) - 1)]
        names.append("logits" if number == len(operations) else f"x{number}")
        before = ""
        for (operator, inputs, settings), name in zip(stages, names, strict=True):
            nodes.append(helper.make_node(operator, [before if x == "" else x for x in inputs], [name], **settings))
            before = name
        constants += [numpy_helper.from_array(arrays[x], x) for _, inputs, _ in stages for x in inputs if " " in x]
    images = helper.make_tensor_value_info("x0", TensorProto.FLOAT, input_shape)
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)
    unique = list({constant.name: constant for constant in constants}.values())
    graph = helper.make_graph(nodes, "network", [images], [logits], unique)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return model.SerializeToString()


def _nodes(operation: dict) -> list[tuple[str, list[str], dict]]:
    """Operator, inputs and settings of each ONNX node of an operation; the input "" is what the node before gives."""
    given = operation.get("sources", [operation.get("source")])
    inputs = [f"x{value}" for value in given]
    if operation.get("other") is not None:
        inputs.append(f"x{operation['other']}")
    match operation["kind"]:
        case "Convolution":
            settings = {"pads": [*operation["padding"]] * 2, "strides": operation["stride"]}
            settings |= {"dilations": operation["dilation"], "group": operation["groups"]}
            found = [("Conv", [*inputs, *(f"{part} {operation['weight']}" for part in ("weight", "bias"))], settings)]
        case "Linear":
            parts = [f"{part} {operation['weight']}" for part in ("weight", "bias")]
            found = [("Gemm", [*inputs, *parts], {"transB": 1})]
        case "MaxPool":
            settings = {"kernel_shape": operation["kernel"], "strides": operation["stride"]}
            found = [("MaxPool", inputs, settings | {"pads": [*operation["padding"]] * 2})]
        case "Concatenation":
            found = [("Concat", inputs, {"axis": 1})]
        case "Activation":
            return _activation(operation["activation"], inputs[0])
        case kind:
            found = [
                ({"Mean": "GlobalAveragePool", "Flatten": "Flatten", "Sum": "Add", "Product": "Mul"}[kind], inputs, {})
            ]
    if operation.get("addend") is not None:
        found.append(("Add", ["", f"x{operation['addend']}"], {}))
    if operation.get("activation"):
        found += _activation(operation["activation"], "")
    if operation.get("pool"):
        found.append(("MaxPool", [""], {"kernel_shape": [2, 2], "strides": [2, 2]}))
    return found


def _activation(name: str, x: str) -> list[tuple[str, list[str], dict]]:
    simple = {"relu": ("Relu", [x], {}), "relu6": ("Clip", [x, "zero", "six"], {}), "sigmoid": ("Sigmoid", [x], {})}
    simple["hardsigmoid"] = "HardSigmoid", [x], {"alpha": 1 / 6, "beta": 0.5}
    if name not in simple:
        raise ValueError(f"the activation {name} has no ONNX operator of the version that all engines read")
    return [simple[name]]


# --- The engines, each at its best settings for one batch after the other -------------------------------------------


def deepsparse(model: bytes, batch: int, threads: int, dtype: str) -> Callable[[np.ndarray], np.ndarray]:
    import deepsparse

    with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
        file.write(model)
        file.flush()
        engine = deepsparse.compile_model(file.name, batch_size=batch, num_cores=threads)
    return lambda x: engine.run([x], val_inp=False)[0]


def openvino(model: bytes, batch: int, threads: int, dtype: str) -> Callable[[np.ndarray], np.ndarray]:
    """Its own way with zeros, CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE, is for int8 products on AMX only."""
    import openvino

    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    settings["INFERENCE_PRECISION_HINT"] = {"fp32": "f32", "bf16": "bf16"}[dtype]
    core = openvino.Core()
    request = core.compile_model(core.read_model(model), "CPU", settings).create_infer_request()
    return lambda x: request.infer([x], share_inputs=True, share_outputs=True)[0]


def onnxruntime(model: bytes, batch: int, threads: int, dtype: str) -> Callable[[np.ndarray], np.ndarray]:
    """Its threads may spin, as is its default and its best on idle cores: `rest` waits until they stop."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x0": x})[0]


ENGINES = {"DeepSparse": deepsparse, "OpenVINO": openvino, "ONNX Runtime": onnxruntime}


# --- The conversation -----------------------------------------------------------------------------------------------


def networks_of(name: str, threads: int) -> tuple[str, Callable[[str, str], Call]]:
    """The version of an engine, and a function of a file of weights and a type that makes a call out of them.

    The call runs the network on the next of the file's inputs and returns logits. Raises ImportError and the like.
    """
    build = ENGINES[name]
    importlib.import_module(build.__name__)

    def load(weights: str, dtype: str) -> Call:
        with np.load(weights) as arrays:
            images = arrays["images"]  # [inputs, batch, 3, height, width]
            model = to_onnx(json.loads(str(arrays["operations"])), arrays, images.shape[1:])
        run = build(model, images.shape[1], threads, dtype)
        turns = itertools.cycle(images)
        return lambda: run(next(turns))

    return importlib.metadata.version(build.__name__), load


def serve(load: Callable[[str, str], Call], say: Callable[[dict], None]) -> None:
    """Do what standard input says until it ends."""
    networks: dict[int, Call] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            match asked["do"]:
                case "load":
                    networks[asked["network"]] = load(asked["weights"], asked["dtype"])
                    say({})
                case "run":
                    say({"logits": np.asarray(networks[asked["network"]](), dtype=float).tolist()})
                case "time":
                    us = time_us(networks[asked["network"]])
                    rest()
                    say({"us": us})
                case "release":
                    networks.clear()
                    say({})
        except Exception as error:  # an engine raises what it likes: the other side says which engine it was
            say({"error": f"{type(error).__name__}: {error}"})


def main() -> None:
    name, threads = sys.argv[1], int(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever an engine prints is no answer

    def say(answer: dict) -> None:
        answers.write(json.dumps(answer) + "\n")

    try:
        version, load = networks_of(name, threads)
    except Exception as error:
        say({"error": f"{type(error).__name__}: {error}"})
        return
    say({"version": version})
    serve(load, say)


if __name__ == "__main__":
    main()
