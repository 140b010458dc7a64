"""The manifest of a zoo: which models, with which recipes, on which data, and what they have to reach."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from quantcli.batch.entry import Entry, Wishes
from quantcli.errors import RecipeError, UsageError
from quantcli.evaluation.metrics import METRICS
from quantcli.evaluation.verdict import Thresholds, check_thresholds
from quantcli.recipe import Recipe, read_recipe, resolve_target

if TYPE_CHECKING:
    from collections.abc import Sequence

FORMATS = ("qdq", "qoperator", "c", "c-params")
OUTPUTS = ("onnx", "pt2")
SIZES = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


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
