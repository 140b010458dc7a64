"""Charts as SVG: each says what it shows in words too, and carries its numbers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape, quoteattr

if TYPE_CHECKING:
    from quantcli.evaluation.compare import LayerSqnr
    from quantcli.report.figures import Channels, Histogram

WIDTH, HEIGHT = 240, 84
# A layer that loses so many dB is marked.
MUCH = 6.0
BAR = 20


def svg(width: float, height: float, title: str, words: str, body: str, kind: str) -> str:
    """Return a chart: its title and description are what a screen reader says."""
    label = quoteattr(f"{title}: {words}")
    return (
        f'<svg class="{kind}" viewBox="0 0 {width:g} {height:g}" role="img" aria-label={label} '
        f'preserveAspectRatio="xMinYMin meet"><title>{escape(title)}</title><desc>{escape(words)}</desc>{body}</svg>'
    )


def layers_chart(layers: tuple[LayerSqnr, ...]) -> str:
    """Return bars of every layer's SQNR, in graph order; those that lose much are marked by a pattern and a word."""
    shown = [layer for layer in layers if math.isfinite(layer.sqnr)]
    if not shown:
        return ""
    top = max(10.0, *(layer.sqnr for layer in shown))
    body = []
    for number, layer in enumerate(shown):
        y, width = number * BAR, max(layer.sqnr, 0.0) / top * 300
        much = layer.lost >= MUCH
        lost = f'<text x="{238 + width:.2f}" y="{y + 14}">−{layer.lost:.1f} here</text>' if much else ""
        body.append(
            f'<g data-name={quoteattr(layer.name)} data-value="{layer.sqnr!r}">'
            f'<text x="0" y="{y + 14}">{escape(shortened(layer.name, 26))}</text>'
            f'<text class="n" x="224" y="{y + 14}" text-anchor="end">{layer.sqnr:.1f}</text>'
            f'<rect class="{"much" if much else "bar"}" x="232" y="{y + 3}" width="{width:.2f}" height="{BAR - 6}" rx="2"/>'
            f"{lost}</g>"
        )
    worst = max(shown, key=lambda layer: layer.lost)
    least = min(layer.sqnr for layer in shown)
    words = f"{len(shown)} layers, {least:.1f} to {top:.1f} dB; most is lost at {worst.name} ({worst.lost:.1f} dB)"
    return svg(600, len(shown) * BAR + 4, "SQNR of every layer in dB", words, "".join(body), "layers")


def histogram_chart(one: Histogram) -> str:
    """Return the histogram of an activation, with the grid's ends."""
    left, right = min(one.minimum, one.lo), max(one.maximum, one.hi)
    span = (right - left) or 1.0
    step = ((one.maximum - one.minimum) or 1.0) / len(one.counts)
    tallest = math.log1p(max(one.counts) or 1)

    def x(value: float) -> float:
        return (value - left) / span * WIDTH

    bars = "".join(
        f'<rect class="bar" x="{x(one.minimum + number * step):.2f}" y="{64 - math.log1p(count) / tallest * 60:.2f}" '
        f'width="{max(step / span * WIDTH - 0.4, 0.4):.2f}" height="{math.log1p(count) / tallest * 60:.2f}" data-value="{count}"/>'
        for number, count in enumerate(one.counts)
        if count
    )
    ends = "".join(
        f'<line class="end" x1="{x(end):.2f}" x2="{x(end):.2f}" y1="0" y2="66"/>' for end in (one.lo, one.hi)
    )
    text = (
        f'<text x="0" y="79">{left:.3g}</text><text class="n" x="{WIDTH}" y="79" text-anchor="end">{right:.3g}</text>'
    )
    words = (
        f"values from {one.minimum:.4g} to {one.maximum:.4g} (log counts), the grid reaches from {one.lo:.4g} to {one.hi:.4g} "
        f"(dashed), {one.clipped:.2%} lie beyond"
    )
    axis = f'<line class="axis" x1="0" x2="{WIDTH}" y1="64" y2="64"/>'
    return svg(WIDTH, HEIGHT, one.name, words, bars + axis + ends + text, "small")


def channels_chart(one: Channels) -> str:
    """Return bars of what each channel of a weight reaches."""
    top, count = max(one.largest) or 1.0, len(one.largest)
    wide = WIDTH / count
    bars = "".join(
        f'<rect class="bar" x="{number * wide:.2f}" y="{64 - value / top * 60:.2f}" width="{max(wide - 0.4, 0.3):.2f}" '
        f'height="{value / top * 60:.2f}" data-value="{value!r}"/>'
        for number, value in enumerate(one.largest)
    )
    least = min(one.largest)
    words = f"{count} channel{'s' if count > 1 else ''} of {one.bits} bits, the largest reaches {top:.4g}, the least {least:.4g}"
    axis = f'<line class="axis" x1="0" x2="{WIDTH}" y1="64" y2="64"/>'
    text = f'<text x="0" y="79">0</text><text class="n" x="{WIDTH}" y="79" text-anchor="end">{top:.3g} at most</text>'
    return svg(WIDTH, HEIGHT, one.name, words, bars + axis + text, "small")


def shortened(text: str, most: int) -> str:
    """Return a text's end, cut to a length."""
    return text if len(text) <= most else f"…{text[-most + 1 :]}"
