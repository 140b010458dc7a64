"""Options that several commands share, and how they are laid over a recipe file."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

if TYPE_CHECKING:
    from quantcli.load import Opening
    from quantcli.observation import Run
    from quantcli.recipe import Recipe

Command = TypeVar("Command", bound=Callable[..., Any])

EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
EXISTING = click.Path(exists=True, path_type=Path)
OUTPUT = click.Path(dir_okay=False, path_type=Path)


INPUT_TYPES = ("float32", "float64", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
KINDS_OF_DATA = ".npz, .npy, .safetensors, .pt, .csv, .jsonl, a folder of images, or of test_data_set_*/input_*.pb"


class Size(click.ParamType[Any]):
    """A size: one number, or height x width."""

    name = "N|HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | list[int]:
        """Return one number or a pair."""
        if not isinstance(value, str):
            return value  # type: ignore[no-any-return]
        try:
            sizes = [int(part) for part in value.lower().split("x")]
        except ValueError:
            sizes = []
        if len(sizes) not in (1, 2) or min(sizes, default=0) < 1:
            self.fail(f"'{value}' is no size; write 224 or 240x320", param, ctx)
        return sizes[0] if len(sizes) == 1 else sizes


class Numbers(click.ParamType[Any]):
    """Numbers with commas between them."""

    name = "A[,B,…]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        """Return the numbers."""
        if not isinstance(value, str):
            return value  # type: ignore[no-any-return]
        try:
            found = [float(part) for part in value.split(",")]
        except ValueError:
            found = [math.nan]
        if not all(map(math.isfinite, found)):
            self.fail(f"'{value}' is not a list of numbers; write 0.485,0.456,0.406", param, ctx)
        return found


def only_finite(_context: click.Context, _parameter: click.Parameter, value: float | None) -> float | None:
    """Return the number of an option, which neither nan nor inf can be: nothing compares with them."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a finite number")
    return value


class Bytes(click.ParamType[Any]):
    """A number of bytes, with an optional unit."""

    name = "N[MB|GB]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes."""
        if not isinstance(value, str):
            return value  # type: ignore[no-any-return]
        text = value.strip().upper().removesuffix("B").removesuffix("I")
        unit = {"K": 10, "M": 20, "G": 30, "T": 40}.get(text[-1:], 0)
        try:
            count = float(text[:-1] if unit else text) * (1 << unit)
        except ValueError:
            count = 0.0
        if not 1 <= count < float("inf"):
            self.fail(f"'{value}' is no amount of memory; write 512MB or 2GB", param, ctx)
        return int(count)


class Shard(click.ParamType[Any]):
    """Which of how many parts, counted from 0."""

    name = "I/N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Return the part's number and how many there are."""
        if not isinstance(value, str):
            return value  # type: ignore[no-any-return]
        number, _, count = value.partition("/")
        if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
            self.fail(f"'{value}' is no shard; write 0/4 for the first of four", param, ctx)
        return int(number), int(count)


