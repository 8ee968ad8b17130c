"""Files of prompts on Ray Data: what is written depends on the rows alone, and what is finished is not made again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mpo_ray import cli
from mpo_ray.data.rendering import Rendering
from mpo_ray.decoding.offline import Recipe, complete
from mpo_ray.decoding.open_engine import open_engine
from mpo_ray.decoding.protocol import Mode, Sampling
from tests.policies.material import WEIGHTS, make_material, write
from tests.tiny import tiny_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
ROWS: list[dict[str, Any]] = [
    {"prompt": "the film was", "id": "first"},
    {"prompt": [{"role": "user", "content": "the plot"}]},
    {"prompt": "the film was"},
    {"prompt": "acting", "id": 4},
    {"prompt": "I liked"},
]


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("generate")
    return write(make_material(root / "material"), root / "artefact", "lora")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def generate(artefact: Path, prompts: Path, out: Path, *more: str) -> int:
    given = ["--prompts", str(prompts), "--out", str(out), "--max-tokens", "6", *more]
    return cli.main(["generate", str(artefact), *given])


def rows(out: Path) -> list[dict[str, Any]]:
    return [row for part in sorted((out / "completions").iterdir()) for row in pq.read_table(part).to_pylist()]


EXACT = ("--n", "2", "--method", "smc", "--particles", "4", "--seed", "7")


@pytest.fixture(scope="module")
def made(artefact: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A file of prompts, and its completions: two rows in a part, two actors."""
    root = tmp_path_factory.mktemp("made")
    prompts = root / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert generate(artefact, prompts, root / "out", *EXACT, "--per-part", "2", "--actors", "2", "--jsonl") == 0
    return prompts, root / "out"


def test_every_completion_is_that_of_its_prompt_and_seed_alone(artefact: Path, made: tuple[Path, Path]) -> None:
    """Decoding one row by itself, with the seed that it was written with, gives its tokens and diagnostics again."""
    found = rows(made[1])
    assert [(row["row"], row["sample"]) for row in found] == [(row, sample) for row in range(5) for sample in range(2)]
    assert [row["id"] for row in found[::2]] == ["first", None, None, "4", None]
    assert len({row["seed"] for row in found}) == len(found)
    recipe = Recipe(Sampling(max_tokens=6), Mode("smc", 4), WEIGHTS)
    engine = open_engine(str(artefact), max_num_seqs=4)
    for row in found:
        given = ROWS[row["row"]]["prompt"]
        prompt = given if isinstance(given, str) else tuple(given)
        ids = Rendering(tiny_tokenizer()).prompt_ids(prompt)
        request = recipe.request("alone", ids, seed=row["seed"], continues_text=isinstance(prompt, str))
        [alone] = complete(engine, [request])
        assert alone.diagnostics is not None
        assert (row["tokens"], row["completion"]) == (list(alone.tokens), alone.text)
        for name in ("log_z", "log_z_hat", "effective_sample_size"):
            assert row[name] == pytest.approx(getattr(alone.diagnostics, name), abs=1e-4)


def test_the_json_lines_say_what_the_tables_say(made: tuple[Path, Path]) -> None:
    parts = sorted((made[1] / "jsonl").iterdir())
    lines = [json.loads(line) for part in parts for line in part.read_text().splitlines()]
    for line, row in zip(lines, rows(made[1]), strict=True):
        assert line["prompt"] == ROWS[row["row"]]["prompt"]
        assert {name: line[name] for name in ("completion", "tokens", "seed", "log_z_hat")} == {
            name: row[name] for name in ("completion", "tokens", "seed", "log_z_hat")
        }


def test_what_is_finished_is_not_made_again_and_what_is_missing_is_made_the_same(
    artefact: Path, made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the parts that a kill left only those that are gone or damaged are made, by another number of actors."""
    prompts, out = made
    before = rows(out)
    parts = sorted((out / "completions").iterdir())
    written = {part: part.stat().st_mtime_ns for part in parts}
    parts[1].unlink()
    parts[2].write_bytes(parts[2].read_bytes()[:-9])
    capsys.readouterr()
    assert generate(artefact, prompts, out, *EXACT, "--per-part", "2") == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(out / "completions")
    assert "1 of 3 parts are there already" in printed.err
    assert rows(out) == before
    assert [part for part, time in written.items() if part.stat().st_mtime_ns == time] == parts[:1]


def test_a_directory_of_other_completions_is_left_alone(
    artefact: Path, made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, out = made
    assert generate(artefact, prompts, out, *EXACT[:-1], "8") == 1
    assert "holds completions that were made with seed 7; now it is 8" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    assert generate(artefact, prompts, tmp_path / "mine") == 1
    assert "holds something else already" in capsys.readouterr().err
    assert len(list((tmp_path / "mine").iterdir())) == 1


def test_what_rejection_does_not_accept_is_counted_and_said(
    artefact: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other rows are there; the exit status is 1, as not every result is."""
    few = ("--method", "rejection", "--particles", "1", "--max-attempts", "2", "--n", "4", "--json")
    assert generate(artefact, prompts, tmp_path / "out", *few) == 1
    printed = capsys.readouterr()
    counts = json.loads(printed.out)
    failed = [row for row in rows(tmp_path / "out") if row["error"] is not None]
    assert 0 < counts["num_failed"] == len(failed) < 20
    assert counts["num_completions"] == 20 - len(failed)
    assert all(row["completion"] == "" and row["finish_reason"] is None for row in failed)
    assert f"{len(failed)} of 20 completions could not be made" in printed.err


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        ('{"prompt": "x"}\n{"prompt": "%s"}\n' % ("film " * 70), (), "prompts.jsonl:2: the prompt has 71 tokens and"),
        ('{"prompt": "x"}\n{"prompt": ""}\n', (), "prompts.jsonl:2: field 'prompt' is empty"),
        ('{"text": "x"}\n', (), "hold no prompts"),
        (None, (), "no such file"),
        ('{"prompt": "x"}\n', ("--weights", "polite=1"), "unknown objective 'polite'"),
        ('{"prompt": "x"}\n', ("--mode", "exact", "--top-p", "0.9"), "top_p acts on single tokens"),
        ('{"prompt": "x"}\n', ("--temperature", "-1"), "temperature is -1.0; it is 0 or more"),
        ('{"prompt": "x"}\n', ("--actors", "0"), "num_actors"),
        ('{"prompt": "x"}\n', ("--cpus-per-actor", "64"), "--actors: each needs 64 CPU"),
        ('{"prompt": "x"}\n', ("--lanes", "0"), "--lanes 0"),
        ('{"prompt": "x"}\n', ("--n", "0"), "--n 0"),
        ('{"prompt": "x"}\n', ("--mode", "token", "--particles", "4"), "--particles goes with --mode exact"),
    ],
)
def test_bad_input_is_refused_before_anything_starts(
    artefact: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: str | None,
    more: tuple[str, ...],
    message: str,
) -> None:
    if content is not None:
        (tmp_path / "prompts.jsonl").write_text(content)
    assert generate(artefact, tmp_path / "prompts.jsonl", tmp_path / "out", *more) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "completions").exists()
