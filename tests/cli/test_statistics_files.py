"""Statistics on the command line: what does not go together is told, and nothing that is there is lost."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.hooks.onnxruntime import Runner
from quantcli.cli import main
from tests.graphs import normal, residual_net


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    residual_net(tmp_path / "net.onnx")
    np.savez(tmp_path / "d.npz", x=normal(50, 3, 8, 8, seed=5))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], command: str) -> tuple[int, str, str]:
    """Return the exit code of a command, and what it printed."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(command.split())
    printed = capsys.readouterr()
    return int(end.value.code or 0), printed.out, printed.err


@pytest.mark.usefixtures("here")
def test_shards_that_are_missing_are_told_wherever_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    for shard in range(3):
        assert run(capsys, f"calibrate net.onnx --data d.npz --batch 5 --shard {shard}/3 -o {shard}.stats -q")[0] == 0
    code, _, errors = run(capsys, "merge 0.stats 2.stats -o both.stats -q")
    assert code == 0
    assert "samples 15 to 29 of 50 are missing" in " ".join(errors.split())
    code, _, errors = run(capsys, "merge both.stats 1.stats -o all.stats -q")
    assert code == 1
    assert "1.stats holds samples from between those of another file; merge all at once" in " ".join(errors.split())
    assert run(capsys, "merge both.stats 0.stats -o all.stats -q")[0] == 1
    assert run(capsys, "merge 2.stats 0.stats 1.stats -o all.stats -q") == (0, "", "")


@pytest.mark.usefixtures("here")
def test_other_draws_of_the_same_data_are_not_put_together(capsys: pytest.CaptureFixture[str]) -> None:
    for shard in range(2):
        drawn = f"--samples 20 --batch 5 --seed {shard} --shard {shard}/2"
        assert run(capsys, f"calibrate net.onnx --data d.npz {drawn} -o {shard}.stats -q")[0] == 0
    code, _, errors = run(capsys, "merge 0.stats 1.stats -o both.stats")
    assert code == 1
    assert "another draw of the same data" in " ".join(errors.split())
    assert not Path("both.stats").exists()


@pytest.mark.parametrize(
    "command", ["calibrate net.onnx --data d.npz", "merge a.stats", "convert net.onnx --stats a.stats"]
)
def test_what_is_no_file_is_not_replaced(here: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert run(capsys, "calibrate net.onnx --data d.npz -o a.stats -q")[0] == 0
    os.mkfifo(here / "pipe.onnx")
    code, _, errors = run(capsys, f"{command} -o pipe.onnx")
    assert code == 2
    assert "a device or a pipe" in " ".join(errors.split())
    assert (here / "pipe.onnx").is_fifo()


def test_a_folder_in_the_checkpoints_place_is_told_at_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "a.stats.partial").mkdir()
    code, _, errors = run(capsys, "calibrate net.onnx --data d.npz -o a.stats")
    assert code == 2
    assert "a.stats.partial is a folder" in " ".join(errors.split())
    assert not (here / "a.stats").exists()


@pytest.mark.usefixtures("here")
def test_a_range_needs_an_observer_that_counts_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, errors = run(capsys, "calibrate net.onnx --data d.npz --range entropy --observer minmax -o a.stats")
    assert code == 2
    assert "does not count what the range entropy needs" in " ".join(errors.split())


@pytest.mark.usefixtures("here")
def test_data_that_is_preprocessed_otherwise_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    pixels = "--layout NHWC --scale 0.5"
    assert run(capsys, f"calibrate net.onnx --data d.npz {pixels} -o a.stats -q")[0] == 0
    code, _, errors = run(capsys, "convert net.onnx --stats a.stats --data d.npz -o q.onnx")
    assert code == 1
    assert "preprocessed in another way" in " ".join(errors.split())
    assert not Path("q.onnx").exists()
    assert run(capsys, f"convert net.onnx --stats a.stats --data d.npz {pixels} --effort fast -o q.onnx -q")[0] == 0
    # Other data may need nothing: it can be what a model takes already.
    np.savez("other.npz", x=normal(20, 3, 8, 8, seed=6))
    assert run(capsys, "convert net.onnx --stats a.stats --data other.npz --effort fast -o q.onnx -q")[0] == 0


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("value", [0.0, 3.5, -2.0])
def test_nothing_is_clipped_of_a_constant(capsys: pytest.CaptureFixture[str], value: float) -> None:
    np.savez("same.npz", x=np.full((20, 3, 8, 8), value, dtype=np.float32))
    assert run(capsys, "calibrate net.onnx --data same.npz --observer all -o a.stats -q")[0] == 0
    for spec in ("minmax", "percentile:99.9", "mse", "entropy"):
        code, out, _ = run(capsys, f"inspect a.stats --range {spec} --json")
        assert code == 0
        assert json.loads(out)["tensors"]["x"]["clipped"] == 0


@pytest.mark.usefixtures("here")
def test_what_is_never_finite_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("nan.npz", x=np.full((20, 3, 8, 8), np.nan, dtype=np.float32))
    code, _, errors = run(capsys, "calibrate net.onnx --data nan.npz --allow-non-finite -o a.stats -q")
    assert code == 0
    assert f"tensor 'x': none of its {20 * 3 * 64} values is finite" in " ".join(errors.split())


@pytest.mark.usefixtures("here")
def test_samples_that_are_not_finite_are_left_out_of_tuning(
    capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    x = dict(np.load("d.npz"))["x"]
    spoiled: Any = x.copy()
    spoiled[3, 0, 0, 0], spoiled[20, 1, 2, 3] = np.nan, np.inf
    np.savez("spoiled.npz", x=spoiled)
    code, out, errors = run(capsys, "convert net.onnx --data spoiled.npz --allow-non-finite -o q.onnx --json")
    assert code == 0
    told = " ".join(errors.split())
    assert "2 samples are not finite, and tuning goes without them" in told
    assert "failed" not in told
    assert not [one for one in recwarn if one.category is RuntimeWarning]
    assert any(one["kept"] and "rounding" in one["name"] for one in json.loads(out)["tuning"]["tries"])


def test_a_run_with_pixels_of_its_own_goes_on(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = "calibrate net.onnx --data d.npz --layout NHWC --scale 0.5 --batch 2 --threads 1 --checkpoint 0 -q"
    assert run(capsys, f"{command} -o whole.stats")[0] == 0
    done: list[int] = []
    real = Runner.run

    def cut_off(self: Runner, *given: Any) -> Any:
        done.append(1)
        if len(done) == 12:
            raise KeyboardInterrupt
        return real(self, *given)

    with monkeypatch.context() as patched:
        patched.setattr(Runner, "run", cut_off)
        assert run(capsys, f"{command} -o broken.stats")[0] == 130
    held = (here / "broken.stats.partial").read_bytes()
    (here / "broken.stats.partial").write_bytes(held[:200])
    code, _, errors = run(capsys, f"{command} -o broken.stats --resume")
    assert code == 1
    assert "broken.stats.partial cannot be gone on from" in " ".join(errors.split())
    assert "; remove it" in " ".join(errors.split())
    (here / "broken.stats.partial").write_bytes(held)
    assert run(capsys, f"{command} -o broken.stats --resume") == (0, "", "")
    assert (here / "broken.stats").read_bytes() == (here / "whole.stats").read_bytes()
