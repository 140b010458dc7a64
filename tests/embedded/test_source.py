"""The files of C source: what they hold, what takes them, and that nothing else than integers is in them."""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantcli import convert, verify_c
from quantcli.arithmetic.affine import IntegerType, dequantize, quantize
from quantcli.cli import run
from quantcli.embedded.check import compiler
from quantcli.embedded.describe import read_description
from quantcli.errors import EmbeddedError, ModelError, UsageError, VerifyError
from quantcli.recipe import Layers, Recipe, Tune, Weight
from tests.graphs import Shape, data_for, node, normal, residual_net, save

WARNINGS = ("-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror")
COMPILERS = [found for found in ("gcc", "clang") if shutil.which(found)]
# What compilers call by themselves, where copies are long.
ALLOWED = {"memset", "memcpy", "__stack_chk_fail", "_GLOBAL_OFFSET_TABLE_"}
FAST = Recipe(tune=Tune(effort="fast"))

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C compiler on the path")


def text(folder: Path, name: str) -> str:
    return (folder / name).read_text("ascii")


def converting(model: Path, data: Path, output: Path) -> list[str]:
    return f"convert {model} --data {data} --format c -o {output} --effort fast".split()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """C source of the residual net."""
    folder = tmp_path_factory.mktemp("c")
    data_for(folder / "d.npz")
    convert(residual_net(folder / "m.onnx"), folder / "net", data=folder / "d.npz", recipe=FAST, form="c", name="net")
    return folder / "net"


def test_what_is_written(source: Path) -> None:
    assert {file.name for file in source.iterdir()} == {
        "net.h", "net.c", "kernels.h", "kernels.c", "edges.h", "edges.c", "test_vectors.h", "example_main.c", "Makefile",
        "program.json", "net.onnx", "net.json",
    }  # fmt: skip
    assert "void net_run(const uint8_t *in, uint8_t *out);" in text(source, "net.h")
    kernels = text(source, "kernels.c")
    assert "void conv(" in kernels
    assert "void depthwise(" in kernels
    assert "softmax" not in kernels  # what the model does not use is not there
    includes = {
        line for name in ("net.c", "net.h", "kernels.c", "kernels.h") for line in text(source, name).splitlines()
    }
    assert {line for line in includes if line.startswith("#include <")} == {"#include <stdint.h>"}
    for name in ("net.c", "kernels.c", "kernels.h", "net.h"):
        assert not any(word in text(source, name) for word in ("float", "double ", "malloc"))
    # Multipliers stand there as the sidecar states them.
    sidecar = json.loads((source / "net.json").read_text())
    first = next(layer for layer in sidecar["layers"] if layer["operator"] == "Conv")["multipliers"][0]
    assert ", ".join(map(str, first["multiplier"][:4])) in " ".join(text(source, "net.c").split())


def test_the_example_is_made_and_finds_nothing_wrong(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "c")
    made = subprocess.run(
        [str(shutil.which("make")), "-C", str(tmp_path / "c")], capture_output=True, text=True, check=True
    )
    assert "test vectors, 0 outputs differ" in made.stdout
    vectors = text(tmp_path / "c", "test_vectors.h")
    begin = vectors.index("expected")
    (tmp_path / "c" / "test_vectors.h").write_text(vectors[:begin] + re.sub(r"\d+,", "1,", vectors[begin:]))
    failed = subprocess.run(
        [str(shutil.which("make")), "-C", str(tmp_path / "c")], capture_output=True, text=True, check=False
    )
    assert failed.returncode != 0


@pytest.mark.parametrize("command", COMPILERS)
@pytest.mark.parametrize(
    "flags", ["-O0", "-O3", "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all", "-O2 -DSTEP=1"]
)
def test_compilers_agree(source: Path, command: str, flags: str) -> None:
    found = verify_c(source, compiler=command, flags=(*WARNINGS, *flags.split()))
    assert found.wrong == 0
    assert found.values == 8 * 10


