"""Whether a program was exported in training mode: its outputs are random then, or depend on their batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantcli.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path

# What operators call the flag that says so.
FLAGS = ("train", "training", "use_input_stats")


def check_evaluating(program: Any, path: Path) -> None:
    """Check that no operator of an exported program is in training mode.

    Raises:
        ModelError: If one is.
    """
    for module in program.graph_module.modules():
        for node in module.graph.nodes if hasattr(module, "graph") else ():
            if node.op == "call_function" and is_training(arguments_of(node)):
                raise ModelError(
                    f"{path} is in training mode: the operator {node.target} ('{node.name}') is active",
                    "call model.eval() before torch.export.export, and give F.dropout training=self.training",
                )


def arguments_of(node: Any) -> dict[str, Any]:
    """Return what an operator is called with, by the names of its schema; empty of one that has none."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {}
    names = [argument.name for argument in schema.arguments]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def is_training(arguments: dict[str, Any]) -> bool:
    """Tell whether an operator that is called so does what it does in training only."""
    if not any(arguments.get(flag) is True for flag in FLAGS):
        return bool(arguments.get("dropout_p", 0.0) != 0.0)
    if "momentum" in arguments:
        # Without running statistics, a normalization takes those of its input in evaluation, too.
        return arguments.get("running_mean") is not None
    return all(arguments.get(chance) != 0.0 for chance in ("p", "dropout"))
