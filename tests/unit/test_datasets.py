"""Labelled images from every kind of source, and what is said about bad ones."""

import dataclasses
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Dataset, Subset

from lifelong_ray.config import DataConfig
from lifelong_ray.datasets import (
    DataSource,
    LabelledImages,
    SourceArrays,
    as_arrays,
    as_source_arrays,
    class_order,
    from_torch_dataset,
    hold_out,
    load_parts,
    load_source,
    natural_order,
)
from lifelong_ray.datasets.parts import thinned
from lifelong_ray.types import DataError

PIXELS = np.zeros((2, 2, 1), np.uint8)


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

    for part, kept in ((whole.train, tenth.train), (whole.test, tenth.test)):
        for name, count in counts(part).items():
            assert counts(kept)[name] == pytest.approx(count / 10, abs=0.51)


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
            x_test=np.zeros((4, 5, 4, 3), np.uint8),
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

    source = load(write(x_train=(ramp / 255).astype(kind), x_test=ramp[:4]))

    np.testing.assert_array_equal(np.stack(source.train.images)[..., 0], ramp)


@pytest.mark.parametrize("kind", [np.uint8, np.int64, np.bool_, np.float32])
def test_black_and_white_images_are_the_same_whatever_their_numbers_are(
    write: Callable[..., Path], kind: type
) -> None:
    masks = np.random.default_rng(0).integers(0, 2, (8, 5, 4))

    source = load(write(x_train=masks.astype(kind), x_test=masks[:4]))

    np.testing.assert_array_equal(np.stack(source.train.images)[..., 0], masks * 255)
    np.testing.assert_array_equal(np.stack(source.test.images)[..., 0], masks[:4] * 255)


def test_dark_bytes_stay_dark_where_one_is_brighter_than_1(write: Callable[..., Path]) -> None:
    dark = np.zeros((8, 5, 4), np.uint8)
    dark[:, 0, 0], dark[3, 1, 1] = 1, 2

    source = load(write(x_train=dark))

    np.testing.assert_array_equal(np.stack(source.train.images)[..., 0], dark)


def test_a_column_of_labels_is_one_label_each(write: Callable[..., Path]) -> None:
    column = np.array([[0], [1]] * 4)

    source = load(write(y_train=column, y_test=np.array([["0"], ["1"]] * 2)))

    assert source.train.labels == ("0", "1") * 4
    assert source.test.labels == ("0", "1") * 2


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
        (
            {"x_train": np.zeros((8, 20))},
            r":train has shape \(8, 20\); .* reshape flattened images",
        ),
        ({"x_train": np.zeros((8, 5, 4, 2), np.uint8)}, r"expected \(N, H, W\)"),
        ({"y_train": np.array([0, 1])}, r"has 8 images and labels of shape \(2,\)"),
        ({"y_train": np.zeros((8, 2))}, r"labels of shape \(8, 2\); .* one-hot \(y.argmax\(1\)\)"),
        ({"y_train": np.zeros((1, 8))}, r"labels of shape \(1, 8\); give each image one label$"),
        ({"x_test": np.zeros((0, 5, 4)), "y_test": np.zeros(0)}, ":test holds no images"),
        ({"x_train": np.full((8, 5, 4), np.nan)}, ":train holds values that are not finite"),
        ({"x_train": np.full((8, 5, 4), np.inf)}, "not finite"),
        ({"x_train": np.full((8, 5, 4), -1)}, r"lies in \[-1.0, -1.0\]"),
        ({"x_train": np.full((8, 5, 4), 256)}, r"lies in \[256.0, 256.0\]"),
        ({"x_train": np.full((8, 5, 4), "a")}, ":train has images of <U1; expected numbers"),
        ({"x_train": np.full((8, 5, 4), None)}, "not a readable .npz of plain arrays"),
        ({"y_train": np.array([0, 1, np.nan, 1] * 2)}, "labels that are not whole numbers"),
        ({"y_train": np.array([0, 1.5, 1, 1] * 2)}, "labels that are not whole numbers"),
        ({"y_test": np.array([0, 2] * 2)}, r"outside the classes of its train part: \['2'\]; add"),
        ({"y_train": np.zeros(8)}, r"has 1 class\(es\); a classifier needs at least two, so add"),
        (
            {"x_test": np.zeros((4, 5, 5), np.uint8)},
            r"train images are \(5, 4, 1\) and the test images \(5, 5, 1\) .* save both at one",
        ),
        (
            {"x_test": np.zeros((4, 5, 4, 3), np.uint8)},
            r"train images are \(5, 4, 1\) and the test images \(5, 4, 3\)",
        ),
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


