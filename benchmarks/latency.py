"""The fastest plan: speed over float as the rules have it, and as `--optimize latency` keeps it.

QUANTCLI_BED=… python -m benchmarks.latency [ENTRY …] [--runs 31]
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

if __package__ in {None, ""}:  # run as a file: its folder stands on the path in the project's place
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.bed import as_feeds, bed_folder, entries, load_bed, machine, median_ratio, session, timed_blocks
from quantcli import Recipe, convert
from quantcli.recipe import Tune

BATCHES, BLOCKS = (1, 8), 3
RECIPES = {"rules": Recipe(), "fastest": Recipe(tune=Tune(optimize="latency"))}


def row(bed: Any, name: str, runs: int, folder: Path) -> str:
    """Return an entry's line of the table."""
    model = bed_folder() / "models" / bed.BED[name]["onnx"]
    plain = session(model)
    given = plain.get_inputs()[0]
    feeds = as_feeds(bed.inputs(name, "calib")[0], given.name)
    data = folder / "data.npz"
    np.savez(data, **{key: values[:256] for key, values in feeds.items()})  # type: ignore[arg-type]
    paths, kept = [], ""
    for form, recipe in RECIPES.items():
        paths.append(folder / f"{form}.onnx")
        done = convert(model, paths[-1], data=data, recipe=recipe)
        kept = next((trial.name for trial in done.trials if trial.kept), "")
    sessions = [plain, *(session(path) for path in paths)]
    speeds = []
    for batch in BATCHES:
        if isinstance(given.shape[0], int) and batch != given.shape[0]:
            speeds.append("")
            continue
        few = {key: values[:batch] for key, values in feeds.items()}
        blocks = timed_blocks(BLOCKS, runs, *(partial(one.run, None, few) for one in sessions))
        speeds.append(" → ".join(f"{median_ratio(blocks, 0, place):.2f}×" for place in (1, 2)))
    metrics = " → ".join(f"{bed.evaluate(path, name):.2f}" for path in paths)
    return f"| {name} | {' | '.join(speeds)} | {kept} | {metrics} |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entries", nargs="*", metavar="ENTRY")
    parser.add_argument("--runs", type=int, default=31, help="runs of each session per block")
    options = parser.parse_args()
    onnxruntime.set_default_logger_severity(4)
    logging.disable(logging.WARNING)
    bed = load_bed()
    names = entries(bed, options.entries)
    print(f"\n{machine()}, 1 thread\n")
    print(f"| model | {' | '.join(f'batch {batch}' for batch in BATCHES)} | kept | metric |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            print(row(bed, name, options.runs, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
