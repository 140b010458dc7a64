"""What a saved PyTorch model may do while it is loaded: become tensors and operators, and nothing else.

A pickle names Python functions and calls them. torch's loaders open pickles in more places than one expects, and read code in
others: an exported program (``.pt2``) holds pickled weights and sample inputs, sizes as expressions that sympy evaluates, guards
and names that become Python source, and targets that are looked up in torch by name; TorchScript holds code that can write files.
All of it is read here first, without being run, and a file that holds more than tensors and operators is refused. While a program
is loaded, unpickling may not find a single function besides (``pickle.find_class``, PEP 578).
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import json
import os
import re
import sys
import threading
import zipfile
from typing import TYPE_CHECKING, Any

from quantcli.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

REMEDY = (
    "--trust-pickle loads it all the same, which runs whatever code it holds, with your rights: "
    "only for files that you made or trust"
)

# What sizes and guards are made of (torch._export.serde, torch.fx.experimental.symbolic_shapes), as names of calls.
SIZE_FUNCTIONS = frozenset(
    {
        "Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Max", "Min", "Mod", "Abs", "floor", "ceiling",
        "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "Equality", "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan",
        "GreaterThan", "And", "Or", "Not", "Piecewise", "ExprCondPair", "Tuple", "FloorDiv", "PythonMod",
        "ModularIndexing", "Where", "CeilDiv", "CleanDiv", "FloorToInt", "CeilToInt", "TruncToInt", "TruncToFloat",
        "RoundToInt", "RoundDecimal", "ToFloat", "IntTrueDiv", "FloatTrueDiv", "FloatPow", "PowByNatural", "LShift",
        "RShift", "BitwiseFn_bitwise_and", "BitwiseFn_bitwise_or", "OpaqueUnaryFn_sqrt", "Identity",
        "IsNonOverlappingAndDenseIndicator", "sqrt", "size", "stride", "storage_offset", "numel", "dim", "max", "min",
        "abs", "int", "float", "bool", "round", "ceil", "trunc", "pow", "exp", "log", "sym_max", "sym_min", "sym_int",
        "sym_float", "sym_not", "sym_ite", "sym_sqrt", "cast_symbool_to_symint_guardless",
    }
)  # fmt: skip
SIZE_NODES = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Call, ast.Name, ast.Constant, ast.Load, ast.Subscript,
    ast.Attribute, ast.keyword, ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.Tuple, ast.IfExp,
)  # fmt: skip
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")
# Operators that reach outside their operands.
REACHING = frozenset({"from_file", "save", "load", "load_library", "_print", "fromfile"})
BITWISE = re.compile(r"torch\.ops\.aten\.__i?(and|or|xor|lshift|rshift)__\.\w+")
TARGET = re.compile(
    r"torch\.ops\.\w+\.\w+(\.\w+)?|_operator\.(?!methodcaller|attrgetter|call)\w+|math\.\w+|torch\.sym_\w+"
)
CODE = re.compile(r"\b(?:torch|aten|prim|inductor)\.(?:save|load|from_file|fromfile)\s*\(|\b__setstate__\b")
# The module of a class in a specification of inputs or outputs, which is JSON within JSON.
STRUCTURE = re.compile(r'\\"type\\":\s*\\"([A-Za-z_][\w.]*)\.\w+\\"')
TYPES = frozenset(
    {"builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict", "collections.namedtuple"}
)


def refused(path: Path, what: str) -> ModelError:
    """Return the error for a file that is more than a model."""
    return ModelError(f"{path} {what}", REMEDY)


def members(path: Path) -> dict[str, zipfile.ZipInfo]:
    """Return an archive's members, by name without the folder that they all stand in.

    Raises:
        ModelError: If two have one name: readers would differ in which they take.
        zipfile.BadZipFile: If the file is no archive.
    """
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
    if len({info.filename for info in infos}) < len(infos):
        raise ModelError(f"{path} holds two members of one name", "save it again")
    tops = {info.filename.partition("/")[0] for info in infos}
    cut = len(next(iter(tops))) + 1 if len(tops) == 1 and all("/" in info.filename for info in infos) else 0
    return {info.filename[cut:]: info for info in infos}


# ---- exported programs ---------------------------------------------------------------------------------------------------------


def check_program(path: Path) -> None:
    """Check that an exported program holds tensors and operators alone.

    Raises:
        ModelError: If it holds anything that runs while it is loaded.
        zipfile.BadZipFile, ValueError: If the file is no archive of one.
    """
    found = members(path)
    for name in found:
        if "aotinductor" in name or name.endswith((".so", ".dll", ".dylib", ".pyd")):
            raise refused(path, f"holds compiled code ({name})")
        if "custom_obj" in name or "opaque_obj" in name:
            raise refused(path, f"holds a pickled object ({name})")
    with zipfile.ZipFile(path) as archive:
        for name, info in found.items():
            if name.endswith(".json") and (name.startswith("models/") or "exported_program" in name):
                check_graph(path, json.loads(archive.read(info)))


def check_graph(path: Path, document: Any, key: str = "") -> None:
    """Check every text of a program's graph that its loader looks up, evaluates or writes into Python source."""
    if isinstance(document, dict):
        for name, value in document.items():
            check_graph(path, value, str(name))
        if key == "range_constraints":
            for name in document:
                check_size(path, name)
    elif isinstance(document, list):
        for value in document:
            check_graph(path, value, key)
    elif isinstance(document, str):
        check_text(path, key, document)


