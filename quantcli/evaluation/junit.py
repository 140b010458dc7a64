"""JUnit XML, as CI systems read it: a suite of cases, each passed, failed (a threshold) or in error (a crash)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Case:
    """One case.

    Attributes:
        suite: What it belongs to.
        name: Its name.
        failure: Why a threshold was missed; empty where none was.
        error: Why it could not be judged; empty where it could.
        seconds: How long it took.
        warnings: What was warned of; as the case's output, where CI systems show it.
    """

    suite: str
    name: str
    failure: str = ""
    error: str = ""
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()


def junit(name: str, cases: Sequence[Case]) -> bytes:
    """Return cases as a JUnit document."""
    root = ET.Element("testsuites")
    suite = ET.SubElement(
        root,
        "testsuite",
        {
            "name": name,
            "tests": str(len(cases)),
            "failures": str(sum(bool(case.failure) for case in cases)),
            "errors": str(sum(bool(case.error) for case in cases)),
            "time": f"{sum(case.seconds for case in cases):.3f}",
        },
    )
    for case in cases:
        element = ET.SubElement(
            suite, "testcase", {"classname": case.suite, "name": case.name, "time": f"{case.seconds:.3f}"}
        )
        for kind, text in (("failure", case.failure), ("error", case.error)):
            if text:
                ET.SubElement(element, kind, {"message": printable(text)})
        if case.warnings:
            ET.SubElement(element, "system-out").text = printable("\n".join(f"warning: {w}" for w in case.warnings))
    ET.indent(root)
    document: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return document + b"\n"


def printable(text: str) -> str:
    """Return text without the characters that XML cannot hold."""
    return "".join(
        c if c in "\t\n\r" or (ord(c) >= 32 and not 0xD800 <= ord(c) <= 0xDFFF and ord(c) & 0xFFFE != 0xFFFE) else "�"
        for c in text
    )