@pytest.mark.skipif("gcc" not in COMPILERS, reason="there is no gcc on the path")
def test_no_floating_point_is_possible(source: Path, tmp_path: Path) -> None:
    machine = subprocess.run(
        [str(shutil.which("gcc")), "-dumpmachine"], capture_output=True, text=True, check=True
    ).stdout
    general = ["-mgeneral-regs-only"] if machine.startswith(("x86_64", "aarch64")) else []
    for name in ("net.c", "kernels.c"):
        command = ["gcc", *WARNINGS, "-O2", *general, "-c", str(source / name), "-o", str(tmp_path / f"{name}.o")]
        subprocess.run(command, check=True)
    named = [str(shutil.which("nm")), "-u", str(tmp_path / "net.c.o"), str(tmp_path / "kernels.c.o")]
    lines = subprocess.run(named, capture_output=True, text=True, check=True).stdout.splitlines()
    needed = {line.split()[-1] for line in lines if " U " in line}
    assert {name for name in needed if not name.startswith("net_")} <= {
        "memset",
        "memcpy",
        "__stack_chk_fail",
        "_GLOBAL_OFFSET_TABLE_",
    }


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ on the path")
def test_firmware_in_cpp_may_call_it(source: Path, tmp_path: Path) -> None:
    main = """#include "net.h"
#include "edges.h"
int main() { static uint8_t in[NET_INPUT], out[NET_OUTPUT]; net_run(in, out); return 0; }
"""
    (tmp_path / "main.cpp").write_text(main)
    objects = []
    for name in ("net.c", "kernels.c", "edges.c"):
        objects.append(str(tmp_path / f"{name}.o"))
        subprocess.run([str(compiler()), "-std=c99", "-c", str(source / name), "-o", objects[-1]], check=True)
    command = [
        str(shutil.which("g++")),
        f"-I{source}",
        str(tmp_path / "main.cpp"),
        *objects,
        "-o",
        str(tmp_path / "main"),
    ]
    subprocess.run(command, check=True)
    subprocess.run([str(tmp_path / "main")], check=True)


def test_the_same_conversion_writes_the_same_bytes(source: Path, tmp_path: Path) -> None:
    data_for(tmp_path / "d.npz")
    convert(
        residual_net(tmp_path / "m.onnx"), tmp_path / "net", data=tmp_path / "d.npz", recipe=FAST, form="c", name="net"
    )
    assert {file.name: file.read_bytes() for file in (tmp_path / "net").iterdir()} == {
        file.name: file.read_bytes() for file in source.iterdir()
    }


def test_edges_round_as_the_executor_does(source: Path, tmp_path: Path) -> None:
    told = read_description(source)
    port = told.inputs[0]
    reals = normal(port.size, seed=3, scale=3.0)
    steps = np.arange(-8, 8, dtype=np.float64) + 0.5
    reals[: steps.size] = (steps * port.scale).astype(np.float32)  # ties, or next to them
    reals[40:45] = [np.inf, -np.inf, np.nan, 1e30, -1e30]
    main = f"""#include <stdio.h>
#include "edges.h"
static float reals[{port.size}], back[{port.size}];
static uint8_t integers[{port.size}];
int main(void)
{{
    if (fread(reals, sizeof reals, 1, stdin) != 1) return 1;
    net_quantize_input(reals, integers);
    net_dequantize_input(integers, back);
    fwrite(integers, sizeof integers, 1, stdout);
    fwrite(back, sizeof back, 1, stdout);
    return 0;
}}
"""
    (tmp_path / "main.c").write_text(main)
    command = [str(compiler()), *WARNINGS, "-O2", f"-I{source}", str(tmp_path / "main.c"), str(source / "edges.c")]
    subprocess.run([*command, "-o", str(tmp_path / "edges")], check=True)
    told_back = subprocess.run([str(tmp_path / "edges")], input=reals.tobytes(), capture_output=True, check=True).stdout
    integers = np.frombuffer(told_back[: port.size], np.uint8)
    scale, zero = np.array([port.scale], np.float32), np.array([port.zero_point])
    finite = ~np.isnan(reals)
    expected = quantize(reals[finite], scale, zero, IntegerType("uint8"), None)
    assert np.array_equal(integers[finite], expected)
    assert (integers[~finite] == port.zero_point).all()
    back = np.frombuffer(told_back[port.size :], np.float32)
    assert np.array_equal(back, dequantize(integers, scale, zero, None))


