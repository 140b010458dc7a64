"""Reading the pages that we write, and looking at them in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


class Charts(HTMLParser):
    """Collects the charts of a page: their labels, and the numbers that their marks carry."""

    def __init__(self) -> None:
        super().__init__()
        self.charts: list[tuple[str, str, list[float]]] = []
        self.opened: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "svg":
            self.charts.append((given["class"] or "", given["aria-label"] or "", []))
        elif given.get("data-value") is not None:
            self.charts[-1][2].append(float(given["data-value"] or 0))


def figures(page: str) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    assert match is not None
    found: dict[str, Any] = json.loads(match[1])
    return found


def looked_at(page: Path, folder: Path, width: int) -> Path:
    """Open a page in a browser: nothing may be said on its console; return the screenshot, which has the asked width."""
    shot = folder / f"{page.stem}-{width}.png"
    done = subprocess.run(
        [*browser(folder, width), f"--screenshot={shot}", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in done.stderr
    assert struct.unpack(">II", shot.read_bytes()[16:24]) == (width, 1600)
    return shot


def browser(folder: Path, width: int) -> list[str]:
    options = (
        "--headless=new --no-sandbox --disable-gpu --hide-scrollbars --enable-logging=stderr --virtual-time-budget=2000"
    )
    return [str(CHROMIUM), *options.split(), f"--user-data-dir={folder}", f"--window-size={width},1600"]
