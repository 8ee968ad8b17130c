"""`check` compares ids, targets and templates with the model before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import AddedToken

from mpo_ray.config import RunConfig
from mpo_ray.data.text_tokens import RenderingError
from mpo_ray.policies.loading import ModelError, load_rendering, load_tokenizer
from mpo_ray.run_file import load_config
from mpo_ray.stages.check_model import check_reference
from tests.tiny import TINY_SIZES, tiny_llama, tiny_tokenizer
from tests.tiny_run import CONFIG


def config(*overrides: str) -> RunConfig:
    return load_config(CONFIG, list(overrides))


def with_token(directory: Path, token: str, **named: str) -> PreTrainedTokenizerFast:
    """A model whose tokenizer has gained a token that the embedding has no row for."""
    tokenizer = tiny_tokenizer()
    tiny_llama(directory, tokenizer, seed=0)
    tokenizer.add_tokens([AddedToken(token, special=True)], special_tokens=True)
    for key, value in named.items():
        setattr(tokenizer, key, value)
    return tokenizer


def test_a_padding_token_needs_no_row(tmp_path: Path) -> None:
    """A pad token beyond the embedding: `check` passes, and the end token pads, everywhere."""
    tokenizer = with_token(tmp_path, "[PAD]", pad_token="[PAD]")
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer.pad_token_id == len(tiny_tokenizer())
    check_reference(str(tmp_path), config())
    assert load_tokenizer(str(tmp_path)).pad_token_id == tokenizer.eos_token_id


def test_a_special_token_without_a_row_is_refused_where_it_is_used(tmp_path: Path) -> None:
    """Nothing uses it: the run goes on, and a row that spells it is bad. The template writes it: refused."""
    tokenizer = with_token(tmp_path, "<image>")
    tokenizer.save_pretrained(tmp_path)
    check_reference(str(tmp_path), config())
    with pytest.raises(RenderingError, match="'<image>' with the id 25, and the model has rows for 25 ids"):
        load_rendering(str(tmp_path)).prompt_ids("the film <image>")
    tokenizer.chat_template = tokenizer.chat_template.replace(" assistant", " <image> assistant")
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"the chat template does not fit the model: .*'<image>'"):
        check_reference(str(tmp_path), config())


@pytest.mark.parametrize("key", ["eos_token", "bos_token"])
def test_ends_and_starts_without_a_row_are_refused(key: str, tmp_path: Path) -> None:
    tokenizer = with_token(tmp_path, "<new>", **{key: "<new>"})
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="'<new>', has the id 25, and the model's embedding has 25 rows"):
        check_reference(str(tmp_path), config())


def test_an_end_token_that_only_the_model_names_needs_no_row(tmp_path: Path) -> None:
    """It cannot be drawn, so it is no end: not of the run either."""
    tiny_llama(tmp_path, tiny_tokenizer(), seed=0)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [2, 99, -1]}))
    check_reference(str(tmp_path), config())
    assert load_rendering(str(tmp_path)).ends == (2,)
    file.write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json cannot be read .*Correct or remove it"):
        check_reference(str(tmp_path), config())


def test_weights_of_another_size_than_the_configurations_are_refused(tmp_path: Path) -> None:
    tiny_llama(tmp_path, tiny_tokenizer(), seed=0)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "vocab_size": 40}))
    with pytest.raises(ModelError, match=r"'lm_head.weight' \(\(25, 32\) in its files, \(40, 32\) by"):
        check_reference(str(tmp_path), config())


def test_a_chat_template_that_is_no_template_is_refused(tmp_path: Path) -> None:
    tiny_llama(tmp_path, tiny_tokenizer(), seed=0)
    (tmp_path / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content ")
    with pytest.raises(ModelError, match=r"the chat template refuses .* Correct the tokenizer's chat_template"):
        check_reference(str(tmp_path), config())


def test_another_models_tokenizer_is_refused(tmp_path: Path) -> None:
    tiny_llama(tmp_path, tiny_tokenizer(), seed=0)
    tiny_tokenizer([f"w{n}" for n in range(60)]).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="a token of the tokenizer, 'w59', has the id 66"):
        check_reference(str(tmp_path), config())


@pytest.mark.parametrize(
    ("targets", "complaint"),
    [
        ("[query_projection]", r"policies\.lora\.target_modules: 'query_projection' .* Did you mean q_proj"),
        ("[]", r"policies\.lora\.target_modules: names no layer\. Layers that can be"),
        ("'('", r"policies\.lora\.target_modules: '\(' is no regular expression"),
        ("[q_proj, lm_head]", r"policies\.lora\.target_modules: 'lm_head' .* the output head"),
    ],
)
def test_targets_that_no_layer_has_are_refused_by_their_key(targets: str, complaint: str, tmp_path: Path) -> None:
    tiny_llama(tmp_path, tiny_tokenizer(), seed=0, tie_word_embeddings=True)
    with pytest.raises(ModelError, match=complaint):
        check_reference(str(tmp_path), config(f"policies.lora.target_modules={targets}"))


SIZES: dict[str, Any] = {**TINY_SIZES, "vocab_size": 25}


def test_experts_by_name_are_refused_and_left_out_of_all_linear(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert "decoded by the engine" in check_reference(str(tmp_path), config())
    with pytest.raises(ModelError, match=r"'w1' .* weights of the experts"):
        check_reference(str(tmp_path), config("policies.lora.target_modules=[w1, w2, w3]"))
    check_reference(str(tmp_path), config("policies.lora=null"))


def test_a_model_that_is_no_causal_language_model_is_refused(tmp_path: Path) -> None:
    tiny_llama(tmp_path, tiny_tokenizer(), seed=0)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"model_type": "llama"', '"model_type": "t5"'))
    with pytest.raises(ModelError, match="no causal language model could be made of it"):
        check_reference(str(tmp_path), config())
