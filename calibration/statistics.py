"""Statistics: what calibration leaves behind, as a value and as a file (docs/statistics.md).

The file is a safetensors file. Its metadata has one key, ``quantcli``, with a JSON document; histograms and channels stand beside
it as arrays, and so do the first calibration samples, ``sample/<input name>``, so that a conversion can check its output without
the data set.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.errors import StatisticsError
from calibration.histogram import BINS, LARGEST_EXPONENT, SMALLEST_EXPONENT, Histogram
from calibration.observers import OBSERVERS, ChannelRanges, SampleRanges, TensorStatistics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

FORMAT, VERSION = "quantcli-statistics", 2
FIELDS = {"elements", "minimum", "maximum", "nan", "infinite", "samples", "histogram"}


@dataclass(frozen=True, order=True)
class Part:
    """Which samples of a data set were run: positions start to stop − 1 of the chosen ones.

    Attributes:
        data_sha256: The data set, before preprocessing.
        chosen: How many samples were chosen for the whole calibration.
        start: The first position that was run.
        stop: One behind the last.
    """

    data_sha256: str
    chosen: int
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Statistics:
    """What was seen of all asked tensors of a model over a data set.

    Attributes:
        model_sha256: The float model's file.
        data_sha256: The data set (arrays or image files), before preprocessing; of several, the digest over theirs.
        preprocess: How the data was preprocessed, as the recipe spells it.
        samples: How many samples were run.
        observer: The name of the observer.
        tensors: By tensor name.
        check_inputs: The first samples, by input name, for self-checks.
        selection: Which samples were chosen and how they were batched, as the recipe spells it.
        parts: Which of them were run, in order.
        synthetic: Whether they were made up.
        runtime: What ran the model.
        momentum: Of moving averages.
        unfinished: What a checkpoint needs besides; None in a finished file.
    """

    model_sha256: str
    data_sha256: str
    preprocess: dict[str, Any]
    samples: int
    observer: str
    tensors: dict[str, TensorStatistics] = field(repr=False)
    check_inputs: dict[str, NDArray[Any]] = field(default_factory=dict, repr=False)
    selection: dict[str, Any] = field(default_factory=dict)
    parts: tuple[Part, ...] = ()
    synthetic: bool = False
    runtime: str = ""
    momentum: float = 0.99
    unfinished: dict[str, Any] | None = field(default=None, repr=False)


def serialized(statistics: Statistics) -> bytes:
    """Return the file's bytes; the same statistics give the same bytes."""
    from safetensors.numpy import save

    arrays = {f"sample/{name}": np.ascontiguousarray(array) for name, array in statistics.check_inputs.items()}
    tensors = {}
    for name, seen in sorted(statistics.tensors.items()):
        if seen.histogram is not None:
            seen.histogram.flush()
        tensors[name] = entry_of(seen)
        if seen.histogram is not None:
            first, filled = filled_bins(seen.histogram)
            tensors[name]["histogram"]["first"] = first
            arrays[f"histogram/{name}"] = filled
        if seen.channels is not None:
            arrays[f"channels/{name}"] = np.stack([seen.channels.minimum, seen.channels.maximum])
        if seen.columns is not None:
            arrays[f"columns/{name}"] = np.stack([seen.columns.minimum, seen.columns.maximum])
    document = {
        "format": FORMAT,
        "version": VERSION,
        "model_sha256": statistics.model_sha256,
        "data_sha256": statistics.data_sha256,
        "preprocess": statistics.preprocess,
        "samples": statistics.samples,
        "observer": statistics.observer,
        "selection": statistics.selection,
        "parts": [[part.data_sha256, part.chosen, part.start, part.stop] for part in statistics.parts],
        "synthetic": statistics.synthetic,
        "runtime": statistics.runtime,
        "momentum": statistics.momentum,
        "tensors": tensors,
        **({"unfinished": statistics.unfinished} if statistics.unfinished is not None else {}),
    }
    return bytes(save(arrays, metadata={"quantcli": json.dumps(document, sort_keys=True, ensure_ascii=False)}))