def check_text(path: Path, key: str, text: str) -> None:
    """Check one text, by the name of the field that it stands in."""
    if key == "target":
        check_target(path, text)
    elif key in {"expr_str", "guards_code"}:
        check_size(path, text)
    elif key in {"name", "as_name", "forward_arg_names", "input_name"} and text and not NAME.fullmatch(text):
        raise refused(path, f"holds the name {text!r}, which is none")
    elif key in {"in_spec", "out_spec"}:
        check_structure(path, text)


def check_target(path: Path, target: str) -> None:
    """Check what a node of a graph calls."""
    parts = target.split(".")
    private = any(part.startswith("__") for part in parts) and not BITWISE.fullmatch(target)
    if private or not TARGET.fullmatch(target) or any(part in REACHING for part in parts):
        raise refused(path, f"calls {target!r}, which is no operator")


def check_size(path: Path, text: str) -> None:
    """Check an expression over sizes."""
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise refused(path, f"holds the size {text[:60]!r}, which is no expression") from error
    for node in nodes:
        known = isinstance(node, SIZE_NODES)
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            known = called in SIZE_FUNCTIONS
        elif isinstance(node, ast.Attribute):
            known = node.attr in SIZE_FUNCTIONS | {"shape"}
        elif isinstance(node, ast.Name):
            known = not node.id.startswith("__")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            known = NAME.fullmatch(node.value) is not None or node.value.isdecimal()
        if not known:
            raise refused(path, f"holds the size {text[:60]!r}, which is no arithmetic")


def check_structure(path: Path, text: str) -> None:
    """Check how inputs or outputs are nested: in the lists, tuples and dicts of Python alone."""
    waiting = [json.loads(text)] if text else []
    while waiting:
        entry = waiting.pop()
        if isinstance(entry, str) and entry[:1] in "[{":  # a context is JSON within JSON
            entry = json.loads(entry)
        if isinstance(entry, dict):
            if "__enum__" in entry or "default_factory_module" in entry or entry.get("type") not in {None, *TYPES}:
                raise refused(path, f"nests its inputs or outputs in {str(entry.get('type') or 'objects')[:60]!r}")
            waiting += entry.values()
        elif isinstance(entry, list):
            waiting += entry


def import_structures(path: Path) -> None:
    """Import the modules of the classes in which a trusted program nests its inputs or outputs: that registers them with torch.

    Raises:
        ModelError: If one cannot be imported.
        zipfile.BadZipFile: If the file is no archive.
    """
    with zipfile.ZipFile(path) as archive:
        texts = [archive.read(info).decode() for name, info in members(path).items() if name.endswith(".json")]
    named = {module for text in texts for module in STRUCTURE.findall(text)}
    for module in sorted(named - {name.rpartition(".")[0] for name in TYPES}):
        try:
            importlib.import_module(module)
        except Exception as error:
            what = f"{path} nests its inputs or outputs in a class of '{module}', which cannot be imported ({error})"
            raise ModelError(what, "install what defines it, or let the model take and give tensors") from error


# ---- TorchScript ---------------------------------------------------------------------------------------------------------------


def is_script(path: Path) -> bool:
    """Tell whether a file is TorchScript."""
    try:
        found = members(path)
    except (zipfile.BadZipFile, OSError):
        return False
    return "constants.pkl" in found and any(name.startswith("code/") for name in found)


def check_script(path: Path) -> None:
    """Check that TorchScript runs nothing while it is loaded, and touches no file while it runs.

    Raises:
        ModelError: If its code does.
    """
    with zipfile.ZipFile(path) as archive:
        for name, info in members(path).items():
            if name.startswith("code/") and name.endswith(".py"):
                found = CODE.search(archive.read(info).decode("utf-8", "replace"))
                if found:
                    raise refused(path, f"holds code that reaches outside the model ({found[0].strip('(')} in {name})")


# ---- while a file is loaded ----------------------------------------------------------------------------------------------------


class Unpickling:
    """Whether the present thread may look functions up for a pickle."""

    def __init__(self) -> None:
        self.state = threading.local()
        self.hooked = False

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Refuse what a pickle looks up, where that is forbidden."""
        if event == "pickle.find_class" and getattr(self.state, "forbidden", False):
            module, name = arguments[:2]
            raise ModelError(f"a pickle in it asks for {module}.{name}", REMEDY)

    @contextlib.contextmanager
    def forbidden(self) -> Iterator[None]:
        """Forbid it: torch then loads tensors with its own, restricted unpickler, or not at all."""
        if not self.hooked:
            sys.addaudithook(self.hook)
            self.hooked = True
        forced, unforced = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
        kept = {name: os.environ.pop(name, None) for name in (forced, unforced)}
        os.environ[forced] = "1"
        self.state.forbidden = True
        try:
            yield
        finally:
            self.state.forbidden = False
            del os.environ[forced]
            os.environ.update({name: value for name, value in kept.items() if value is not None})


UNPICKLING = Unpickling()
