"""A real chat model whose tokenizer ends texts with another token than its template ends turns, as Gemma and Phi."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from mpo_ray.cluster.score import PairReference, Sampler
from mpo_ray.config import Scoring
from mpo_ray.decoding.answer import answer
from mpo_ray.decoding.offline import Recipe
from mpo_ray.decoding.protocol import Mode, Sampling
from mpo_ray.policies.artefact import write_artefact
from mpo_ray.records import encode_prompt, prompt_id

ACTORS = Scoring(batch_size=4).model_dump()
QUESTIONS = ("Name a bird.", "Say hello.", "What is 2 + 2? One word.")
REPLIES = ("A wren.", "Hello there!", "Four.")
THINKING = "{{ '<think>\\n\\n</think>\\n\\n' if loop.last and message['role'] == 'assistant' else '' }}"


def arranged(model: Path, out: Path) -> Path:
    """The model with `<|endoftext|>` as the end of texts, and both end tokens in its generation_config."""
    shutil.copytree(model, out, copy_function=os.link)
    for name, changes in (
        ("tokenizer_config.json", {"eos_token": "<|endoftext|>"}),
        ("generation_config.json", {"eos_token_id": [0, 2]}),
    ):
        values = json.loads((out / name).read_text())
        (out / name).unlink()
        (out / name).write_text(json.dumps(values | changes))
    return out


def chats() -> dict[str, list[Any]]:
    prompts = [({"role": "user", "content": question},) for question in QUESTIONS]
    texts = [encode_prompt(prompt)[0] for prompt in prompts]
    return {"prompt_id": [prompt_id(p) for p in prompts], "prompt": texts, "is_chat": [True] * len(texts)}


@pytest.fixture(scope="module")
def both(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return smollm2, arranged(smollm2, tmp_path_factory.mktemp("arranged") / "smollm2")


@pytest.mark.slow
def test_log_probabilities_of_replies_agree_with_the_usual_arrangement(both: tuple[Path, Path]) -> None:
    pairs = chats() | {
        "id": list("abc"), "chosen": list(REPLIES), "rejected": list(REPLIES[::-1]), "weight": [1.0] * 3
    }  # fmt: skip
    usual, other = (PairReference(str(model), ACTORS, {})(pa.table(pairs), {}) for model in both)
    for side in ("chosen", "rejected"):
        assert other[f"{side}_ids"].to_pylist() == usual[f"{side}_ids"].to_pylist()
        assert {ids[-1] for ids in other[f"{side}_ids"].to_pylist()} == {2}
        values = [table[f"log_ref_{side}"].to_pylist() for table in (usual, other)]
        assert values[1] == pytest.approx(values[0], abs=1e-3)


@pytest.mark.slow
def test_samples_and_generated_answers_agree_to_the_token(both: tuple[Path, Path], tmp_path: Path) -> None:
    """The run's sampler and the engine behind `generate` stop where the template ends a turn."""
    drawn, answers = [], []
    for number, model in enumerate(both):
        sampler = Sampler(str(model), {}, ACTORS, {}, num_samples=2, max_new_tokens=40)
        drawn.append(sampler(pa.table(chats()), {"proposal": "reference", "first_id": 0, "seed": 3}))
        artefact = tmp_path / str(number)
        write_artefact(
            artefact, objectives={"a": model}, reference=model, copy_reference=False, weights={"a": 1.0}, fit={}
        )
        recipe = Recipe(Sampling(max_tokens=40, temperature=0.0), Mode(), {"a": 1.0})
        answers.append([answer(str(artefact), question, recipe, num=1, seed=0)[0] for question in QUESTIONS])
    for column in ("response_ids", "finished", "num_tokens"):
        assert drawn[0][column].to_pylist() == drawn[1][column].to_pylist()
    assert sum(drawn[1]["finished"].to_pylist()) >= 3
    assert [one.tokens for one in answers[0]] == [one.tokens for one in answers[1]]
    assert [one.finish_reason for one in answers[1]].count("stop") >= 2


@pytest.mark.slow
def test_thoughts_that_the_template_writes_before_a_reply_are_scored(both: tuple[Path, Path], tmp_path: Path) -> None:
    """The reply follows what the template writes, as transformers renders the whole conversation."""
    from transformers import AutoTokenizer

    from mpo_ray.policies.loading import load_rendering

    model = arranged(both[0], tmp_path / "thinking")
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").unlink()
    before_content = "' + message['content']"
    assert before_content in template
    (model / "chat_template.jinja").write_text(
        template.replace(before_content, "' + (" + THINKING[3:-3] + ") + message['content']")
    )
    prompt = ({"role": "user", "content": QUESTIONS[0]},)
    ids, reply = load_rendering(str(model)).ids(prompt, REPLIES[0])
    whole = [*prompt, {"role": "assistant", "content": REPLIES[0]}]
    expected = AutoTokenizer.from_pretrained(model).apply_chat_template(whole, return_dict=False)
    assert [*ids, *reply] == expected[:-1]  # less the newline behind the end
    assert load_rendering(str(model)).tokenizer.decode(reply) == "<think>\n\n</think>\n\nA wren.<|im_end|>"
