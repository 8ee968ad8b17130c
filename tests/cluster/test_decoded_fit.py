"""The decoded fit for real, on tiny models: what a step decodes, and that broken-off games end as unbroken ones."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
import yaml
from rich.console import Console

from mpo_ray.cluster.decoded_fit import DecodedFit, play
from mpo_ray.cluster.score import draw, load_rewards, with_rewards
from mpo_ray.config import Decoding, RunConfig
from mpo_ray.data.sources import DataError
from mpo_ray.decoding.sampler import EnsembleSampler, MixtureSampler, Room, sampling_recipe
from mpo_ray.evaluation.gains import Gains
from mpo_ray.policies.artefact import write_artefact
from mpo_ray.policies.ensemble import Ensemble
from mpo_ray.policies.loading import ModelError, load_policy, load_rendering, load_tokenizer
from mpo_ray.policies.mixture import MixtureForCausalLM
from mpo_ray.records import REFERENCE, digest, prompt_id
from mpo_ray.run import Run
from tests.tiny import next_logprobs, tiny_llama, tiny_lora, tiny_tokenizer

OBJECTIVES = ("good", "short")
PROMPTS = ("the film", "a plot", "I liked", "acting was", "it")
REWARDS = '''
"""Rewards that fail on request: `die` ends the process once, `refuse` raises while it is there."""
import os, pathlib, signal

HERE = pathlib.Path(__file__).parent

def good(prompts, responses):
    return [float(response.count("good") + response.count("liked")) + 0.01 * len(response) for response in responses]

def short(prompts, responses):
    written = len(list(HERE.glob("fit/decoded/step-*.parquet")))
    if written == 1 and (HERE / "die").exists():
        (HERE / "die").unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    if written == 3 and (HERE / "refuse").exists():
        raise RuntimeError("the reward refuses")
    return [-float(len(response.split())) for response in responses]
'''


class Game:
    """A run directory with prompts, tiny policies and a score table, and what `play` is called with."""

    def __init__(self, root: Path) -> None:
        self.root = root
        sources = {"preferences": {"path": "unused"}, "reward": "unused"}
        self.config = RunConfig.model_validate(
            {
                "name": root.name,
                "storage": str(root.parent),
                "reference": {"model": "unused"},
                "objectives": dict.fromkeys(OBJECTIVES, sources),
                "samples": {"max_new_tokens": 8},
                "scoring": {"prompts_per_part": 2, "num_actors": 1},
                "fit": {
                    "method": "decoded",
                    "decoded": {"steps": 3, "num_prompts": 4, "completions_per_prompt": 2},
                    "bootstrap_draws": 5,
                },
            }
        )
        self.run = Run(str(root.parent), root.name)
        self.places = {name: str(root.parent / "models" / name) for name in (REFERENCE, *OBJECTIVES)}

    def play(self, **changes: Any) -> DecodedFit:
        arguments: dict[str, Any] = {
            "reference": self.places[REFERENCE],
            "policies": {name: self.places[name] for name in OBJECTIVES},
            "rewards": {name: f"{self.root}/rewards.py:{name}" for name in OBJECTIVES},
            "inputs": "models and prompts",
            "console": Console(file=io.StringIO()),
        }
        return play(self.run, self.config, **{**arguments, **changes})

    def files(self) -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in self.root.glob("fit/decoded/*.parquet")}


def write_game(root: Path) -> Game:
    """The whole path to the game: models, prompts, samples of the reference and of both policies, their rewards."""
    game = Game(root)
    tokenizer = tiny_tokenizer(chat_template=False)
    base = tiny_llama(root.parent / "models" / REFERENCE, tokenizer, seed=0)
    for seed, name in enumerate(OBJECTIVES, start=1):
        tiny_lora(root.parent / "models" / name, base, seed=seed)
    root.mkdir()
    (root / "rewards.py").write_text(REWARDS)
    game.run.write_text("config.yaml", yaml.safe_dump(game.config.as_json()))
    rows = {"prompt_id": [prompt_id(p) for p in PROMPTS], "prompt": list(PROMPTS), "is_chat": [False] * len(PROMPTS)}
    prompts = pa.table(rows)
    game.run.write_table("prompts/fit/part-00000.parquet", prompts)
    policies = Ensemble(game.places[REFERENCE], {name: game.places[name] for name in OBJECTIVES})
    sampler = EnsembleSampler(policies, Room(8))
    opened = load_rendering(game.places[REFERENCE])
    rewards = load_rewards({name: f"{root}/rewards.py:{name}" for name in OBJECTIVES}, game.config.scoring)
    for name in (REFERENCE, *OBJECTIVES):
        recipe = sampling_recipe({name: 1.0}, max_new_tokens=8, temperature=1.0)
        drawn = draw(sampler, recipe, opened, prompts, num=3, seed=7)
        scored = with_rewards(drawn, rewards, opened, {}, beta=0.1)
        scored = scored.append_column("proposal", pa.array([name] * scored.num_rows))
        game.run.write_table(f"scores/{name}-part-00000.parquet", scored)
    return game


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> tuple[Game, DecodedFit]:
    game = write_game(tmp_path_factory.mktemp("decoded") / "unbroken")
    return game, game.play()


def copy_of(game: Game, name: str) -> Game:
    """The run as it was before the game."""
    root = game.root.parent / name
    shutil.copytree(game.root, root)
    shutil.rmtree(root / "fit")
    return Game(root)


def test_a_step_is_what_its_files_hold(unbroken: tuple[Game, DecodedFit]) -> None:
    """λ_1 is uniform; gains, their errors, Σ log Z_t and lengths are means over the step's completions."""
    game, fit = unbroken
    assert len(fit.steps) == 3
    assert fit.steps[0].weights == {"good": 0.5, "short": 0.5}
    gains = Gains(game.run.read_table("scores"), OBJECTIVES, "win_rate")
    for t, step in enumerate(fit.steps):
        files = [f"fit/decoded/step-{t:03d}-part-{part:05d}.parquet" for part in range(2)]
        table = pa.concat_tables(game.run.read_table(file) for file in files)
        assert table.num_rows == 4 * 2
        values, errors = gains.of(table)
        assert list(step.gains.values()) == pytest.approx(values.tolist())
        assert list(step.standard_errors.values()) == pytest.approx(errors.tolist())
        assert step.log_z == pytest.approx(np.mean(table["log_z"].to_pylist()))
        assert step.num_tokens == pytest.approx(np.mean([len(ids) for ids in table["response_ids"].to_pylist()]))
    assert set(fit.policies) == set(OBJECTIVES)
    assert sum(fit.weights.values()) == pytest.approx(1.0)
    assert fit.intervals is not None
    assert json.loads(json.dumps(fit.as_json())) == fit.as_json()


