"""A zoo of the bed: verdicts, second runs, kills, more machines, and what the scheduler costs.

QUANTCLI_BED=… python -m benchmarks.batch [--steps verdicts,again,kill,throughput,cluster,overhead] [--simulated 10000]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

if __package__ in {None, ""}:  # run as a file: its folder stands on the path in the project's place
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.bed import as_feeds, bed_folder, load_bed, machine
from quantcli.batch.cluster import ray_engine
from quantcli.batch.entry import Entry, Wishes
from quantcli.batch.local import Ended, run_local
from quantcli.batch.manifest import read_zoo
from quantcli.batch.run import Outcome, document, run_batch
from quantcli.recipe import Recipe

MODELS = [
    "lenet_mnist",
    "dscnn_kws",
    "resnet8_ic",
    "resnet20_cifar10",
    "facedet_rfb320",
    "lstm_rows_mnist",
    "gru_rows_mnist",
]
METRICS = """
import time

def never(outputs, labels):
    time.sleep(10000)

def hog(outputs, labels):
    held = [bytearray(50_000_000) for _ in range(100)]
    return float(sum(map(len, held)))
"""
HEAD = """
[defaults]
timeout = 300
memory = "6GB"

[recipes.w8]
[recipes.w8-per-tensor]
weight = {per_channel = false}
[recipes.w4]
weight = {bits = 4}
"""
FAILING = """
[[models]]
name = "corrupt"
path = "corrupt.onnx"
data = "dscnn_kws.npz"
recipes = ["w8"]

[[models]]
name = "never"
path = "models/dscnn_kws.onnx"
data = "dscnn_kws.npz"
metric = "mine:never"
timeout = 10
recipes = ["w8"]

[[models]]
name = "hog"
path = "models/dscnn_kws.onnx"
data = "dscnn_kws.npz"
metric = "mine:hog"
memory = "1GB"
recipes = ["w8"]

