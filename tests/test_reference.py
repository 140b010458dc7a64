"""The documentation says what the code does."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from quantcli.cli import cli, run
from quantcli.reference import PAGES
from quantcli.rules import RULES

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("file", list(PAGES), ids=lambda file: file.name)
def test_generated_pages_are_up_to_date(file: Path) -> None:
    assert file.read_text() == PAGES[file](), "run make docs"


def test_every_operator_is_listed() -> None:
    page = (ROOT / "docs" / "operators.md").read_text()
    assert all(f"| {name} |" in page for name in RULES)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target


def options(arguments: list[str]) -> set[str]:
    return {re.split(r"[=\s]", word)[0] for word in arguments if re.match(r"--?[a-z]", word)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_shown_commands_exist_with_their_options(document: Path) -> None:
    for block in re.findall(r"```(?:sh|bash|console)\n(.*?)```", document.read_text(), re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if not words or words[0] != "quantcli" or len(words) < 2 or words[1].startswith("-"):
                continue
            command = cli.commands[words[1]]
            known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
            assert options(words[2:]) <= known, line


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name in cli.commands:
        assert run([name, "--help"]) == 0
        assert "Options:" in capsys.readouterr().out


def test_public_functions_are_documented() -> None:
    import ast

    for file in [*(ROOT / "quantcli").rglob("*.py"), *(ROOT / "calibration").rglob("*.py")]:
        top = ast.parse(file.read_text()).body
        members = [member for entry in top if isinstance(entry, ast.ClassDef) for member in entry.body]
        for entry in [*top, *members]:
            if isinstance(entry, (ast.FunctionDef, ast.ClassDef)) and not entry.name.startswith("_"):
                assert ast.get_docstring(entry), f"{file.name}: {entry.name}"
