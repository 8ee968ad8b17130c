"""How a run file is read: YAML, `--set`, environment variables."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from mpo_ray.config import ConfigError
from mpo_ray.run_file import load_config, parse_config
from tests.run_files import MINIMAL, complaint


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    """An empty file, a list, a word."""
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"run\.yaml: a run file is a mapping of keys"):
        load_config(path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    """Missing, a directory, not UTF-8, not YAML, the same key twice."""
    with pytest.raises(ConfigError, match=r"absent\.yaml: no such run file"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_bytes(b"name: caf\xe9")
    with pytest.raises(ConfigError, match="not UTF-8 at byte 9"):
        load_config(path)
    path.write_text("name: [unclosed")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(path)
    path.write_text("objectives:\n  a: {reward: x}\n  a: {reward: y}\n")
    with pytest.raises(ConfigError, match=r"line 3: the key 'a' is there twice"):
        load_config(path)


def test_set_overrides_values_and_makes_sections(raw: dict[str, Any]) -> None:
    """key.path=value, the value as YAML."""
    config = parse_config(
        raw,
        [
            "policies.lora=null",
            "policies.workers.num_workers=2",
            "policies.length_normalized=true",
            "data.max_pairs=7",
            "name=other",
            "objectives.harmless.preferences.path=c=d.jsonl",
        ],
    )
    assert config.policies.lora is None
    assert config.policies.workers.num_workers == 2
    assert config.policies.length_normalized
    assert config.data.max_pairs == 7
    assert config.name == "other"
    assert config.objectives["harmless"].preferences.path == "c=d.jsonl"


def test_a_number_in_scientific_notation_is_a_number(raw: dict[str, Any]) -> None:
    """YAML 1.1 takes 5e-5 for a word; a learning rate is written so."""
    raw["policies"] = {"learning_rate": yaml.safe_load("5e-5")}
    assert parse_config(raw).policies.learning_rate == 5e-5
    assert parse_config(raw, ["policies.learning_rate=1e-3"]).policies.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("fit.steps", "write key.path=value"),
        ("=3", "write key.path=value"),
        ("seed.deeper=3", "'seed' is a value, not a mapping"),
        ("fit.methd=bsmd", "fit.methd: unknown key; did you mean 'method'?"),
        ("fit.steps=[1", "not valid YAML"),
    ],
)
def test_an_override_that_cannot_be_applied_is_refused(raw: dict[str, Any], override: str, expected: str) -> None:
    """The override, or the place, is named."""
    raw["seed"] = 1
    assert expected in complaint(raw, override)


def test_the_file_that_was_read_is_not_changed_by_overrides(raw: dict[str, Any]) -> None:
    """parse_config works on a copy."""
    before = copy.deepcopy(raw)
    parse_config(raw, ["objectives.helpful.label=x", "seed=3"])
    assert raw == before


def test_environment_variables_are_filled_in(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """${NAME}, ${NAME:-default}; several in one string; in lists; empty counts as not set, as in a shell's :-."""
    monkeypatch.setenv("MPO_TEST_BUCKET", "s3://bucket")
    monkeypatch.delenv("MPO_TEST_ABSENT", raising=False)
    monkeypatch.setenv("MPO_TEST_EMPTY", "")
    raw["storage"] = "${MPO_TEST_BUCKET}/${MPO_TEST_ABSENT:-team}/${MPO_TEST_EMPTY:-runs}"
    raw["objectives"]["harmless"]["preferences"]["path"] = ["${MPO_TEST_BUCKET}/a.jsonl"]
    config = parse_config(raw)
    assert config.storage == "s3://bucket/team/runs"
    assert config.objectives["harmless"].preferences.path == ["s3://bucket/a.jsonl"]
    assert parse_config(MINIMAL, ["storage=${MPO_TEST_BUCKET}/x"]).storage == "s3://bucket/x"
    raw["storage"] = "${MPO_TEST_ABSENT}/runs"
    assert "the environment variable MPO_TEST_ABSENT in '${MPO_TEST_ABSENT}/runs' is not set" in complaint(raw)


def _laughs(levels: int, width: int) -> str:
    """Lists of aliases of lists: width ** levels values from a few lines."""
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text",
    [
        _laughs(8, 8),
        "a: &a [1, *a]\n",
        "a: &a {b: *a}\n",
        "a0: &a0 {x: 1}\n" + "\n".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 8)),
    ],
    ids=["aliases of aliases", "a list in itself", "a mapping in itself", "merge keys"],
)
def test_aliases_that_grow_without_bounds_are_refused(tmp_path: Path, raw: dict[str, Any], text: str) -> None:
    """Counted, not written out: in the file, and in the value of --set."""
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(
        ConfigError, match=r"run\.yaml: with its aliases .* more than 100,000 values, or contains itself"
    ):
        load_config(path)
    value = text.strip().replace("\n", ", ")
    assert "more than 100,000 values" in complaint(raw, f"embedded={{{value}}}")


def test_aliases_that_a_person_writes_are_taken(tmp_path: Path) -> None:
    """An anchor for what several objectives share, and a merge key."""
    path = tmp_path / "run.yaml"
    path.write_text(
        "name: trial\nreference: {model: embedded}\nobjectives:\n"
        "  a: &shared {preferences: {embedded: pairs}}\n  b: *shared\n  c: {<<: *shared, label: a}\n"
    )
    objectives = load_config(path).objectives
    assert objectives["a"] == objectives["b"]
    assert objectives["c"].label == "a"


def test_lists_within_lists_without_end_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: " + "[" * 5000 + "]" * 5000)
    with pytest.raises(ConfigError, match="nested too deeply"):
        load_config(path)


def test_a_home_directory_stands_for_its_sign(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In every path of a run file and of --set; elsewhere in a path, and in a hub id, it is a sign like others."""
    monkeypatch.setenv("HOME", "/home/me")
    raw["objectives"]["helpful"]["reward"] = "~/rewards.py:helpful"
    raw["evaluation"] = {"models": {"theirs": "~/models/theirs"}}
    config = parse_config(raw, ["storage=~/runs", "reference.model=~/model", "evaluation.models.other=org/a~b"])
    assert (config.storage, config.reference.model) == ("/home/me/runs", "/home/me/model")
    assert config.objectives["helpful"].reward == "/home/me/rewards.py:helpful"
    assert config.evaluation.models == {"theirs": "/home/me/models/theirs", "other": "org/a~b"}
    assert "there is no home directory for '~nobody-here'" in complaint(raw, "storage=~nobody-here/runs")
