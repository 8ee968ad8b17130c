"""Hub data sets, from directories in the hub's layout: `load_dataset` takes one as it takes an id."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from mpo_ray.config_training import Source
from mpo_ray.data.comparisons import read_comparisons
from mpo_ray.data.sources import DataError, Refusal, Row, fingerprint, read_rows
from mpo_ray.data.texts import Text, read_texts

#: Texts that `datasets` takes for something else: missing values, numbers, dates, truth values.
LIKE_OTHER_THINGS = ["NA", "None", "null", "nan", "007", "1e3", "2024-01-31", "2024-01-31T10:00:00", "true", " x "]

CARD = """---
configs:
- config_name: one
  data_files: [{split: train, path: one.csv}]
- config_name: two
  data_files: [{split: train, path: two.jsonl}]
dataset_info:
- config_name: one
  features:
  - {name: prompt, dtype: string}
  - {name: a, dtype: string}
  - {name: b, dtype: string}
  - {name: kind, dtype: {class_label: {names: {'0': a, '1': b}}}}
---
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    root = tmp_path / "hub"
    for part, name in (("harmless-base", "train"), ("harmless-base", "test"), ("helpful-base", "train")):
        rows = [{"chosen": f"{part} {name} {number}", "rejected": None} for number in range(3)]
        write_lines(root / part / f"{name}.jsonl", *rows)
    return root


@pytest.fixture
def configured(tmp_path: Path) -> Path:
    """Two configurations, of which the first declares classes in its card."""
    root = tmp_path / "configured"
    write_lines(root / "two.jsonl", {"prompt": "r", "a": "7", "b": "8", "kind": 1})
    (root / "README.md").write_text(CARD)
    (root / "one.csv").write_text("prompt,a,b,kind\np,1,2,0\nq,3,4,1\nr,5,6,b\ns,7,8,\nt,9,0,5\n")
    return root


def write_lines(path: Path, *rows: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def values(source: Source) -> list[Any]:
    return [row.values for row in read_rows(source) if isinstance(row, Row)]


def error_of(source: Source) -> str:
    with pytest.raises(DataError) as caught:
        list(read_rows(source))
    return str(caught.value)


def test_a_hub_data_set_is_read_by_data_dir_and_split(hub: Path) -> None:
    source = Source(hub=str(hub), data_dir="harmless-base", split="test", rename={"chosen": "text"})
    rows = list(read_rows(source))
    assert rows[1] == Row(f"{hub}/harmless-base/test.jsonl:2", {"text": "harmless-base test 1", "rejected": None})
    assert len(rows) == 3
    other = Source(hub=str(hub), data_dir="helpful-base")
    assert values(other)[0]["chosen"] == "helpful-base train 0"
    before = fingerprint(other)
    assert before != fingerprint(source)
    write_lines(hub / "helpful-base" / "train.jsonl", {"chosen": "new", "rejected": None})
    assert fingerprint(other) != before


@pytest.mark.parametrize(
    ("split", "numbers"),
    [
        ("train[:2]", ["train 0", "train 1"]),
        ("test[2:]+train[:34%]", ["test 2", "train 0"]),
        ("train[-1:]", ["train 2"]),
    ],
)
def test_a_split_may_be_made_of_parts(hub: Path, split: str, numbers: list[str]) -> None:
    found = values(Source(hub=str(hub), data_dir="harmless-base", split=split))
    assert [row["chosen"] for row in found] == [f"harmless-base {number}" for number in numbers]


def test_what_save_to_disk_wrote_is_read(tmp_path: Path) -> None:
    """One split or several, with the classes of its schema."""
    import datasets

    rows = [{"prompt": f"p{n}", "a": "7", "b": "8", "kind": n % 2} for n in range(4)]
    kind = datasets.ClassLabel(names=["b", "a"])
    one = datasets.Dataset.from_list(rows).cast_column("kind", kind)
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": one, "test": one.select([3])}).save_to_disk(str(tmp_path / "both"))
    assert [c.chosen for c in read_comparisons(Source(hub=str(tmp_path / "one")), "kind").comparisons] == [*"8787"]
    found = values(Source(hub=str(tmp_path / "one"), split="train[1:3]"))
    assert [(row["prompt"], row["kind"]) for row in found] == [("p1", "a"), ("p2", "b")]
    assert values(Source(hub=str(tmp_path / "both"), split="test+train[:1]"))[0]["prompt"] == "p3"
    assert 'Unknown split "dev"' in error_of(Source(hub=str(tmp_path / "one"), split="dev"))
    before = fingerprint(Source(hub=str(tmp_path / "one")))
    assert fingerprint(Source(hub=str(tmp_path / "one"))) == before
    datasets.Dataset.from_list(rows[:2]).save_to_disk(str(tmp_path / "one"))
    assert fingerprint(Source(hub=str(tmp_path / "one"))) != before


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".ndjson", ".json"])
def test_texts_are_read_exactly_as_they_are_written(tmp_path: Path, ending: str) -> None:
    root = tmp_path / "texts"
    root.mkdir()
    sign = {".csv": ",", ".tsv": "\t"}.get(ending)
    if sign is None:
        rows = [{"prompt": "p", "response": text} for text in LIKE_OTHER_THINGS]
        written = json.dumps(rows) if ending == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    else:
        written = "".join(
            f"{p}{sign}{r}\n" for p, r in [("prompt", "response"), *(("p", t) for t in LIKE_OTHER_THINGS)]
        )
    (root / f"train{ending}").write_text(written)
    read = read_texts(Source(hub=str(root)))
    assert read.texts == [Text("p", text) for text in LIKE_OTHER_THINGS]
    assert read.refused == []


