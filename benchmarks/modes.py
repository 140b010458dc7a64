"""Conversions without calibration data, beside ONNX Runtime's own tools: size, quality and speed.

QUANTCLI_BED=… python -m benchmarks.modes [ENTRY …] [--runs 15] [--batch 8]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

if __package__ in {None, ""}:  # run as a file: its folder stands on the path in the project's place
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.bed import as_feeds, bed_folder, entries, interleaved, load_bed, machine
from quantcli import convert
from quantcli.recipe import Recipe, Weight

DEFAULT = ["minilm", "lstm_rows_mnist", "gru_rows_mnist", "lenet_mnist"]
CALIBRATION = 256


def ours(recipe: Recipe, data: Path | None, source: Path, target: Path) -> None:
    """Convert with quantcli."""
    convert(source, target, data=data, recipe=recipe)


def dynamic_of_onnxruntime(source: Path, target: Path) -> None:
    """Convert with ONNX Runtime's dynamic quantization."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(source, target, weight_type=QuantType.QInt8, per_channel=True)


def blocks_of_onnxruntime(bits: int, source: Path, target: Path) -> None:
    """Convert with ONNX Runtime's block-wise quantization of products."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    tool = MatMulNBitsQuantizer(onnx.load(source), block_size=32, is_symmetric=False, bits=bits)
    tool.process()
    tool.model.save_model_to_file(str(target))


def session(path: Path) -> Any:
    """Load a model for one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def outputs(loaded: Any, feeds: dict[str, NDArray[Any]], size: int = 64) -> NDArray[np.float64]:
    """Return the first output over all samples."""
    count = len(next(iter(feeds.values())))
    parts = [loaded.run(None, {k: v[i : i + size] for k, v in feeds.items()})[0] for i in range(0, count, size)]
    return np.concatenate(parts).astype(np.float64)


def measure(bed: Any, name: str, runs: int, batch: int, folder: Path) -> None:
    """Convert one entry in every way and print a row for each."""
    source = bed_folder() / "models" / bed.BED[name]["onnx"]
    loaded = session(source)
    first = loaded.get_inputs()[0].name
    evaluation, calibration = (as_feeds(bed.inputs(name, split)[0], first) for split in ("eval", "calib"))
    data = folder / "calib.npz"
    np.savez(data, **{k: v[:CALIBRATION] for k, v in calibration.items()})  # type: ignore[arg-type]
    ways: dict[str, Callable[[Path, Path], None]] = {
        "quantcli static": partial(ours, Recipe(), data),
        "quantcli dynamic": partial(ours, Recipe(mode="dynamic"), None),
        "ONNX Runtime dynamic": dynamic_of_onnxruntime,
        "quantcli weights, 8 bits": partial(ours, Recipe(mode="weights"), None),
        "ONNX Runtime blocks, 8 bits": partial(blocks_of_onnxruntime, 8),
        "quantcli weights, 4 bits": partial(ours, Recipe(mode="weights", weight=Weight(bits=4)), None),
        "ONNX Runtime blocks, 4 bits": partial(blocks_of_onnxruntime, 4),
    }
    reference = outputs(loaded, evaluation)
    few = {k: v[:batch] for k, v in evaluation.items()}
    for label, way in ways.items():
        target = folder / f"{label}.onnx"
        try:
            way(source, target)
            candidate = session(target)
            found = outputs(candidate, evaluation)
            metric = bed.evaluate(target, name)
        except Exception as error:  # noqa: BLE001 - a way that fails is a row that says so
            print(f"| {name} | {label} | no: {str(error).strip().splitlines()[-1][:60]} | | | | |")
            continue
        cosine = (reference * found).sum(-1) / (np.linalg.norm(reference, axis=-1) * np.linalg.norm(found, axis=-1))
        sqnr = 10 * np.log10((reference**2).sum() / ((reference - found) ** 2).sum())
        times = interleaved(runs, lambda: loaded.run(None, few), partial(candidate.run, None, few))
        size = target.stat().st_size / source.stat().st_size
        print(
            f"| {name} | {label} | {size:.0%} | {metric:.2f} | {cosine.mean():.4f} | {sqnr:.1f} | {times[0] / times[1]:.2f}× |",
            flush=True,
        )


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entries", nargs="*", default=DEFAULT)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    bed = load_bed()
    print(
        f"{machine()}; onnxruntime {onnxruntime.__version__}; 1 thread, batch {options.batch}, medians of interleaved runs\n"
    )
    print("| model | form | size | metric | mean cosine | SQNR, dB | speed over float |\n|---|---|---|---|---|---|---|")
    for name in entries(bed, options.entries):
        with tempfile.TemporaryDirectory() as folder:
            measure(bed, name, options.runs, options.batch, Path(folder))


if __name__ == "__main__":
    main()
