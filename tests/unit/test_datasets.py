"""Labelled images from every kind of source, and what is said about bad ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lifelong_ray.config import DataConfig
from lifelong_ray.datasets import DataSource, LabelledImages, load_source, natural_order
from lifelong_ray.types import DataError


def load(source: str | Path, seed: int = 0, **settings: Any) -> DataSource:
    return load_source(DataConfig(source=str(source), **settings), seed)


def counts(images: LabelledImages) -> dict[str, int]:
    return {name: images.labels.count(name) for name in images.class_names}


# ---------------------------------------------------------------- digits


def test_digits_have_ten_classes_and_a_fifth_of_each_for_the_test() -> None:
    source = load("digits")

    assert source.train.class_names == source.test.class_names == tuple("0123456789")
    assert len(source.train) + len(source.test) == 1_797
    assert len(source.test) == pytest.approx(1_797 / 5, abs=10)
    assert source.train.images[0].shape == (16, 16, 1)
    assert source.train.images[0].dtype == np.uint8


def test_no_image_is_in_both_parts() -> None:
    source = load("digits")

    train = {image.tobytes() for image in source.train.images}

    assert not any(image.tobytes() in train for image in source.test.images)


def test_the_split_is_decided_by_the_seed() -> None:
    one, same, other = load("digits", 1), load("digits", 1), load("digits", 2)

    assert [i.tobytes() for i in one.test.images] == [i.tobytes() for i in same.test.images]
    assert [i.tobytes() for i in one.test.images] != [i.tobytes() for i in other.test.images]


def test_a_fraction_thins_every_class_of_both_parts() -> None:
    whole, tenth = load("digits"), load("digits", fraction=0.1)

    for part, thinned in ((whole.train, tenth.train), (whole.test, tenth.test)):
        for name, count in counts(part).items():
            assert counts(thinned)[name] == pytest.approx(count / 10, abs=0.51)


def test_a_tiny_fraction_keeps_two_images_of_every_class() -> None:
    source = load("digits", fraction=0.0001)

    assert set(counts(source.train).values()) == {2}


def test_classes_can_be_chosen() -> None:
    source = load("digits", classes=("3", "8"))

    assert source.train.class_names == source.test.class_names == ("3", "8")


def test_an_unknown_class_is_named_with_those_there_are() -> None:
    with pytest.raises(DataError, match=r"\['ten'\], which digits does not have; it has \['0'"):
        load("digits", classes=("3", "ten"))


def test_one_class_is_not_enough() -> None:
    with pytest.raises(DataError, match="needs at least two"):
        load("digits", classes=("3",))


# ---------------------------------------------------------------- .npz


@pytest.fixture
def arrays() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (8, 5, 4), np.uint8),
        "y_train": np.array([0, 1] * 4),
        "x_test": rng.integers(0, 256, (4, 5, 4), np.uint8),
        "y_test": np.array([0, 1] * 2),
    }


@pytest.fixture
def write(tmp_path: Path, arrays: dict[str, Any]) -> Callable[..., Path]:
    def save(**changed: Any) -> Path:
        kept = {k: v for k, v in (arrays | changed).items() if v is not None}
        np.savez(tmp_path / "data.npz", **kept)
        return tmp_path / "data.npz"

    return save


def test_an_npz_is_read_as_it_is(write: Callable[..., Path], arrays: dict[str, Any]) -> None:
    source = load(write())

    assert source.train.labels == ("0", "1") * 4
    np.testing.assert_array_equal(
        np.stack(source.train.images), arrays["x_train"][:, :, :, None], strict=True
    )
    assert len(source.test) == 4


def test_colour_images_and_names_of_classes_are_kept(write: Callable[..., Path]) -> None:
    source = load(
        write(
            x_train=np.zeros((4, 5, 4, 3), np.uint8),
            y_train=np.array(["cat", "dog", "cat", "dog"]),
            y_test=np.array([b"cat", b"dog", b"cat", b"dog"]),
        )
    )

    assert source.train.images[0].shape == (5, 4, 3)
    assert source.train.class_names == source.test.class_names == ("cat", "dog")


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_numbers_from_0_to_1_come_back_to_the_same_pixels(
    write: Callable[..., Path], arrays: dict[str, Any], kind: type
) -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(8, 8, 4)

    source = load(write(x_train=(ramp / 255).astype(kind)))

    np.testing.assert_array_equal(np.stack(source.train.images)[..., 0], ramp)


def test_numbers_from_0_to_255_and_whole_float_labels_are_taken(
    write: Callable[..., Path], arrays: dict[str, Any]
) -> None:
    source = load(write(x_train=arrays["x_train"] * 1.0, y_train=arrays["y_train"] * 1.0))

    np.testing.assert_array_equal(np.stack(source.train.images)[..., 0], arrays["x_train"])
    assert source.train.class_names == ("0", "1")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0, 1j] * 4), "labels of complex128"),
        (np.array(["2024-01-01", "2024-01-02"] * 4, dtype="datetime64[D]"), "labels of datetime64"),
        (np.array(["cat", ""] * 4), "an empty label"),
        (np.array([b"cat", b" "] * 4), "an empty label"),
    ],
    ids=["complex", "dates", "empty", "blank"],
)
def test_labels_that_name_no_class_are_refused(
    write: Callable[..., Path], labels: np.ndarray, message: str
) -> None:
    with pytest.raises(DataError, match=f"data.npz:train has {message}"):
        load(write(y_train=labels))


def test_complex_images_are_refused(write: Callable[..., Path], arrays: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="has images of complex128"):
        load(write(x_train=arrays["x_train"] * 1j))


def test_a_missing_npz_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.npz does not exist"):
        load(tmp_path / "nothing.npz")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"y_test": None}, r"lacks \['y_test'\]; it holds .* and needs"),
        ({"x_train": np.zeros((8, 20))}, r":train has shape \(8, 20\); expected"),
        ({"x_train": np.zeros((8, 5, 4, 2), np.uint8)}, r"expected \(N, H, W\)"),
        ({"y_train": np.array([0, 1])}, r"has 8 images and labels of shape \(2,\)"),
        ({"y_train": np.zeros((8, 1))}, r"labels of shape \(8, 1\)"),
        ({"x_test": np.zeros((0, 5, 4)), "y_test": np.zeros(0)}, ":test holds no images"),
        ({"x_train": np.full((8, 5, 4), np.nan)}, ":train holds values that are not finite"),
        ({"x_train": np.full((8, 5, 4), np.inf)}, "not finite"),
        ({"x_train": np.full((8, 5, 4), -1)}, r"lies in \[-1.0, -1.0\]"),
        ({"x_train": np.full((8, 5, 4), 256)}, r"lies in \[256.0, 256.0\]"),
        ({"x_train": np.full((8, 5, 4), "a")}, ":train has images of <U1; expected numbers"),
        ({"x_train": np.full((8, 5, 4), None)}, "not a readable .npz of plain arrays"),
        ({"y_train": np.array([0, 1, np.nan, 1] * 2)}, "labels that are not whole numbers"),
        ({"y_train": np.array([0, 1.5, 1, 1] * 2)}, "labels that are not whole numbers"),
    ],
)
def test_a_malformed_npz_says_what_is_wrong(
    write: Callable[..., Path], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load(write(**changed))


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 cut"])
def test_bytes_that_are_no_npz_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "data.npz"
    path.write_bytes(content)

    with pytest.raises(DataError, match=r"data\.npz is not a readable \.npz"):
        load(path)


def test_a_single_array_is_no_npz(tmp_path: Path) -> None:
    with (tmp_path / "data.npz").open("wb") as file:
        np.save(file, np.zeros(3))

    with pytest.raises(DataError, match="is not a readable"):
        load(tmp_path / "data.npz")


def test_a_truncated_npz_is_refused(write: Callable[..., Path]) -> None:
    path = write()
    path.write_bytes(path.read_bytes()[:-100])

    with pytest.raises(DataError, match="is not a readable"):
        load(path)


# ---------------------------------------------------------------- folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(10):
            pixels = rng.integers(0, 256, (6, 4, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    return tmp_path


def test_a_folder_has_one_folder_per_class(folder: Path) -> None:
    (folder / "cat" / "notes.txt").write_text("not an image")
    (folder / ".cache").mkdir()
    Image.new("L", (4, 4)).save(folder / ".cache" / "x.png")

    source = load(folder)

    assert counts(source.train) == {"cat": 8, "dog": 8}
    assert counts(source.test) == {"cat": 2, "dog": 2}
    assert source.train.images[0].shape == (6, 4, 3)


def test_files_are_decoded_as_serving_decodes_them(folder: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    for number in range(10):
        image = Image.new("L", (6, 4), number)
        image.putpixel((0, 0), 255)
        image.save(folder / "dog" / f"{number}.png", exif=turned)

    source = load(folder)

    dog = source.train.images[source.train.labels.index("dog")]
    assert dog.shape == (6, 4, 1)
    assert dog[0, 3] == 255


def test_a_folder_that_does_not_exist_is_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere does not exist; data\.source is digits, torch"):
        load(tmp_path / "nowhere")


def test_an_empty_folder_is_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no images; expected one folder per class"):
        load(tmp_path)


def test_a_broken_image_is_named(folder: Path) -> None:
    (folder / "dog" / "3.png").write_bytes(b"not a picture")

    with pytest.raises(DataError, match=r"dog/3\.png cannot be read as an image"):
        load(folder)


# ---------------------------------------------------------------- torchvision


def test_an_unknown_torchvision_name_is_answered_with_known_ones() -> None:
    with pytest.raises(DataError, match="no data set Fashion; try MNIST"):
        load("torchvision:Fashion")


def test_torchvision_files_that_are_not_there_are_not_downloaded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="put its files there first, nothing is downloaded"):
        load("torchvision:FashionMNIST", folder=str(tmp_path))


def test_a_torchvision_set_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no train and test part"):
        load("torchvision:FakeData", folder=str(tmp_path))


def test_torchvision_classes_come_by_name(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    labels = np.array([0, 1] * 10, np.uint8)
    images = np.arange(20 * 28 * 28, dtype=np.uint8).reshape(20, 28, 28)
    for part in ("train", "t10k"):
        header = np.array([0x803, 20, 28, 28], ">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = np.array([0x801, 20], ">i4").tobytes()
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())

    source = load("torchvision:FashionMNIST", folder=str(tmp_path))

    assert source.train.class_names == ("T-shirt/top", "Trouser")
    np.testing.assert_array_equal(source.train.images[1][:, :, 0], images[1])
    assert len(source.test) == 20


# ---------------------------------------------------------------- order


def test_classes_are_in_natural_order() -> None:
    assert sorted(["10", "b", "2", "a"], key=natural_order) == ["2", "10", "a", "b"]
