"""The settings tree: files that load, fields that explain themselves, errors that help."""

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lifelong_ray.config import Config, StepConfig, config_from, default_file, load_config
from lifelong_ray.types import ConfigError

ROOT = Path(__file__).parents[2]
LOCAL = ROOT / "conf" / "local.yaml"


def test_local_file_spells_out_the_embedded_default():
    assert LOCAL.read_text(encoding="utf-8") == default_file()
    assert load_config(LOCAL) == Config()


def test_local_file_names_every_key():
    tree = yaml.safe_load(LOCAL.read_text(encoding="utf-8"))

    written = set(leaf_keys(tree))

    assert written == set(leaf_keys(Config().model_dump()))


def test_cluster_file_loads_and_uses_object_storage_and_gpus():
    config = load_config(ROOT / "conf" / "cluster.yaml")

    assert config.store.url.startswith("s3://")
    assert config.training.gpus_per_worker > 0
    assert config.serving.front.num_gpus > 0


def test_cluster_batches_divide_among_the_training_workers():
    config = load_config(ROOT / "conf" / "cluster.yaml")

    trainers = (config.learning.base, config.learning.update.trainer)

    for trainer in trainers:
        assert trainer.num_shards % config.training.num_workers == 0
        assert trainer.batch_size % trainer.num_shards == 0


def branches(model: type[BaseModel] = Config) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from branches(field.annotation)


def fields() -> list[tuple[str, FieldInfo]]:
    models = dict.fromkeys([*branches(), StepConfig])
    return [(f"{m.__name__}.{name}", f) for m in models for name, f in m.model_fields.items()]


@pytest.mark.parametrize(("name", "field"), [pytest.param(*f, id=f[0]) for f in fields()])
def test_every_field_is_described_or_is_a_documented_branch(name: str, field: FieldInfo):
    kinds = [field.annotation, *get_args(field.annotation)]
    branch = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)

    explanation = field.description or (branch and branch.__doc__) or ""

    assert explanation.strip().endswith("."), f"{name} does not say what it does"


def test_branches_are_frozen_and_refuse_unknown_keys():
    assert all(b.model_config["frozen"] and b.model_config["extra"] == "forbid" for b in branches())


@pytest.mark.parametrize(
    ("override", "unknown", "nearest"),
    [
        ("gate.min_retentoin=0.9", "gate.min_retentoin", "min_retention"),
        ("learnin.seed=3", "learnin", "learning"),
        ("learning.update.ewc.lambda=3", "learning.update.ewc.lambda", "lambda_ewc"),
        ("rollout.steps=[{setWait: 5}]", "rollout.steps.0.setWait", "setWeight"),
    ],
)
def test_unknown_key_is_named_with_the_nearest_known_one(override, unknown, nearest):
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=(override,))

    assert f"unknown config key {unknown}" in str(caught.value)
    assert str(caught.value).endswith(nearest)


def test_value_out_of_bounds_is_named_with_its_key():
    with pytest.raises(
        ConfigError, match=r"gate\.min_retention is 1\.5: .*less than or equal to 1"
    ):
        load_config(overrides=("gate.min_retention=1.5",))


def test_override_wins_over_the_file():
    config = load_config(LOCAL, ("learning.seed=7", "serving.front.max_replicas=5"))

    assert config.learning.seed == 7
    assert config.serving.front.max_replicas == 5


def test_environment_decides_the_addresses(monkeypatch):
    monkeypatch.setenv("LIFELONG_STORE_URL", "s3://elsewhere/prefix")
    monkeypatch.setenv("LIFELONG_S3_ENDPOINT_URL", "http://127.0.0.1:9000")

    config = load_config(LOCAL, ("store.url=ignored",))

    assert config.store.url == "s3://elsewhere/prefix"
    assert config.store.endpoint_url == "http://127.0.0.1:9000"


def test_missing_file_is_an_error_that_names_the_one_to_start_from(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml does not exist; conf/local\.yaml"):
        load_config(tmp_path / "nowhere.yaml")


def test_file_that_is_not_yaml_is_an_error(tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("store: [", encoding="utf-8")

    with pytest.raises(ConfigError, match="is not YAML"):
        load_config(broken)


def test_empty_file_means_the_defaults(tmp_path):
    empty = tmp_path / "empty.yaml"
    empty.write_text("", encoding="utf-8")

    assert load_config(empty) == Config()


@pytest.mark.parametrize("step", [{}, {"shadow": 0.5, "pause": 10}])
def test_rollout_step_has_exactly_one_kind(step):
    with pytest.raises(ConfigError, match="exactly one of shadow, setWeight, pause"):
        config_from({"rollout": {"steps": [step]}})


@pytest.mark.parametrize("override", ["learning.seed", "=3"])
def test_override_without_key_or_value_is_an_error(override):
    with pytest.raises(ConfigError, match="not of the form"):
        load_config(overrides=(override,))


def leaf_keys(tree: object, path: str = "") -> Iterator[str]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaf_keys(value, f"{path}.{key}" if path else key)
    else:
        yield path


def test_a_setting_of_a_section_leaves_its_neighbours_at_their_defaults():
    config = load_config(None, ("learning.update.trainer.precision=bf16",))

    expected = Config().learning.update.trainer.model_copy(update={"precision": "bf16"})
    assert config.learning.update.trainer == expected


def test_an_override_that_is_not_yaml_is_named():
    with pytest.raises(ConfigError, match=r"'serving.port=\[' is not YAML"):
        load_config(None, ("serving.port=[",))


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("rollout.steps=[{pause: .inf}]", "rollout.steps.0.pause"),
        ("serving.batch_wait_s=.nan", "serving.batch_wait_s"),
        ("tuning.lambda_ewc=[0.1, .inf]", "tuning.lambda_ewc.1"),
    ],
)
def test_a_number_that_is_not_finite_is_refused(override, key):
    with pytest.raises(ConfigError, match=rf"{key} is (inf|nan): .*finite number"):
        load_config(None, (override,))


@pytest.mark.parametrize("ends", ["[0, 10]", "[10, 1]", "[-1, 1]"])
@pytest.mark.parametrize("key", ["lambda_ewc", "learning_rate"])
def test_a_range_to_search_goes_from_a_positive_number_to_a_larger_one(key, ends):
    with pytest.raises(ConfigError, match=rf"tuning.{key} is .*from a positive number to a larger"):
        load_config(None, (f"tuning.{key}={ends}",))


def test_a_folder_in_place_of_the_file_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be read: Is a directory"):
        load_config(tmp_path)


def test_a_file_in_another_encoding_is_an_error(tmp_path):
    file = tmp_path / "latin.yaml"
    file.write_bytes("store: {url: Schlüssel}".encode("latin-1"))

    with pytest.raises(ConfigError, match=r"latin\.yaml is not UTF-8 text"):
        load_config(file)
