"""Broken models: bytes and fields of ONNX files changed at random; every command must end with one clear line, or work.

python -m benchmarks.fuzz [--mutations 10000] [--seed 0] [--jobs 2] [--seconds 60]

Returns 1 where a command shows an internal error, ends in another way than by exit code 0, 1 or 2, hangs, or dies with its process.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import multiprocessing
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

LARGEST = 1 << 20  # bytes of a model that a mutation may ask for: a few changed bits of a shape can ask for a terabyte


@dataclass
class Trial:
    """What a command did with a mutated model.

    Attributes:
        number: The mutation's number.
        how: What was changed.
        code: The exit code; None where there was none.
        said: The last line on standard error.
    """

    number: int
    how: str
    code: int | None
    said: str

    @property
    def failed(self) -> bool:
        """Whether that must not happen."""
        return (
            self.code not in {0, 1, 2}
            or "internal error" in self.said
            or (self.code != 0 and "error: " not in self.said)
        )


def seeds() -> list[bytes]:
    """Return small models of many operators."""
    generator = np.random.default_rng(0)

    def array(*shape: int) -> NDArray[np.float32]:
        return generator.standard_normal(shape).astype(np.float32)

    def model(
        nodes: Sequence[onnx.NodeProto], shape: Sequence[int | str], constants: Mapping[str, Any], opset: int
    ) -> bytes:
        graph = helper.make_graph(
            list(nodes),
            "seed",
            [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, list(shape))],
            [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        )
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
        return bytes(made.SerializeToString(deterministic=True))

    def node(kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(kind, list(inputs), [output], name=f"{output}_node", **attributes)

    planar = model(
        [
            node("Conv", ["x", "w", "b"], "c", pads=[1, 1, 1, 1]),
            node("Relu", ["c"], "r"),
            node("Conv", ["r", "d"], "e", pads=[1, 1, 1, 1], group=4),
            node("Clip", ["e", "zero", "six"], "f"),
            node("Add", ["f", "r"], "a"),
            node("MaxPool", ["a"], "m", kernel_shape=[2, 2], strides=[2, 2]),
            node("Concat", ["m", "m"], "k", axis=1),
            node("GlobalAveragePool", ["k"], "g"),
            node("Flatten", ["g"], "l"),
            node("Gemm", ["l", "p", "q"], "s", transB=1),
            node("Softmax", ["s"], "y"),
        ],
        ["N", 3, 8, 8],
        {
            "w": array(4, 3, 3, 3), "b": array(4), "d": array(4, 1, 3, 3), "zero": np.float32(0), "six": np.float32(6),
            "p": array(5, 8), "q": array(5),
        },
        17,
    )  # fmt: skip
    rows = model(
        [
            node("LayerNormalization", ["x", "g", "b"], "n"),
            node("MatMul", ["n", "w"], "m"),
            node("Reshape", ["m", "to"], "r"),
            node("Transpose", ["r"], "t", perm=[0, 2, 1]),
            node("MatMul", ["r", "t"], "s"),
            node("Softmax", ["s"], "p"),
            node("Mul", ["p", "half"], "y"),
        ],
        ["N", 6, 8],
        {"g": array(8), "b": array(8), "w": array(8, 8), "to": np.array([0, 6, 8]), "half": np.float32(0.5)},
        17,
    )
    return [planar, rows]


def bytes_changed(data: bytes, chance: random.Random) -> tuple[bytes, str]:
    """Flip, cut, insert or repeat bytes."""
    held = bytearray(data)
    at, count = chance.randrange(len(held)), chance.choice([1, 1, 2, 8, 64])
    kind = chance.choice(["flip", "flip", "cut", "insert", "repeat", "end"])
    if kind == "flip":
        for _ in range(count):
            held[chance.randrange(len(held))] ^= 1 << chance.randrange(8)
    elif kind == "cut":
        del held[at : at + count]
    elif kind == "insert":
        held[at:at] = chance.randbytes(count)
    elif kind == "repeat":
        held[at:at] = held[at : at + count]
    else:
        del held[at:]
    return bytes(held), f"{kind} {count} bytes at {at}"


def field_changed(data: bytes, chance: random.Random) -> tuple[bytes, str]:  # noqa: PLR0912 - one branch per field
    """Change one field of the message: a size, a type, a name, an edge, an attribute, an operator, a version."""
    model = onnx.load_from_string(data)
    graph = model.graph
    node, tensor = chance.choice(graph.node), chance.choice(graph.initializer)
    names = [name for n in graph.node for name in (*n.input, *n.output)] + ["", "nowhere"]
    kind = chance.choice(
        ["dims", "type", "name", "input", "output", "attribute", "operator", "opset", "ir", "raw", "drop"]
    )
    if kind == "dims" and tensor.dims:
        tensor.dims[chance.randrange(len(tensor.dims))] = chance.choice([0, -1, 1, 2, 3, 7, 1 << 20])
    elif kind == "type":
        tensor.data_type = chance.choice([0, 1, 2, 6, 7, 9, 10, 11, 16, 99])
    elif kind == "name":
        tensor.name = chance.choice(names)
    elif kind == "input" and node.input:
        node.input[chance.randrange(len(node.input))] = chance.choice(names)
    elif kind == "output":
        node.output[0] = chance.choice(names)
    elif kind == "attribute" and node.attribute:
        attribute = chance.choice(node.attribute)
        if attribute.ints:
            attribute.ints[chance.randrange(len(attribute.ints))] = chance.choice([-5, -1, 0, 1, 2, 9, 1 << 16])
        else:
            attribute.i = chance.choice([-9, -1, 0, 1, 5, 1 << 16])
    elif kind == "operator":
        node.op_type = chance.choice(
            ["Conv", "Add", "Gemm", "MatMul", "Relu", "Concat", "Reshape", "Loop", "Einsum", "", "Nonsense"]
        )
    elif kind == "opset":
        model.opset_import[0].version = chance.choice([0, 1, 6, 7, 9, 11, 12, 25, 999])
    elif kind == "ir":
        model.ir_version = chance.choice([0, 1, 3, 7, 99])
    elif kind == "raw":
        tensor.raw_data = chance.randbytes(chance.choice([0, 1, len(tensor.raw_data)]))
    else:
        del graph.node[chance.randrange(len(graph.node))]
    return model.SerializeToString(), f"field: {kind}"


MUTATIONS: list[Callable[[bytes, random.Random], tuple[bytes, str]]] = [bytes_changed, field_changed]


def mutated(number: int, seed: int, models: Sequence[bytes]) -> tuple[bytes, str]:
    """Return a mutation by its number."""
    chance = random.Random(f"{seed}/{number}")
    return chance.choice(MUTATIONS)(chance.choice(models), chance)


def tried(number: int, seed: int, models: Sequence[bytes], folder: Path) -> Trial:
    """Convert one mutation."""
    from quantcli.cli import run

    data, how = mutated(number, seed, models)
    path, output = folder / "m.onnx", folder / "q.onnx"
    path.write_bytes(data)
    complained = io.StringIO()
    modes = (["--synthetic", "2"], ["--mode", "weights"], ["--mode", "dynamic"], ["--synthetic", "2", "--everywhere"])
    command = ["convert", str(path), *modes[number % len(modes)], "-o", str(output), "-q"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(complained), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = run(command)
    lines = complained.getvalue().strip().splitlines()
    for file in (output, output.with_suffix(".json")):
        if code != 0 and file.exists():
            return Trial(number, how, None, f"left {file.name} behind")
        file.unlink(missing_ok=True)
    return Trial(number, how, code, lines[-1] if lines else "")


def serve(channel: Connection, seed: int) -> None:
    """Try the mutations whose numbers come in."""
    import logging
    import resource

    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    models = seeds()
    with tempfile.TemporaryDirectory() as folder:
        while (number := channel.recv()) is not None:
            try:
                channel.send(tried(number, seed, models, Path(folder)))
            except BaseException as error:  # noqa: BLE001 - whatever comes through is a failure
                channel.send(Trial(number, mutated(number, seed, models)[1], None, f"{type(error).__name__}: {error}"))


class Worker:
    """A process that tries mutations, started anew where one of them ends it."""

    def __init__(self, seed: int, seconds: float) -> None:
        self.seed, self.seconds = seed, seconds
        self.start()

    def start(self) -> None:
        """Start the process."""
        context = multiprocessing.get_context("spawn")
        self.channel, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, self.seed), daemon=True)
        self.process.start()
        theirs.close()

    def trial(self, number: int) -> Trial:
        """Try one mutation."""
        self.channel.send(number)
        try:
            if self.channel.poll(self.seconds):
                found: Trial = self.channel.recv()
                return found
            said = f"no end after {self.seconds:.0f} s"
        except EOFError:
            self.process.join()
            said = f"the process died ({self.process.exitcode})"
        self.process.kill()
        self.process.join()
        self.start()
        return Trial(number, mutated(number, self.seed, seeds())[1], None, said)


def main() -> int:
    """Try all and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=10000)
    parser.add_argument("--first", type=int, default=0, help="the number of the first mutation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    workers = [Worker(options.seed, options.seconds) for _ in range(options.jobs)]
    numbers = range(options.first, options.first + options.mutations)

    def share(number: int) -> list[Trial]:
        return [workers[number].trial(trial) for trial in numbers[number :: options.jobs]]

    with ThreadPoolExecutor(options.jobs) as pool:
        trials = [trial for part in pool.map(share, range(options.jobs)) for trial in part]
    counts = collections.Counter("failed" if trial.failed else f"exit code {trial.code}" for trial in trials)
    print(f"{len(trials)} mutated models: " + ", ".join(f"{count} {what}" for what, count in sorted(counts.items())))
    for trial in sorted((trial for trial in trials if trial.failed), key=lambda trial: trial.number):
        print(f"  {trial.number} ({trial.how}): {trial.code} {trial.said[:300]}")
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
