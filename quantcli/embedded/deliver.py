"""C source of a quantized model, whole: what is written, what it takes, and whether it computes what the executor computes."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import onnx
import onnx_ir as ir

from quantcli.embedded import source
from quantcli.embedded.check import compiler, run_source
from quantcli.embedded.describe import FILE, Description, describe
from quantcli.embedded.lowering import Lowering
from quantcli.embedded.operators import LOWERED
from quantcli.errors import VerifyError
from quantcli.integer.executor import Executor

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from quantcli.sidecar import Sidecar

# Samples that the self-check compiles and runs.
CHECKED = 4


@dataclass(frozen=True, eq=False)
class Source:
    """C source.

    Attributes:
        files: By name.
        description: What it says of itself.
        checked: How many samples were compiled, run and found right; None where there is no compiler.
    """

    files: dict[str, bytes]
    description: Description
    checked: int | None


@dataclass(eq=False)
class Compared:
    """What C source gave beside the executor.

    Attributes:
        compiler: What it was compiled with.
        samples: How many were run.
        values: How many outputs were compared.
        wrong: How many differ.
        first: The first that does: sample, output, place, what the executor gives, what C gives.
    """

    compiler: str
    samples: int = 0
    values: int = 0
    wrong: int = 0
    first: tuple[int, str, int, int, int] | None = None


def written(
    model: bytes, sidecar: Sidecar, samples: Mapping[str, NDArray[Any]], name: str, until: Sequence[str]
) -> Source:
    """Return the C source of a quantized model, compiled and compared where there is a compiler.

    Args:
        model: The quantized model.
        sidecar: Its sidecar.
        samples: Inputs: test vectors are made of them.
        name: The model's name in C.
        until: Integer tensors that take the place of the model's outputs.

    Raises:
        EmbeddedError: If an operator has no kernel.
        VerifyError: If the compiled source gives anything else than the executor.
    """
    executor = executor_of(model, sidecar)
    singles = list(single_samples(executor, samples))
    program = Lowering(executor, singles[0], until).run(LOWERED)
    description = describe(program, name)
    given, expected = [], []
    for feeds in singles[:CHECKED]:
        ins, outs = integers_of(executor, description, feeds)
        given.append(ins)
        expected.append(outs)
    count = source.vector_count(program, len(given))
    title = f"{sidecar.float_model.name} by {sidecar.producer}: sidecar {sidecar.model.sha256[:16]}"
    texts = source.files(program, name, title, (given[:count], expected[:count]))
    files = {file: text.encode() for file, text in texts.items()}
    files[FILE] = msgspec.json.format(msgspec.json.encode(description)) + b"\n"
    command = compiler()
    if command is None:
        return Source(files, description, None)
    with tempfile.TemporaryDirectory(prefix="quantcli-") as folder:
        for file, content in files.items():
            (Path(folder) / file).write_bytes(content)
        compared = Compared(command)
        tally(compared, description, run_source(Path(folder), description, given, command), expected)
    require_same(compared)
    return Source(files, description, len(given))


def executor_of(model: bytes, sidecar: Sidecar) -> Executor:
    """Return the executor of a model."""
    return Executor(ir.from_proto(onnx.load_from_string(model)), sidecar)


def single_samples(executor: Executor, samples: Mapping[str, NDArray[Any]]) -> Iterator[dict[str, NDArray[Any]]]:
    """Yield samples one by one, or as many at once as a model with a fixed batch takes."""
    sizes = [
        value.shape[0]
        for value in executor.model.graph.inputs
        if str(value.name) in samples and value.shape is not None and len(value.shape)
    ]
    fixed = next((size for size in sizes if isinstance(size, int)), 1)
    available = min(array.shape[0] if array.ndim else 1 for array in samples.values())
    for begin in range(0, max(available - fixed + 1, 1), fixed):
        yield {name: array[begin : begin + fixed] if array.ndim else array for name, array in samples.items()}


def integers_of(
    executor: Executor, description: Description, feeds: Mapping[str, NDArray[Any]]
) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
    """Return the integers that go in for a sample, and those that the executor gives."""
    integers, _ = executor.run_all(feeds)
    ins = [integers[port.tensor].reshape(-1).astype(np.int64) for port in description.inputs]
    outs = [integers[port.tensor].reshape(-1).astype(np.int64) for port in description.outputs]
    return ins, outs


def tally(
    compared: Compared,
    description: Description,
    found: Sequence[Sequence[NDArray[np.int64]]],
    expected: Sequence[Sequence[NDArray[np.int64]]],
) -> None:
    """Add the differences of some samples."""
    for outs, wanted in zip(found, expected, strict=True):
        for port, got, want in zip(description.outputs, outs, wanted, strict=True):
            wrong = np.flatnonzero(got != want)
            compared.values += want.size
            compared.wrong += wrong.size
            if wrong.size and compared.first is None:
                at = int(wrong[0])
                compared.first = compared.samples, port.name, at, int(want[at]), int(got[at])
        compared.samples += 1


def require_same(compared: Compared) -> None:
    """Raise VerifyError where anything differs."""
    if compared.first is not None:
        sample, port, at, want, got = compared.first
        raise VerifyError(
            f"compiled by {compared.compiler}, {compared.wrong:,} of {compared.values:,} outputs differ from the executor's: "
            f"sample {sample}, '{port}'[{at}] is {got} and has to be {want}",
            "the files do not belong together, or please report this",
        )
