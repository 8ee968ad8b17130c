"""Where a given policy lies, in which files, and with which tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
)

from mpo_ray.policies.given import check_comparable, find_policy, look_at
from mpo_ray.policies.loading import ModelError, load_policy
from tests.policies.adapters_given import (
    WEIGHTS,
    adapter,
    as_peft,
    assert_mixture,
    logprobs,
    mix,
    rewrite,
    spoil,
)
from tests.tiny import tiny_lora, tiny_tokenizer

pytestmark = [pytest.mark.filterwarnings("ignore")]  # PEFT's own, of odd adapters


class TestPlaces:
    def test_an_adapter_lies_in_a_directory_inside(self, bases: dict[str, Path], tmp_path: Path) -> None:
        """As PEFT saves adapters that have names; of several, `default` is meant."""
        odd = adapter(tmp_path / "run" / "helpful", bases["untied"])
        assert find_policy(tmp_path / "run") == odd
        other = adapter(tmp_path / "run" / "kind", bases["untied"])
        with pytest.raises(ModelError, match=f"holds 2 adapters: helpful, kind. Name one of them: {odd}"):
            find_policy(tmp_path / "run")
        other.rename(tmp_path / "run" / "default")
        assert find_policy(tmp_path / "run") == tmp_path / "run" / "default"
        base, plain = bases["untied"], bases["plain_untied"]
        mix(tmp_path / "mixed", {"odd": tmp_path / "run", "plain": plain}, base)
        assert_mixture(tmp_path / "mixed", as_peft(base, tmp_path / "run", subfolder="default"), as_peft(base, plain))

    def test_what_lies_beside_an_adapter_stays_there(self, bases: dict[str, Path], tmp_path: Path) -> None:
        odd = adapter(tmp_path / "odd", bases["untied"])
        adapter(odd / "second", bases["untied"])
        (odd / "optimizer.pt").write_bytes(b"x")
        mix(tmp_path / "mixed", {"odd": odd, "plain": bases["plain_untied"]}, bases["untied"])
        kept = {
            str(path.relative_to(tmp_path / "mixed/policies/odd"))
            for path in (tmp_path / "mixed/policies/odd").rglob("*")
        }
        assert kept == {"adapter_config.json", "adapter_model.safetensors"}

    @pytest.mark.parametrize("inside", ["", "default"])
    def test_a_hub_id_is_read_from_the_cache_as_peft_does(
        self, inside: str, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        base, plain = bases["untied"], bases["plain_untied"]
        snapshot = tmp_path / "hub" / "models--somebody--kind" / "snapshots" / "0123abcd"
        odd = adapter(snapshot / inside, base, use_dora=True)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("0123abcd")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        mix(tmp_path / "mixed", {"odd": "somebody/kind", "plain": plain}, base)
        assert_mixture(tmp_path / "mixed", as_peft(base, odd), as_peft(base, plain))

    @pytest.mark.parametrize(
        ("given", "complaint"),
        [
            ("nobody/nothing", "nobody/nothing: no such directory, and as a hub id it could not be fetched"),
            ("./nowhere", "no such policy directory; give the directory of a policy, or a hub id"),
        ],
    )
    def test_what_is_nowhere_is_refused(self, given: str, complaint: str) -> None:
        with pytest.raises(ModelError, match=complaint):
            find_policy(given)


def shards(directory: Path, model: PreTrainedModel) -> Path:
    model.save_pretrained(directory, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(directory)
    return directory


def shard(directory: Path) -> Path:
    return min(directory.glob("model-*.safetensors"))


class TestFullWeights:
    @pytest.mark.parametrize(
        ("damage", "complaint"),
        [
            (lambda d: sorted(d.glob("model-*"))[1].unlink(), r"model-00002-of-.*: this file of the model is missing"),
            (
                lambda d: spoil(float("nan"), min(d.glob("model-*.safetensors")).name, "weight")(d),
                "the tensor '.*' holds 1",
            ),
        ],
    )
    def test_shards_are_all_there_and_finite(
        self, damage: Callable[[Path], None], complaint: str, bases: dict[str, Path], tmp_path: Path
    ) -> None:
        odd = shards(tmp_path / "odd", LlamaForCausalLM.from_pretrained(bases["untied"]))
        assert look_at(odd, str(bases["untied"])).vocab_size == 25
        damage(odd)
        with pytest.raises(ModelError, match=complaint):
            mix(tmp_path / "mixed", {"odd": odd, "plain": bases["plain_untied"]}, bases["untied"])
        with pytest.raises(ModelError, match=complaint):
            check_comparable("theirs", str(odd), str(bases["untied"]))
        assert not (tmp_path / "mixed").exists()

    def test_a_lost_tensor_is_found_without_opening_the_model(self, bases: dict[str, Path], tmp_path: Path) -> None:
        odd = Path(shutil.copytree(bases["untied"], tmp_path / "odd"))
        rewrite(odd / "model.safetensors", lambda state: {k: v for k, v in state.items() if k != "model.norm.weight"})
        with pytest.raises(ModelError, match=r"1 weights of a LlamaForCausalLM .*'model\.norm\.weight'"):
            look_at(odd, str(bases["untied"]))


class TestTokenizers:
    def padded(self, directory: Path) -> Path:
        """Its tokenizer gained a padding token, which has no row in the embeddings."""
        tokenizer = tiny_tokenizer()
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        tokenizer.save_pretrained(directory)
        assert tokenizer.pad_token_id == 25
        return directory

    def test_a_padding_token_of_ones_own_is_no_difference(self, bases: dict[str, Path], tmp_path: Path) -> None:
        base, plain = bases["untied"], bases["plain_untied"]
        odd = self.padded(adapter(tmp_path / "odd", base))
        for order, name in enumerate(({"odd": odd, "plain": plain}, {"plain": plain, "odd": odd})):
            mix(tmp_path / f"mixed{order}", name, base)
            assert AutoTokenizer.from_pretrained(tmp_path / f"mixed{order}").pad_token_id < 25
        assert_mixture(tmp_path / "mixed0", as_peft(base, odd), as_peft(base, plain))
        check_comparable("theirs", str(odd), str(base))

    def test_policies_that_changed_their_end_alike_agree(self, bases: dict[str, Path], tmp_path: Path) -> None:
        """They are compared with each other; the artefact has their end token, not the reference's."""
        ended = tiny_tokenizer()
        ended.eos_token = "assistant"
        policies: dict[str, str | Path] = {}
        for seed, name in enumerate(WEIGHTS):
            policies[name] = tiny_lora(tmp_path / name, bases["untied"], seed, tokenizer=ended)
        mix(tmp_path / "mixed", policies, bases["untied"])
        assert AutoTokenizer.from_pretrained(tmp_path / "mixed").eos_token == "assistant"
        policies["plain"] = bases["plain_untied"]
        with pytest.raises(ModelError, match=r"eos_token is 'assistant' \(id 5\) and '</s>' \(id 2\)"):
            mix(tmp_path / "other", policies, bases["untied"])

    def resized(self, directory: Path, base: Path, *, seed: int = 0, **config: Any) -> Path:
        """A token more, and a row for it: in a model, or in an adapter that trains the embeddings."""
        tokenizer = tiny_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
        model = LlamaForCausalLM.from_pretrained(base)
        model.resize_token_embeddings(26)
        if config:
            model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config))
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator) * parameter.requires_grad
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return directory

    @pytest.mark.parametrize("kind", ["tied", "untied"])
    @pytest.mark.parametrize(
        "more",
        [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}, {"target_modules": ["embed_tokens", "lm_head"]}],
        ids=["saved", "trained whole", "adapted"],
    )
    def test_policies_that_were_resized_alike_agree(
        self, more: dict[str, Any], kind: str, bases: dict[str, Path], tmp_path: Path
    ) -> None:
        """PEFT writes the embeddings of an adapter whose model was resized, whatever was trained."""
        base = bases[kind]
        odd = self.resized(tmp_path / "odd", base, seed=1, **{"r": 2, "target_modules": ["q_proj"], **more})
        plain = self.resized(tmp_path / "plain", base, seed=2)
        mix(tmp_path / "mixed", {"odd": odd, "plain": plain}, base)
        larger = LlamaForCausalLM.from_pretrained(base)
        larger.resize_token_embeddings(26)
        expected = logprobs(PeftModel.from_pretrained(larger, str(odd)).eval())
        assert_mixture(tmp_path / "mixed", expected, logprobs(AutoModelForCausalLM.from_pretrained(plain)))
        assert AutoTokenizer.from_pretrained(tmp_path / "mixed").convert_tokens_to_ids("<|turn|>") == 25
        with pytest.raises(ModelError, match=r"differ in size \(odd: 26, plain: 25\).*resize_token_embeddings"):
            mix(tmp_path / "uneven", {"odd": odd, "plain": bases[f"plain_{kind}"]}, base)
        assert not (tmp_path / "uneven").exists()

    def test_another_chat_template_is_told(self, bases: dict[str, Path], tmp_path: Path) -> None:
        other = tiny_tokenizer()
        other.chat_template = other.chat_template.replace("assistant", "bot")
        odd = tiny_lora(tmp_path / "odd", bases["untied"], 1, tokenizer=other)
        [line] = mix(tmp_path / "mixed", {"plain": bases["plain_untied"], "odd": odd}, bases["untied"])
        assert "the chat templates of 'plain' and 'odd' differ: " in line
        assert "user c assistant" in line


def test_an_adapter_may_be_compared_with_the_reference(bases: dict[str, Path], tmp_path: Path) -> None:
    """As `evaluation.models` names it: any that PEFT loads, without a tokenizer of its own."""
    odd = adapter(tmp_path / "run" / "default", bases["untied"], use_dora=True)
    check_comparable("theirs", str(tmp_path / "run"), str(bases["untied"]))
    opened = load_policy(str(find_policy(tmp_path / "run")), str(bases["untied"]))
    torch.testing.assert_close(logprobs(opened), as_peft(bases["untied"], odd), atol=1e-6, rtol=0)


def test_a_compared_model_with_another_chat_template_is_told(bases: dict[str, Path], tmp_path: Path) -> None:
    other = tiny_tokenizer()
    other.chat_template = other.chat_template.replace("assistant", "bot")
    odd = tiny_lora(tmp_path / "odd", bases["untied"], 1, tokenizer=other)
    caution = check_comparable("theirs", str(odd), str(bases["untied"]))
    assert caution is not None
    assert "evaluation.models.theirs has another chat template than the reference ('<s> user a " in caution
    assert check_comparable("theirs", str(bases["plain_untied"]), str(bases["untied"])) is None
