"""EleutherAI's `lm_eval` over HTTP against `lm_eval` on the model itself; it was written by others.

It scores a text by echo, logprobs and max_tokens 1, in batches of token ids, and generates until stop strings.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from mpo_ray.policies.mixture import MixtureForCausalLM
from tests.serving.live import NAME, Live
from tests.tiny import WORDS

NUM_ITEMS = 24
CHOICE = {
    "task": "choice",
    "output_type": "multiple_choice",
    "doc_to_text": "{{prompt}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
CONTINUATION = {
    "task": "continuation",
    "output_type": "generate_until",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "{{choices[0]}}",
    "generation_kwargs": {"until": ["film", "bad plot"], "max_gen_toks": 8, "temperature": 0.0, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    """Two tasks over the same random sentences, with a few words to choose from."""
    root = tmp_path_factory.mktemp("tasks")
    random = np.random.default_rng(5)

    def sentence(longest: int) -> str:
        return " ".join(random.choice(WORDS, size=random.integers(1, longest + 1)))

    rows = [
        {"prompt": sentence(9), "choices": [sentence(4) for _ in range(4)], "answer": int(random.integers(4))}
        for _ in range(NUM_ITEMS)
    ]
    (root / "items.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    source = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(root / "items.jsonl")}, "cache_dir": str(root / "cache")},
        "test_split": "test",
    }
    for task in (CHOICE, CONTINUATION):
        (root / f"{task['task']}.yaml").write_text(yaml.safe_dump(task | source), encoding="utf-8")
    return TaskManager(include_path=str(root), include_defaults=False)


def evaluate(tasks: TaskManager, backend: str, **arguments: Any) -> dict[str, Any]:
    found = simple_evaluate(
        model=backend,
        model_args={"add_bos_token": True, "max_length": 64, "batch_size": 8, **arguments},
        tasks=["choice", "continuation"],
        task_manager=tasks,
        bootstrap_iters=0,
    )
    assert found is not None
    return dict(found)


def local_model(policy: str, artefact: Path) -> dict[str, Any]:
    """How lm_eval itself opens what a model id serves."""
    if policy == "mixture":
        return {"pretrained": MixtureForCausalLM.from_pretrained(artefact)}
    adapter = {} if policy == "reference" else {"peft": str(artefact / "policies" / policy)}
    return {"pretrained": str(artefact / "reference"), "dtype": "float32", "device": "cpu", **adapter}


@pytest.mark.parametrize("policy", ["helpful", "reference", "mixture"])
def test_lm_eval_finds_over_http_what_it_finds_on_the_model(
    policy: str, tasks: TaskManager, live: Live, word_artefact: Path
) -> None:
    """Scores equal; every choice's log-likelihood, to 1e-4, and whether it is greedy; every generated text."""
    if policy == "reference" and not live.served.has_reference:
        pytest.skip("vLLM decodes the policies, and not their base beside them")
    remote = evaluate(
        tasks,
        "local-completions",
        model=NAME if policy == "mixture" else f"{NAME}/{policy}",
        base_url=f"{live.url}/v1/completions",
        tokenizer=str(word_artefact),
        tokenizer_backend="huggingface",
        max_retries=1,
    )
    local = evaluate(tasks, "hf", tokenizer=str(word_artefact), **local_model(policy, word_artefact))
    assert remote["results"] == local["results"]
    assert 0 < remote["results"]["choice"]["acc,none"] < 1
    for one, other in zip(remote["samples"]["choice"], local["samples"]["choice"], strict=True):
        assert one["doc"] == other["doc"]
        for [(logprob, greedy)], [(expected, is_greedy)] in zip(one["resps"], other["resps"], strict=True):
            assert logprob == pytest.approx(expected, abs=1e-4)
            assert greedy == is_greedy
    texts = [[sample["resps"] for sample in found["samples"]["continuation"]] for found in (remote, local)]
    # The endpoint decodes behind the prompt, so the space between the two is there; lm-eval decodes the tokens alone.
    # A text without words is empty where the end token came first, and a space where a stop string did.
    behind = [[[text if text.strip() else "" for text in drawn] for drawn in sample] for sample in texts[0]]
    assert behind == [[[text and f" {text}" for text in drawn] for drawn in sample] for sample in texts[1]]
    assert len({str(text) for text in texts[0]}) > NUM_ITEMS / 2
