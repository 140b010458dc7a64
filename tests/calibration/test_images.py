"""Folders of images: what they give and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from calibration.datasets import InputSpec, Preprocess, open_dataset
from calibration.errors import DataError
from tests.calibration.samples import IMAGES, Array, U, damaged, everything, normalized_exactly, pixels, spec


def photo(path: Path, values: Array) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


def photos(folder: Path, *names: str, shape: tuple[int, ...] = (4, 5, 3)) -> list[NDArray[np.uint8]]:
    """Write one image per name and return their pixels in the order of the names given."""
    values = pixels(len(names), *shape)
    for name, image in zip(names, values, strict=True):
        photo(folder / name, image)
    return list(values)


def channels_first(*images: Array, scale: float = 1 / 255) -> Array:
    return np.stack([normalized_exactly(image, scale, [0.0], [1.0]).transpose(2, 0, 1) for image in images])


def test_class_folders_are_labels(tmp_path: Path) -> None:
    cat, dog, fox = photos(tmp_path / "d", "b/2.png", "a/deep/3.PNG", "b/1.bmp")
    (tmp_path / "d" / "b" / "notes.txt").write_text("no image")
    dataset = open_dataset(tmp_path / "d", [IMAGES])
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [0, 1, 1]  # a/deep/3.PNG, b/1.bmp, b/2.png
    given = everything(dataset)["x"]
    np.testing.assert_array_equal(given, channels_first(dog, fox, cat), strict=True)
    np.testing.assert_array_equal(dataset.read(np.array([2, 0]))["x"], given[[2, 0]], strict=True)


@pytest.mark.parametrize("names", [("1.png", "2.png"), ("1.png", "a/2.png")])
def test_without_class_folders_there_are_no_labels(tmp_path: Path, names: tuple[str, ...]) -> None:
    photos(tmp_path, *names)
    dataset = open_dataset(tmp_path, [IMAGES])
    assert len(dataset) == 2
    assert dataset.labels is None


TABLE = "file,label,split\nb.png,7,val\nsub/c.png,2,train\na.png,5,val\n"


@pytest.mark.parametrize(
    ("split", "labels", "order"), [(None, [7, 2, 5], [1, 2, 0]), ("val", [7, 5], [1, 0]), ("train", [2], [2])]
)
def test_a_csv_names_files_and_labels(tmp_path: Path, split: str | None, labels: list[int], order: list[int]) -> None:
    images = photos(tmp_path / "d", "a.png", "b.png", "sub/c.png", "unnamed.png")
    (tmp_path / "l.csv").write_text(TABLE)
    dataset = open_dataset(tmp_path / "d", [IMAGES], labels=tmp_path / "l.csv", split=split)
    assert dataset.labels is not None
    assert dataset.labels.tolist() == labels
    np.testing.assert_array_equal(everything(dataset)["x"], channels_first(*(images[i] for i in order)), strict=True)


@pytest.mark.parametrize(
    ("table", "split", "told"),
    [
        pytest.param("file,label\n../x.png,1\n", None, "not under", id="outside"),
        pytest.param("file,label\nlink.png,1\n", None, "not under", id="outside by a link"),
        pytest.param("file,label\n/etc/passwd,1\n", None, "not under", id="absolute"),
        pytest.param("file,label\nmissing.png,1\n", None, "missing.png", id="no such file"),
        pytest.param("file,label\n.,1\n", None, "not under", id="the folder itself"),
        pytest.param("file,label\na.png,cat\n", None, "not an integer", id="a name for a label"),
        pytest.param("file,label\na.png,1.0\n", None, "not an integer", id="a real label"),
        pytest.param("file,label\na.png\n", None, "l.csv", id="a row cut short"),
        pytest.param("label,file\n1\n", None, "l.csv", id="a row without its file"),
        pytest.param("file,label\na.png,99999999999999999999\n", None, "l.csv", id="a label beyond int64"),
        pytest.param("name,label\na.png,1\n", None, "file, label", id="no column file"),
        pytest.param("file,class\na.png,1\n", None, "file, label", id="no column label"),
        pytest.param("file,label\na.png,1\n", "val", "split", id="no column split"),
        pytest.param("file,label,split\na.png,1,train\n", "val", "'val'", id="no row of the split"),
        pytest.param("file,label\n", None, "lacks rows", id="no rows"),
        pytest.param("", None, "lacks rows", id="nothing"),
        pytest.param("file,label\n\xff.png,1\n", None, "l.csv", id="not UTF-8"),
    ],
)
def test_a_csv_that_does_not_fit_the_folder_is_refused(
    tmp_path: Path, table: str, split: str | None, told: str
) -> None:
    photos(tmp_path, "d/a.png", "x.png")
    (tmp_path / "d" / "link.png").symlink_to(tmp_path / "x.png")
    (tmp_path / "l.csv").write_bytes(table.encode("latin-1"))
    with pytest.raises(DataError) as caught:
        open_dataset(tmp_path / "d", [IMAGES], labels=tmp_path / "l.csv", split=split)
    assert told in str(caught.value)


def test_a_csv_may_name_files_absolutely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (image,) = photos(tmp_path / "d", "a.png")
    (tmp_path / "l.csv").write_text(f"file,label\n{tmp_path / 'd' / 'a.png'},1\n")
    monkeypatch.chdir(tmp_path)
    dataset = open_dataset(Path("d"), [IMAGES], labels=Path("l.csv"))
    np.testing.assert_array_equal(everything(dataset)["x"], channels_first(image), strict=True)


@pytest.mark.parametrize(
    ("inputs", "how", "split", "told"),
    [
        pytest.param([spec(None, 5, 4, 6)], Preprocess(), None, "does not show", id="no channels to be seen"),
        pytest.param([spec(None, 3, 4, 3)], Preprocess(), None, "does not show", id="channels on both sides"),
        pytest.param([spec(None, None, None, None)], Preprocess(), None, "does not show", id="all free"),
        pytest.param([spec(None, 60)], Preprocess(), None, "not a batch of images", id="rows"),
        pytest.param([spec(None, 60)], Preprocess(layout="NCHW"), None, "'x'", id="rows with a layout"),
        pytest.param(
            [IMAGES, spec(None, 3, 4, 5, name="z")], Preprocess(), None, "single float input", id="two inputs"
        ),
        pytest.param([spec(None, 3, 4, 5, dtype="uint8")], Preprocess(), None, "single float input", id="integers"),
        pytest.param([IMAGES], Preprocess(), "val", "--labels", id="a split without labels"),
        pytest.param(
            [spec(None, 4, 4, 5)], Preprocess(layout="NCHW"), None, "takes shape [?, 4, 4, 5]", id="four channels"
        ),
        pytest.param([IMAGES], Preprocess(color="L"), None, "takes shape", id="gray for a model of colors"),
        pytest.param([IMAGES], Preprocess(size=2), None, "takes shape", id="another size than the model's"),
        pytest.param([IMAGES], Preprocess(crop=9), None, "crop of 9x9", id="a crop larger than the image"),
        pytest.param([IMAGES], Preprocess(mean=(1.0, 2.0)), None, "", id="two means for three channels"),
    ],
)
def test_a_folder_that_does_not_fit_the_model_is_refused(
    tmp_path: Path, inputs: list[InputSpec], how: Preprocess, split: str | None, told: str
) -> None:
    photos(tmp_path, "a.png")
    with pytest.raises(DataError) as caught:
        everything(open_dataset(tmp_path, inputs, how, split=split))
    assert told in str(caught.value)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        open_dataset(tmp_path, [IMAGES])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "gif", "tif", "ppm", "webp"])
def test_images_cut_short_are_read_or_refused(tmp_path: Path, suffix: str) -> None:
    path = photo(tmp_path / f"a.{suffix}", pixels(4, 5, 3))
    content = path.read_bytes()
    refused = []
    for length in range(0, len(content), max(1, len(content) // 60)):
        path.write_bytes(content[:length])
        try:
            everything(open_dataset(tmp_path, [IMAGES]))
        except DataError as error:
            refused.append(str(error))
    assert refused
    assert all(path.name in line for line in refused)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("suffix", ["png", "gif", "tif"])
def test_damaged_images_are_read_or_refused(tmp_path: Path, suffix: str) -> None:
    path = photo(tmp_path / f"a.{suffix}", pixels(4, 5, 3))
    content = path.read_bytes()
    refused = 0
    for position in range(min(len(content), 400)):
        path.write_bytes(damaged(content, position, position + 1))
        try:
            everything(open_dataset(tmp_path, [IMAGES]))
        except DataError:
            refused += 1
    assert refused > 0


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos(tmp_path, "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9)  # 20 pixels are more than twice as many
    with pytest.raises(DataError, match=r"bomb\.png"):
        everything(open_dataset(tmp_path, [IMAGES]))


def bilinear(image: Array, height: int, width: int) -> Array:
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        pytest.param(Preprocess(), lambda p: bilinear(p, 4, 5), id="the model's size"),
        pytest.param(Preprocess(size=(4, 5)), lambda p: bilinear(p, 4, 5), id="height and width"),
        pytest.param(Preprocess(crop=(4, 5)), lambda p: p[3:7, 7:12], id="a crop alone"),
        pytest.param(Preprocess(size=5, crop=(4, 5)), lambda p: bilinear(p, 5, 10)[:4, 2:7], id="shorter side"),
        pytest.param(Preprocess(size=(6, 7), crop=(4, 5)), lambda p: bilinear(p, 6, 7)[1:5, 1:6], id="pair and crop"),
    ],
)
def test_images_are_resized_and_cropped(tmp_path: Path, how: Preprocess, expected: Callable[[Array], Array]) -> None:
    (image,) = photos(tmp_path, "a.png", shape=(10, 20, 3))
    given = everything(open_dataset(tmp_path, [IMAGES], how))["x"]
    np.testing.assert_array_equal(given, channels_first(expected(image)), strict=True)


@pytest.mark.parametrize(("shape", "expected"), [((10, 21), (5, 10)), ((21, 10), (10, 5)), ((10, 10), (5, 5))])
def test_one_number_sizes_the_shorter_side(tmp_path: Path, shape: tuple[int, int], expected: tuple[int, int]) -> None:
    photos(tmp_path, "a.png", shape=(*shape, 3))
    given = everything(open_dataset(tmp_path, [spec(None, 3, None, None)], Preprocess(size=5)))["x"]
    assert given.shape == (1, 3, *expected)


def test_a_square_crop_takes_one_number(tmp_path: Path) -> None:
    (image,) = photos(tmp_path, "a.png", shape=(7, 9, 3))
    given = everything(open_dataset(tmp_path, [spec(None, 3, 5, 5)], Preprocess(crop=5)))["x"]
    np.testing.assert_array_equal(given, channels_first(image[1:6, 2:7]), strict=True)


def test_images_of_different_sizes_need_one(tmp_path: Path) -> None:
    photo(tmp_path / "a.png", pixels(4, 5, 3))
    photo(tmp_path / "b.png", pixels(5, 4, 3))
    free = spec(None, 3, None, None)
    with pytest.raises(DataError, match="differ in size"):
        everything(open_dataset(tmp_path, [free]))
    assert everything(open_dataset(tmp_path, [free], Preprocess(size=(4, 4))))["x"].shape == (2, 3, 4, 4)


@pytest.mark.parametrize(
    ("shape", "layout", "channels_last"),
    [
        ((None, 3, 6, 5), None, False),
        ((None, 6, 5, 3), None, True),
        ((1, 3, None, None), None, False),
        ((None, None, None, 3), None, True),
        ((None, 3, 4, 3), "NCHW", False),
        ((None, 4, 3, 3), "NHWC", True),
        ((None, None, None, None), "NHWC", True),
    ],
)
def test_the_layout_is_seen_or_said(
    tmp_path: Path, shape: tuple[int | None, ...], layout: Any, channels_last: bool
) -> None:
    size = (4, 3) if shape.count(3) == 2 else (6, 5)
    (image,) = photos(tmp_path, "a.png", shape=(*size, 3))
    given = everything(open_dataset(tmp_path, [spec(*shape)], Preprocess(layout=layout)))["x"]
    expected = channels_first(image)
    np.testing.assert_array_equal(given, expected.transpose(0, 2, 3, 1) if channels_last else expected, strict=True)


def test_gray_models_get_gray_images(tmp_path: Path) -> None:
    gray, color = pixels(4, 5), pixels(4, 5, 3)
    photo(tmp_path / "a.png", gray)
    photo(tmp_path / "b.png", color)
    luma = np.asarray(Image.fromarray(color).convert("L"))
    expected = channels_first(gray[..., None], luma[..., None])
    given = everything(open_dataset(tmp_path, [spec(None, 1, 4, 5)]))["x"]
    np.testing.assert_array_equal(given, expected, strict=True)
    said = everything(open_dataset(tmp_path, [spec(None, None, 4, 5)], Preprocess(color="L", layout="NCHW")))["x"]
    np.testing.assert_array_equal(said, expected, strict=True)


def test_color_models_get_gray_images_in_three_channels(tmp_path: Path) -> None:
    gray = pixels(4, 5)
    photo(tmp_path / "a.png", gray)
    given = everything(open_dataset(tmp_path, [IMAGES]))["x"]
    np.testing.assert_array_equal(given, channels_first(np.repeat(gray[..., None], 3, axis=2)), strict=True)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_bgr_turns_the_channels_after_normalizing(tmp_path: Path, layout: Any) -> None:
    (image,) = photos(tmp_path, "a.png")
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)  # of red, green, blue
    wanted = IMAGES if layout == "NCHW" else spec(None, 4, 5, 3)
    how = Preprocess(mean=mean, std=std, color="BGR", layout=layout)
    given = everything(open_dataset(tmp_path, [wanted], how))["x"]
    x = normalized_exactly(image, 1 / 255, list(mean), list(std))[None, ..., ::-1]
    np.testing.assert_array_equal(given, x.transpose(0, 3, 1, 2) if layout == "NCHW" else x, strict=True)


def test_a_given_scale_goes_before_the_default(tmp_path: Path) -> None:
    (image,) = photos(tmp_path, "a.png")
    given = everything(open_dataset(tmp_path, [IMAGES], Preprocess(scale=1.0)))["x"]
    np.testing.assert_array_equal(given, channels_first(image, scale=1.0), strict=True)


def test_sixteen_bit_images_are_not_clipped_in_silence(tmp_path: Path) -> None:
    deep = (np.arange(20, dtype=np.uint16) * 3000).reshape(4, 5)  # 0 … 57000 of 65535
    photo(tmp_path / "a.png", deep)
    try:
        given = everything(open_dataset(tmp_path, [spec(None, 1, 4, 5)]))["x"]
    except DataError:
        return  # refused aloud
    # Eight of the sixteen bits remain: a value is off by one step of 255 at most.
    assert np.abs(given[0, 0] - deep / 65535).max() <= 1 / 255 + U


def test_the_digest_follows_names_and_bytes_of_images(tmp_path: Path) -> None:
    photos(tmp_path, "a.png", "b.png")

    def digest() -> str:
        return open_dataset(tmp_path, [IMAGES]).digest

    first = digest()
    assert digest() == first
    (tmp_path / "note.txt").write_text("no image")
    assert digest() == first
    (tmp_path / "b.png").rename(tmp_path / "c.png")
    second = digest()
    photo(tmp_path / "c.png", np.zeros((4, 5, 3), dtype=np.uint8))
    assert len({first, second, digest()}) == 3


@pytest.mark.parametrize("field", [{"mean": ()}, {"std": ()}, {"std": (1.0, 0.0)}])
def test_preprocessing_without_meaning_is_refused(field: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="std"):
        Preprocess(**field)
