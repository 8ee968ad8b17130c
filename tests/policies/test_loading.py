"""What may be opened, and what is refused, with a message that says what was found and what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from mpo_ray.policies.given import check_comparable
from mpo_ray.policies.loading import (
    ModelError,
    load_model,
    load_policy,
    load_reward_model,
    load_tokenizer,
)
from tests.tiny import next_logprobs, tiny_llama, tiny_lora, tiny_reward, tiny_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "base", tiny_tokenizer(), seed=0)


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    """A model directory that a test may damage."""
    return Path(shutil.copytree(base, tmp_path / "model"))


def test_a_model_is_opened_as_it_was_saved_for_evaluation(base: Path) -> None:
    model = load_model(str(base))
    assert not model.training
    saved = load_file(base / "model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    assert load_model(str(base), precision="bf16").dtype == torch.bfloat16


def test_an_adapter_changes_its_reference_and_full_weights_need_none(base: Path, tmp_path: Path) -> None:
    adapter = tiny_lora(tmp_path / "adapter", base, seed=1)
    policy = load_policy(str(adapter), str(base))
    assert isinstance(policy, PeftModel)
    assert not policy.training
    ids = [1, 7, 8]
    tuned = next_logprobs(policy, ids)
    with policy.disable_adapter():
        torch.testing.assert_close(next_logprobs(policy, ids), next_logprobs(load_model(str(base)), ids))
    assert (tuned - next_logprobs(load_model(str(base)), ids)).abs().max() > 0.1
    full = tiny_llama(tmp_path / "full", tiny_tokenizer(), seed=2)
    torch.testing.assert_close(
        next_logprobs(load_policy(str(full), "no/such/reference"), ids),
        next_logprobs(LlamaForCausalLM.from_pretrained(full), ids),
    )


def only_pickle(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def no_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def truncated(directory: Path) -> None:
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(content[: len(content) // 2])


def lost_tensor(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def other_shape(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))


def own_code(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "evil.py").write_text("raise SystemExit('this code was run')\n")


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (only_pickle, r"has no model\.safetensors but pytorch_model\.bin.*can run code.*save_pretrained"),
        (no_weights, r"has no model\.safetensors but .*config\.json.*save the model whole"),
        (no_config, r"is not a model directory; it has no config\.json"),
        (truncated, "could not be opened"),
        (lost_tensor, r"1 weights of a LlamaForCausalLM .*'model\.norm\.weight'; they would be random"),
        (other_shape, "could not be opened|have another shape"),
        (own_code, "could not be opened.*contains custom code"),
    ],
)
def test_a_damaged_or_unsafe_model_is_refused(damage: Callable[[Path], None], complaint: str, copy: Path) -> None:
    damage(copy)
    with pytest.raises(ModelError, match=f"{copy}: .*({complaint})"):
        load_model(str(copy))


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("no/such/directory", "no such directory"),
        ("./nowhere", "no such directory"),
        ("nobody/nothing", "could not be opened"),
    ],
)
def test_a_missing_model_is_refused(path: str, complaint: str) -> None:
    """What looks like a hub id is asked of the hub (offline here), the rest is a directory that is not there."""
    with pytest.raises(ModelError, match=f"^{path}: .*{complaint}"):
        load_model(path)


def test_an_adapter_is_no_model_and_must_fit_its_reference(base: Path, tmp_path: Path) -> None:
    adapter = tiny_lora(tmp_path / "adapter", base, seed=1)
    with pytest.raises(ModelError, match="holds a LoRA adapter, not a model"):
        load_model(str(adapter))
    wider = tiny_llama(tmp_path / "wider", tiny_tokenizer(), seed=0, hidden_size=64)
    with pytest.raises(ModelError, match="does not fit the reference model"):
        load_policy(str(adapter), str(wider))
    deeper = tiny_llama(tmp_path / "deeper", tiny_tokenizer(), seed=0, num_hidden_layers=3)
    by_suffix = tiny_lora(tmp_path / "by_suffix", base, seed=1, target_modules=["q_proj", "v_proj"])
    with pytest.raises(ModelError, match="does not fit the reference model: 4 tensors are missing"):
        load_policy(str(by_suffix), str(deeper))
    shallow = tiny_llama(tmp_path / "shallow", tiny_tokenizer(), seed=0, num_hidden_layers=1)
    with pytest.raises(ModelError, match="does not fit the reference model"):
        load_policy(str(adapter), str(shallow))


def test_an_adapter_without_safetensors_or_of_another_kind_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = tiny_lora(tmp_path / "adapter", base, seed=1)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "PREFIX_TUNING"}))
    with pytest.raises(ModelError, match="peft_type is 'PREFIX_TUNING'; only LORA"):
        load_policy(str(adapter), str(base))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"has no adapter_model\.safetensors but adapter_model\.bin"):
        load_policy(str(adapter), str(base))


def test_a_reward_model_has_one_logit_and_a_trained_head(base: Path, tmp_path: Path) -> None:
    model, tokenizer = load_reward_model(str(tiny_reward(tmp_path / "reward", tiny_tokenizer(), seed=3)))
    assert model(**tokenizer(["the film was good", "bad"], padding=True, return_tensors="pt")).logits.shape == (2, 1)
    with pytest.raises(ModelError, match="has 3 logits; a reward model has one"):
        load_reward_model(str(tiny_reward(tmp_path / "three", tiny_tokenizer(), seed=3, num_labels=3)))
    with pytest.raises(ModelError, match=r"score\.weight'; they would be random"):
        load_reward_model(str(base))


def test_a_tokenizer_pads_with_its_end_token_where_it_has_no_other(base: Path, tmp_path: Path) -> None:
    assert load_tokenizer(str(base)).pad_token == "<pad>"
    bare = tiny_tokenizer()
    bare.pad_token = None
    bare.save_pretrained(tmp_path / "bare")
    assert load_tokenizer(str(tmp_path / "bare")).pad_token == "</s>"
    bare.eos_token = None
    bare.save_pretrained(tmp_path / "endless")
    with pytest.raises(ModelError, match="has no end token"):
        load_tokenizer(str(tmp_path / "endless"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="no tokenizer could be opened"):
        load_tokenizer(str(tmp_path / "empty"))


def test_a_model_to_compare_shares_the_references_vocabulary_and_output_layer(base: Path, tmp_path: Path) -> None:
    """Nothing is opened but files; the message names the place in the run file, both models and the difference."""
    check_comparable("theirs", str(tiny_llama(tmp_path / "twin", tiny_tokenizer(), seed=9)), str(base))
    fewer = tiny_llama(tmp_path / "fewer", tiny_tokenizer(words=["the", "film"]), seed=1, vocab_size=25)
    with pytest.raises(ModelError, match=r"evaluation\.models\.theirs: .*different vocabularies: 9 and 25 tokens"):
        check_comparable("theirs", str(fewer), str(base))
    padded = tiny_llama(tmp_path / "padded", tiny_tokenizer(), seed=1, vocab_size=32)
    with pytest.raises(ModelError, match=r"evaluation\.models\.theirs: the output layers of .* have 32 and 25 entries"):
        check_comparable("theirs", str(padded), str(base))
    with pytest.raises(ModelError, match=r"nowhere: no such policy directory"):
        check_comparable("theirs", str(tmp_path / "nowhere"), str(base))