def entry_of(seen: TensorStatistics) -> dict[str, Any]:
    """Return what the document says of a tensor; numbers of any size as they are, exactly."""
    entry: dict[str, Any] = {"elements": seen.elements}
    if seen.elements:
        entry.update(minimum=seen.minimum, maximum=seen.maximum)
    if seen.nan or seen.infinite:
        entry.update(nan=seen.nan, infinite=seen.infinite)
    if seen.samples is not None:
        kept = seen.samples
        entry["samples"] = {
            "count": kept.count,
            "low": str(kept.low),  # JSON readers lose digits of integers beyond 2^53
            "high": str(kept.high),
            "first": list(kept.first),
            "average": list(kept.average),
        }
    if seen.histogram is not None:
        held = seen.histogram
        tails = [None if math.isinf(tail) else tail for tail in held.tails]
        entry["histogram"] = {"exponent": held.exponent, "zeros": held.zeros, "stride": held.stride, "tails": tails}
    return entry


def filled_bins(histogram: Histogram) -> tuple[int, NDArray[np.int64]]:
    """Return the number of the first bin that holds anything, counted from zero, and the counts up to the last such bin."""
    filled = np.flatnonzero(histogram.counts)
    if not len(filled):
        return 0, np.zeros(0, dtype=np.int64)
    return int(filled[0]) - BINS, histogram.counts[filled[0] : filled[-1] + 1]


def load(path: Path) -> Statistics:
    """Read a statistics file.

    Raises:
        StatisticsError: If it cannot be read, is not a statistics file of a version that is known, or is not finished.
    """
    found = load_any(path)
    if found.unfinished is not None:
        raise StatisticsError(f"{path} is a checkpoint of a calibration that did not end", "go on with --resume")
    return found


