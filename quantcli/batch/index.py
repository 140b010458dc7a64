"""The HTML index of a batch: one page, no network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.batch.worker import REPORT
from quantcli.evaluation.metrics import written

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantcli.batch.run import Outcome

PAGE = Path(__file__).with_suffix(".html")


def index(outcomes: Sequence[Outcome]) -> bytes:
    """Return the page."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    rows = [row_of(outcome) for outcome in outcomes]
    met = sum(outcome.status == "met" for outcome in outcomes)
    return environment.from_string(PAGE.read_text("utf-8")).render(rows=rows, met=met).encode()


def row_of(outcome: Outcome) -> dict[str, Any]:
    """Return one entry's cells."""
    figures = outcome.record.figures
    done, metric = outcome.record.status == "done", str(figures.get("metric", ""))
    shown = REPORT if "charts" in figures else str(figures.get("output", "")).rpartition(".")[0] + ".json"
    return {
        "name": outcome.entry.name,
        "status": outcome.status,
        "reason": outcome.reason,
        "warnings": outcome.record.warnings,
        "link": f"entries/{outcome.entry.name}/" + (shown if done else "log.txt"),
        "metric": metric,
        "bytes": f"{figures['bytes']:,}" if done else "",
        "share": f"{figures['bytes'] / figures['float_bytes']:.0%}" if done else "",
        "speed": "" if figures.get("speedup") is None else f"{figures['speedup']:.2f}×",
        "seconds": f"{outcome.record.seconds:.1f}",
        **{name: written(metric, figures.get(name)) for name in ("float", "quantized", "drop")},
    }
