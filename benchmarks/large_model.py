"""A generated model above 2 GB with external data: does it convert, and in how much memory?

python -m benchmarks.large_model [--gigabytes 2.5] [--mode static] [--exclude PATTERN …]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper

WIDTH = 4096
LAYER = WIDTH * WIDTH * 4


def generate(path: Path, gigabytes: float) -> int:
    """Write a chain of products, its weights in one file beside it, and return the bytes of both."""
    layers = max(1, round(gigabytes * 1e9 / LAYER))
    data = path.with_name(f"{path.name}.data")
    generator = np.random.default_rng(0)
    nodes, tensors, before = [], [], "x"
    with data.open("wb") as stream:
        for number in range(layers):
            weight = generator.standard_normal((WIDTH, WIDTH), dtype=np.float32) / np.float32(np.sqrt(WIDTH))
            tensor = TensorProto(name=f"w{number}", dims=weight.shape, data_type=TensorProto.FLOAT)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", data.name), ("offset", str(stream.tell())), ("length", str(LAYER))):
                tensor.external_data.add(key=key, value=value)
            stream.write(weight.tobytes())
            tensors.append(tensor)
            nodes.append(helper.make_node("MatMul", [before, f"w{number}"], [f"p{number}"], name=f"product{number}"))
            nodes.append(helper.make_node("Relu", [f"p{number}"], [f"r{number}"], name=f"relu{number}"))
            before = f"r{number}"
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", WIDTH])],
        [helper.make_tensor_value_info(before, TensorProto.FLOAT, ["N", WIDTH])],
        tensors,
    )
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    )
    return path.stat().st_size + data.stat().st_size


def main() -> int:
    """Generate, convert in a process of its own, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.5)
    parser.add_argument("--mode", choices=["static", "weights", "dynamic"], default="static")
    parser.add_argument(
        "--exclude", nargs="*", default=[], help="layers that stay float: 'product*' writes as much as is read"
    )
    parser.add_argument("--folder", type=Path, help="where to keep the model; else it is removed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        path = Path(place) / "large.onnx"
        size = generate(path, options.gigabytes)
        data = ["--synthetic", "4"] if options.mode == "static" else ["--mode", options.mode]
        data += [argument for pattern in options.exclude for argument in ("--exclude", pattern)]
        command = [sys.executable, "-m", "quantcli", "convert", str(path), *data, "-o", f"{place}/q.onnx", "--json"]
        start = time.perf_counter()
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(Path.cwd())}
        )
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        if done.returncode:
            print(done.stderr[-2000:])
            return 1
        document = json.loads(done.stdout)
    layers, sqnr = document["integer_layers"], document["self_check"]["sqnr_db"]
    print(
        f"a model of {size / 1e9:.2f} GB: {document['bytes'] / 1e9:.2f} GB quantized, {layers} integer layers, SQNR {sqnr}"
    )
    print(f"peak memory {peak / 1e9:.2f} GB, {peak / size:.2f} times the model; {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