@pytest.mark.parametrize("name", ["Fashion", "mnist"])
def test_an_unknown_torchvision_name_is_answered_with_known_ones(name: str) -> None:
    with pytest.raises(DataError, match=f"no data set {name}; try MNIST"):
        load(f"torchvision:{name}")


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


def test_a_torchvision_set_in_two_splits_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Numbers:
        def __init__(self, root: str, split: str, download: bool) -> None:
            assert not download
            self.first = {"train": 0, "test": 10}[split]

        def __len__(self) -> int:
            return 4

        def __getitem__(self, i: int) -> tuple[Image.Image, int]:
            return Image.new("RGB", (4, 3), (self.first + i, 0, 0)), i % 2

    monkeypatch.setattr(torchvision.datasets, "SVHN", Numbers)

    source = load("torchvision:SVHN", folder=str(tmp_path))

    assert as_arrays(source.train).images[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert as_arrays(source.test).images[:, 0, 0, 0].tolist() == [10, 11, 12, 13]


def test_cifar100_is_read_from_its_folder(cifar100: Path) -> None:
    source = load("torchvision:CIFAR100", folder=str(cifar100))

    by_item = torchvision.datasets.CIFAR100(str(cifar100), train=False)
    assert source.train.class_names == tuple(f"c{i:02}" for i in range(100))
    np.testing.assert_array_equal(source.test.images[7], np.asarray(by_item[7][0]))
    assert source.test.labels[7] == by_item.classes[by_item[7][1]]


def test_cifar100_in_two_parts_follows_the_order_of_the_literature(cifar100: Path) -> None:
    config = DataConfig(source="cifar100-50+50", folder=str(cifar100))

    base, update = load_parts(config, seed=0)

    order = [f"c{i:02}" for i in class_order(100, 1993)]
    assert set(base.train.class_names) == set(base.test.class_names) == set(order[:50])
    assert set(update.train.class_names) == set(order[50:])
    assert load_source(config, seed=0).train.labels == base.train.labels


def test_cifar100_cannot_be_split_twice(cifar100: Path) -> None:
    with pytest.raises(DataError, match=r"data\.split is \[60, 40\]; leave one out"):
        load("cifar100-50+50", folder=str(cifar100), split=(60, 40))


# ---------------------------------------------------------------- parts


def test_any_source_can_arrive_in_parts() -> None:
    config = DataConfig(source="digits", split=(6, 3, 1))

    parts = load_parts(config, seed=0)

    assert [p.train.class_names for p in parts] == [tuple("012345"), tuple("678"), ("9",)]
    assert [p.test.class_names for p in parts] == [tuple("012345"), tuple("678"), ("9",)]
    assert sum(len(p.train) + len(p.test) for p in parts) == 1_797


def test_a_base_starts_from_the_first_part_only() -> None:
    assert load("digits", split=(6, 4)).train.class_names == tuple("012345")


@pytest.mark.parametrize("split", [(5, 4), (10, 1), (3,)])
def test_a_split_that_does_not_add_up_is_refused(split: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"the split .* and digits has 10; let the numbers"):
        load("digits", split=split)


def test_a_seed_of_a_split_that_is_none_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    load("digits", split_seed=1993)

    assert "data.split_seed has no effect" in caplog.text


def test_a_fraction_and_classes_apply_to_every_part() -> None:
    config = DataConfig(
        source="digits", classes=("1", "3", "5", "7"), split=(2, 2), split_seed=1, fraction=0.1
    )

    parts = load_parts(config, seed=0)

    assert {n for p in parts for n in p.train.class_names} == {"1", "3", "5", "7"}
    assert all(10 <= n <= 16 for p in parts for n in counts(p.train).values())


@given(labels=st.lists(st.sampled_from("abc"), min_size=1), fraction=st.floats(0.001, 1))
def test_thinning_keeps_some_of_every_class(labels: list[str], fraction: float) -> None:
    images = LabelledImages((PIXELS,) * len(labels), tuple(labels))

    kept = counts(thinned(images, fraction, np.random.default_rng(0)))

    assert kept == {
        name: min(count, max(2, round(fraction * count))) for name, count in counts(images).items()
    }


@given(labels=st.lists(st.sampled_from("abc"), min_size=1), seed=st.integers(0, 9))
def test_holding_out_loses_no_image(labels: list[str], seed: int) -> None:
    whole = np.arange(len(labels), dtype=np.uint8)[:, None, None, None]
    images = LabelledImages.from_array(whole, tuple(labels))

    source = hold_out(images, np.random.default_rng(seed))

    found = [(int(i[0, 0, 0]), label) for part in (source.train, source.test)
             for i, label in zip(part.images, part.labels, strict=True)]  # fmt: skip
    assert sorted(found) == list(enumerate(labels))
    assert set(source.train.labels) == set(labels)


# ---------------------------------------------------------------- whole arrays


@given(
    labels=st.lists(st.sampled_from(["b", "10", "2"]), min_size=1, max_size=20),
    data=st.data(),
)
def test_whole_arrays_are_the_images_one_by_one(labels: list[str], data: st.DataObject) -> None:
    pixels = np.arange(len(labels) * 4, dtype=np.uint8).reshape(-1, 2, 2, 1)
    chosen = data.draw(st.lists(st.integers(0, len(labels) - 1), min_size=1))

    held = LabelledImages.from_array(pixels, tuple(labels)).take(chosen).repeated(2)
    arrays = as_arrays(held.take(range(1, len(held))))

    assert arrays.images.tolist() == [pixels[i].tolist() for i in (chosen * 2)[1:]]
    assert [arrays.class_names[i] for i in arrays.labels] == [labels[i] for i in (chosen * 2)[1:]]
    assert arrays.labels.dtype == np.int64


def test_a_whole_source_is_handed_out_without_a_copy_and_cannot_be_written_to(
    write: Callable[..., Path],
) -> None:
    source = load(write())

    arrays = as_arrays(source.train)

    assert arrays.images is as_arrays(source.train).images
    assert np.shares_memory(arrays.images, source.train.images[3])
    with pytest.raises(ValueError, match="read-only"):
        arrays.images[0] = 0
    with pytest.raises(ValueError, match="read-only"):
        source.train.images[0][:] = 0


def test_choosing_images_copies_no_pixels() -> None:
    pixels = np.zeros((6, 2, 2, 1), np.uint8)

    chosen = LabelledImages.from_array(pixels, ("a", "b") * 3).of_classes(("b",))

    assert all(np.shares_memory(image, pixels) for image in chosen.images)


def test_replaced_images_are_not_those_of_the_old_array() -> None:
    images = LabelledImages.from_array(np.zeros((2, 2, 2, 1), np.uint8), ("a", "b"))

    brighter = dataclasses.replace(images, images=tuple(i + 1 for i in images.images))

    assert as_arrays(brighter).images.min() == 1


def test_labels_count_in_the_classes_that_are_given() -> None:
    images = LabelledImages((PIXELS, PIXELS), ("b", "c"))

    assert as_arrays(images, ("c", "a", "b")).labels.tolist() == [2, 0]


def test_images_of_several_sizes_make_no_whole_array() -> None:
    images = LabelledImages((PIXELS, np.zeros((3, 2, 1), np.uint8)), ("a", "b"))

    with pytest.raises(DataError, match=r"2 different shapes, such as \(2, 2, 1\) and \(3, 2, 1\)"):
        as_arrays(images)


def test_a_class_that_is_not_listed_is_named() -> None:
    images = LabelledImages((PIXELS, PIXELS), ("a", "b"))

    with pytest.raises(DataError, match=r"labels \['b'\] are outside the classes \['a'\]; list"):
        as_arrays(images, ("a",))


def test_no_images_make_no_array() -> None:
    with pytest.raises(DataError, match="there are no images"):
        as_arrays(LabelledImages((), ()))


def test_images_without_labels_are_refused() -> None:
    with pytest.raises(DataError, match="2 images and 1 labels; give each image one label"):
        LabelledImages((PIXELS, PIXELS), ("a",))


def test_both_parts_share_one_list_of_classes(write: Callable[..., Path]) -> None:
    source = load(write(y_test=np.ones(4, int)))

    arrays = as_source_arrays(source)

    assert arrays.class_names == ("0", "1")
    assert arrays.test_labels.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"class_names": ("a",)}, r"the classes are \['a'\]; give at least two"),
        ({"class_names": ("a", "a")}, "give at least two different names"),
        ({"train_labels": np.array([0, 2])}, "train labels lie in 0 to 2, outside the 2 classes"),
        ({"test_labels": np.array([-1, 0])}, "test labels lie in -1 to 0"),
        ({"test_labels": np.array([0])}, r"2 images and int64 labels of shape \(1,\); give each"),
        ({"train_labels": np.array([0.0, 1])}, "float64 labels"),
        ({"train_images": np.zeros((2, 2, 2, 1))}, "train images are float64 of shape"),
        ({"train_images": np.zeros((2, 2, 2), np.uint8)}, "give uint8 of shape"),
        ({"test_images": np.zeros((2, 3, 2, 1), np.uint8)}, "save both at one size"),
        (
            {"test_images": np.zeros((0, 2, 2, 1), np.uint8), "test_labels": np.zeros(0, int)},
            "test part holds no images",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_refused(changed: dict[str, Any], message: str) -> None:
    images, labels = np.zeros((2, 2, 2, 1), np.uint8), np.array([0, 1])
    fitting = {
        "train_images": images,
        "train_labels": labels,
        "test_images": images,
        "test_labels": labels,
        "class_names": ("a", "b"),
    }

    with pytest.raises(DataError, match=message):
        SourceArrays(**(fitting | changed))


# ---------------------------------------------------------------- PyTorch data sets

GREY = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
COLOUR = np.stack([GREY, GREY // 2, GREY // 4], axis=2)


class Items(Dataset[Any]):
    """A map-style data set of what it is given."""

    def __init__(self, *items: Any, classes: Sequence[str] | None = None) -> None:
        self.items = items
        if classes is not None:
            self.classes = classes

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        return self.items[i]


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(GREY),
        GREY,
        GREY[:, :, None],
        (GREY / 255).astype(np.float32),
        GREY * 1.0,
        torch.from_numpy(GREY),
        torch.from_numpy(GREY)[None],
        torch.from_numpy(GREY)[None] / 255,
        torch.from_numpy(GREY / 255).requires_grad_(),
    ],
    ids=["pil", "hw", "hwc", "0to1", "0to255", "tensor", "chw", "unit_tensor", "with_grad"],
)
def test_grey_images_of_every_kind_are_the_same(image: Any) -> None:
    images = from_torch_dataset(Items((image, 0), (image, 1)))

    np.testing.assert_array_equal(images.images[1], GREY[:, :, None], strict=True)
    assert images.labels == ("0", "1")


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(COLOUR),
        Image.fromarray(COLOUR).convert("RGBA"),
        COLOUR,
        COLOUR / 255,
        torch.from_numpy(COLOUR).permute(2, 0, 1),
    ],
    ids=["pil", "rgba", "hwc", "0to1", "chw"],
)
def test_colour_images_of_every_kind_are_the_same(image: Any) -> None:
    images = from_torch_dataset(Items((image, 0)))

    np.testing.assert_array_equal(as_arrays(images).images[0], COLOUR, strict=True)


