"""Compile C source with the system's compiler and compare what it gives with the integer executor, byte for byte."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from quantcli.embedded.program import C_TYPES
from quantcli.embedded.source import suffix
from quantcli.errors import EmbeddedError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from quantcli.embedded.describe import Description

# Warnings are no errors here: what a compiler of tomorrow warns of must not stop a conversion.
FLAGS = ("-std=c99", "-O2")
COMPILERS = ("cc", "gcc", "clang")
# Seconds that a compiler, or the compiled program on its inputs, may take.
PATIENCE = 600


def compiler(wanted: str | None = None) -> str | None:
    """Return the compiler: the one that is wanted, ``$CC``, or the first that there is; None where there is none.

    Raises:
        EmbeddedError: If the one that is wanted is not there.
    """
    named = wanted or os.environ.get("CC")
    if named:
        if shutil.which(named) is None:
            raise EmbeddedError(f"there is no C compiler '{named}'", "name one that is on the path (--cc)")
        return named
    return next((found for found in COMPILERS if shutil.which(found)), None)


def harness(description: Description) -> str:
    """Return a program that reads samples from its standard input and writes outputs to its standard output."""
    name, ctype = description.name, C_TYPES[description.dtype]
    ins = [f"in{suffix(i, description.inputs)}" for i in range(len(description.inputs))]
    outs = [f"out{suffix(i, description.outputs)}" for i in range(len(description.outputs))]
    ports = [*zip(ins, description.inputs, strict=True), *zip(outs, description.outputs, strict=True)]
    declared = "\n".join(f"static {ctype} {variable}[{port.size}];" for variable, port in ports)
    first = f"fread({ins[0]}, sizeof {ins[0]}, 1, stdin) == 1"
    others = "".join(f" && fread({variable}, sizeof {variable}, 1, stdin) == 1" for variable in ins[1:])
    written = "".join(f"        fwrite({variable}, sizeof {variable}, 1, stdout);\n" for variable in outs)
    return (
        f'#include <stdio.h>\n\n#include "{name}.h"\n\n{declared}\n\nint main(void)\n{{\n    while ({first}{others}) {{\n'
        f"        {name}_run({', '.join(ins + outs)});\n{written}    }}\n    return 0;\n}}\n"
    )


def built(folder: Path, description: Description, place: Path, command: str, flags: Sequence[str] = FLAGS) -> Path:
    """Compile the source in a folder with a program that reads samples, and return the executable.

    Raises:
        EmbeddedError: If the compiler does not take it.
    """
    main = place / "harness.c"
    main.write_text(harness(description), encoding="utf-8")
    executable = place / "model"
    sources = [str(folder / f"{description.name}.c"), str(folder / "kernels.c"), str(main)]
    told = subprocess.run(  # noqa: S603 - it is the compiler that was asked for
        [command, *flags, f"-I{folder.resolve()}", "-o", str(executable), *sources],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    if told.returncode:
        lines = (
            [line for line in told.stderr.splitlines() if "error" in line] or told.stderr.splitlines() or ["no word"]
        )
        raise EmbeddedError(f"{command} does not take the C source: {lines[0]}", "try another compiler (--cc)")
    return executable


def outputs_of(
    executable: Path, description: Description, samples: Sequence[Sequence[NDArray[np.int64]]]
) -> list[list[NDArray[np.int64]]]:
    """Run samples, and return the outputs of each.

    Args:
        executable: What `built` returned.
        description: The program's inputs and outputs.
        samples: By sample, by input: integers as the model counts them.

    Raises:
        EmbeddedError: If it dies, or does not write what it has to.
    """
    dtype = np.dtype(description.dtype)
    given = b"".join(
        np.ascontiguousarray(port.reshape(-1).astype(dtype)).tobytes() for sample in samples for port in sample
    )
    told = subprocess.run([str(executable)], input=given, capture_output=True, timeout=PATIENCE, check=False)  # noqa: S603 - ours
    sizes = [port.size for port in description.outputs]
    if told.returncode or len(told.stdout) != len(samples) * sum(sizes) * dtype.itemsize:
        last = (told.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {told.returncode}"])[0]
        raise EmbeddedError(f"the compiled model does not run: {last}", "please report this")
    rows = np.frombuffer(told.stdout, dtype=dtype).reshape(len(samples), -1).astype(np.int64)
    return [np.split(row, np.cumsum(sizes)[:-1].tolist()) for row in rows]


def run_source(
    folder: Path,
    description: Description,
    samples: Sequence[Sequence[NDArray[np.int64]]],
    command: str,
    flags: Sequence[str] = FLAGS,
) -> list[list[NDArray[np.int64]]]:
    """Compile the source in a folder, run samples, and return the outputs of each."""
    with tempfile.TemporaryDirectory(prefix="quantcli-") as place:
        return outputs_of(built(folder, description, Path(place), command, flags), description, samples)
