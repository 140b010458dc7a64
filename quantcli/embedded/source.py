"""The C source: kernels that are used, constants, one function that runs the model, and what one needs to try it."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.embedded.products import COLUMNS
from quantcli.embedded.program import C_TYPES, Array, Buffer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from quantcli.embedded.program import Program, Step

KERNELS = Path(__file__).parent / "kernels"
# What each kernel needs besides itself, in the order in which it has to stand: declarations, then definitions.
NEEDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "conv": (("convolution",), ("rescale", "lanes", "finish", "unpack", "products")),
    "conv_transpose": (("convolution",), ("rescale", "lanes", "finish", "unpack", "products")),
    "depthwise": (("convolution",), ("rescale", "lanes", "finish", "unpack")),
    "fully_connected": ((), ("rescale", "lanes", "finish", "unpack")),
    "matrix_product": ((), ("rescale", "clamp")),
    "sum": (("loops",), ("rescale", "lanes")),
    "sum_headroom": (("loops",), ("rescale", "clamp")),
    "product": (("loops",), ("rescale", "clamp")),
    "requantize": (("loops",), ("rescale", "clamp")),
    "larger": (("loops",), ("rescale", "clamp")),
    "prelu": (("loops",), ("rescale", "clamp")),
    "copy": (("loops",), ()),
    "gather": ((), ()),
    "fill": ((), ()),
    "lookup": ((), ()),
    "max_pool": (("pool",), ()),
    "average_pool": (("pool",), ("clamp", "divide")),
    "mean": (("reduction",), ("clamp", "divide")),
    "extreme": (("reduction",), ()),
    "softmax": (("reduction",), ("clamp", "divide")),
    "softmax_fixed": (("reduction",), ("clamp",)),
}
# Test vectors take at most so many values.
VECTOR_VALUES = 200_000


def used(program: Program) -> tuple[list[str], list[str]]:
    """Return the declarations and the definitions that a program needs, each once."""
    kernels = list(dict.fromkeys(step.kernel for step in program.steps))
    headers = dict.fromkeys(name for kernel in kernels for name in NEEDS[kernel][0])
    bodies = dict.fromkeys(name for kernel in kernels for name in NEEDS[kernel][1])
    if not packed(program):
        bodies.pop("unpack", None)
    return [*headers, *kernels], [*bodies, *kernels]


def packed(program: Program) -> bool:
    """Tell whether some weights lie two to a byte."""
    return any(step.parameters is not None and step.parameters[1].get("packed") for step in program.steps)


def kernels_h(program: Program, name: str) -> str:
    """Return ``kernels.h``: types, and the kernels that the model uses."""
    headers, _ = used(program)
    wide_index = any(array.ctype == "uint32_t" for array in program.arrays)
    kernels = [kernel for kernel in headers if (KERNELS / f"{kernel}.c").exists()]
    values = {
        "ACTIVATION": C_TYPES[program.dtype],
        "COLUMN": "int16_t" if program.itemsize == 1 else "int32_t",
        "ACCUMULATOR": "int64_t" if program.wide else "int32_t",
        "INDEX": "uint32_t" if wide_index else "uint16_t",
        "COLUMNS": COLUMNS,
        "MULTIPLIER_BITS": program.multiplier_bits,
        "DOUBLE": int("double" in program.roundings),
        "HALF_EVEN": int("half_even" in program.roundings),
        "FLOOR": int("floor" in program.roundings),
        "LEFT": int(program.left),
        "WIDE_RESULTS": int(program.wide_results),
        "PACKED": int(packed(program)),
        "NAMES": "\n".join(f"#define {kernel} {name}_{kernel}" for kernel in kernels),
    }
    head = re.sub("@([A-Z_]+)@", lambda match: str(values[match[1]]), (KERNELS / "head.h").read_text("utf-8"))
    return guarded(
        f"{name}_kernels_h", "\n".join([head, *((KERNELS / f"{part}.h").read_text("utf-8") for part in headers)])
    )


def kernels_c(program: Program) -> str:
    """Return ``kernels.c``."""
    _, bodies = used(program)
    return '#include "kernels.h"\n\n' + "\n".join((KERNELS / f"{body}.c").read_text("utf-8") for body in bodies)


def model_h(program: Program, name: str, title: str) -> str:
    """Return ``model.h``: sizes, parameters of inputs and outputs, and the function that runs the model."""
    upper, ctype = name.upper(), C_TYPES[program.dtype]
    lines = [f"/* {comment(title)}", " *"]
    for kind, ports in (("input", program.inputs), ("output", program.outputs)):
        for port in ports:
            shape = " x ".join(str(size) for size in port.shape)
            lines.append(
                f" * {kind} '{comment(port.name)}': {shape} of {ctype}, real = {port.scale!r} * (q - {port.zero_point})"
            )
    lines += [" */", "#include <stdint.h>", ""]
    lines.append(
        f"enum {{ {upper}_RAM = {program.ram}, {upper}_CONSTANTS = {program.flash} }}; /* bytes; without code and stack */"
    )
    for kind, ports in (("INPUT", program.inputs), ("OUTPUT", program.outputs)):
        lines += [f"enum {{ {upper}_{kind}{suffix(i, ports)} = {port.size} }};" for i, port in enumerate(ports)]
    lines += [
        "",
        "/* Run the model once. It keeps its activations in static memory: one run at a time. */",
        for_cpp(f"{signature(program, name)};"),
        "",
    ]
    return guarded(f"{name}_h", "\n".join(lines))


def signature(program: Program, name: str) -> str:
    """Return the head of the function that runs the model."""
    ctype = C_TYPES[program.dtype]
    ins = [f"const {ctype} *in{suffix(i, program.inputs)}" for i in range(len(program.inputs))]
    outs = [f"{ctype} *out{suffix(i, program.outputs)}" for i in range(len(program.outputs))]
    return f"void {name}_run({', '.join(ins + outs)})"


def suffix(number: int, ports: Sequence[Any]) -> str:
    """Return the number of a port, where there are several."""
    return str(number) if len(ports) > 1 else ""


def model_c(program: Program, name: str, title: str) -> str:
    """Return ``model.c``: the constants, the parameters of each kernel call, and the calls."""
    lines = [f"/* {comment(title)} */", f'#include "{name}.h"', "", '#include "kernels.h"', ""]
    lines += [array_text(array) for array in program.arrays]
    if program.arena:
        lines.append(f"static activation_t arena[{program.arena}];")
    if program.scratch:
        lines.append(f"static column_t columns[COLUMNS * PADDED({program.scratch // COLUMNS})];")
    calls = []
    for number, step in enumerate(program.steps):
        if step.parameters is not None:
            kind, fields = step.parameters
            lines.append(f"\n/* {comment(step.operator)} {comment(step.layer)} */")
            lines.append(f"static const {kind} step{number} = {initializer(fields)};")
        calls.append(f"    {call(program, step, number)} /* {comment(step.operator)} {comment(step.layer)} */")
    lines += ["", signature(program, name), "{", *calls, "}", ""]
    return "\n".join(lines)


def call(program: Program, step: Step, number: int) -> str:
    """Return a kernel call."""
    given = [f"&step{number}"] if step.parameters is not None else []
    given += [value.name if isinstance(value, Array) else str(value) for value in step.arguments]
    given += [place(program, buffer, at) for buffer, at in (*step.reads, step.writes)]
    if step.scratch:
        given.append("columns")
    return f"{step.kernel}({', '.join(given)});"


def place(program: Program, buffer: Buffer, at: int) -> str:
    """Return a pointer into a buffer."""
    if buffer.kind == "arena":
        at += buffer.offset
        base = "arena"
    elif buffer.kind == "constant":
        base = buffer.array.name if buffer.array is not None else ""
    else:
        ports = program.inputs if buffer.kind == "input" else program.outputs
        base = ("in" if buffer.kind == "input" else "out") + suffix(buffer.index, ports)
    return f"{base} + {at}" if at else base


def initializer(fields: dict[str, Any]) -> str:
    """Return a struct's initial values."""
    return "{\n" + "".join(f"    .{key} = {field_text(value)},\n" for key, value in fields.items()) + "}"