def test_transparent_parts_are_laid_on_white() -> None:
    images = from_torch_dataset(Items((Image.new("RGBA", (2, 2), (9, 9, 9, 0)), 0)))

    assert images.images[0].min() == 255


def test_a_dark_image_among_bright_ones_stays_dark() -> None:
    images = from_torch_dataset(Items((np.ones((2, 2)), 0), (np.full((2, 2), 255.0), 1)))

    assert images.images[0].max() == 1


@pytest.mark.parametrize("kind", [np.uint8, np.int64, np.bool_, np.float32])
def test_black_and_white_items_are_the_same_whatever_their_numbers_are(kind: type) -> None:
    images = from_torch_dataset(Items((np.eye(2).astype(kind), 0), (np.zeros((2, 2), kind), 1)))

    assert images.images[0][..., 0].tolist() == [[255, 0], [0, 255]]
    assert images.images[1].max() == 0


def test_sizes_may_differ_and_further_parts_of_an_item_are_ignored() -> None:
    images = from_torch_dataset(Items((GREY, 0, "task"), [GREY[:, :2], 1]))

    assert [i.shape for i in images.images] == [(2, 3, 1), (2, 2, 1)]


@pytest.mark.parametrize("label", [1, np.int64(1), torch.tensor(1), 1.0, "dog"])
def test_labels_of_every_kind_name_their_class(label: Any) -> None:
    images = from_torch_dataset(Items((GREY, label)), class_names=("cat", "dog"))

    assert images.labels == ("dog",)