[[models]]
name = "demanding"
path = "models/dscnn_kws.onnx"
data = "dscnn_kws.npz"
evaluate = "dscnn_kws.eval.npz"
metric = "top1"
min_metric = 99.9
recipes = ["w8"]
"""


def lay_out(folder: Path) -> Path:
    """Write the zoo and its data, and return the manifest."""
    bed = load_bed()
    (folder / "models").mkdir(parents=True)
    (folder / "mine.py").write_text(METRICS)
    (folder / "corrupt.onnx").write_text("no model")
    text = HEAD
    for name in MODELS:
        shutil.copy(bed_folder() / "models" / f"{name}.onnx", folder / "models")
        given = "x"
        for split, end in (("calib", ""), ("eval", ".eval")):
            x, labels = bed.inputs(name, split)
            arrays = {key: values[:500] for key, values in as_feeds(x, given).items()}
            if labels is not None and bed.BED[name]["metric"] == "top1":
                arrays["labels"] = np.asarray(labels[:500])
            np.savez(folder / f"{name}{end}.npz", **arrays)  # type: ignore[arg-type]
        metric = "top1" if bed.BED[name]["metric"] == "top1" else "sqnr"
        limit = "max_drop = 20.0" if metric == "top1" else "min_metric = 10.0"
        text += f'\n[[models]]\npath = "models/{name}.onnx"\ndata = "{name}.npz"\nevaluate = "{name}.eval.npz"\n'
        text += f'metric = "{metric}"\n{limit}\n'
    (folder / "zoo.toml").write_text(text + FAILING)
    return folder / "zoo.toml"


def quietly(outcome: Outcome, done: int, total: int) -> None:
    """Say what became of an entry on standard error."""
    print(f"  [{done}/{total}] {outcome.entry.name}: {outcome.status}", file=sys.stderr)


def contents(output: Path) -> dict[str, bytes]:
    """Return every converted model and sidecar."""
    return {str(file.relative_to(output)): file.read_bytes() for file in sorted((output / "entries").rglob("model.*"))}


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """Return how many seconds an action takes, and what it gives."""
    began = time.perf_counter()
    found = action()
    return time.perf_counter() - began, found


def verdicts(zoo: Path, output: Path) -> list[Outcome]:
    """Run the whole zoo, and print what failed."""
    seconds, outcomes = timed(lambda: run_batch(read_zoo(zoo), output, 2, told=quietly))
    print(f"verdicts: {len(outcomes)} entries in {seconds:.0f} s, {document(outcomes)['summary']}")
    for outcome in outcomes:
        if outcome.status != "met":
            print(f"  {outcome.entry.name}: {outcome.status}: {outcome.reason}")
    return list(outcomes)


def again(zoo: Path, output: Path) -> None:
    """Run it again, and again with one line of a recipe changed."""
    seconds, outcomes = timed(lambda: run_batch(read_zoo(zoo), output, 2))
    print(f"second run: {sum(not o.cached for o in outcomes)} entries run, {seconds:.2f} s")
    changed = zoo.with_name("changed.toml")
    changed.write_text(zoo.read_text().replace("weight = {bits = 4}", "weight = {bits = 5}"))
    copy = output.with_name("changed")
    shutil.copytree(output, copy)
    outcomes = run_batch(read_zoo(changed), copy, 2, told=lambda *_: None)
    print(f"one recipe line changed: {sorted(o.entry.name for o in outcomes if not o.cached)}")


def kill(zoo: Path, output: Path, whole: bytes, times: int = 4) -> None:
    """Kill a batch at random moments, go on, and compare the results."""
    command = [sys.executable, "-m", "quantcli", "batch", str(zoo), "-o", str(output), "--jobs", "2", "-q"]
    drawn = random.Random(7)
    for number in range(times):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        time.sleep(drawn.uniform(4, 20))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kept = len(list(output.glob("entries/*/*/record.json")))
        print(f"kill {number + 1}: {kept} entries finished")
    subprocess.run([*command, "--resume"], stderr=subprocess.DEVNULL, check=False)
    print(f"results.json after kills equals the unbroken run's: {(output / 'results.json').read_bytes() == whole}")


def chosen(zoo: Path) -> list[Entry]:
    """Return the entries that are converted, without those that are there to fail."""
    failing = {"corrupt", "never", "hog", "demanding"}
    return [entry for entry in read_zoo(zoo) if entry.name.partition("/")[0] not in failing]


def throughput(zoo: Path, folder: Path) -> None:
    """Compare one job, two jobs and Ray on this machine."""
    entries = chosen(zoo)
    one, _ = timed(lambda: run_batch(entries, folder / "one", 1))
    two, _ = timed(lambda: run_batch(entries, folder / "two", 2))
    ray, _ = timed(lambda: run_batch(entries, folder / "ray", 2, engine=ray_engine(None)))
    print(
        f"throughput of {len(entries)} entries: 1 job {one:.1f} s, 2 jobs {two:.1f} s ({one / two:.2f} times), Ray {ray:.1f} s",
        end="",
    )
    print(f" ({two / ray:.2f} times 2 jobs', with its start)")
    print(f"bytes alike: {contents(folder / 'one') == contents(folder / 'two') == contents(folder / 'ray')}")


def cluster(zoo: Path, folder: Path) -> None:
    """Run on a cluster of three nodes, and take one away in the middle."""
    import ray
    from ray.cluster_utils import Cluster

    entries = chosen(zoo)
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    others = [nodes.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=nodes.address, log_to_driver=False)
    taken = threading.Event()

    def take(outcome: Outcome, done: int, total: int) -> None:
        quietly(outcome, done, total)
        if done == len(entries) // 3 and not taken.is_set():
            taken.set()
            threading.Thread(target=lambda: nodes.remove_node(others[0], allow_graceful=False)).start()

    seconds, outcomes = timed(
        lambda: run_batch(entries, folder / "cluster", 1, engine=ray_engine(nodes.address), told=take)
    )
    alive = sum(node["Alive"] for node in ray.nodes())
    ray.shutdown()
    nodes.shutdown()
    print(
        f"cluster: {len(outcomes)} entries in {seconds:.0f} s, {document(outcomes)['summary']}; {alive} of 3 nodes left"
    )
    if not (folder / "two").is_dir():
        run_batch(entries, folder / "two", 2)
    print(f"bytes as the local engine's: {contents(folder / 'cluster') == contents(folder / 'two')}")


def overhead(folder: Path, simulated: int) -> None:
    """Measure what the scheduler costs per entry, with entries that do nothing, and a Ray task that does nothing."""
    model = folder / "tiny.onnx"
    model.write_bytes(b"tiny")
    entries = [Entry(f"m{number}/r", str(model), Recipe(), Wishes()) for number in range(simulated)]

    def nothing(waiting: Any, workplace: Path, jobs: int, finished: Callable[[Entry, Ended, Path], None]) -> None:
        del jobs
        for entry in waiting:
            made = workplace / entry.name.replace("/", "@")
            made.mkdir()
            (made / "model.onnx").write_bytes(b"")
            finished(entry, Ended("done", "", {"output": "model.onnx", "bytes": 1, "float_bytes": 1}, 0.0), made)

    first, _ = timed(lambda: run_batch(entries, folder / "simulated", 1, engine=nothing))
    second, _ = timed(lambda: run_batch(entries, folder / "simulated", 1, engine=nothing))
    each = [1e3 * seconds / simulated for seconds in (first, second)]
    print(f"scheduler: {each[0]:.2f} ms per entry over {simulated}, {each[1]:.2f} ms where it is there already")
    few = [Entry(f"n{number}/r", str(folder / "none.onnx"), Recipe(), Wishes()) for number in range(12)]
    local, _ = timed(lambda: run_batch(few, folder / "few", 1, engine=run_local))
    ray, _ = timed(lambda: run_batch(few, folder / "few-ray", 1, engine=ray_engine(None, cpus=2.0)))
    import ray as module

    module.init(address="local", log_to_driver=False, include_dashboard=False)
    warm = ray_engine(None, cpus=2.0)
    run_batch(few[:2], folder / "few-warm", 1, engine=warm)
    steady, _ = timed(lambda: run_batch(few, folder / "few-steady", 1, engine=warm))
    module.shutdown()
    per = [1e3 * seconds / len(few) for seconds in (local, ray, steady)]
    print(
        f"an entry that fails at once: {per[0]:.0f} ms in a process here, {per[1]:.0f} ms with Ray and its start,",
        end="",
    )
    print(f" {per[2]:.0f} ms on a running cluster: {per[2] - per[0]:+.0f} ms per task")


def main(arguments: list[str] | None = None) -> None:
    """Run the steps, and print what they show."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", default="verdicts,again,kill,throughput,cluster,overhead")
    parser.add_argument("--simulated", type=int, default=10000)
    options = parser.parse_args(arguments)
    steps = options.steps.split(",")
    print(machine())
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        zoo = lay_out(folder / "zoo")
        if {"verdicts", "again", "kill"} & set(steps):
            verdicts(zoo, folder / "out")
        if "again" in steps:
            again(zoo, folder / "out")
        if "kill" in steps:
            command = [sys.executable, "-m", "quantcli", "batch", str(zoo), "-o", str(folder / "out"), "-q"]
            subprocess.run(command, stderr=subprocess.DEVNULL, check=False)
            whole = (folder / "out" / "results.json").read_bytes()
            print(json.loads(whole)["summary"])
            kill(zoo, folder / "killed", whole)
        if "throughput" in steps:
            throughput(zoo, folder)
        if "cluster" in steps:
            cluster(zoo, folder)
        if "overhead" in steps:
            overhead(folder, options.simulated)


if __name__ == "__main__":
    main()
