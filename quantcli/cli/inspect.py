"""``quantcli inspect``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantcli.cli.options import EXISTING_FILE, Range
from quantcli.cli.terminal import output_options, samples, terminal_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from calibration.histogram import Histogram
    from calibration.observers import TensorStatistics
    from calibration.ranges import Grid, RangeSpec

BARS = " ▁▂▃▄▅▆▇█"
WIDTH = 24


@click.command()
@click.argument("statistics", type=EXISTING_FILE)
@click.option(
    "--range",
    "range_",
    type=Range(),
    help="Show what this range would clip.  [default: the one that the observer is for]",
)
@click.option("--symmetric", is_flag=True, help="Compute it for a symmetric grid.")
@click.option("--bits", type=click.IntRange(2, 16), default=8, show_default=True, help="Compute it for so many bits.")
@output_options
@click.pass_context
def inspect(context: click.Context, /, statistics: Path, range_: str | None, symmetric: bool, bits: int) -> None:
    """Show what STATISTICS hold: the range of every tensor, what a range would clip, outliers, and histograms.

    "clipped" is the share of values outside the range; "outliers" how many times the whole range is as wide as that which holds
    99.9 % of the values; "channels" the widest channel over the narrowest. A histogram's bars are to the scale of their logarithms.
    """
    from calibration import statistics as statistics_file
    from calibration.ranges import Grid, parse_range

    terminal = terminal_of(context)
    found = statistics_file.load(statistics)
    meant = "minmax" if found.observer == "all" else found.observer
    spec, grid = parse_range(range_ or meant), Grid((1 << bits) - 1, symmetric)
    documents = {name: described(name, seen, spec, grid) for name, seen in found.tensors.items()}
    rows = [
        (
            name,
            *(f"{entry[key]:.5g}" for key in ("minimum", "maximum", "lo", "hi")),
            share(entry["clipped"]),
            "" if entry["outliers"] is None else f"{entry['outliers']:.1f}x",
            "" if entry["channel_spread"] is None else f"{entry['channel_spread']:.1f}x",
            entry["histogram"],
        )
        for name, entry in documents.items()
    ]
    columns = ("tensor", ">lowest", ">highest", ">lo", ">hi", ">clipped", ">outliers", ">channels", "histogram")
    shown = [i for i in range(len(columns)) if i < 5 or any(row[i] for row in rows)]
    terminal.table(
        f"{statistics.name}: {found.observer}, range {range_ or meant}",
        [columns[i] for i in shown],
        [[row[i] for i in shown] for row in rows],
    )
    strange = {name: (seen.nan, seen.infinite) for name, seen in found.tensors.items() if seen.nan or seen.infinite}
    for name, (nan, infinite) in strange.items():
        terminal.warn(f"tensor '{name}': {nan} NaN and {infinite} infinite values were left out")
    if found.synthetic:
        terminal.warn("the samples were made up")
    parts = ", ".join(f"{part.start} to {part.stop - 1} of {part.chosen}" for part in found.parts)
    terminal.say(f"{len(found.tensors)} tensors over {samples(found.samples)} ({parts or 'unknown'})")
    terminal.say(f"model {found.model_sha256[:12]}…, data {found.data_sha256[:12]}…, run by {found.runtime}")
    terminal.result(
        {
            "observer": found.observer,
            "range": range_ or meant,
            "samples": found.samples,
            "synthetic": found.synthetic,
            "model_sha256": found.model_sha256,
            "data_sha256": found.data_sha256,
            "parts": [[part.start, part.stop, part.chosen] for part in found.parts],
            "tensors": documents,
        }
    )


def described(name: str, seen: TensorStatistics, spec: RangeSpec, grid: Grid) -> dict[str, Any]:
    """Return what is shown of a tensor."""
    from calibration.ranges import Grid as AnyGrid
    from calibration.ranges import RangeSpec as AnySpec
    from calibration.ranges import range_of

    lo, hi = range_of(spec, name, seen, grid)
    clipped, outliers = None, None
    if seen.histogram is not None:
        clipped = outside(seen, lo, hi)
        inner = range_of(AnySpec("percentile", 99.9), name, seen, AnyGrid(grid.steps, grid.symmetric))
        width = max(inner[1], 0.0) - min(inner[0], 0.0)
        outliers = (max(seen.maximum, 0.0) - min(seen.minimum, 0.0)) / width if width > 0 else None
    spread = None
    if seen.channels is not None:
        widths = seen.channels.maximum.astype(float) - seen.channels.minimum
        live = widths[widths > 0]
        spread = float(live.max() / live.min()) if len(live) else None
    return {
        "minimum": seen.minimum,
        "maximum": seen.maximum,
        "elements": seen.elements,
        "nan": seen.nan,
        "infinite": seen.infinite,
        "lo": lo,
        "hi": hi,
        "clipped": clipped,
        "outliers": outliers,
        "channel_spread": spread,
        "histogram": "" if seen.histogram is None else sparkline(seen.histogram, seen.minimum, seen.maximum),
    }


def outside(seen: TensorStatistics, lo: float, hi: float) -> float:
    """Return the share of values in bins that lie outside a range, whole or by the part that does."""
    import numpy as np

    assert seen.histogram is not None  # noqa: S101 - the caller has looked
    edges, counts = seen.histogram.edges(), seen.histogram.counts.astype(float)
    width = math.ldexp(1.0, seen.histogram.exponent)
    below = np.clip((lo - edges[:-1]) / width, 0.0, 1.0)
    above = np.clip((edges[1:] - hi) / width, 0.0, 1.0)
    # The bins of the extremes reach beyond them, where nothing is.
    ends = np.flatnonzero(counts > 0)
    below[ends[0]] = 0.0 if below[ends[0]] < 1 or lo <= seen.minimum else below[ends[0]]
    above[ends[-1]] = 0.0 if above[ends[-1]] < 1 or hi >= seen.maximum else above[ends[-1]]
    return float((counts * np.minimum(below + above, 1.0)).sum() / counts.sum())


def sparkline(histogram: Histogram, lowest: float, highest: float) -> str:
    """Return a histogram between two values as a line of bars, to the scale of their logarithms."""
    import numpy as np

    if highest <= lowest:
        return BARS[-1]
    centres = (histogram.edges()[:-1] + histogram.edges()[1:]) / 2
    places = np.clip(((centres - lowest) / (highest - lowest) * WIDTH).astype(int), 0, WIDTH - 1)
    sums: NDArray[np.float64] = np.log1p(np.bincount(places, weights=histogram.counts, minlength=WIDTH))
    heights = np.ceil(sums / sums.max() * (len(BARS) - 1)).astype(int)
    return "".join(BARS[height] for height in heights)


def share(value: float | None) -> str:
    """Write a share for a table."""
    if value is None:
        return ""
    return "0" if value == 0 else f"{value:.2%}" if value >= 1e-4 else "<0.01%"