def test_weights_of_four_bits_lie_two_to_a_byte(tmp_path: Path) -> None:
    data, model = data_for(tmp_path / "d.npz"), residual_net(tmp_path / "m.onnx")
    sizes = {}
    for bits in (8, 5, 4, 2):
        recipe = Recipe(tune=Tune(effort="fast"), weight=Weight(bits=bits))
        done = convert(model, tmp_path / f"c{bits}", data=data, recipe=recipe, form="c")
        assert done.embedded is not None
        sizes[bits] = done.embedded.description.constant_bytes
        assert verify_c(tmp_path / f"c{bits}", data).wrong == 0
    weights = 8 * 27 + 8 * 9 + 64 + 80
    assert sizes[8] == sizes[5]
    # Rows begin at a byte: 8 rows of 27 need 14 bytes each, 9 taps of 8 need 4. What an output's weights lie about is a byte.
    packed, outputs = 8 * 14 + 9 * 4 + 32 + 40, 8 + 8 + 8 + 10
    assert sizes[8] - sizes[4] == weights - packed - outputs
    assert sizes[2] == sizes[4]
    recipe = Recipe(tune=Tune(effort="fast"), weight=Weight(bits=4, symmetric=True))
    done = convert(model, tmp_path / "s4", data=data, recipe=recipe, form="c")
    assert done.embedded is not None
    assert sizes[8] - done.embedded.description.constant_bytes == weights - packed
    assert verify_c(tmp_path / "s4", data).wrong == 0


def test_what_stays_float_is_named_and_a_way_round_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = [
        node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        node("Relu", ["c"], ["r"]),
        node("Exp", ["r"], ["e"]),
        node("GlobalAveragePool", ["r"], ["g"]),
    ]
    model = save(
        tmp_path / "m.onnx", nodes, {"x": ["N", 3, 8, 8]}, {"e": None, "g": None}, {"w": normal(4, 3, 3, 3, scale=0.3)}
    )
    data = data_for(tmp_path / "d.npz")
    command = converting(model, data, tmp_path / "c")
    assert run(command) == 1
    error = capsys.readouterr().err
    assert "Exp 'e_node' stays float (no rule for this operator)" in error
    assert "--end-at 'r' --end-at 'g'" in error
    assert not (tmp_path / "c").exists()
    assert run([*command, "--end-at", "r", "--end-at", "g"]) == 0
    told = read_description(tmp_path / "c")
    assert [port.tensor for port in told.outputs] == ["r", "g"]
    assert "const uint8_t *in, uint8_t *out0, uint8_t *out1" in text(tmp_path / "c", "model.h")
    assert verify_c(tmp_path / "c", data).wrong == 0
    capsys.readouterr()
    assert run([*command, "--end-at", "nowhere"]) == 1
    assert "there is no integer tensor 'nowhere'" in capsys.readouterr().err