def test_rows_that_look_like_an_agent_s_log_are_rows(tmp_path: Path) -> None:
    rows = [{"type": "t", "message": {"role": "user"}, "prompt": "p", "chosen": "c", "rejected": "r"}] * 2
    write_lines(tmp_path / "log" / "train.jsonl", *rows)
    assert values(Source(hub=str(tmp_path / "log"))) == rows


def test_a_configuration_is_chosen_and_counts(configured: Path) -> None:
    one, two = Source(hub=str(configured), config="one"), Source(hub=str(configured), config="two")
    assert values(two) == [{"prompt": "r", "a": "7", "b": "8", "kind": 1}]
    assert fingerprint(one) != fingerprint(two) != fingerprint(Source(hub=str(configured), config="two", revision="x"))
    wrong = error_of(Source(hub=str(configured), config="three"))
    assert f"hub data set {str(configured)!r} (config 'three', split 'train')" in wrong
    assert "Available: ['one', 'two']" in wrong
    assert "network" not in wrong


def test_classes_that_the_card_declares_are_read_by_name(configured: Path) -> None:
    """In CSV files a class is written as its number or its name."""
    source = Source(hub=str(configured), config="one")
    parsed = read_comparisons(source, "kind")
    assert [(c.prompt, c.chosen) for c in parsed.comparisons] == [("p", "1"), ("q", "4"), ("r", "6")]
    assert parsed.skipped == {"missing labels": 1}
    where = f"{configured}/one.csv:6"
    assert parsed.refused == [Refusal(where, "unknown class: '5' in column 'kind'; its schema declares a, b")]


def test_classes_of_parquet_files_are_read_by_name(tmp_path: Path) -> None:
    import datasets

    root = tmp_path / "parquet"
    root.mkdir()
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "a": datasets.Value("string"), "b": datasets.Value("string")}
        | {"kind": datasets.ClassLabel(names=["a", "b", "tie"])}
    )
    rows = {"prompt": ["p", "q", "r"], "a": ["1"] * 3, "b": ["2"] * 3, "kind": [0, 1, 2]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(root / "train.parquet")
    for source in (Source(hub=str(root)), Source(path=str(root / "train.parquet"))):
        parsed = read_comparisons(source, "kind")
        assert [c.chosen for c in parsed.comparisons] == ["1", "2"]
        assert parsed.skipped == {"ties": 1}


def test_a_data_set_that_does_not_load_is_named_with_the_cause(hub: Path, tmp_path: Path) -> None:
    unknown_split = error_of(Source(hub=str(hub), data_dir="harmless-base", split="nope"))
    assert f"hub data set {str(hub)!r} (split 'nope', data_dir 'harmless-base') does not load" in unknown_split
    assert "network" not in unknown_split
    unknown_id = error_of(Source(hub="nobody-xyz/no-such-data-set", revision="v1"))
    assert "hub data set 'nobody-xyz/no-such-data-set' (split 'train', revision 'v1')" in unknown_id
    assert "download the files and name them in `path:`" in unknown_id
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "train.h5").write_bytes(b"no table")
    if importlib.util.find_spec("h5py") is None:
        missing = error_of(Source(hub=str(tmp_path / "tables")))
        assert "No module named 'h5py'. Install the missing package" in missing
        assert "network" not in missing


def test_a_tilde_stands_for_the_home_directory(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(hub.parent))
    source = Source(hub="~/hub", data_dir="helpful-base")
    assert values(source)[0]["chosen"] == "helpful-base train 0"
    assert fingerprint(source) == fingerprint(Source(hub=str(hub), data_dir="helpful-base"))


def test_what_belongs_to_a_hub_data_set_is_refused_elsewhere() -> None:
    with pytest.raises(ValueError, match="revision belongs to a hub data set, and the source has path"):
        Source(path="x.jsonl", revision="main")
