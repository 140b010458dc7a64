"""Convolutions' results handed out as ONNX Runtime computes them, in blocks of channels.

ONNX Runtime runs convolutions on tensors whose channels lie in blocks of 8 or 16, the innermost axis of memory, and rearranges each
that leaves the graph (ReorderOutput), which takes as long as many a convolution. Who counts values needs no order of them. So the
model is loaded once as ONNX Runtime has optimized it for this machine, without the rearrangements that only a handed-out tensor
needs. Samples stay apart: their axis is the outermost one either way.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    import onnx

# The operator that rearranges, and how it names the number of channels.
REORDER, CHANNELS = "ReorderOutput", "channels"
# The largest blocks there are. What has a multiple of so many channels is not filled up with zeros on any machine.
BLOCK = 16
# The most bytes of a model that is written and read once more for it.
LARGEST = 1 << 28


def in_blocks(model: bytes, unordered: Collection[str], optimize: Callable[[Path], None]) -> bytes | None:
    """Return a model as ONNX Runtime optimized it, that hands out some tensors in its order of their elements.

    Args:
        model: The model's bytes.
        unordered: The outputs of which only the values matter.
        optimize: Writes the optimized model into a file.

    Returns:
        The bytes, for a session that does not optimize them; None where nothing would be gained, or no file can be written.
    """
    if not unordered or len(model) > LARGEST or b"Conv" not in model:
        return None
    import onnx

    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            file = Path(folder) / "optimized.onnx"
            optimize(file)
            optimized = onnx.load(file)
    except (OSError, RunError):
        return None
    return bytes(optimized.SerializeToString()) if cut(optimized.graph, unordered) else None


def cut(graph: onnx.GraphProto, unordered: Collection[str]) -> int:
    """Take away what only rearranges a handed-out tensor; return how many there were."""
    handed_out = {value.name for value in graph.output} & set(unordered)
    read = {name for node in graph.node for name in node.input}
    renamed: dict[str, str] = {}
    kept = []
    for node in graph.node:
        if node.op_type == REORDER and node.output[0] in handed_out - read and node.input[0] not in renamed:
            channels = next((attribute.i for attribute in node.attribute if attribute.name == CHANNELS), 1)
            if channels % BLOCK == 0:
                renamed[node.input[0]] = node.output[0]
                continue
        kept.append(node)
    if not renamed:
        return 0
    for node in kept:
        for names in (node.input, node.output):
            names[:] = [renamed.get(name, name) for name in names]
    left = [value for value in graph.value_info if value.name not in renamed]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(kept)
    graph.value_info.extend(left)
    return len(renamed)