def load_any(path: Path) -> Statistics:
    """Read a statistics file, or a checkpoint.

    Raises:
        StatisticsError: If it cannot be read, or is not a statistics file of a version that is known.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise StatisticsError(f"there is no statistics file at {path}", "make it with quantcli calibrate")
    try:
        with safe_open(path, framework="numpy") as file:
            document = json.loads((file.metadata() or {})["quantcli"])
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if document["format"] != FORMAT:
            raise KeyError("format")
        if document["version"] != VERSION:
            raise StatisticsError(f"{path} has format version {document['version']}, not {VERSION}", "calibrate again")
        return from_document(document, arrays)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        remedy = "make one with quantcli calibrate MODEL --data DATA; samples themselves are given by --data (data=)"
        if path.suffix in {".onnx", ".json"}:
            remedy = (
                "of a quantized model quantcli report, eval --layers and diff tell; quantcli calibrate makes statistics"
            )
        raise StatisticsError(f"{path} is not a statistics file", remedy) from error


def from_document(document: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> Statistics:
    """Return the statistics that a document and its arrays hold.

    Raises:
        KeyError, TypeError, ValueError: If they do not belong to a statistics file.
    """
    kinds = {
        "model_sha256": str, "data_sha256": str, "preprocess": dict, "samples": int, "observer": str, "selection": dict,
        "parts": list, "synthetic": bool, "runtime": str, "momentum": float, "tensors": dict,
    }  # fmt: skip
    for name, kind in kinds.items():
        if not isinstance(document[name], kind):
            raise TypeError(name)
    if document["observer"] not in OBSERVERS:
        raise ValueError("observer")
    momentum = document["momentum"]
    tensors = {
        name: tensor_from(
            entry,
            arrays.get(f"histogram/{name}"),
            arrays.get(f"channels/{name}"),
            arrays.get(f"columns/{name}"),
            momentum,
        )
        for name, entry in document["tensors"].items()
    }
    samples = {key.removeprefix("sample/"): array for key, array in arrays.items() if key.startswith("sample/")}
    if not all(len(values) for values in samples.values()):
        raise ValueError("samples")
    return Statistics(
        document["model_sha256"],
        document["data_sha256"],
        document["preprocess"],
        document["samples"],
        document["observer"],
        tensors,
        samples,
        document["selection"],
        tuple(Part(str(sha), int(chosen), int(start), int(stop)) for sha, chosen, start, stop in document["parts"]),
        document["synthetic"],
        document["runtime"],
        momentum,
        document.get("unfinished"),
    )


def tensor_from(
    entry: dict[str, Any],
    counts: NDArray[Any] | None,
    channels: NDArray[Any] | None,
    columns: NDArray[Any] | None,
    momentum: float,
) -> TensorStatistics:
    """Return a tensor's statistics, after checking that its range is finite and the right way round.

    Raises:
        KeyError, TypeError, ValueError: If the entry is none.
    """
    if not set(entry) <= FIELDS:
        raise ValueError("tensors")
    elements, low, high = entry["elements"], entry.get("minimum", math.inf), entry.get("maximum", -math.inf)
    if not (isinstance(elements, int) and isinstance(low, (int, float)) and isinstance(high, (int, float))):
        raise TypeError("tensors")
    if elements and not (-math.inf < low <= high < math.inf):
        raise ValueError("tensors")
    seen = TensorStatistics(float(low), float(high), elements, int(entry.get("nan", 0)), int(entry.get("infinite", 0)))
    if (kept := entry.get("samples")) is not None:
        first, average = ((float(kept[key][0]), float(kept[key][1])) for key in ("first", "average"))
        seen.samples = SampleRanges(int(kept["count"]), int(kept["low"]), int(kept["high"]), first, average, momentum)
    if (held := entry.get("histogram")) is not None:
        if counts is None or counts.ndim != 1 or counts.dtype.kind != "i" or (counts < 0).any():
            raise ValueError("histogram")
        below, above = held["tails"]
        histogram = Histogram(int(held["exponent"]), zeros=int(held["zeros"]), stride=int(held["stride"]))
        histogram.tails = (-math.inf if below is None else float(below), math.inf if above is None else float(above))
        begin = BINS + int(held["first"])
        if not SMALLEST_EXPONENT <= histogram.exponent <= LARGEST_EXPONENT:
            raise ValueError("histogram")
        if begin < 0 or begin + len(counts) > 2 * BINS or histogram.stride < 1:
            raise ValueError("histogram")
        histogram.counts[begin : begin + len(counts)] = counts
        seen.histogram = histogram
    if channels is not None:
        minimum, maximum = channels
        seen.channels = ChannelRanges(minimum, maximum)
    if columns is not None:
        minimum, maximum = columns
        seen.columns, seen.by_column = ChannelRanges(minimum, maximum), True
    return seen


def merge(files: Sequence[tuple[str, Statistics]]) -> Statistics:
    """Return the statistics of several runs together: what one run over all their samples gives.

    The order in which they are given does not matter: parts of a data set follow each other as their samples do.

    Args:
        files: Statistics with the names to call them in errors; at least one.

    Raises:
        StatisticsError: If they belong to different models, were counted differently, or count a sample twice.
    """
    first_name, first = files[0]
    for name, other in files[1:]:
        check_alike(first_name, first, name, other)
    ordered = sorted(files, key=lambda entry: entry[1].parts)
    parts: list[Part] = []
    draws: dict[str, tuple[Any, ...]] = {}
    for name, statistics in ordered:
        for part in statistics.parts:
            last = parts[-1] if parts else None
            same = last is not None and (last.data_sha256, last.chosen) == (part.data_sha256, part.chosen)
            if last is not None and last.data_sha256 == part.data_sha256 and (not same or part.start < last.stop):
                if same and not any(overlap(part, other) for other in parts):
                    raise StatisticsError(
                        f"{name} holds samples from between those of another file", "merge all at once"
                    )
                raise StatisticsError(f"{name} counts samples that another file counts too", "merge each shard once")
            drawn = draws.setdefault(part.data_sha256, draw_of(statistics))
            if drawn != draw_of(statistics):
                raise StatisticsError(
                    f"{name} is of another draw of the same data ({told_draw(draw_of(statistics))}; {told_draw(drawn)})",
                    "merge shards that were drawn alike: the same --samples, --seed and --shuffle",
                )
            if last is not None and same and part.start == last.stop:
                parts[-1] = replace(last, stop=part.stop)
            else:
                parts.append(part)
    tensors = {name: copy.deepcopy(seen) for name, seen in ordered[0][1].tensors.items()}
    for _, statistics in ordered[1:]:
        for name, seen in statistics.tensors.items():
            tensors[name].merge(seen)
    return replace(
        ordered[0][1],
        data_sha256=combined_digest([part.data_sha256 for part in parts]),
        samples=sum(statistics.samples for _, statistics in ordered),
        tensors=tensors,
        parts=tuple(parts),
        synthetic=any(statistics.synthetic for _, statistics in ordered),
    )


def overlap(one: Part, other: Part) -> bool:
    """Tell whether two parts hold the same sample."""
    return one.data_sha256 == other.data_sha256 and one.start < other.stop and other.start < one.stop


def draw_of(statistics: Statistics) -> tuple[Any, ...]:
    """Return what says which samples of a data set were chosen, and in which order."""
    return tuple(statistics.selection.get(key) for key in ("samples", "shuffle", "seed"))


def told_draw(draw: tuple[Any, ...]) -> str:
    """Say how samples were drawn."""
    count, shuffled, seed = draw
    return f"{count} samples, {f'shuffled by seed {seed}' if shuffled else 'not shuffled'}"


def missing(parts: Sequence[Part]) -> list[Part]:
    """Return the samples that were chosen of some data, of which there are parts, and that none of the parts holds.

    Args:
        parts: In order, none of which overlap.
    """
    found: list[Part] = []
    reached: dict[tuple[str, int], int] = {}
    for part in parts:
        begun = reached.get((part.data_sha256, part.chosen), 0)
        if part.start > begun:
            found.append(replace(part, start=begun, stop=part.start))
        reached[part.data_sha256, part.chosen] = part.stop
    found += [Part(digest, chosen, stop, chosen) for (digest, chosen), stop in reached.items() if stop < chosen]
    return found


def combined_digest(digests: Sequence[str]) -> str:
    """Return the digest of one data set, or the digest over those of several."""
    distinct = list(dict.fromkeys(digests))
    return distinct[0] if len(distinct) == 1 else hashlib.sha256("\n".join(distinct).encode()).hexdigest()


def by_channel(statistics: Statistics) -> set[tuple[str, bool, bool]]:
    """Return the tensors of whose channels or columns the extremes were counted, and of which."""
    return {
        (name, seen.channels is not None, seen.columns is not None)
        for name, seen in statistics.tensors.items()
        if seen.channels is not None or seen.columns is not None
    }


def check_alike(name: str, one: Statistics, other_name: str, other: Statistics) -> None:
    """Check that two statistics can be merged.

    Raises:
        StatisticsError: If they cannot, saying why.
    """
    questions = {
        "belong to different models": (one.model_sha256, other.model_sha256),
        "were preprocessed differently": (one.preprocess, other.preprocess),
        "were made by different observers": (one.observer, other.observer),
        "have moving averages of different momentum": (one.momentum, other.momentum),
        "were run by different runtimes": (one.runtime, other.runtime),
        "hold different tensors": (set(one.tensors), set(other.tensors)),
        "hold the extremes of different tensors' channels": (by_channel(one), by_channel(other)),
    }
    for what, (mine, theirs) in questions.items():
        if mine != theirs:
            raise StatisticsError(
                f"{name} and {other_name} {what}", "merge what the same command made of other samples"
            )
