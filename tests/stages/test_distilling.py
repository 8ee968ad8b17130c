"""A distilled policy: far nearer to the mixture than what it began as, and exactly as near as its record says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from mpo_ray.data.prompts import PlacedPrompt
from mpo_ray.data.rendering import Rendering
from mpo_ray.data.sources import DataError
from mpo_ray.decoding.offline import Recipe
from mpo_ray.decoding.protocol import Mode, Sampling
from mpo_ray.policies.mixture import MixtureForCausalLM
from mpo_ray.policies.soup import load_soup
from mpo_ray.stages.distilling import Schooling, distil, split_prompts
from tests.policies.material import WEIGHTS, make_material, paths, write
from tests.tiny import WORDS, next_logprobs, tiny_tokenizer

PROMPTS = [PlacedPrompt(word, f"the {word} was") for word in WORDS]
#: With one token, KL along completions is the KL between next-token distributions: nothing is left to chance.
ONE_TOKEN = Recipe(Sampling(max_tokens=1), Mode(), {"positive": 0.4, "concise": 0.6, "detailed": 0.0})
SCHOOLING = Schooling(steps=120, batch_size=8, micro_batch_size=8, learning_rate=5e-3, rank=8)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_material(tmp_path_factory.mktemp("distilling"))


def run(artefact: Path, out: Path, recipe: Recipe = ONE_TOKEN, schooling: Schooling = SCHOOLING) -> dict[str, Any]:
    """Measured on what is learned: random models hold nothing that would carry over to other prompts."""
    shown: list[tuple[str, int, int]] = []
    record = distil(
        str(artefact),
        out,
        (PROMPTS, PROMPTS),
        recipe,
        schooling,
        seed=3,
        show=lambda title, done, total, figures: shown.append((title, done, total)),
    )
    assert shown[-1] == ("distillation", schooling.steps, schooling.steps)
    return record


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_divergence_falls_and_is_that_of_the_model_which_loads(material: Path, tmp_path: Path, kind: str) -> None:
    """KL(q ‖ s) at every prompt, by the distributions of what transformers and PEFT load from the disk."""
    artefact = write(material, tmp_path / "artefact", kind)
    record = run(artefact, tmp_path / "student")
    before, after = record["before"]["per_token"], record["after"]["per_token"]
    assert after[0] < before[0] / 10
    assert before[0] < record["reference"]["per_token"][0]
    assert after[1] <= after[0] <= after[2]
    assert json.loads((tmp_path / "student" / "distillation.json").read_text()) == record

    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert (tmp_path / "student" / "adapter_config.json").exists() == (kind == "lora")
    mixture = MixtureForCausalLM.from_pretrained(artefact, weights=ONE_TOKEN.weights)
    places = [Rendering(tiny_tokenizer()).prompt_ids(placed.prompt) for placed in PROMPTS]
    assert after[0] == pytest.approx(float(np.mean([_kl(mixture, student, ids) for ids in places])), rel=1e-3)
    reference = AutoModelForCausalLM.from_pretrained(material / "reference")
    policies = {name: str(path) for name, path in paths(material, kind).items()}
    soup = load_soup(str(material / "reference"), policies, ONE_TOKEN.weights)
    for model, found in ((reference, record["reference"]["per_token"]), (soup, before)):
        expected = float(np.mean([_kl(mixture, model, ids) for ids in places]))
        assert found[0] == pytest.approx(expected, rel=1e-3)
    if kind == "lora":
        other = PeftModel.from_pretrained(reference, tmp_path / "student")
        torch.testing.assert_close(next_logprobs(other, places[0]), next_logprobs(student, places[0]))


def _kl(mixture: Any, student: Any, ids: list[int]) -> float:
    q, s = next_logprobs(mixture, ids), next_logprobs(student, ids)
    return float((q.exp() * (q - s)).sum())


def test_the_same_seed_gives_the_same_policy(material: Path, tmp_path: Path) -> None:
    """Whole completions, drawn exactly; the record and the adapter's bytes."""
    artefact = write(material, tmp_path / "artefact", "lora")
    recipe = Recipe(Sampling(max_tokens=5), Mode("smc", 4), WEIGHTS)
    schooling = Schooling(steps=4, batch_size=4, micro_batch_size=2, completions_per_prompt=2)
    records = [run(artefact, tmp_path / name, recipe, schooling) for name in ("one", "two")]
    assert records[0] == records[1]
    assert records[0]["drawn"] == {"kind": "smc", "particles": 4, "max_attempts": 1000, "log_z": True}
    assert records[0]["training_completions"] == 2 * len(PROMPTS)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "--steps 0: it is above 0"),
        ({"learning_rate": -1.0}, "--learning-rate -1"),
        ({"batch_size": 12}, "--batch-size 12 is not a multiple of --micro-batch-size 8"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_a_model_is_opened(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "nothing", tmp_path / "out", schooling=Schooling(**changes))


def test_too_few_prompts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="3 prompts to train on and 1 held out"):
        distil("nothing", tmp_path, (PROMPTS[:3], PROMPTS[3:4]), ONE_TOKEN, SCHOOLING, seed=0, show=print)


def test_a_file_s_prompts_are_split_once_each() -> None:
    trained, held = split_prompts([*PROMPTS, *PROMPTS], share=0.4, seed=0)
    assert {p.where for p in trained} | {p.where for p in held} == set(WORDS)
    assert len(trained) + len(held) == len(set(WORDS))
    assert held
