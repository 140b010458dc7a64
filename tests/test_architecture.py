"""The house's rules: which way imports run, which rooms there are, what is loaded when."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(file for package in ("quantcli", "calibration") for file in (ROOT / package).rglob("*.py"))

# A module may import from modules of its own line and of lines above it.
ORDER = [
    {"calibration.errors", "calibration.imports", "calibration.memory"},
    {"calibration.datasets"},
    {"calibration.hooks", "calibration.histogram", "calibration.lanes", "calibration.layout"},
    {"calibration.observers"},
    {"calibration.statistics", "calibration.together", "calibration.shortcut", "calibration.ranges"},
    {"calibration.collect"},
    {"calibration"},
    {"quantcli.errors"},
    {
        "quantcli.targets",
        "quantcli.recipe",
        "quantcli.files",
        "quantcli.progress",
        "quantcli.documents",
        "quantcli.tuning",
    },
    {"quantcli.arithmetic"},
    {
        "quantcli.load",
        "quantcli.torch.quantizers",
        "quantcli.torch.layers",
        "quantcli.torch.normalization",
        "quantcli.torch.given",
        "quantcli.torch.prepare",
        "quantcli.torch.floats",
        "quantcli.fold",
        "quantcli.canonical",
        "quantcli.written_out",
        "quantcli.transposes",
        "quantcli.factors",
        "quantcli.branches",
        "quantcli.recurrent",
        "quantcli.shapes",
        "quantcli.scores",
        "quantcli.joined",
        "quantcli.randomness",
        "quantcli.precision",
        "quantcli.probe",
        "quantcli.island",
    },
    {"quantcli.rules", "quantcli.integer_operators", "quantcli.cost"},
    {"quantcli.logarithms", "quantcli.divisors", "quantcli.bodies", "quantcli.bounds", "quantcli.beginning"},
    {"quantcli.placement", "quantcli.masks", "quantcli.suspicion"},
    {"quantcli.plan"},
    {"quantcli.tune", "quantcli.modes", "quantcli.steps"},
    {"quantcli.quantize"},
    {"quantcli.write"},
    {"quantcli.coherence"},
    {"quantcli.sidecar"},
    {"quantcli.integer"},
    {"quantcli.embedded"},
    {"quantcli.export"},
    {"quantcli.sources", "quantcli.known"},
    {"quantcli.observation", "quantcli.requantize"},
    {"quantcli.review", "quantcli.explain"},
    {"quantcli.evaluation"},
    {
        "quantcli.tune.candidates",
        "quantcli.tune.adaround",
        "quantcli.tune.room",
        "quantcli.tune.judge",
        "quantcli.tune.trying",
        "quantcli.tune.effort",
        "quantcli.tune.search",
        "quantcli.tune.data",
    },
    {"quantcli.decision", "quantcli.delivery", "quantcli.verification"},
    {"quantcli.pipeline"},
    {"quantcli.torch"},
    {"quantcli", "quantcli.demo"},
    {"quantcli.report.figures"},
    {"quantcli.report.charts"},
    {"quantcli.report"},
    {"quantcli.batch.entry"},
    {"quantcli.batch.manifest"},
    {"quantcli.batch.worker"},
    {"quantcli.batch.local"},
    {"quantcli.batch"},
    {"quantcli.cli", "quantcli.__main__"},
    {"quantcli.reference"},
]
HEAVY = {"torch", "onnxruntime", "ray"}
# Rooms for PyTorch alone; who enters them imports them where a torch model is handled.
TORCH_WRITERS = {
    f"quantcli.write.torch_{name}" for name in ("call", "functions", "layers", "moves", "operators", "pt2")
}
TORCH_ROOMS = {"quantcli.tune.adaround", "quantcli.torch"} | TORCH_WRITERS
DRAWERS = {"utils", "util", "common", "helpers", "helper", "base", "core", "manager", "misc"}


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def level(module: str) -> int:
    """Return the line of ORDER that a module stands on: the longest entry that it begins with."""
    found = [
        (len(entry), number)
        for number, line in enumerate(ORDER)
        for entry in line
        if (module + ".").startswith(entry + ".")
    ]
    assert found, f"{module} has no place in the order"
    return max(found)[1]


def imports(file: Path, at_top: bool) -> set[str]:
    """Return the modules that a file imports, outside TYPE_CHECKING; only those at its top level where asked."""
    tree = ast.parse(file.read_text())
    typing_only = {
        id(child)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for child in ast.walk(block)
    }
    nodes = tree.body if at_top else list(ast.walk(tree))
    found: set[str] = set()
    for entry in nodes:
        if id(entry) in typing_only:
            continue
        if isinstance(entry, ast.Import):
            found.update(alias.name for alias in entry.names)
        elif isinstance(entry, ast.ImportFrom) and entry.module:
            for alias in entry.names:
                dotted = f"{entry.module}.{alias.name}"
                place = ROOT / Path(*dotted.split("."))
                found.add(dotted if place.with_suffix(".py").exists() or place.is_dir() else entry.module)
    return found


@pytest.mark.parametrize("file", SOURCES, ids=module_name)
def test_imports_run_one_way(file: Path) -> None:
    module = module_name(file)
    for imported in imports(file, at_top=True):
        if imported.split(".")[0] in {"quantcli", "calibration"}:
            assert level(imported) <= level(module), f"{module} imports {imported}"


@pytest.mark.parametrize("file", SOURCES, ids=module_name)
def test_no_room_is_a_drawer_and_no_import_is_heavy_or_a_star(file: Path) -> None:
    assert not DRAWERS & set(module_name(file).split("."))
    heavy = HEAVY - {"torch"} if module_name(file).startswith(tuple(TORCH_ROOMS)) else HEAVY
    assert not heavy & {name.split(".")[0] for name in imports(file, at_top=True)}
    assert "import *" not in file.read_text()


def test_calibration_never_imports_quantcli() -> None:
    for file in (ROOT / "calibration").rglob("*.py"):
        assert not [name for name in imports(file, at_top=False) if name.startswith("quantcli")]


def test_arithmetic_knows_numpy_and_the_standard_library_alone() -> None:
    allowed = {"__future__", "typing", "dataclasses", "collections.abc", "math", "numpy", "numpy.typing"}
    for file in (ROOT / "quantcli" / "arithmetic").glob("*.py"):
        foreign = {name for name in imports(file, at_top=False) if not name.startswith("quantcli.arithmetic")}
        assert foreign <= allowed


def loaded_after(code: str) -> set[str]:
    """Run code in a fresh interpreter and return the top-level modules that it loaded."""
    probe = f"import sys\n{code}\nprint('\\n'.join(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd=ROOT)
    return {name.split(".")[0] for name in done.stderr.split()}


def test_help_loads_nothing_heavy() -> None:
    loaded = loaded_after(
        "from quantcli.cli import run\nassert run(['--help']) == 0\nassert run(['convert', '--help']) == 0"
    )
    assert not {"torch", "onnx", "onnxruntime", "onnx_ir", "onnxscript"} & loaded


def test_an_onnx_conversion_never_loads_torch(tmp_path: Path) -> None:
    from tests.graphs import data_for, residual_net

    model, data = residual_net(tmp_path / "m.onnx"), data_for(tmp_path / "d.npz")
    code = f"from quantcli import convert\nconvert({str(model)!r}, {str(tmp_path / 'q.onnx')!r}, data={str(data)!r})"
    loaded = loaded_after(code)
    assert "onnxruntime" in loaded
    assert "torch" not in loaded


def test_a_command_does_without_what_is_imported_late(tmp_path: Path) -> None:
    from tests.graphs import data_for, residual_net

    model, data = residual_net(tmp_path / "m.onnx"), data_for(tmp_path / "d.npz")
    command = ["-X", "importtime", "-m", "quantcli", "convert", str(model), "--data", str(data), "-o", "q.onnx", "-q"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True, cwd=tmp_path)
    loaded = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "onnx_ir._core" in loaded
    assert "sympy.core" not in loaded


def test_what_is_imported_late_works_as_ever() -> None:
    loaded = loaded_after(
        "from quantcli.lazily import import_late\n"
        "import_late()\n"
        "import_late()\n"
        "import onnx_ir\n"
        "assert not {'sympy.core', 'mpmath'} & set(sys.modules)\n"
        "assert str((onnx_ir.SymbolicDim('n') + 1) * 2) == '2*n + 2'\n"
        "import sympy.core.numbers\n"
        "assert sympy.Integer(2) + 1 == 3\n"
        "assert sum(type(finder).__name__ == 'LateFinder' for finder in sys.meta_path) == 1"
    )
    assert {"sympy", "mpmath"} <= loaded


def test_the_public_names() -> None:
    import quantcli

    assert quantcli.__all__ == sorted(quantcli.__all__)
    assert all(getattr(quantcli, name) is not None for name in quantcli.__all__)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = quantcli.nothing_like_it
