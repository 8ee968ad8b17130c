"""The embedded world: known rewards, honest labels, no overlap between what is learned and what is judged."""

import json
from pathlib import Path

import numpy as np
import pytest

from mpo_ray.data import embedded


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("world")
    embedded.write_world(directory, num_texts=200, num_pairs=3000, num_prompts=100, seed=1)
    return directory


def test_rewards_count_what_they_say() -> None:
    review = "the food was great , dirty view , i would not go there again ."
    assert embedded.positive([""], [review]) == [0.0]
    assert embedded.concise([""], [review]) == [-12 / 5]
    assert embedded.detailed([""], [review]) == [2.0]


def test_every_word_of_every_text_is_in_the_vocabulary(world: Path) -> None:
    words = {w for row in _rows(world / "pairs.jsonl") for side in "ab" for w in row[side].split()}
    words |= {w for prompt in embedded.prompts() for w in prompt.split()}
    assert words <= set(embedded.vocabulary())


def test_labels_follow_bradley_terry_at_the_stated_scale(world: Path) -> None:
    """P(a preferred) = σ(scale · Δr): over pairs, the mean label equals the mean of that probability."""
    rows = _rows(world / "pairs.jsonl")
    for name, reward in embedded.REWARDS.items():
        first, second = (np.array(reward([""] * len(rows), [row[side] for row in rows])) for side in "ab")
        expected = 1 / (1 + np.exp(-embedded.LABEL_SCALES[name] * (first - second)))
        labels = np.array([row[name] for row in rows])
        strong = first > second  # without the symmetry of the sides, which would hide a wrong scale
        assert labels[strong].mean() == pytest.approx(expected[strong].mean(), abs=0.03)
        assert (labels[first == second] == 0.5).all()


def test_prompts_of_the_evaluation_are_in_no_training_file(world: Path) -> None:
    judged = {json.dumps(row["prompt"]) for row in _rows(world / "prompts.jsonl")}
    learned = {json.dumps(row["prompt"]) for file in ("corpus", "pairs") for row in _rows(world / f"{file}.jsonl")}
    assert len(judged) == 100
    assert not judged & learned


def test_the_same_seed_writes_the_same_world(world: Path, tmp_path: Path) -> None:
    embedded.write_world(tmp_path, num_texts=200, num_pairs=3000, num_prompts=100, seed=1)
    for file in ("corpus", "pairs", "prompts"):
        assert (tmp_path / f"{file}.jsonl").read_bytes() == (world / f"{file}.jsonl").read_bytes()
