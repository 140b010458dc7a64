"""The page of a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from quantcli.documents import finite
from quantcli.evaluation.metrics import written
from quantcli.report.charts import channels_chart, histogram_chart, layers_chart

if TYPE_CHECKING:
    from quantcli.report.figures import Figures

PAGE = Path(__file__).with_suffix(".html")


def page(found: Figures) -> bytes:
    """Return the page."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    sidecar, evaluation = found.sidecar, found.evaluation
    text = json.dumps(finite(found.document()), ensure_ascii=False).replace("<", "\\u003c")
    recipe = msgspec.json.format(msgspec.json.encode(sidecar.recipe), indent=2).decode()
    return (
        environment.from_string(PAGE.read_text("utf-8"))
        .render(
            name=sidecar.model.name,
            source=sidecar.float_model.name,
            producer=sidecar.producer,
            target=sidecar.target.name,
            samples=evaluation.samples,
            tiles=tiles(found),
            layers=Markup(layers_chart(evaluation.layers)),  # noqa: S704 - its texts are escaped where they are made
            histograms=[
                {"svg": Markup(histogram_chart(h)), "name": h.name, "note": f"{h.clipped:.2%} beyond the grid"}  # noqa: S704
                for h in found.histograms
            ],
            left_out=found.left_out,
            channels=[
                {"svg": Markup(channels_chart(c)), "name": c.name, "note": f"{c.bits} bits, read by {c.layer}"}  # noqa: S704
                for c in found.channels
            ],
            floats=sidecar.float_layers,
            recipe=recipe,
            document=Markup(text),  # noqa: S704 - no tag can begin in it
        )
        .encode()
    )


def tiles(found: Figures) -> list[tuple[str, str, str]]:
    """Return the figures that stand on top: what, how much, beside what."""
    evaluation, sidecar = found.evaluation, found.sidecar
    metric, drop = evaluation.metric, ""
    if evaluation.drop is not None:
        drop = f"float {written(metric, evaluation.reference)}, drop {written(metric, evaluation.drop, signed=True)}"
    rows = [(metric, written(metric, evaluation.quantized), drop)]
    if evaluation.reference_size:
        share = evaluation.size / evaluation.reference_size
        rows.append(("size", f"{share:.0%}", f"{evaluation.size:,} of {evaluation.reference_size:,} bytes"))
    if evaluation.latency is not None:
        timing = evaluation.latency
        milliseconds = f"{timing.quantized_seconds * 1e3:.3f} ms, float {timing.float_seconds * 1e3:.3f} ms"
        rows.append(
            ("speed", f"{timing.ratio:.2f}×", f"{milliseconds}; batch {timing.batch}, {timing.threads} thread(s)")
        )
    for name, value in evaluation.sqnr.items():
        if evaluation.metric != "sqnr" or len(evaluation.sqnr) > 1:
            rows.append(("SQNR", f"{value:.1f} dB", f"output {name}"))
    rows.append(("integer layers", str(len(sidecar.layers)), f"{len(sidecar.float_layers)} operators stay float"))
    return rows
