"""The world of the demo: every image has one purpose, decided by the seed."""

import numpy as np
import pytest

from lifelong_ray.datasets import DataSource, LabelledImages
from lifelong_ray.demo.world import World, change_image, make_world
from lifelong_ray.feedback import content_hash
from lifelong_ray.types import DataError

NAMES = tuple("abcdefghij")


def source(names: tuple[str, ...] = NAMES, num_each: int = 40) -> DataSource:
    rng = np.random.default_rng(0)

    def part(count: int) -> LabelledImages:
        labels = names * count
        images = tuple(rng.integers(0, 256, (6, 5, 1), np.uint8) for _ in labels)
        return LabelledImages(images, labels)

    return DataSource(part(num_each), part(10))


@pytest.fixture(scope="module")
def unchanged() -> World:
    """A world in which the change does nothing, so that images can be recognised."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lifelong_ray.demo.world.change_image", lambda pixels, rng: pixels)
        return make_world(source(), 0, num_operator=20)


def hashes(images: LabelledImages) -> set[str]:
    return {content_hash(image) for image in images.images}


def test_the_last_fifth_of_the_classes_is_new(unchanged: World) -> None:
    assert unchanged.old_classes == NAMES[:8]
    assert unchanged.new_classes == NAMES[8:]
    for images in (unchanged.base, unchanged.calm_traffic, unchanged.test_old):
        assert images.class_names == NAMES[:8]
    for images in (unchanged.operator, unchanged.test_new):
        assert images.class_names == NAMES[8:]
    for images in (unchanged.changed_traffic, unchanged.later_traffic):
        assert images.class_names == NAMES
    assert unchanged.test_drifted.class_names == NAMES[:8]


def test_every_image_has_one_purpose(unchanged: World) -> None:
    parts = [
        hashes(images)
        for images in (
            unchanged.base,
            unchanged.calm_traffic,
            unchanged.changed_traffic,
            unchanged.later_traffic,
            unchanged.operator,
            unchanged.test_old,
            unchanged.test_new,
        )
    ]

    assert all(parts)
    assert sum(map(len, parts)) == len(set.union(*parts)) == 10 * 40 + 10 * 10


def test_the_test_part_is_the_source_s_own(unchanged: World) -> None:
    assert hashes(unchanged.test_old) | hashes(unchanged.test_new) == hashes(source().test)
    assert hashes(unchanged.test_drifted) == hashes(unchanged.test_old)


def test_an_operator_labels_as_many_as_asked(unchanged: World) -> None:
    assert len(unchanged.operator) == 20


@pytest.fixture(scope="module")
def worlds() -> list[World]:
    """Two of one seed, and one of another."""
    return [make_world(source(), seed, num_operator=20) for seed in (1, 1, 2)]


@pytest.mark.parametrize(
    "part", ["base", "calm_traffic", "changed_traffic", "later_traffic", "operator"]
)
def test_the_world_is_decided_by_the_seed(worlds: list[World], part: str) -> None:
    one, same, other = (
        [image.tobytes() for image in getattr(world, part).images] for world in worlds
    )

    assert one == same
    assert one != other


def test_too_few_classes_or_images_are_refused() -> None:
    with pytest.raises(DataError, match=r"at least 4 classes, got \['a', 'b', 'c'\]"):
        make_world(source(("a", "b", "c")), 0, num_operator=20)
    with pytest.raises(DataError, match=r"class a has [0-9]+ images; the demo needs 20"):
        make_world(source(num_each=15), 0, num_operator=20)


@pytest.mark.parametrize("shape", [(8, 8, 1), (8, 8, 3), (5, 9, 1), (7, 4, 3)])
def test_the_change_keeps_shape_and_type(shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, shape, np.uint8)
    before = pixels.copy()

    changed = change_image(pixels, rng)

    assert changed.shape == shape
    assert changed.dtype == np.uint8
    assert not np.array_equal(changed, before)
    np.testing.assert_array_equal(pixels, before)
