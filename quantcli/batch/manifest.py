"""The manifest of a zoo: which models, with which recipes, on which data, and what they have to reach."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import math
import re
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from calibration.errors import ReportedError
from quantcli.errors import RecipeError, UsageError
from quantcli.evaluation.metrics import METRICS
from quantcli.evaluation.verdict import Thresholds, check_thresholds
from quantcli.recipe import Recipe, read_recipe, resolve_target

if TYPE_CHECKING:
    from collections.abc import Sequence

Number = Annotated[float, msgspec.Meta(ge=0)]
FORMATS = ("qdq", "qoperator", "c", "c-params")
OUTPUTS = ("onnx", "pt2")
# What a wish is where none is made: written out, it changes no key.
DEFAULTS = {
    "format": "qdq",
    "output": "onnx",
    "end_at": (),
    **dict.fromkeys(("trust_pickle", "strict", "verify", "report"), False),
}
# What outputs depend on besides their inputs.
PACKAGES = ("quantcli", "numpy", "onnx", "onnxruntime", "onnx-ir", "onnxscript", "torch")
SIZES = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Wishes(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is wished for a model; None leaves it to the defaults of the zoo.

    Attributes:
        data: Calibration data.
        labels: A CSV that names the image files.
        split: Keep only those of its rows, to calibrate.
        evaluate: Evaluation data; the calibration data where there is none.
        evaluate_split: Keep only those rows, to evaluate.
        samples: How many samples are evaluated; all by default.
        recipe: A recipe file that the recipes are laid over.
        metric: ``top1``, ``sqnr``, …, or ``module:function``.
        max_drop, min_metric, min_speedup: What has to be reached.
        timeout: Seconds that an entry may take; 0 for no limit.
        memory: Memory that it may take: ``4GB``; ``0`` for no limit.
        format: ``qdq``, ``qoperator``, ``c`` or ``c-params``.
        end_at: Integer tensors at which C source ends.
        output: ``onnx`` or ``pt2``.
        factory: What builds the module of a state dict.
        trust_pickle: Whether the file may run what code it holds.
        strict, verify: As `quantcli.convert` has them.
        report: Whether a page about each converted model is written (``report.html``), and its numbers into the results.
        shards: On a cluster, into how many tasks its calibration is cut; the bytes are the same.
    """

    data: str | None = None
    labels: str | None = None
    split: str | None = None
    evaluate: str | None = None
    evaluate_split: str | None = None
    samples: Annotated[int, msgspec.Meta(ge=1)] | None = None
    recipe: str | None = None
    metric: str | None = None
    max_drop: float | None = None
    min_metric: float | None = None
    min_speedup: Number | None = None
    timeout: Number | None = None
    memory: str | None = None
    format: str | None = None
    end_at: tuple[str, ...] | None = None
    output: str | None = None
    factory: str | None = None
    trust_pickle: bool | None = None
    strict: bool | None = None
    verify: bool | None = None
    report: bool | None = None
    shards: Annotated[int, msgspec.Meta(ge=1)] | None = None


