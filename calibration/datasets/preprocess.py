"""From stored pixels to what a model takes: size, crop, scale, mean, std, layout."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from calibration.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

    from calibration.datasets.dataset import InputSpec


@dataclass(frozen=True)
class Preprocess:
    """How stored values become the model's input: x = (pixel · scale − mean) / std.

    Attributes:
        size: Images are resized: one number is the length of the shorter side, two are height and width. None: to the height and
            width of the model's input (only for image files).
        crop: Height and width of a crop from the centre after resizing (one number: a square).
        scale: What a stored value is multiplied with; None is 1/255 for image files and 1 for arrays.
        mean: Subtracted after scaling; one value, or one per channel.
        std: Divided by; one value, or one per channel.
        layout: Where the model wants the channels. None: as the model's input shape shows.
        color: The order of the channels.
    """

    size: int | tuple[int, int] | None = None
    crop: int | tuple[int, int] | None = None
    scale: float | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layout: Literal["NCHW", "NHWC"] | None = None
    color: Literal["RGB", "BGR", "L"] | None = None

    def __post_init__(self) -> None:
        if not self.mean or not self.std or 0.0 in self.std:
            raise ValueError("mean and std hold one value or one per channel, and no std is 0")
        if not all(map(math.isfinite, (*self.mean, *self.std, 1.0 if self.scale is None else self.scale))):
            raise ValueError("scale, mean and std are finite numbers")
        for name, size in (("size", self.size), ("crop", self.crop)):
            if size is not None and min(as_pair(size)) < 1:
                raise ValueError(f"a {name} is at least 1")


def as_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return a size as (height, width)."""
    return (size, size) if isinstance(size, int) else size


def image_layout(spec: InputSpec, preprocess: Preprocess) -> str:
    """Return ``NCHW`` or ``NHWC``: what the recipe says, else what the input's shape shows.

    Raises:
        DataError: If the shape does not show it and the recipe does not say it.
    """
    if len(spec.shape) != 4:
        raise DataError(f"input '{spec.name}' of shape {shown(spec)} is not a batch of images", "give the data as .npz")
    if preprocess.layout:
        return preprocess.layout
    first, last = spec.shape[1] in (1, 3), spec.shape[3] in (1, 3)
    if first == last:
        raise DataError(
            f"input '{spec.name}' of shape {shown(spec)} does not show where its channels are", "set --layout"
        )
    return "NCHW" if first else "NHWC"


def image_geometry(spec: InputSpec, layout: str) -> tuple[int | None, int | None, int | None]:
    """Return (height, width, channels) of an image input; None where free."""
    _, *dims = spec.shape
    return (dims[1], dims[2], dims[0]) if layout == "NCHW" else (dims[0], dims[1], dims[2])


def resized(image: Image, preprocess: Preprocess, model_size: tuple[int, int] | None) -> Image:
    """Resize (bilinear, antialiased) and crop an image as the recipe says."""
    from PIL.Image import Resampling

    size = preprocess.size if preprocess.size is not None else (None if preprocess.crop else model_size)
    if isinstance(size, int):
        shorter = min(image.width, image.height)
        height, width = round(image.height * size / shorter), round(image.width * size / shorter)
    elif size is not None:
        height, width = size
    else:
        height, width = image.height, image.width
    if (width, height) != image.size:
        image = image.resize((width, height), Resampling.BILINEAR)
    if preprocess.crop is not None:
        height, width = as_pair(preprocess.crop)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        if left < 0 or top < 0:
            raise DataError(
                f"a crop of {height}x{width} is larger than the image of {image.height}x{image.width}", "set --size"
            )
        image = image.crop((left, top, left + width, top + height))
    return image


def normalized(
    pixels: NDArray[Any], preprocess: Preprocess, scale: float, layout: str | None, source: str
) -> NDArray[np.float32]:
    """Return x = (pixel · scale − mean) / std in float32, channels moved to where the model wants them.

    Args:
        pixels: Shape (N, H, W) or (N, H, W, C), or any shape where ``layout`` is None.
        preprocess: Mean and std.
        scale: The factor that applies.
        layout: ``NCHW``, ``NHWC``, or None to leave the axes alone.
        source: What to call the data in errors.

    Raises:
        DataError: If a layout is asked for what is no image, or mean and std do not fit the channels.
    """
    if layout is not None and pixels.ndim not in (3, 4):
        held = list(pixels.shape[1:])
        raise DataError(f"{source} holds samples of shape {held}, which are no images", "leave out --layout")
    if layout is not None and pixels.ndim == 3:
        pixels = pixels[..., None]
    with np.errstate(over="ignore", invalid="ignore"):  # what is too large is infinite, which is told of the data
        x: NDArray[np.float32] = pixels.astype(np.float32) * np.float32(scale)
    # Rows of features have one value of mean and std per feature; elsewhere only a layout says where the channels are.
    channels = pixels.shape[-1] if layout is not None or pixels.ndim == 2 else 1
    for name, values in (("mean", preprocess.mean), ("std", preprocess.std)):
        if len(values) not in (1, channels):
            remedy = (
                f"give one, or {channels}" if layout is not None else "set --layout, which says where the channels are"
            )
            raise DataError(f"the {name} has {len(values)} values and {source} {channels} channels", remedy)
    mean, std = np.array(preprocess.mean, dtype=np.float32), np.array(preprocess.std, dtype=np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        x = (x - mean) / std
    if layout == "NCHW":
        x = x.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(x, dtype=np.float32)


def shown(spec: InputSpec) -> str:
    """Write an input's shape for people, free dimensions as ``?``."""
    return "[" + ", ".join("?" if size is None else str(size) for size in spec.shape) + "]"