def test_a_data_set_that_knows_its_classes_names_them_also_as_a_subset() -> None:
    whole = Items((GREY, 0), (GREY, 1), classes=["cat", "dog"])

    assert from_torch_dataset(whole).labels == ("cat", "dog")
    assert from_torch_dataset(Subset(whole, [1])).labels == ("dog",)
    assert from_torch_dataset(whole, ("a", "b")).labels == ("a", "b")


def nan_image() -> np.ndarray:
    return np.array([[0.5, np.nan]])


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ((), "Items holds no items; give it at least one"),
        ((GREY,), r"item 0 of Items is a ndarray without a label; items are \(image, label\)"),
        (((GREY,),), "item 0 of Items is a tuple without a label"),
        (
            ((GREY, 0), (GREY, 2)),
            r"item 1 of Items has the label 2, .* outside the 2 classes",
        ),
        (((GREY, -1),), "has the label -1, which is outside"),
        (((GREY, "ape"),), r"has the label 'ape', which is outside the classes \['cat', 'dog'\]"),
        (((GREY, 0.5),), r"has a label of float64 and shape \(\); give one whole number"),
        (((GREY, np.nan),), "has a label of float64"),
        (((GREY, np.inf),), "has a label of float64"),
        (((GREY, None),), "has a label of object"),
        (((GREY, np.array([0, 1])),), r"has a label of int64 and shape \(2,\)"),
        (((GREY, 0), (nan_image(), 0)), "item 1 of Items has pixels that are not finite"),
        (((torch.tensor([[np.inf]]), 0),), "has pixels that are not finite"),
        (((GREY, 0), (COLOUR, 1)), r"item 1 of Items has 3 channel\(s\) and item 0 has 1; convert"),
        (((GREY - 0.5, 0),), r"Items lies in \[-0.5, 199.5\]; .* before they are normalised"),
        (((np.full((2, 2), "a"), 0),), "has images of <U1; expected numbers"),
        (((np.zeros((2, 2, 2)), 0),), r"type ndarray and shape \(2, 2, 2\); expected \(H, W\) or"),
        (((np.zeros((0, 2)), 0),), r"shape \(0, 2, 1\)"),
        (((torch.zeros(2, 2, 3), 0),), r"type Tensor and shape \(2, 2, 3\); .* \(1 or 3, H, W\)"),
        (((torch.zeros(2, 2, dtype=torch.bfloat16), 0),), "no array of numbers"),
        (((Image.new("I", (2, 2)), 0),), "PIL image of mode I; convert it to L"),
    ],
)
def test_items_that_are_none_are_named(items: tuple[Any, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_torch_dataset(Items(*items), class_names=("cat", "dog"))


@pytest.mark.parametrize("names", [("a", "a"), ("a", " ")])
def test_classes_need_names_of_their_own(names: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match="give each class a name of its own"):
        from_torch_dataset(Items((GREY, 0)), class_names=names)


def test_an_empty_text_is_no_label() -> None:
    with pytest.raises(DataError, match="item 0 of mine has an empty label"):
        from_torch_dataset(Items((GREY, "")), name="mine")


def test_a_stream_is_no_map_style_data_set() -> None:
    with pytest.raises(DataError, match="has no length or no items; give a map-style Dataset"):
        from_torch_dataset(iter([(GREY, 0)]))


# ---------------------------------------------------------------- functions of one's own


@pytest.fixture
def own_module(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def put(**functions: Any) -> None:
        module = types.ModuleType("own_data")
        for name, function in functions.items():
            setattr(module, name, function)
        monkeypatch.setitem(sys.modules, "own_data", module)

    return put


def items_of(num: int, *labels: int) -> Items:
    return Items(*((GREY, label) for label in labels for _ in range(num)))


def test_a_function_gives_train_and_test(own_module: Callable[..., None]) -> None:
    own_module(make=lambda: (items_of(4, 0, 1), items_of(2, 0, 1)))

    source = load("own_data:make")

    assert (counts(source.train), counts(source.test)) == ({"0": 4, "1": 4}, {"0": 2, "1": 2})


def test_one_data_set_of_a_function_gives_a_fifth_to_the_test(
    own_module: Callable[..., None],
) -> None:
    own_module(make=lambda: items_of(10, 0, 1))

    source = load("own_data:make", fraction=0.5)

    assert (counts(source.train), counts(source.test)) == ({"0": 4, "1": 4}, {"0": 2, "1": 2})


def test_a_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own_data:make").mkdir()

    with pytest.raises(DataError, match="data folder own_data:make holds no images"):
        load("own_data:make")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no_such.module:make", "names a module that cannot be imported: .*; is its folder on"),
        ("own_data:other", "own_data has no function other; .* takes no arguments"),
        ("own_data:number", "own_data has no function number"),
        ("own_data:fails", "own_data:fails failed when it was called: KeyError"),
        ("own_data:needs", "own_data:needs failed when it was called: TypeError"),
        ("own_data:three", "own_data:three returned 3 things; return"),
        ("own_data:nothing", "own_data:nothing has no length"),
        ("own_data:empty", "own_data:empty:test holds no items"),
        ("own_data:one_class", "has 1 class"),
    ],
)
def test_functions_that_give_no_data_are_refused(
    own_module: Callable[..., None], source: str, message: str
) -> None:
    def fails() -> None:
        raise KeyError("x")

    own_module(
        number=3,
        fails=fails,
        needs=lambda path: None,
        three=lambda: (1, 2, 3),
        nothing=lambda: None,
        empty=lambda: (items_of(1, 0, 1), Items()),
        one_class=lambda: items_of(4, 0),
    )

    with pytest.raises(DataError, match=message):
        load(source)


# ---------------------------------------------------------------- order


def test_classes_are_in_natural_order() -> None:
    assert sorted(["10", "b", "2", "a"], key=natural_order) == ["2", "10", "a", "b"]
