"""One entry of a zoo, in a process of its own: ``python -m quantcli.batch.worker ENTRY.json FOLDER``.

Everything goes through files: the entry comes as JSON, and ``result.json`` appears in the folder beside the converted model.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import msgspec

from calibration.errors import ReportedError
from calibration.memory import keep_freed
from quantcli.batch.entry import Entry
from quantcli.documents import encodable, finite
from quantcli.errors import UsageError
from quantcli.lazily import import_late

RESULT = "result.json"
# What the page about a model is called.
REPORT = "report.html"
# What a part of a calibration is called.
SHARD = "part.stats"
# What the system says where it lacks something for now: room, memory, open files.
PASSING = {errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EMFILE, errno.ENFILE}


class Warnings(logging.Handler):
    """Keeps what the library warns of, each text once, and lets the log have it too."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one warning."""
        text = encodable(record.getMessage())
        if text not in self.texts:
            self.texts.append(text)
            print(f"warning: {text}", file=sys.stderr)


def die_with_parent(parent: int) -> None:
    """On Linux, ask to be killed when the parent is gone (prctl, PR_SET_PDEATHSIG): nothing goes on without whom it tells.

    Where it is gone already, this ends at once.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def run(entry: Entry, folder: Path) -> dict[str, Any]:
    """Convert and evaluate an entry, and return its figures."""
    from calibration.datasets import Selection
    from quantcli.load import Opening, load
    from quantcli.observation import Run
    from quantcli.pipeline import calibrate, convert, evaluate

    wishes = entry.wishes
    opening = Opening(wishes.factory, bool(wishes.trust_pickle))
    if wishes.data is None and entry.recipe.mode == "static":
        if not Path(entry.path).is_file():
            load(Path(entry.path), opening)  # says so
        raise UsageError("the entry has no calibration data", "give data, of the model or in [defaults]")
    if entry.shard is not None:
        run = Run(shard=entry.shard)
        given = {"recipe": entry.recipe, "labels": wishes.labels, "split": wishes.split, "opening": opening}
        calibrate(entry.path, wishes.data, folder / SHARD, run=run, **given)  # type: ignore[arg-type]
        return {}
    form = wishes.format or "qdq"
    output = folder / {"c": "c", "c-params": "model.h"}.get(form, f"model.{wishes.output or 'onnx'}")
    done = convert(
        entry.path,
        output,
        statistics=entry.statistics,
        data=wishes.data,
        recipe=entry.recipe,
        labels=wishes.labels,
        split=wishes.split,
        strict=bool(wishes.strict),
        verified=bool(wishes.verify),
        form=form,
        until=wishes.end_at or (),
        opening=opening,
    )
    output = done.model
    figures: dict[str, Any] = {
        "float_sha256": done.sidecar.float_model.sha256,
        "sha256": done.sidecar.model.sha256,
        "float_bytes": done.sidecar.float_model.bytes,
        "bytes": done.sidecar.model.bytes,
        "integer_layers": len(done.plan.layers),
        "float_layers": len(done.plan.floats),
        "output": str(output.relative_to(folder)),
    }
    if done.embedded is not None:
        told = done.embedded.description
        figures |= {
            "ram_bytes": told.arena_bytes + told.scratch_bytes,
            "constant_bytes": told.constant_bytes,
            "macs": told.macs,
        }
    data = wishes.evaluate or wishes.data
    if data is not None:
        judging: dict[str, Any] = {
            "metric": wishes.metric,
            "recipe": entry.recipe,
            "labels": wishes.labels,
            "split": wishes.evaluate_split if wishes.evaluate else wishes.split,
            "selection": Selection(wishes.samples),
            "latency": wishes.min_speedup is not None,
            "opening": opening,
        }
        if wishes.report and output.suffix == ".onnx":
            from quantcli.report.make import made
            from quantcli.report.page import page

            shown = made(output, Path(entry.path), Path(data), **judging)
            (folder / REPORT).write_bytes(page(shown))
            found = shown.evaluation
            figures["charts"] = finite(shown.charts())
        else:
            found = evaluate(output, data, entry.path, **judging)
        figures |= {
            "metric": found.metric,
            "samples": found.samples,
            "quantized": finite(found.quantized),
            "float": finite(found.reference),
            "drop": finite(found.drop),
            "sqnr_db": finite(found.sqnr),
            "speedup": found.latency.ratio if found.latency is not None else None,
        }
    return figures


def passes(error: BaseException | None) -> bool:
    """Return whether a failure comes of a full disk or the like, and not of the entry."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in PASSING:
            return True
        error = error.__cause__ or error.__context__
    return False


def main(arguments: list[str]) -> int:
    """Run the entry of a file, and write what came of it."""
    die_with_parent(int(arguments[2]))
    import_late()
    keep_freed()
    sys.path.append(str(Path.cwd()))  # at the end: nothing beside the manifest takes the place of what is installed
    entry = Entry.decoded(Path(arguments[0]).read_bytes())
    folder = Path(arguments[1])
    warnings = Warnings()
    for name in ("calibration", "quantcli"):
        logging.getLogger(name).addHandler(warnings)
    began = time.perf_counter()
    result: dict[str, Any] = {"status": "done", "reason": "", "figures": {}, "passing": False}
    try:
        result["figures"] = run(entry, folder)
    except ReportedError as error:
        result |= {"status": "failed", "reason": str(error), "passing": passes(error)}
    except MemoryError:
        result |= {"status": "memory", "reason": "it ran out of memory"}
    except Exception as error:  # noqa: BLE001 - whatever it is, it is this entry's
        print(traceback.format_exc(), file=sys.stderr)
        result |= {"status": "crashed", "reason": f"{type(error).__name__}: {error}", "passing": passes(error)}
    result["reason"], result["warnings"] = encodable(result["reason"]), warnings.texts
    result["seconds"] = time.perf_counter() - began
    temporary = folder / f".{RESULT}"
    temporary.write_bytes(msgspec.json.encode(result))
    temporary.replace(folder / RESULT)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
