"""Statistics: what calibration leaves behind, as a value and as a file (docs/statistics.md).

The file is a safetensors file. Its metadata has one key, ``quantcli``, with a JSON document; the first calibration samples stand
beside it as arrays ``sample/<input name>``, so that a conversion can check its output without the data set.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.errors import StatisticsError

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT, VERSION = "quantcli-statistics", 1


@dataclass(frozen=True)
class TensorStatistics:
    """What was seen of one tensor.

    Attributes:
        minimum: The lowest value (float32, written without loss).
        maximum: The highest value.
        elements: How many values were seen.
    """

    minimum: float
    maximum: float
    elements: int


@dataclass(frozen=True, eq=False)
class Statistics:
    """What was seen of all asked tensors of a model over a data set.

    Attributes:
        model_sha256: The float model's file.
        data_sha256: The data set (arrays or image files), before preprocessing.
        preprocess: How the data was preprocessed, as the recipe spells it.
        samples: How many samples were run.
        observer: The name of the observer.
        tensors: By tensor name.
        check_inputs: The first samples, by input name, for self-checks.
    """

    model_sha256: str
    data_sha256: str
    preprocess: dict[str, Any]
    samples: int
    observer: str
    tensors: dict[str, TensorStatistics]
    check_inputs: dict[str, NDArray[Any]] = field(default_factory=dict)


def serialized(statistics: Statistics) -> bytes:
    """Return the file's bytes; the same statistics give the same bytes."""
    from safetensors.numpy import save

    document = {
        "format": FORMAT,
        "version": VERSION,
        "model_sha256": statistics.model_sha256,
        "data_sha256": statistics.data_sha256,
        "preprocess": statistics.preprocess,
        "samples": statistics.samples,
        "observer": statistics.observer,
        "tensors": {name: asdict(seen) for name, seen in sorted(statistics.tensors.items())},
    }
    arrays = {f"sample/{name}": np.ascontiguousarray(array) for name, array in statistics.check_inputs.items()}
    return bytes(save(arrays, metadata={"quantcli": json.dumps(document, sort_keys=True, ensure_ascii=False)}))


def load(path: Path) -> Statistics:
    """Read a statistics file.

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
            arrays = {key.removeprefix("sample/"): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if document["format"] != FORMAT:
            raise KeyError("format")
        if document["version"] != VERSION:
            raise StatisticsError(f"{path} has format version {document['version']}, not {VERSION}", "calibrate again")
        check_document(document)
        if not all(
            len(values) and (values.dtype.kind != "f" or np.isfinite(values).all()) for values in arrays.values()
        ):
            raise ValueError("samples")
        return Statistics(
            document["model_sha256"],
            document["data_sha256"],
            document["preprocess"],
            document["samples"],
            document["observer"],
            {name: TensorStatistics(**seen) for name, seen in document["tensors"].items()},
            arrays,
        )
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise StatisticsError(f"{path} is not a statistics file", "make it with quantcli calibrate") from error


def check_document(document: dict[str, Any]) -> None:
    """Check the kinds of a document's fields, and that every range is finite and the right way round.

    Raises:
        TypeError: If a field is of another kind.
        ValueError: If a range is not one.
    """
    kinds = {
        "model_sha256": str,
        "data_sha256": str,
        "preprocess": dict,
        "samples": int,
        "observer": str,
        "tensors": dict,
    }
    for field_name, kind in kinds.items():
        if not isinstance(document[field_name], kind):
            raise TypeError(field_name)
    for seen in document["tensors"].values():
        low, high = seen["minimum"], seen["maximum"]
        if not (isinstance(low, (int, float)) and isinstance(high, (int, float)) and isinstance(seen["elements"], int)):
            raise TypeError("tensors")
        if not (-math.inf < low <= high < math.inf):
            raise ValueError("tensors")
