"""How far integers alone reach: what floats are in the way, and where a model could end before them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quantcli.errors import EmbeddedError
from quantcli.integer.executor import is_fence
from quantcli.island import captured

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    from quantcli.integer.executor import Executor
    from quantcli.sidecar import LayerEntry

# Results of these depend on the shape of their operand alone.
OF_SHAPES = frozenset({"Shape", "Size"})


@dataclass(eq=False)
class Reach:
    """What integers reach in a model.

    Args:
        executor: The model and its sidecar.
        inputs: The names of its inputs.

    Attributes:
        moving: What follows from the inputs' values; shapes do not.
        reasons: What integers alone do not give, with the operator that is in the way, and why it is.
    """

    executor: Executor
    inputs: set[str]
    moving: set[str] = field(default_factory=set)
    reasons: dict[str, tuple[ir.Node, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sidecar = self.executor.sidecar
        self.moving |= {str(value.name) for value in self.executor.model.graph.inputs} & self.inputs
        self.walk()

    def walk(self) -> None:
        """Go through the operators in order, and note what follows from the inputs, and what is in the way."""
        reasons, moving = self.reasons, self.moving
        floats = {entry.name: entry.reason for entry in self.sidecar.float_layers}
        for node in self.executor.order:
            entry = self.executor.entries.get(str(node.name))
            made = [str(value.name) for value in node.outputs]
            read = [str(value.name) for value in (*node.inputs, *captured(node)) if value is not None]
            follows = [self.executor.by_real.get(name, name) for name in read]
            if entry is not None:
                if any(name in moving for name in (*follows, *entry.inputs)):
                    moving.update(made, entry.outputs)
                blocker = next((reasons[name] for name in entry.inputs if name in reasons), None)
                if blocker is None and entry.accumulator_scale is not None:
                    blocker = node, "its output stays real"
                if blocker is None and any(name in moving for name in self.data_operands(node, entry)):
                    blocker = node, "where it reads follows from the data"
            else:
                if node.op_type in OF_SHAPES or not any(name in moving for name in follows):
                    continue
                moving.update(made)
                blocker = next((reasons[name] for name in follows if name in reasons), None)
                if is_fence(node):
                    blocker = blocker or (node, "what it leads to stays float")
                blocker = blocker or (node, floats.get(str(node.name), "it stays float"))
            if blocker is not None:
                reasons.update(dict.fromkeys([*made, *(entry.outputs if entry is not None else [])], blocker))

    def data_operands(self, node: ir.Node, entry: LayerEntry) -> list[str]:
        """Return a layer's operands that have no parameters: shapes, axes, indices."""
        names = [str(value.name) for value in node.inputs if value is not None]
        quantized = {self.sidecar.tensors[name].reals for name in entry.inputs} | set(entry.inputs)
        return [name for name in names if name not in quantized]

    def blocked(self, name: str) -> bool:
        """Tell whether a tensor is out of reach."""
        return name in self.reasons or self.sidecar.tensors[name].reals in self.reasons

    def check(self, wanted: Sequence[str]) -> None:
        """Check that outputs are in reach.

        Raises:
            EmbeddedError: If one is not, with the nearest way round.
        """
        name = next((name for name in wanted if name not in self.sidecar.tensors or self.blocked(name)), None)
        if name is None:
            return
        if name in self.reasons:
            node, why = self.reasons[name]
            what = f"C source is integers alone, and {node.op_type} '{node.name}' stays float ({why}){self.without_rules(node)}"
        else:
            what = f"C source is integers alone, and nothing computes '{name}' in integers"
        edge = self.edge()
        ends = " ".join(f"--end-at '{end}'" for end in edge)
        raise EmbeddedError(
            what, f"end before it, and leave it to the caller: {ends}" if edge else "use another format"
        )

    def without_rules(self, named: ir.Node) -> str:
        """Return the operators that no rule knows, beside the one that is named: they are often why others stay float."""
        found = [
            entry
            for entry in self.sidecar.float_layers
            if entry.reason.startswith("no rule") and entry.name != named.name
        ]
        operators = ", ".join(dict.fromkeys(entry.operator for entry in found))
        return f"; so do {operators}: there is no rule for them" if operators else ""

    def edge(self) -> list[str]:
        """Return the last integer tensors in reach: those that something out of reach reads, and outputs."""
        found: dict[str, None] = {}
        reach = {
            name
            for entry in self.sidecar.layers
            for name in entry.outputs
            if name in self.moving and name in self.sidecar.tensors and not self.blocked(name)
        }
        for node in self.executor.order:
            entry = self.executor.entries.get(str(node.name))
            read = (
                entry.inputs
                if entry is not None
                else [self.executor.by_real.get(str(v.name), "") for v in node.inputs if v is not None]
            )
            if any(str(value.name) in self.reasons for value in node.outputs):
                found.update(dict.fromkeys(name for name in read if name in reach))
        outputs = [self.executor.by_real.get(str(v.name), "") for v in self.executor.model.graph.outputs]
        found.update(dict.fromkeys(name for name in outputs if name in reach))
        return list(found)

    def needed(self, wanted: Sequence[str]) -> list[ir.Node]:
        """Return the layers that lead to what is wanted, in order."""
        open_names, found = set(wanted), []
        for node in reversed(self.executor.order):
            entry = self.executor.entries.get(str(node.name))
            if entry is not None and open_names & set(entry.outputs):
                open_names.update(entry.inputs)
                found.append(node)
        return found[::-1]
