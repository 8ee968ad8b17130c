"""cluster.yaml, against Ray's own schema and preparation: what `ray up` would check before it asks the cloud."""

from __future__ import annotations

import copy
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTER_FILE = Path(__file__).parents[1] / "cluster.yaml"


@pytest.fixture
def cluster() -> dict[str, Any]:
    return dict(yaml.safe_load(CLUSTER_FILE.read_text(encoding="utf-8")))


def schema() -> dict[str, Any]:
    path = Path(ray.autoscaler.__file__).with_name("ray-schema.json")
    return dict(json.loads(path.read_text(encoding="utf-8")))


def test_the_file_follows_rays_schema_and_its_defaults_fit(cluster: dict[str, Any]) -> None:
    """Alone, and as `ray up` sees it: with the provider's defaults filled in."""
    assert list(jsonschema.Draft7Validator(schema()).iter_errors(cluster)) == []
    filled = prepare_config(copy.deepcopy(cluster))
    validate_config(filled)
    assert filled["available_node_types"].keys() == cluster["available_node_types"].keys()


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("setup_comands",), ["true"]),
        (("max_workers",), "four"),
        (("docker", "imagee"), "rayproject/ray"),
        (("auth", "user"), "ubuntu"),
        (("available_node_types", "gpu_worker", "resource"), {"GPU": 4}),
        (("available_node_types", "gpu_worker", "resources"), {"GPU": 0.5}),
        (("head_start_ray_commands",), "ray start --head"),
    ],
)
def test_a_slip_of_the_pen_is_refused(cluster: dict[str, Any], place: tuple[str, ...], value: object) -> None:
    """An unknown key, or a value of the wrong type, at the top or below."""
    below = cluster
    for key in place[:-1]:
        below = below[key]
    below[place[-1]] = value
    with pytest.raises(jsonschema.ValidationError, match=place[-1] if "resources" not in place else "0.5"):
        jsonschema.validate(cluster, schema())
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(cluster))


@pytest.mark.parametrize(
    ("place", "value", "complaint"),
    [(("head_node_type",), "heda", "head_node_type"), (("max_workers",), -1, "-1")],
)
def test_a_cluster_that_cannot_start_is_refused(
    cluster: dict[str, Any], place: tuple[str, ...], value: object, complaint: str
) -> None:
    """The head's type must exist; the number of workers is at least 0."""
    cluster[place[0]] = value
    with pytest.raises((ValueError, jsonschema.ValidationError), match=complaint):
        validate_config(prepare_config(cluster))


def test_the_head_has_no_gpu_and_workers_with_gpus_come_and_go(cluster: dict[str, Any]) -> None:
    """Nothing is paid for while nothing runs but the head."""
    types = cluster["available_node_types"]
    head = types.pop(cluster["head_node_type"])
    assert "GPU" not in head["resources"]
    for worker in types.values():
        assert worker["resources"]["GPU"] >= 1
        assert worker["min_workers"] == 0 < worker["max_workers"] <= cluster["max_workers"]
    assert 0 < cluster["idle_timeout_minutes"] < 60


def test_every_node_asks_for_the_token_and_has_it(cluster: dict[str, Any]) -> None:
    """RAY_AUTH_MODE=token where Ray starts, the token at Ray's default path and readable by its owner only."""
    for commands in (cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"]):
        starts = [command for command in commands if "ray start" in command]
        assert len(starts) == 1
        assert "RAY_AUTH_MODE=token" in starts[0].partition("ray start")[0]
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "chmod 600 ~/.ray/auth_token" in cluster["setup_commands"]


def test_the_dashboard_listens_on_loopback_only(cluster: dict[str, Any]) -> None:
    """Reached through ssh by `ray dashboard cluster.yaml`."""
    start = next(command for command in cluster["head_start_ray_commands"] if "ray start" in command)
    assert "--dashboard-host=127.0.0.1" in start.split()


def test_the_nodes_have_the_versions_that_are_tested_here(cluster: dict[str, Any]) -> None:
    """The containers' Ray is the installed one, Python is 3.11, and the rest comes at the pinned versions."""
    for image in (cluster["docker"]["head_image"], cluster["docker"]["worker_image"]):
        assert image.startswith(f"rayproject/ray:{version('ray')}-py311")
    install = next(command for command in cluster["setup_commands"] if "--editable" in command)
    assert "--constraint ~/mpo_ray/constraints.txt" in install