def test_log_z_is_the_sum_over_the_completions_tokens(unbroken: tuple[Game, DecodedFit]) -> None:
    """Σ_t log Σ_v Π_k π_k(v | y_<t)^λ_k, one token at a time through each policy alone; at most 0 (Hölder)."""
    game, fit = unbroken
    policies = [load_policy(game.places[name], game.places[REFERENCE]) for name in OBJECTIVES]
    weights = torch.tensor(list(fit.steps[1].weights.values()), dtype=torch.float64)
    for row in game.run.read_table("fit/decoded/step-001-part-00001.parquet").to_pylist():
        ids, start = [*row["prompt_ids"], *row["response_ids"]], len(row["prompt_ids"])
        expected = 0.0
        for t in range(start, len(ids)):
            logprobs = torch.stack([next_logprobs(policy, ids[:t]) for policy in policies])
            expected += float((weights @ logprobs).logsumexp(-1))
        assert row["log_z"] == pytest.approx(expected, abs=1e-3)
        assert row["log_z"] <= 1e-4


def test_with_particles_a_step_decodes_whole_completions(unbroken: tuple[Game, DecodedFit]) -> None:
    """The first step's files hold what the sampler draws; the token-level game's files are not taken."""
    game = copy_of(unbroken[0], "particles")
    game.config = game.config.model_copy(update={"decoding": Decoding(particles=4)})
    fit = game.play()
    assert fit.particles == 4
    assert unbroken[1].particles == 1
    policies = {name: Path(game.places[name]) for name in OBJECTIVES}
    reference, even = game.places[REFERENCE], dict.fromkeys(OBJECTIVES, 0.5)
    artefact = game.root / "artefact"
    write_artefact(artefact, objectives=policies, reference=reference, copy_reference=False, weights=even, fit={})
    sampler = MixtureSampler(MixtureForCausalLM.from_pretrained(artefact), Room(4))
    tokenizer = load_tokenizer(str(artefact))
    for part in range(2):
        node = f"fit/decoded/step-000-part-{part:05d}.parquet"
        rows = game.run.read_table(node).to_pylist()
        drawn = sampler.draw(
            [row["prompt_ids"] for row in rows[::2]],
            sampling_recipe(even, max_new_tokens=8, temperature=1.0, particles=4),
            num=2,
            end_ids=[tokenizer.eos_token_id],
            seed=int(digest([0, "decoded", 0, part])[:12], 16),
        )
        assert [row["response_ids"] for row in rows] == [list(c.tokens) for own in drawn for c in own]
        assert [row["log_z"] for row in rows] == pytest.approx([c.log_z_hat for own in drawn for c in own])
    game.config = game.config.model_copy(update={"decoding": Decoding(particles=1)})
    assert game.play() == unbroken[1]


