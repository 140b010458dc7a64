"""The HTML index of a batch: one page, no network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantcli.batch.run import Outcome

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>quantcli batch: {{ met }} of {{ rows|length }} met</title>
<style>
:root { color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif }
body { margin: 1.5rem auto; max-width: 76rem; padding: 0 1rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100% }
th, td { border-bottom: 1px solid color-mix(in srgb, currentColor 18%, transparent); padding: .35rem .6rem; text-align: left;
  vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
.met { color: light-dark(#176b2c, #6fd48a) } .not { color: light-dark(#a3201d, #ff8f88); font-weight: 600 }
</style></head><body>
<h1>{{ met }} of {{ rows|length }} entries met what was asked</h1>
<div class="scroll" tabindex="0" role="region" aria-label="Entries"><table>
<thead><tr><th scope="col">entry</th><th scope="col">verdict</th><th scope="col">metric</th><th scope="col" class="n">float</th>
<th scope="col" class="n">quantized</th><th scope="col" class="n">drop</th><th scope="col" class="n">bytes</th>
<th scope="col" class="n">of float</th><th scope="col" class="n">speed</th><th scope="col" class="n">seconds</th>
<th scope="col">why</th></tr></thead>
<tbody>{% for row in rows %}<tr>
<th scope="row">{% if row.link %}<a href="{{ row.link }}">{{ row.name }}</a>{% else %}{{ row.name }}{% endif %}</th>
<td class="{{ 'met' if row.status == 'met' else 'not' }}">{{ row.status }}</td><td>{{ row.metric }}</td>
<td class="n">{{ row.float }}</td><td class="n">{{ row.quantized }}</td><td class="n">{{ row.drop }}</td>
<td class="n">{{ row.bytes }}</td><td class="n">{{ row.share }}</td><td class="n">{{ row.speed }}</td>
<td class="n">{{ row.seconds }}</td><td>{{ row.reason }}</td></tr>
{% endfor %}</tbody></table></div></body></html>
"""


def index(outcomes: Sequence[Outcome]) -> bytes:
    """Return the page."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    rows = [row_of(outcome) for outcome in outcomes]
    met = sum(outcome.status == "met" for outcome in outcomes)
    return environment.from_string(PAGE).render(rows=rows, met=met).encode()


def row_of(outcome: Outcome) -> dict[str, Any]:
    """Return one entry's cells."""
    figures = outcome.record.figures
    done = outcome.record.status == "done"
    return {
        "name": outcome.entry.name,
        "status": outcome.status,
        "reason": outcome.reason,
        "link": f"entries/{outcome.entry.name}/" + ("model.json" if done else "log.txt"),
        "metric": figures.get("metric", ""),
        "bytes": f"{figures['bytes']:,}" if done else "",
        "share": f"{figures['bytes'] / figures['float_bytes']:.0%}" if done else "",
        "speed": "" if figures.get("speedup") is None else f"{figures['speedup']:.2f}×",
        "seconds": f"{outcome.record.seconds:.1f}",
        **{
            name: "" if figures.get(name) is None else f"{figures[name]:.2f}" for name in ("float", "quantized", "drop")
        },
    }