class Model(Wishes, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One model, or those that a pattern finds.

    Attributes:
        path: A file, or a pattern (``models/*.onnx``).
        name: Its name in reports; the file's by default.
        recipes: Which of the zoo's recipes; all by default.
    """

    path: str
    name: str | None = None
    recipes: tuple[str, ...] | None = None


class Zoo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A manifest as it is written."""

    models: tuple[Model, ...]
    defaults: Wishes = Wishes()
    recipes: dict[str, dict[str, Any]] = {}


class Entry(msgspec.Struct, frozen=True):
    """One model with one recipe, whole.

    Attributes:
        name: ``model/recipe``.
        path: The model.
        recipe: The recipe.
        wishes: Everything else; paths are absolute.
        folder: The manifest's folder: where functions are imported from.
        timeout: Seconds; 0 for no limit.
        memory: Bytes; 0 for no limit.
        shard: Only calibrate, and only this part of the samples: (i, n).
        statistics: Where its calibration stands, if it was done already.
    """

    name: str
    path: str
    recipe: Recipe
    wishes: Wishes
    folder: str = "."
    timeout: float = 0.0
    memory: int = 0
    shard: tuple[int, int] | None = None
    statistics: str | None = None

    def encoded(self) -> bytes:
        """Return the entry as JSON, from which `decoded` makes it again; paths may hold bytes that are no UTF-8."""
        return json.dumps(msgspec.to_builtins(self)).encode()

    @staticmethod
    def decoded(data: bytes) -> Entry:
        """Return the entry that was encoded."""
        return msgspec.convert(json.loads(data), Entry)

    def places(self) -> dict[str, Path]:
        """Return the files and folders that the entry reads, by what they are to it."""
        wishes = self.wishes
        factory = (wishes.factory or "").rpartition(":")[0]
        module = (wishes.metric or "").partition(":")[0] if ":" in (wishes.metric or "") else ""
        named = {
            "path": self.path,
            "data": wishes.data,
            "labels": wishes.labels,
            "evaluate": wishes.evaluate,
            "metric": self.source_of(module),
            "factory": factory if factory.endswith(".py") else self.source_of(factory),
            "target": self.recipe.target_file,
        }
        return {field: Path(place) for field, place in named.items() if place}

    def source_of(self, module: str) -> str | None:
        """Return the file of a module beside the manifest, or the folder of its package; None where there is none."""
        found = module_in(Path(self.folder), module) if module else None
        return str(found) if found else None

    def key(self, digests: dict[Path, str]) -> str:
        """Return what the entry's output and figures follow from, as a digest: contents, recipe, versions.

        Neither thresholds nor limits are part of it, nor where files stand; a default that is written out is none.

        Args:
            digests: Digests of files and folders that were read already; new ones are added.
        """
        contents = {}
        for field, path in self.places().items():
            if path not in digests:
                digests[path] = digest_at(path)
            contents[field] = digests[path]
        named = {"data", "labels", "evaluate", "recipe", "factory"}
        aside = {"max_drop", "min_metric", "min_speedup", "timeout", "memory", "shards"} | named
        wishes = {
            name: DEFAULTS.get(name) if getattr(self.wishes, name) is None else getattr(self.wishes, name)
            for name in Wishes.__struct_fields__
            if name not in aside
        }
        factory = (self.wishes.factory or "").rpartition(":")
        recipe = msgspec.to_builtins(self.recipe) | {"target": Path(self.recipe.target).name}
        timed = self.wishes.min_speedup is not None
        told = [contents, Path(self.path).name, Path(factory[0]).name, factory[2], recipe, wishes, versions(), timed]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def richer(self) -> list[Entry]:
        """Return the entries whose outcome holds this one's: those with a report, with measured latencies, or both."""
        asked = self.wishes
        return [
            msgspec.structs.replace(self, wishes=msgspec.structs.replace(asked, report=report, min_speedup=speedup))
            for report in {bool(asked.report), True}
            for speedup in {asked.min_speedup, asked.min_speedup or 0.0}
        ]


def versions() -> dict[str, str]:
    """Return the versions of what computes."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def digest_at(path: Path) -> str:
    """Return the sha256 of a file (and of a model's external data), or of a folder's files, with their names.

    A file's own name is left out, but for what tells its kind.
    """
    digest = hashlib.sha256()
    for file in files_of(path):
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name if file != path else file.suffix
        digest.update(name.encode(errors="surrogateescape") + b"\0")
        # What cannot be read is told by the entry that reads it.
        with contextlib.suppress(OSError), file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def module_in(folder: Path, module: str) -> Path | None:
    """Return the file of a module in a folder, or the folder of the package that it is of; None where there is none."""
    package = folder / module.partition(".")[0]
    file = package.with_name(f"{package.name}.py")
    if file.is_file() and not (package / "__init__.py").is_file():  # as Python chooses between the two
        return file
    return package if package.is_dir() else None


def with_imports(file: Path) -> list[Path]:
    """Return a module's file, and those of the modules beside it that it imports, and that they import."""
    found: list[Path] = []
    waiting = [file]
    while waiting:
        one = waiting.pop()
        if one in found:
            continue
        found.append(one)
        for name in imported_by(one):
            beside = module_in(file.parent, name)
            if beside is not None:
                waiting += beside.rglob("*.py") if beside.is_dir() else [beside]
    return [file, *sorted(found[1:])]


def imported_by(file: Path) -> set[str]:
    """Return the names of the modules that a file imports, wherever in it; none where it is no Python."""
    if file.suffix != ".py":
        return set()
    with contextlib.suppress(OSError, SyntaxError, ValueError):
        nodes = list(ast.walk(ast.parse(file.read_bytes())))
        plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        return plain | {
            node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level
        }
    return set()


def files_of(path: Path) -> list[Path]:
    """Return the files that a path stands for; none where there is nothing."""
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file() and file.parent.name != "__pycache__")
    if path.suffix == ".py" and path.is_file():
        return with_imports(path)
    if path.suffix == ".onnx":
        from quantcli.load.onnx import load_onnx

        with contextlib.suppress(ReportedError):  # what is no model is what it is
            return load_onnx(path)[1]
    return [path] if path.is_file() else []


def read_zoo(path: Path, made: Sequence[Path] = ()) -> list[Entry]:
    """Return the entries of a manifest: every model with every one of its recipes.

    Args:
        path: The manifest; paths in it are relative to its folder.
        made: The folders of what the batch makes, which no pattern finds.

    Raises:
        RecipeError: If it cannot be read, a pattern finds nothing, or two entries have one name.
    """
    try:
        zoo = msgspec.toml.decode(path.read_text("utf-8-sig"), type=Zoo)
    except (msgspec.DecodeError, OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not a manifest ({error})", "it is a TOML file: docs/batch.md") from error
    entries: list[Entry] = []
    for model in zoo.models:
        for file in found_at(path, model, made):
            names = model.recipes if model.recipes is not None else tuple(zoo.recipes) or ("default",)
            for recipe in names:
                if recipe not in zoo.recipes and (zoo.recipes or recipe != "default"):
                    raise RecipeError(
                        f"{path} has no recipe '{recipe}'", f"recipes: {', '.join(zoo.recipes) or 'none'}"
                    )
                entries.append(entry_of(path, zoo, model, file, recipe))
    if not entries:
        raise RecipeError(f"{path} names no model", "add [[models]] with a path")
    seen: set[str] = set()
    for entry in entries:
        if entry.name in seen:
            raise RecipeError(f"{path} has two entries '{entry.name}'", "give the models names")
        seen.add(entry.name)
    return entries


def found_at(manifest: Path, model: Model, made: Sequence[Path]) -> list[Path]:
    """Return the files of a model's path or pattern, without those that the batch itself has made.

    Raises:
        RecipeError: If a pattern finds nothing.
    """
    folder = manifest.resolve().parent
    if not any(sign in model.path for sign in "*?["):
        return [folder / model.path]
    if Path(model.path).is_absolute():
        top, pattern = Path(Path(model.path).anchor), str(Path(model.path).relative_to(Path(model.path).anchor))
    else:
        top, pattern = folder, model.path
    ours = [place.resolve() for place in made]
    files = sorted(
        file for file in top.glob(pattern) if file.is_file() and not any(map(file.resolve().is_relative_to, ours))
    )
    if not files:
        raise RecipeError(f"{manifest}: '{model.path}' finds no file", "patterns are those of a shell")
    if model.name is not None and len(files) > 1:
        raise RecipeError(
            f"{manifest}: '{model.path}' finds {len(files)} files for the one name '{model.name}'", "leave it out"
        )
    return files


def entry_of(manifest: Path, zoo: Zoo, model: Model, file: Path, recipe: str) -> Entry:
    """Return one entry: the model's wishes over the zoo's, and its recipe over the recipe file.

    Raises:
        RecipeError: If a name, a size or the recipe cannot be used.
    """
    folder = manifest.resolve().parent
    stem = model.name or file.stem
    name = f"{stem}/{recipe}"
    if not re.fullmatch(r"[\w][\w .+-]*", stem) or not re.fullmatch(r"[\w][\w .+-]*", recipe):
        raise RecipeError(f"{manifest}: '{name}' is no name of an entry", "use letters, digits, and . _ + -")
    wishes = wishes_of(folder, zoo, model)
    try:
        check_wishes(wishes)
        whole = recipe_of(folder, zoo, wishes, recipe)
        memory = bytes_in(wishes.memory)
    except UsageError as error:
        raise RecipeError(f"{manifest}: {name}: {error.what}", error.remedy) from error
    return Entry(name, str(file), whole, wishes, str(folder), wishes.timeout or 0.0, memory)


def wishes_of(folder: Path, zoo: Zoo, model: Model) -> Wishes:
    """Return a model's wishes over the zoo's, with paths from the manifest's folder."""
    given = {field: getattr(model, field) for field in Wishes.__struct_fields__}
    merged = {name: getattr(zoo.defaults, name) if value is None else value for name, value in given.items()}
    for name in ("data", "labels", "evaluate", "recipe"):
        if merged[name] is not None:
            merged[name] = str(folder / merged[name])
    if merged["factory"] and merged["factory"].rpartition(":")[0].endswith(".py"):
        merged["factory"] = str(folder / merged["factory"])
    return Wishes(**merged)


def check_wishes(wishes: Wishes) -> None:
    """Raise UsageError where a wish names what there is not, or has no meaning."""
    for name in ("max_drop", "min_metric", "min_speedup", "timeout"):
        value = getattr(wishes, name)
        if value is not None and not math.isfinite(value):
            raise UsageError(f"{name} is {value}", "give a number, or leave it out")
    for name, known in (("metric", METRICS), ("format", FORMATS), ("output", OUTPUTS)):
        value = getattr(wishes, name)
        if value is not None and value not in known and not (name == "metric" and ":" in value):
            more = ", or module:function" if name == "metric" else ""
            raise UsageError(f"there is no {name} '{value}'", f"known: {', '.join(known)}{more}")
    if wishes.metric is not None:
        check_thresholds(wishes.metric, Thresholds(wishes.max_drop, wishes.min_metric, wishes.min_speedup))


def recipe_of(folder: Path, zoo: Zoo, wishes: Wishes, name: str) -> Recipe:
    """Return a recipe of the zoo over the recipe file, after looking at its target.

    Raises:
        RecipeError: If one of them, or the target, cannot be used.
    """
    file = Path(wishes.recipe) if wishes.recipe else None
    whole = read_recipe(file)
    if name in zoo.recipes:
        whole = read_recipe(file, zoo.recipes[name], f"[recipes.{name}]")
    if whole.target_file is not None:
        whole = msgspec.structs.replace(whole, target=str(folder / whole.target))
    resolve_target(whole)
    return whole


def bytes_in(text: str | None) -> int:
    """Return a size such as ``4GB`` in bytes; 0 for none.

    Raises:
        RecipeError: If it is none.
    """
    if text is None:
        return 0
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B?)\s*", text.upper())
    unit = match[2] if match else ""
    unit = unit if unit.endswith("B") or not unit else f"{unit}B"
    if match is None or (unit not in SIZES and unit != "B"):
        raise RecipeError(f"'{text}' is no size", "write 4GB or 512MiB")
    return int(float(match[1]) * SIZES.get(unit, 1))