class Range(click.ParamType[Any]):
    """How ranges are computed."""

    name = "NAME[:P]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the text after checking it."""
        from calibration.ranges import parse_range

        try:
            parse_range(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return str(value)


class Input(click.ParamType[Any]):
    """An input of a PyTorch model: its name, its shape with the batch, and its dtype."""

    name = "NAME:SHAPE[:DTYPE]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, list[int], str]:
        """Return name, sizes and dtype."""
        if not isinstance(value, str):
            return value  # type: ignore[no-any-return]
        name, _, rest = value.partition(":")
        shape, _, dtype = rest.partition(":")
        sizes = shape.lower().split("x")
        if not name or not all(size.isdecimal() and int(size) > 0 for size in sizes):
            self.fail(f"'{value}' is no input; write x:1x3x224x224 or ids:1x128:int64", param, ctx)
        if dtype and dtype not in INPUT_TYPES:
            self.fail(f"'{dtype}' is no type of an input; known: {', '.join(INPUT_TYPES)}", param, ctx)
        return name, [int(size) for size in sizes], dtype or "float32"


class Axis(click.ParamType[Any]):
    """An axis of an input."""

    name = "NAME:AXIS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        """Return name and axis."""
        if not isinstance(value, str):
            return value  # type: ignore[no-any-return]
        name, _, axis = value.rpartition(":")
        if not name or not axis.isdecimal():
            self.fail(f"'{value}' is no axis; write x:2", param, ctx)
        return name, int(axis)


def together(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Return a decorator that adds options in the order in which they are to be shown."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


recipe_option = click.option(
    "--recipe", type=EXISTING_FILE, help="A TOML file with any of these options; flags go before it."
)

preprocess_options = together(
    click.option("--size", type=Size(), help="Resize images: shorter side, or height x width.  [default: the model's]"),
    click.option("--crop", type=Size(), help="Crop images at the centre after resizing."),
    click.option("--scale", type=float, help="Multiply stored values.  [default: 1/255 for images, 1 for arrays]"),
    click.option("--mean", type=Numbers(), help="Subtract after scaling; one number or one per channel."),
    click.option("--std", type=Numbers(), help="Divide by; one number or one per channel."),
    click.option("--layout", type=click.Choice(["NCHW", "NHWC"]), help="Where the model wants the channels of images."),
    click.option("--color", type=click.Choice(["RGB", "BGR", "L"]), help="The order of the channels of image files."),
)

sample_options = together(
    click.option("--samples", type=click.IntRange(min=1), help="Use so many samples.  [default: all]"),
    click.option("--batch", type=click.IntRange(min=1), help="Samples per run.  [default: the model's, or at most 64]"),
    click.option(
        "--shuffle/--no-shuffle",
        default=None,
        help="Draw samples at random, or take the first.  [default: at random where --samples takes a part]",
    ),
    click.option("--seed", type=click.IntRange(min=0), help="Seed of the random draw.  [default: 0]"),
)

function_option = click.option(
    "--data-function",
    "function",
    metavar="MODULE:FUNCTION",
    help="Call this Python function (or FILE.py:FUNCTION) instead: it yields batches, dicts of arrays by input name, or tuples "
    "of them in the inputs' order, labels behind, as a DataLoader does.",
)

data_options = together(
    click.option("--data", type=EXISTING, help=f"Calibration data: {KINDS_OF_DATA}."),
    function_option,
    click.option(
        "--synthetic",
        type=click.IntRange(min=1),
        metavar="N",
        help="Make up N random samples instead: for trying out, stamped, refused by --strict.",
    ),
)

counting_options = together(
    click.option(
        "--observer",
        type=click.Choice(["minmax", "moving-average", "mean-minmax", "percentile", "mse", "entropy", "all"]),
        help="What is counted.  [default: what --range needs]",
    ),
    click.option(
        "--momentum",
        type=click.FloatRange(0, 1, max_open=True),
        help="How much of a moving average a sample leaves.  [default: 0.99]",
    ),
    click.option(
        "--allow-non-finite/--refuse-non-finite",
        "allow_non_finite",
        default=None,
        help="Count and leave out NaN and infinities, or fail.  [default: fail]",
    ),
    click.option(
        "--max-memory",
        type=Bytes(),
        help="Shrink batches so that the process stays within, say, 2GB; fail if none fits.",
    ),
    click.option("--threads", type=click.IntRange(min=1), help="Threads of ONNX Runtime.  [default: the cores]"),
    click.option(
        "--runtime",
        type=click.Choice(["onnxruntime", "torch"]),
        help="What runs the float model (torch: PyTorch models only).  [default: onnxruntime]",
    ),
    click.option(
        "--device",
        type=click.Choice(["cpu", "cuda"]),
        help="Where it runs; cuda means --runtime torch.  [default: cpu]",
    ),
)

label_options = together(
    click.option("--labels", type=EXISTING_FILE, help="Labels: CSV (file,label) for images, .npy for arrays."),
    click.option("--split", help="Use only the CSV's rows whose column split says so."),
)

torch_options = together(
    click.option(
        "--factory",
        metavar="MODULE:CALLABLE|FILE.py:CALLABLE",
        help="What builds the module of a state dict. This code is imported and called.",
    ),
    click.option(
        "--trust-pickle",
        "trusted",
        is_flag=True,
        help="Load a pickled module. This runs whatever code the file holds, with your rights: only for files that you trust.",
    ),
    click.option(
        "--input",
        "inputs",
        multiple=True,
        type=Input(),
        help="What a PyTorch model takes, where the data does not show it: x:1x3x224x224, ids:1x128:int64.",
    ),
    click.option(
        "--dynamic",
        multiple=True,
        type=Axis(),
        help="Leave this axis of a PyTorch model's input free, besides the batch: x:2.",
    ),
)

quantization_options = together(
    click.option(
        "--requantize", is_flag=True, default=False, help="Take a quantized model: make it float, and quantize it anew."
    ),
    click.option(
        "--target", help="A target's name or TOML file; native: this machine's ONNX Runtime.  [default: ort-x86]"
    ),
    click.option(
        "--activation-dtype",
        type=click.Choice(["uint8", "int8", "int16"]),
        help="Type of activations.  [default: the target's]",
    ),
    click.option(
        "--activation-bits",
        type=click.IntRange(2, 16),
        help="Width of activations' grids, where less than their type's.  [default: the target's]",
    ),
    click.option(
        "--range",
        "range_",
        type=Range(),
        help="Ranges: minmax, moving-average, mean-minmax, percentile[:99.99], mse, entropy.  [default: the observer's]",
    ),
    click.option("--symmetric/--asymmetric", default=None, help="Form of activations.  [default: the target's]"),
    click.option("--per-channel/--per-tensor", default=None, help="Scales of weights.  [default: the target's]"),
    click.option(
        "--symmetric-weights/--asymmetric-weights",
        default=None,
        help="Whether grids of weights of 6 bits and less lie about zero.  [default: the target's]",
    ),
    click.option(
        "--multiplier-bits", type=click.Choice(["8", "16", "32"]), help="Width of M0.  [default: the target's]"
    ),
    click.option(
        "--rounding",
        type=click.Choice(["single", "double", "half_even", "floor"]),
        help="How products with M0 are rounded.  [default: the target's]",
    ),
    click.option("--include", multiple=True, metavar="PATTERN", help="Quantize only these layers (names, or op:Conv)."),
    click.option("--exclude", multiple=True, metavar="PATTERN", help="Keep these layers float (names, or op:Conv)."),
    click.option(
        "--everywhere/--where-it-pays",
        default=None,
        help="Quantize whatever can be, or what pays on the target.  [default: what pays]",
    ),
    click.option(
        "--integer-start/--fast-start",
        default=None,
        help="Quantize a network's first convolutions, too, where float computes them faster.  [default: what is faster]",
    ),
    click.option(
        "--smooth/--no-smooth",
        default=None,
        help="Even the columns of what normalisations and gated units make (SmoothQuant).  "
        "[default: where the target has float kernels]",
    ),
)


CALIBRATION = ("samples", "batch", "shuffle", "seed", "observer", "momentum", "channels", "allow_non_finite")


def run_of(options: dict[str, Any]) -> Run:
    """Return how the options ask for a calibration to be run.

    Raises:
        UsageError: If runtime and device contradict each other.
    """
    from quantcli.errors import UsageError
    from quantcli.observation import CHECKPOINT_SECONDS, Run

    device: Literal["cpu", "cuda"] = options.get("device") or "cpu"
    runtime: Literal["onnxruntime", "torch"] = options.get("runtime") or (
        "torch" if device == "cuda" else "onnxruntime"
    )
    if device == "cuda" and runtime != "torch":
        raise UsageError("--device cuda runs the model in torch, not in ONNX Runtime", "leave out --runtime")
    seconds = options.get("checkpoint")
    return Run(
        options.get("shard") or (0, 1),
        options.get("max_memory"),
        None,
        CHECKPOINT_SECONDS if seconds is None else seconds,
        bool(options.get("resume")),
        runtime,
        device,
        options.get("threads") or 0,
    )


def recipe_of(options: dict[str, Any]) -> Recipe:
    """Return the recipe that the options ask for, over the file that ``--recipe`` names.

    Raises:
        RecipeError: If the file cannot be used.
    """
    from quantcli.recipe import read_recipe

    bits = options.get("multiplier_bits")
    overrides: dict[str, Any] = {
        "target": options.get("target"),
        "requantize": options.get("requantize") or None,
        "mode": options.get("mode"),
        "calibration": {key: options.get(key) for key in CALIBRATION},
        "preprocess": {key: options.get(key) for key in ("size", "crop", "scale", "mean", "std", "layout", "color")},
        "activation": {
            "range": options.get("range_"),
            "dtype": options.get("activation_dtype"),
            "bits": options.get("activation_bits"),
            "symmetric": options.get("symmetric"),
        },
        "weight": {
            "per_channel": options.get("per_channel"),
            "symmetric": options.get("symmetric_weights"),
            "bits": options.get("weight_bits"),
            "block_size": options.get("block_size"),
        },
        "multiplier": {"bits": int(bits) if bits else None, "rounding": options.get("rounding")},
        "layers": {
            **{key: list(options.get(key) or ()) or None for key in ("include", "exclude")},
            "everywhere": options.get("everywhere"),
            "integer_start": options.get("integer_start"),
        },
        "tune": {
            "smooth": options.get("smooth"),
            "optimize": options.get("optimize"),
            "effort": options.get("effort"),
            "max_drop": options.get("max_drop"),
            "metric": options.get("metric"),
            "cost": options.get("cost"),
        },
    }
    return read_recipe(options.get("recipe"), overrides)


def opening_of(options: dict[str, Any]) -> Opening:
    """Return how the options ask for a PyTorch model to be opened."""
    import numpy as np

    from calibration.datasets.dataset import InputSpec
    from quantcli.load import Opening

    inputs = tuple(InputSpec(name, np.dtype(dtype), tuple(sizes)) for name, sizes, dtype in options.get("inputs") or ())
    return Opening(options.get("factory"), bool(options.get("trusted")), inputs, tuple(options.get("dynamic") or ()))


def keep_apart(options: dict[str, Any], *outputs: Path) -> None:
    """Check that no output is the recipe or the labels; what else is read, the stages check.

    Raises:
        UsageError: If one is.
    """
    from quantcli.files import check_output

    for output in outputs:
        check_output(output, options.get("recipe"), options.get("labels"))
