"""cluster.yaml: what `ray up` would accept, and what it must not lose."""

import copy
import json
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cluster() -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    return tree


def test_file_matches_the_schema_of_ray(cluster):
    schema = json.loads((files("ray.autoscaler") / "ray-schema.json").read_text(encoding="utf-8"))

    jsonschema.validate(cluster, schema)


def test_ray_accepts_the_file_with_its_defaults_filled_in(cluster):
    prepared = prepare_config(copy.deepcopy(cluster))

    validate_config(prepared)
    assert prepared["head_node_type"] == "head"


def test_serving_gpus_stay_and_training_gpus_are_spot(cluster):
    types = cluster["available_node_types"]

    serving, training = types["serving_gpu"], types["training_gpu_spot"]

    assert serving["resources"]["GPU"] == 1
    assert "InstanceMarketOptions" not in serving["node_config"]
    assert training["resources"]["GPU"] == 1
    assert training["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert training["min_workers"] == 0


@pytest.mark.parametrize("place", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_ray_starts_with_the_token_and_the_settings_of_serve(cluster, place):
    (start,) = [command for command in cluster[place] if "ray start" in command]

    before = start.partition("ray start")[0]

    assert "export RAY_AUTH_MODE=token" in before
    assert "RAY_SERVE_ENABLE_HA_PROXY=1" in before
    assert "RAY_SERVE_THROUGHPUT_OPTIMIZED=1" in before


def test_dashboard_listens_on_loopback(cluster):
    (start,) = [c for c in cluster["head_start_ray_commands"] if "ray start" in c]

    assert "--dashboard-host=127.0.0.1" in start


def test_every_node_takes_its_rights_from_a_role_and_its_network_from_a_group(cluster):
    for node_type in cluster["available_node_types"].values():
        node = node_type["node_config"]

        assert node["IamInstanceProfile"]["Arn"]
        assert node["SecurityGroupIds"]
        assert node["MetadataOptions"]["HttpTokens"] == "required"
    assert "AWS_SECRET_ACCESS_KEY" not in str(cluster)


def test_spot_watcher_drains_with_a_reason_that_ray_knows(cluster):
    watcher = cluster["worker_start_ray_commands"][-1]

    reason = watcher.partition("--reason ")[2].split()[0]

    assert DrainNodeReason.Value(reason)
    assert "spot/instance-action" in watcher


def test_images_carry_the_tested_version_of_ray(cluster):
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    (pin,) = [line for line in constraints if line.startswith("ray==")]

    images = [
        cluster["docker"]["image"],
        cluster["docker"]["head_image"],
        cluster["available_node_types"]["cpu"]["docker"]["worker_image"],
    ]

    assert all(image.startswith(f"rayproject/ray:{pin.removeprefix('ray==')}-") for image in images)


def test_extra_that_the_nodes_install_exists(cluster):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    (install,) = [command for command in cluster["setup_commands"] if "pip install" in command]

    assert "'.[aws]'" in install
    assert "aws" in project["optional-dependencies"]


def test_workers_of_conf_cluster_fit_on_the_nodes(cluster):
    config = yaml.safe_load((ROOT / "conf" / "cluster.yaml").read_text(encoding="utf-8"))
    serving_node = cluster["available_node_types"]["serving_gpu"]
    training_node = cluster["available_node_types"]["training_gpu_spot"]
    front, slot = config["serving"]["front"], config["serving"]["slot"]

    gpus = sum(d["max_replicas"] * d["num_gpus"] for d in (front, slot))
    capacity = serving_node["max_workers"] * serving_node["resources"]["GPU"]

    assert gpus <= capacity
    assert config["training"]["cpus_per_worker"] <= training_node["resources"]["CPU"]
    assert config["training"]["gpus_per_worker"] <= training_node["resources"]["GPU"]
    assert config["training"]["num_workers"] <= training_node["max_workers"]