def field_text(value: Any) -> str:
    """Return one field's initial value."""
    if isinstance(value, Array):
        return value.name
    if isinstance(value, dict):
        return "{" + ", ".join(f".{key} = {field_text(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "{" + ", ".join(field_text(one) for one in value) + "}"
    if isinstance(value, int) and abs(value) >= 1 << 31:
        return f"INT64_C({value})"
    return str(value)


def array_text(array: Array) -> str:
    """Return a constant array."""
    more = " + STEP" if array.ctype == "int8_t" else ""
    return f"static const {array.ctype} {array.name}[{array.values.size}{more}] = {{\n{numbers(array.values)}\n}};\n"


def numbers(values: NDArray[Any]) -> str:
    """Return numbers in lines."""
    lowest = -(1 << 31)
    texts = ["INT32_MIN" if value == lowest else str(value) for value in values.reshape(-1).tolist()]
    return textwrap.fill(", ".join(texts), 120, initial_indent="    ", subsequent_indent="    ")


def comment(text: str) -> str:
    """Return text that may stand in a comment."""
    clean = re.sub(r"[^\x20-\x7e]", "?", text)
    return clean.replace("*/", "* /").replace("/*", "/ *").replace("??", "? ?")


def for_cpp(declarations: str) -> str:
    """Return declarations that C++ takes too."""
    return f'#ifdef __cplusplus\nextern "C" {{\n#endif\n{declarations}\n#ifdef __cplusplus\n}}\n#endif'


def guarded(name: str, text: str) -> str:
    """Return a header that may be included twice."""
    guard = f"QUANTCLI_{name.upper()}"
    return f"#ifndef {guard}\n#define {guard}\n\n{text}\n#endif\n"


# ---- edges, example, build -----------------------------------------------------------------------------------------------------


def edges(program: Program, name: str) -> tuple[str, str]:
    """Return ``edges.h`` and ``edges.c``: reals to integers and back, the only floating point, for whoever wants it."""
    ctype = C_TYPES[program.dtype]
    declared, defined = [], []
    for kind, ports in (("input", program.inputs), ("output", program.outputs)):
        for number, port in enumerate(ports):
            which = f"{name}_{{}}_{kind}{suffix(number, ports)}"
            quantizes = f"void {which.format('quantize')}(const float *reals, {ctype} *integers)"
            dequantizes = f"void {which.format('dequantize')}(const {ctype} *integers, float *reals)"
            declared += [f"{quantizes};", f"{dequantizes};"]
            scale = real_text(port.scale)
            loop = f"    int32_t i;\n    for (i = 0; i < {port.size}; i++) {{\n        "
            forth = f"quantized(reals[i], {scale}, {port.zero_point}, {port.qmin}, {port.qmax})"
            back = f"{scale} * (float)(integers[i] - {port.zero_point})"
            defined.append(f"{quantizes}\n{{\n{loop}integers[i] = ({ctype}){forth};\n    }}\n}}\n")
            defined.append(f"{dequantizes}\n{{\n{loop}reals[i] = {back};\n    }}\n}}\n")
    header = guarded(f"{name}_edges_h", "#include <stdint.h>\n\n" + for_cpp("\n".join(declared)) + "\n")
    body = (KERNELS / "edges.c").read_text("utf-8")
    return header, f'#include "edges.h"\n\n{body}\n' + "\n".join(defined)


def real_text(value: float) -> str:
    """Return a float32 as C99 writes it exactly."""
    digits, exponent = float(value).hex().split("p")
    return f"{digits.rstrip('0').rstrip('.')}p{exponent}f"


def vectors_h(
    program: Program, name: str, inputs: Sequence[Sequence[NDArray[Any]]], outputs: Sequence[Sequence[NDArray[Any]]]
) -> str:
    """Return ``test_vectors.h``: inputs, and what the executor makes of them.

    Args:
        program: The program.
        name: The model's name in C.
        inputs: By sample, by port: integers.
        outputs: The same of the outputs.
    """
    ctype, parts = C_TYPES[program.dtype], ["#include <stdint.h>\n", f"enum {{ VECTORS = {len(inputs)} }};\n"]
    for kind, ports, samples in (("inputs", program.inputs, inputs), ("expected", program.outputs, outputs)):
        for number, port in enumerate(ports):
            rows = ",\n".join(f"{{\n{numbers(sample[number])}\n}}" for sample in samples)
            parts.append(
                f"static const {ctype} {kind}{suffix(number, ports)}[{len(samples)}][{port.size}] = {{\n{rows}\n}};\n"
            )
    return guarded(f"{name}_test_vectors_h", "\n".join(parts))


def vector_count(program: Program, available: int) -> int:
    """Return how many test vectors are written."""
    size = sum(port.size for port in (*program.inputs, *program.outputs))
    return max(1, min(available, 4, VECTOR_VALUES // size))


def example_c(program: Program, name: str) -> str:
    """Return ``example_main.c``: it runs the test vectors, and says whether the outputs are those expected."""
    ctype = C_TYPES[program.dtype]
    outs = [f"out{suffix(i, program.outputs)}" for i in range(len(program.outputs))]
    ins = [f"inputs{suffix(i, program.inputs)}[v]" for i in range(len(program.inputs))]
    declared = "\n".join(
        f"    static {ctype} {out}[{port.size}];" for out, port in zip(outs, program.outputs, strict=True)
    )
    compared = "\n".join(
        f"        wrong += memcmp({out}, expected{suffix(i, program.outputs)}[v], sizeof {out}) != 0;"
        for i, out in enumerate(outs)
    )
    return f"""#include <stdio.h>
#include <string.h>

#include "{name}.h"
#include "test_vectors.h"

/* Returns 0 where every test vector gives what it has to. */
int main(void)
{{
{declared}
    int wrong = 0, v;
    for (v = 0; v < VECTORS; v++) {{
        {name}_run({", ".join(ins + outs)});
{compared}
    }}
    printf("%d test vectors, %d outputs differ\\n", (int)VECTORS, wrong);
    return wrong != 0;
}}
"""


def makefile(name: str) -> str:
    """Return the Makefile."""
    sources = f"{name}.c kernels.c"
    return f"""CC ?= cc
CFLAGS ?= -O3
CFLAGS += -std=c99 -Wall -Wextra -Wpedantic

test: example
\t./example

example: example_main.c {sources} {name}.h kernels.h test_vectors.h
\t$(CC) $(CFLAGS) -o $@ example_main.c {sources}

clean:
\trm -f example

.PHONY: test clean
"""


def files(program: Program, name: str, title: str, vectors: tuple[Any, Any]) -> dict[str, str]:
    """Return every file by its name."""
    header, body = edges(program, name)
    return {
        f"{name}.h": model_h(program, name, title),
        f"{name}.c": model_c(program, name, title),
        "kernels.h": kernels_h(program, name),
        "kernels.c": kernels_c(program),
        "edges.h": header,
        "edges.c": body,
        "test_vectors.h": vectors_h(program, name, *vectors),
        "example_main.c": example_c(program, name),
        "Makefile": makefile(name),
    }