def test_a_difference_is_found(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(source, tmp_path / "c")
    assert run(["verify", "--c", str(tmp_path / "c"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["samples"], told["outputs"], told["differences"]) == (8, 80, 0)
    model = text(tmp_path / "c", "net.c")
    begin = model.index("{", model.index("data_w4"))
    changed = model[:begin] + re.sub(r"(-?\d\d+),", "0,", model[begin:], count=1)
    assert changed != model
    (tmp_path / "c" / "net.c").write_text(changed)
    assert run(["verify", "--c", str(tmp_path / "c")]) == 3
    assert "outputs differ from the executor's" in capsys.readouterr().err
    (tmp_path / "c" / "net.c").write_text("int x = ;")
    assert run(["verify", "--c", str(tmp_path / "c")]) == 1
    assert "does not take the C source" in capsys.readouterr().err


def test_an_executor_and_a_kernel_that_differ_stop_a_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantcli.embedded import source as sources

    kernels = tmp_path / "kernels"
    shutil.copytree(sources.KERNELS, kernels)
    rescale = (kernels / "rescale.c").read_text()
    assert "+ 1) >> 1" in rescale
    (kernels / "rescale.c").write_text(rescale.replace("+ 1) >> 1", "+ 2) >> 1"))
    monkeypatch.setattr(sources, "KERNELS", kernels)
    with pytest.raises(VerifyError, match="outputs differ from the executor's"):
        convert(
            residual_net(tmp_path / "m.onnx"), tmp_path / "c", data=data_for(tmp_path / "d.npz"), recipe=FAST, form="c"
        )
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("operator", "attributes"), [("Conv", {"pads": [1] * 4}), ("MaxPool", {"kernel_shape": [2, 2]})]
)
def test_a_window_over_several_samples_is_refused_with_a_way_out(
    tmp_path: Path, operator: str, attributes: dict[str, Any]
) -> None:
    last = node(operator, ["r", "w"] if operator == "Conv" else ["r"], ["y"], **attributes)
    nodes = [node("MatMul", ["x", "m"], ["r"]), last]
    constants = {"m": normal(8, 8), "w": normal(3, 3, 3, 3)}
    held = {name: value for name, value in constants.items() if name == "m" or operator == "Conv"}
    model = save(tmp_path / "m.onnx", nodes, {"x": [4, 3, 8, 8]}, {"y": None}, held)
    with pytest.raises(EmbeddedError, match=r"of shape \[4, 3, 8, 8\]; export the model for one sample, or any number"):
        convert(model, tmp_path / "c", data=data_for(tmp_path / "d.npz"), recipe=FAST, form="c")


def test_without_a_compiler_it_is_written_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = residual_net(tmp_path / "m.onnx"), data_for(tmp_path / "d.npz")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    command = converting(model, data, tmp_path / "c")
    assert run(command) == 0
    assert "there is no C compiler here" in capsys.readouterr().err
    with pytest.raises(EmbeddedError, match="there is no C compiler on the path"):
        verify_c(tmp_path / "c")
    with pytest.raises(EmbeddedError, match="there is no C compiler 'tcc'"):
        verify_c(tmp_path / "c", compiler="tcc")


USAGE: list[tuple[dict[str, Any], str]] = [
    ({"form": "c", "output": "c.onnx"}, "C source is a folder"),
    ({"form": "c", "name": "int"}, "no name for a model in C"),
    ({"form": "c", "name": "two words"}, "no name for a model in C"),
    ({"form": "c-params"}, "parameters are a header"),
    ({"form": "c-params", "output": "c.h", "until": ["r1"]}, "--end-at is for C source"),
    ({"form": "qdq", "output": "q.onnx", "until": ["r1"]}, "--end-at is for C source"),
    ({"form": "c", "recipe": Recipe(mode="weights"), "data": None}, "C source is integers alone"),
    ({"form": "c", "recipe": Recipe(tune=Tune(optimize="latency"))}, "times ONNX Runtime"),
]


@pytest.mark.parametrize(("given", "message"), USAGE)
def test_requests_that_contradict_themselves(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    model, data = residual_net(tmp_path / "m.onnx"), data_for(tmp_path / "d.npz")
    wishes: dict[str, Any] = {"output": "c", "data": data, "recipe": FAST} | given
    wishes["output"] = tmp_path / wishes["output"]
    with pytest.raises(UsageError, match=message):
        convert(model, **wishes)
    assert {file.name for file in tmp_path.iterdir()} == {"m.onnx", "d.npz"}


def test_commands_that_contradict_themselves(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify"]) == 2
    assert run(["verify", str(source / "net.json"), "--c", str(source)]) == 2
    assert run(["verify", str(source / "net.json"), "--cc", "gcc"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    with pytest.raises(ModelError, match="holds no C source of quantcli"):
        verify_c(source.parent)


def test_an_input_in_the_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    model = residual_net(tmp_path / "c" / "model.onnx")
    before = model.read_bytes()
    with pytest.raises(UsageError, match="something else than C source"):
        convert(model, tmp_path / "c", data=data_for(tmp_path / "d.npz"), recipe=FAST, form="c")
    assert model.read_bytes() == before
    elsewhere = model.rename(tmp_path / "m.onnx")
    for _ in range(2):  # C source is written over C source
        convert(elsewhere, tmp_path / "c", data=tmp_path / "d.npz", recipe=FAST, form="c")
    with pytest.raises(UsageError, match="also an input"):
        convert(tmp_path / "c" / "model.onnx", tmp_path / "c", data=tmp_path / "d.npz", recipe=FAST, form="c")


def test_parameters_alone(tmp_path: Path) -> None:
    data = data_for(tmp_path / "d.npz")
    recipe = Recipe(tune=Tune(effort="fast"), layers=Layers(everywhere=True))
    done = convert(
        residual_net(tmp_path / "m.onnx"), tmp_path / "p.h", data=data, recipe=recipe, form="c-params", name="net"
    )
    assert (
        run(["export", str(tmp_path / "p.json"), "--to", "c-params", "-o", str(tmp_path / "again.h"), "--name", "net"])
        == 0
    )
    assert (tmp_path / "again.h").read_bytes() == (tmp_path / "p.h").read_bytes()
    layer = next(one for one in done.sidecar.layers if one.operator == "Gemm")
    out = done.sidecar.tensors["x"]
    stem = f"net_layer_{layer.name}"
    main = f"""#include <stdio.h>
#include "p.h"
int main(void)
{{
    unsigned i;
    for (i = 0; i < sizeof {stem}_multiplier / sizeof *{stem}_multiplier; i++) {{
        printf("%ld %d\\n", (long){stem}_multiplier[i], {stem}_shift[i]);
    }}
    printf("%d %d %d\\n", NET_X_ZERO_POINT, NET_X_LOWEST, NET_X_HIGHEST);
    printf("%.9g\\n", (double)NET_X_SCALE);
    for (i = 0; i < sizeof net_b4_integers / sizeof *net_b4_integers; i++) {{
        printf("%ld\\n", (long)net_b4_integers[i]);
    }}
    return 0;
}}
"""
    (tmp_path / "main.c").write_text(main)
    subprocess.run([str(compiler()), *WARNINGS, str(tmp_path / "main.c"), "-o", str(tmp_path / "p")], check=True)
    lines = subprocess.run([str(tmp_path / "p")], capture_output=True, text=True, check=True).stdout.splitlines()
    one = layer.multipliers[0]
    count = len(one.multiplier)
    assert lines[:count] == [f"{m} {s}" for m, s in zip(one.multiplier, one.shift, strict=True)]
    assert lines[count] == f"{out.zero_point[0]} {out.qmin} {out.qmax}"
    assert struct.pack("f", float(lines[count + 1])) == struct.pack("f", out.scale[0])
    assert len(lines) == count + 2 + 10
    assert not math.isnan(out.scale[0])


def test_two_inputs_and_what_follows_from_constants_alone(tmp_path: Path) -> None:
    nodes = [
        node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        node("Mul", ["c", "y"], ["m"]),
        node("Exp", ["k"], ["e"]),  # of a constant: folded, and no operator on the way
        node("Add", ["m", "e"], ["z"]),
    ]
    constants = {"w": normal(4, 3, 3, 3, scale=0.3), "k": normal(1, 4, 1, 1, seed=5)}
    shapes: dict[str, Shape] = {"x": ["N", 3, 8, 8], "y": ["N", 4, 1, 1]}
    model = save(tmp_path / "m.onnx", nodes, shapes, {"z": None}, constants)
    np.savez(tmp_path / "d.npz", x=normal(8, 3, 8, 8), y=normal(8, 4, 1, 1, seed=3))
    done = convert(model, tmp_path / "c", data=tmp_path / "d.npz", recipe=FAST, form="c")
    assert done.embedded is not None
    assert [port.name for port in done.embedded.description.inputs] == ["x", "y"]
    assert "void model_run(const uint8_t *in0, const uint8_t *in1, uint8_t *out);" in text(tmp_path / "c", "model.h")
    assert verify_c(tmp_path / "c", tmp_path / "d.npz").wrong == 0


def test_a_search_writes_its_tries_beside_the_folder(tmp_path: Path) -> None:
    x = normal(48, 3, 8, 8, seed=9)
    np.savez(tmp_path / "d.npz", x=x, labels=np.arange(48) % 10)
    recipe = Recipe(tune=Tune(max_drop=100.0), weight=Weight(bits=4))
    done = convert(residual_net(tmp_path / "m.onnx"), tmp_path / "c", data=tmp_path / "d.npz", recipe=recipe, form="c")
    assert done.attempts
    assert {file.name for file in tmp_path.iterdir()} == {"m.onnx", "d.npz", "c"}


def test_what_kernel_calls_take(source: Path) -> None:
    told = read_description(source)
    macs = {step.layer: step.macs for step in told.steps}
    assert sum(macs.values()) == told.macs
    assert macs["c1_node"] == 8 * 8 * 8 * 27
    assert max(step.live_bytes for step in told.steps) == told.bound_bytes
    assert sum(step.constant_bytes for step in told.steps) >= told.constant_bytes  # some constants are shared
