"""One network in every form that PyTorch saves: the same integers, the same accuracy, the same statistics in both runtimes.

QUANTCLI_BED=… python -m benchmarks.torch_forms [ENTRY …]
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

if __package__ in {None, ""}:  # run as a file: its folder stands on the path in the project's place
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.bed import as_feeds, bed_folder, entries, load_bed
from quantcli import convert
from quantcli.load import Opening
from quantcli.observation import Run
from quantcli.pipeline import calibrate
from quantcli.sidecar import Sidecar

DEFAULT = ["lenet_mnist", "resnet20_cifar10", "dscnn_kws"]


def module_of(name: str) -> tuple[Any, str]:
    """Return the bed's float module, and the factory that builds it without weights."""
    file = bed_folder() / "modules.py"
    spec = importlib.util.spec_from_file_location("modules", file)
    assert spec is not None and spec.loader is not None  # noqa: S101, PT018 - it is a .py file
    source = importlib.util.module_from_spec(spec)
    sys.modules["modules"] = source
    spec.loader.exec_module(source)
    return source.build(name), f"{file}:{source.MODULES[name].__name__}"


def forms(name: str, folder: Path, example: torch.Tensor) -> dict[str, tuple[Path, Opening]]:
    """Save a network in every form, and say how each is opened."""
    module, factory = module_of(name)
    if "<lambda>" in factory:
        builder = folder / f"{name}_factory.py"
        builder.write_text(
            f"import sys\nsys.path.insert(0, {str(bed_folder())!r})\nfrom modules import MODULES\nbuild = MODULES[{name!r}]\n"
        )
        factory = f"{builder}:build"
    paths = {
        form: folder / f"{name}.{form}"
        for form in ("pt2", "onnx", "script.pt", "trace.pt", "pth", "safetensors", "module.pt")
    }
    program = torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim.AUTO},), strict=False)
    torch.export.save(program, paths["pt2"])
    torch.onnx.export(program, dynamo=True, opset_version=20, verbose=False, input_names=["x"], f=str(paths["onnx"]))
    torch.jit.save(torch.jit.script(module), str(paths["script.pt"]))
    torch.jit.save(torch.jit.trace(module, example), str(paths["trace.pt"]))  # type: ignore[no-untyped-call]
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in module.state_dict().items()}, "epoch": 1}, paths["pth"]
    )
    save_file(module.state_dict(), paths["safetensors"])
    torch.save(module, paths["module.pt"])
    built, plain = Opening(factory=factory), Opening()
    return {
        "pt2": (paths["pt2"], plain),
        "onnx": (paths["onnx"], plain),
        "TorchScript, scripted": (paths["script.pt"], plain),
        "TorchScript, traced": (paths["trace.pt"], plain),
        "state dict, wrapped (.pth)": (paths["pth"], built),
        "state dict (.safetensors)": (paths["safetensors"], built),
        "whole module (pickle)": (paths["module.pt"], replace(plain, trusted=True)),
    }


def integers(sidecar: Sidecar) -> list[Any]:
    """Return what a sidecar says, names aside."""
    tensors = [
        (t.role, t.dtype, t.scale, t.zero_point, t.qmin, t.qmax)
        for layer in sidecar.layers
        for t in (sidecar.tensors[name] for name in (*layer.inputs, *layer.outputs) if name in sidecar.tensors)
    ]
    rows = [
        (layer.operator, layer.clamp, [(m.multiplier, m.shift) for m in layer.multipliers]) for layer in sidecar.layers
    ]
    return [tensors, rows]


def main(arguments: list[str] | None = None) -> None:
    """Convert every form, and print how they compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="ENTRY")
    bed = load_bed()
    print(
        "| entry | form | integers as from .pt2 | top-1 % | statistics, torch against ONNX Runtime |\n|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name in entries(bed, parser.parse_args(arguments).names or DEFAULT):
            samples = as_feeds(bed.inputs(name, "calib")[0], "x")
            data = folder / f"{name}.npz"
            np.savez(data, **samples)  # type: ignore[arg-type]
            first: list[Any] | None = None
            for form, (path, opening) in forms(
                name, folder, torch.from_numpy(next(iter(samples.values()))[:2])
            ).items():
                output = folder / "out.onnx"
                done = convert(path, output, data=data, opening=opening)
                found = integers(done.sidecar)
                first = first if first is not None else found
                score = float(bed.evaluate(output, name))
                same = "yes" if found == first else "no"
                print(f"| {name} | {form} | {same} | {score:.2f} | {statistics(path, data, opening)} |", flush=True)


def statistics(path: Path, data: Path, opening: Opening) -> str:
    """Return by how much the extremes of torch's statistics differ from ONNX Runtime's, of the widest magnitude of each tensor."""
    if path.suffix == ".onnx":
        return ""
    here = calibrate(path, data, opening=opening)
    there = calibrate(path, data, opening=opening, run=Run(runtime="torch"))
    if set(here.tensors) != set(there.tensors):
        return "other tensors"
    worst = 0.0
    for name, seen in here.tensors.items():
        other = there.tensors[name]
        span = max(abs(seen.minimum), abs(seen.maximum), 1e-30)
        worst = max(worst, abs(seen.minimum - other.minimum) / span, abs(seen.maximum - other.maximum) / span)
    return f"{len(here.tensors)} tensors, within {worst:.1e}"


if __name__ == "__main__":
    main()
