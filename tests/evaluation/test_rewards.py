"""Rewards: functions, files and classifiers behind one interface that checks what they return."""

from pathlib import Path

import pytest
import torch

from mpo_ray.data import embedded
from mpo_ray.evaluation.rewards import RewardError, is_callable_spec, load_reward
from mpo_ray.policies.loading import ModelError, load_reward_model
from tests.tiny import tiny_reward, tiny_tokenizer


def _file(tmp_path: Path, body: str) -> str:
    path = tmp_path / "rewards.py"
    path.write_text(f"def score(prompts, responses):\n    {body}\n")
    return f"{path}:score"


def test_a_function_of_a_module_is_called_with_prompts_and_responses() -> None:
    reward = load_reward("mpo_ray.data.embedded:detailed", objective="x")
    assert reward(["", ""], ["the food was great .", "boring ."]) == embedded.detailed(
        ["", ""], ["the food was great .", "boring ."]
    )


def test_a_function_of_a_file_needs_no_package(tmp_path: Path) -> None:
    spec = _file(tmp_path, "return [len(p) + len(r) for p, r in zip(prompts, responses)]")
    assert load_reward(spec, objective="x")(["ab"], ["c"]) == [3.0]


def test_a_classifier_reads_prompt_and_response_as_one_text_whatever_shares_its_batch(tmp_path: Path) -> None:
    path = str(tiny_reward(tmp_path / "reward", tiny_tokenizer(), seed=0))
    prompts, responses = ["the film ", "a ", "I "], ["was good", "plot", "liked it not at all"]
    model, tokenizer = load_reward_model(path)
    expected = []
    for prompt, response in zip(prompts, responses, strict=True):
        ids = torch.tensor([tokenizer(prompt + response)["input_ids"]])
        with torch.no_grad():
            expected.append(float(model(input_ids=ids).logits))
    assert load_reward(path, objective="x", batch_size=2)(prompts, responses) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0]", r"objectives\.x\.reward: returned 1 numbers for 2 responses"),
        ("return [1.0, float('nan')]", "returned nan for the response 'second'"),
    ],
)
def test_what_a_function_returns_is_checked(tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        load_reward(_file(tmp_path, body), objective="x")(["p", "p"], ["first", "second"])


def test_a_function_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="has no function 'scores'"):
        load_reward(_file(tmp_path, "return []") + "s", objective="x")
    with pytest.raises(RewardError, match=r"'no\.such\.module' cannot be imported"):
        load_reward("no.such.module:score", objective="x")
    with pytest.raises(RewardError, match=r"missing\.py' cannot be imported"):
        load_reward(f"{tmp_path}/missing.py:score", objective="x")


def test_anything_without_a_function_is_a_model(tmp_path: Path) -> None:
    assert not is_callable_spec("owner/model")
    assert not is_callable_spec("s3://bucket/model")
    assert is_callable_spec("package.module:function")
    with pytest.raises(ModelError, match="no such directory"):
        load_reward(f"{tmp_path}/none/", objective="x")