def test_every_prompt_is_used_and_steps_take_different_ones(unbroken: tuple[Game, DecodedFit]) -> None:
    game, _ = unbroken
    taken = []
    for t in range(3):
        files = [f"fit/decoded/step-{t:03d}-part-{part:05d}.parquet" for part in range(2)]
        taken.append({p for file in files for p in game.run.read_table(file)["prompt_id"].to_pylist()})
    assert [len(prompts) for prompts in taken] == [4, 4, 4]
    assert set.union(*taken) == {prompt_id(p) for p in PROMPTS}
    assert taken[0] != taken[1]


def test_a_finished_game_is_read_and_loads_nothing(unbroken: tuple[Game, DecodedFit]) -> None:
    """With all files there no actor is started: even models that are not there are not missed. λ is the same."""
    game, fit = unbroken
    written = game.files()
    assert game.play(reference="/nowhere") == fit
    assert game.files() == written


def test_a_game_whose_worker_and_driver_failed_ends_as_the_unbroken_one(unbroken: tuple[Game, DecodedFit]) -> None:
    """A worker's process is killed in step 1, a reward fails in step 2: λ is the same bit by bit, no file twice."""
    game = copy_of(unbroken[0], "broken")
    (game.root / "die").touch()
    (game.root / "refuse").touch()
    with pytest.raises(RuntimeError, match=r"^the reward refuses$"):
        game.play()
    assert not (game.root / "die").exists()
    written = game.files()
    assert len(written) == 3
    (game.root / "refuse").unlink()
    assert game.play() == unbroken[1]
    assert written.items() <= game.files().items()
    for file in game.files():
        node = f"fit/decoded/{file}"
        assert game.run.read_table(node).equals(unbroken[0].run.read_table(node))


def test_other_models_are_decoded_again_and_what_is_wrong_with_them_is_said(unbroken: tuple[Game, DecodedFit]) -> None:
    game, _ = unbroken
    with pytest.raises(ModelError, match="/nowhere: no such directory"):
        game.play(reference="/nowhere", inputs="other models")


def test_a_score_table_without_the_reference_is_refused_before_anything_is_started(
    unbroken: tuple[Game, DecodedFit],
) -> None:
    game = copy_of(unbroken[0], "policies-only")
    (game.root / "scores" / f"{REFERENCE}-part-00000.parquet").unlink()
    with pytest.raises(DataError, match=r"no samples of the reference.*samples\.proposals to all"):
        game.play()


def test_one_prompt_is_refused(unbroken: tuple[Game, DecodedFit]) -> None:
    game = copy_of(unbroken[0], "one-prompt")
    node = "prompts/fit/part-00000.parquet"
    prompts = game.run.read_table(node)
    game.run.write_table(node, prompts.filter(pc.equal(prompts["prompt"], "it")))
    with pytest.raises(DataError, match=r"prompts/fit holds 1 prompt\(s\).*raise samples\.num_prompts"):
        game.play()
