"""Manifests: what they may say, what is refused, and what is listed."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from quantcli.batch.manifest import FORMATS, bytes_in, read_zoo
from quantcli.cli import run
from quantcli.errors import RecipeError
from quantcli.evaluation.junit import Case, junit
from tests.batch.zoos import DONE, ran, told


@pytest.mark.parametrize(
    ("options", "message"), [("--address auto", "for --engine ray"), ("--shared", "for --engine ray")]
)
def test_options_of_a_cluster_need_it(
    zoo: Path, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    assert run(["batch", str(zoo / "zoo.toml"), "-o", "out", *options.split()]) == 2
    assert message in capsys.readouterr().err


def test_entries_can_be_listed(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["batch", str(zoo / "zoo.toml"), "-o", "out", "--list"]) == 0
    assert "demanding/w8" in capsys.readouterr().out
    assert not Path("out").exists()


BROKEN = [
    ("", "names no model|missing required field"),
    ("models = 3", "not a manifest"),
    ('[[models]]\npath = "none/*.onnx"', "finds no file"),
    ('[[models]]\npath = "nets/*.onnx"\nname = "one"', "2 files for the one name"),
    ('[[models]]\npath = "nets/a.onnx"\n[[models]]\npath = "nets/a.onnx"', "two entries 'a/default'"),
    ('[[models]]\npath = "nets/a.onnx"\nrecipes = ["w3"]', "no recipe 'w3'"),
    ('[[models]]\npath = "nets/a.onnx"\nmemory = "much"', "no size"),
    ('[[models]]\npath = "nets/a.onnx"\ncolour = "red"', "colour"),
    ('[[models]]\npath = "nets/a.onnx"\nmax_drop = nan', "max_drop is nan"),
    ('[[models]]\npath = "nets/a.onnx"\nmin_metric = -inf', "min_metric is -inf"),
    ('[recipes.x]\nweight = {bits = 99}\n[[models]]\npath = "nets/a.onnx"', "unknown"),
    ('[recipes.x]\nweight = {bits = 99}\n[[models]]\npath = "nets/a.onnx"', r"a/x: \[recipes.x\] asks"),
    (
        '[defaults]\nrecipe = "fast.toml"\n[recipes.x]\ncolour = 3\n[[models]]\npath = "nets/a.onnx"',
        r"a/x: \[recipes.x\] asks",
    ),
    ('[recipes.x]\ntarget = "moon"\n[[models]]\npath = "nets/a.onnx"', "a/x: there is no target 'moon'"),
    ('[recipes.x.activation]\nbits = 12\n[[models]]\npath = "nets/a.onnx"', "a/x: activations of 12 bits do not fit"),
    ('[[models]]\npath = "nets/a.onnx"\nmetric = "top2"', "a/default: there is no metric 'top2'"),
    ('[[models]]\npath = "nets/a.onnx"\nformat = "tflite"', "a/default: there is no format 'tflite'"),
    ('[[models]]\npath = "nets/a.onnx"\noutput = "pth"', "a/default: there is no output 'pth'"),
    ('[[models]]\npath = "nets/a.onnx"\nmetric = "mse"\nmin_metric = 1', "a/default: .*better the lower"),
    ('[[models]]\npath = "nets/a.onnx"\nmetric = "sqnr"\nmax_drop = 1', "a/default: .*no meaning for sqnr"),
    ('[[models]]\npath = "nets/a.onnx"\nname = "../up"', "no name of an entry"),
]


@pytest.mark.parametrize(("text", "message"), BROKEN)
def test_a_manifest_that_means_nothing_is_refused(zoo: Path, text: str, message: str) -> None:
    (zoo / "zoo.toml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_zoo(zoo / "zoo.toml")


def test_a_manifest_and_a_recipe_may_begin_with_a_byte_order_mark(zoo: Path) -> None:
    for name in ("zoo.toml", "fast.toml"):
        (zoo / name).write_bytes(b"\xef\xbb\xbf" + (zoo / name).read_bytes())
    (zoo / "zoo.toml").write_text((zoo / "zoo.toml").read_text().replace("max_drop", 'recipe = "fast.toml"\nmax_drop'))
    assert len(read_zoo(zoo / "zoo.toml")) == 6


def test_a_manifest_knows_the_formats_that_are_written() -> None:
    from quantcli.delivery import C_FORMS
    from quantcli.write import WRITERS

    assert (*WRITERS, *C_FORMS) == FORMATS


def test_a_pattern_does_not_find_what_the_batch_has_made(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = '[[models]]\npath = "**/*.onnx"\ndata = "data.npz"\n'
    (zoo / "corrupt.onnx").unlink()
    assert ran(zoo, manifest, DONE) == ["a/default", "b/default"]
    assert (zoo / "out" / "entries" / "a" / "default" / "model.onnx").is_file()
    _, listed = told(capsys, f"batch {zoo / 'zoo.toml'} -o {zoo / 'out'} --list")
    assert [entry["name"] for entry in listed["entries"]] == ["a/default", "b/default"]


def test_junit_holds_no_character_that_xml_has_not() -> None:
    text = "bad \x1b[31m\x00 \ufffe \U0001ffff <&>"
    found = ET.fromstring(junit("q", [Case("a", "b", failure=text)]))  # noqa: S314 - it is ours
    failure = found.find(".//failure")
    assert failure is not None
    assert failure.get("message") == "bad �[31m� � � <&>"


def test_sizes() -> None:
    assert [bytes_in(text) for text in (None, "512", "4GB", "1.5MiB", "2k", "3 gb")] == [
        0, 512, 4 * 10**9, 3 * 2**19, 2000, 3 * 10**9,
    ]  # fmt: skip
