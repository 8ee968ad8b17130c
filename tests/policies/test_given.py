"""Policies as users have them: each is served as PEFT loads it, or refused by name before anything is written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from mpo_ray.decoding.branch import Piece
from mpo_ray.decoding.need import Need
from mpo_ray.decoding.runner import MixtureRunner
from mpo_ray.policies.artefact import write_artefact
from mpo_ray.policies.given import check_comparable, find_policy, look_at
from mpo_ray.policies.loading import ModelError, is_adapter, load_policy
from mpo_ray.policies.mixture import MixtureForCausalLM
from tests.tiny import TINY_SIZES, tiny_llama, tiny_lora, tiny_tokenizer

IDS = [1, 8, 9, 10, 11, 7, 6]
MOE = {**TINY_SIZES, "vocab_size": 25}
WEIGHTS = {"odd": 0.6, "plain": 0.4}
pytestmark = [pytest.mark.filterwarnings("ignore")]  # PEFT's own, of odd adapters


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base with an output layer of its own, one whose output layer is its embeddings, and an adapter of each."""
    root = tmp_path_factory.mktemp("given")
    for name, tied in (("untied", False), ("tied", True)):
        base = tiny_llama(root / name, tiny_tokenizer(), seed=0, tie_word_embeddings=tied, attention_bias=True)
        tiny_lora(root / f"plain_{name}", base, seed=7)
    return {path.name: path for path in root.iterdir()}


def adapted(base: Path, **config: Any) -> PeftModel:
    """A LoRA of the model at `base` all whose trained parameters are random."""
    made = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **config}
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **made))
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def adapter(directory: Path, base: Path, **config: Any) -> Path:
    """As `PeftModel.save_pretrained` writes it: no tokenizer beside it."""
    adapted(base, **config).save_pretrained(directory)
    return directory


def change(directory: Path, **values: Any) -> Path:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return directory


def rewrite(file: Path, by: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file({k: v.contiguous() for k, v in by(load_file(file)).items()}, file, metadata={"format": "pt"})


def mix(out: Path, policies: dict[str, str | Path], reference: Path) -> list[str]:
    """Write the artefact as `mpo-ray mix` does; returns the lines that it tells."""
    told: list[str] = []
    weights = dict.fromkeys(policies, 1 / len(policies)) if policies.keys() != WEIGHTS.keys() else WEIGHTS
    how: dict[str, Any] = {"copy_reference": False, "weights": weights, "fit": {}, "tell": told.append}
    write_artefact(out, objectives=policies, reference=reference, **how)
    return told


@torch.no_grad()
def logprobs(model: Any) -> Tensor:
    return model(input_ids=torch.tensor([IDS])).logits[0].double().log_softmax(-1)  # type: ignore[no-any-return]


def as_peft(base: Path, adapter: str | Path, **how: Any) -> Tensor:
    return logprobs(PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), str(adapter), **how).eval())


def by_engine(mixture: MixtureForCausalLM) -> Tensor:
    runner = MixtureRunner(mixture, max_num_seqs=1)
    [lane], _ = runner.open(Need((0, 1), (), 64))
    parts = [(0, 4), (4, 5), (5, 7)]
    weights = list(mixture.config.weights.values())
    rows = [
        runner.run([Piece(lane, IDS[a:b], a, weights, b - a, True)]).logits.double().log_softmax(-1) for a, b in parts
    ]
    return torch.cat(rows)


def assert_mixture(artefact: Path, odd: Tensor, plain: Tensor) -> None:
    """The artefact's next-token distributions are the product of the two, by `forward` and by the engine."""
    expected = (WEIGHTS["odd"] * odd + WEIGHTS["plain"] * plain).log_softmax(-1)
    mixture = MixtureForCausalLM.from_pretrained(artefact)
    torch.testing.assert_close(logprobs(mixture), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(by_engine(mixture), expected, atol=1e-5, rtol=0)


#: Adapters that are stacked as they are.
STACKED: dict[str, dict[str, Any]] = {
    "rank-stabilised": {"use_rslora": True},
    "patterns": {"rank_pattern": {r"^model\.layers\.0\..*q_proj": 2}, "alpha_pattern": {r"layers\.1\..*v_proj": 12}},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
    "fan in, fan out": {"fan_in_fan_out": True},
}
#: Adapters that are more than factors of linear layers, kept with full weights; how the line about them calls them.
MERGED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True, "use_rslora": True, "target_modules": "all-linear"}, "DoRA adapter"),
    "whole head": ({"modules_to_save": ["lm_head"]}, "modules_to_save: ..lm_head"),
    "whole embeddings": ({"modules_to_save": ["embed_tokens"]}, "modules_to_save: ..embed_tokens"),
    "both whole": ({"modules_to_save": ["embed_tokens", "lm_head"]}, "modules_to_save"),
    "whole norm": ({"modules_to_save": ["norm"]}, "modules_to_save: ..norm"),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, "other layers than linear ones"),
    "embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, "other layers than linear ones"),
    "both ends": ({"target_modules": ["embed_tokens", "lm_head"]}, "other layers than linear ones"),
    "ends tied": (
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        "other layers than linear ones",
    ),
    "tokens": ({"trainable_token_indices": [3, 9, 12]}, "rows of single tokens"),
    "biases": ({"bias": "all"}, "with biases"),
    "bias of B": ({"target_modules": ["q_proj"], "lora_bias": True}, "with biases"),
    "pissa": ({"init_lora_weights": "pissa"}, r"changes the reference's weights first .pissa"),
    "olora": ({"init_lora_weights": "olora"}, r"changes the reference's weights first .olora"),
}


@pytest.mark.parametrize("config", STACKED.values(), ids=STACKED)
def test_a_plain_adapter_is_stacked(config: dict[str, Any], bases: dict[str, Path], tmp_path: Path) -> None:
    base, plain = bases["untied"], bases["plain_untied"]
    odd = adapter(tmp_path / "odd", base, **config)
    change(odd, fan_in_fan_out=config.get("fan_in_fan_out", False))  # PEFT has set it right already
    told = mix(tmp_path / "mixed", {"odd": odd, "plain": plain}, base)
    assert not told
    assert is_adapter(tmp_path / "mixed/policies/odd")
    assert_mixture(tmp_path / "mixed", as_peft(base, odd), as_peft(base, plain))


@pytest.mark.parametrize("config", MERGED.values(), ids=MERGED)
def test_what_cannot_be_stacked_is_merged_as_peft_computes_it(
    config: tuple[dict[str, Any], str], bases: dict[str, Path], tmp_path: Path
) -> None:
    """log π of the artefact is that of `PeftModel.from_pretrained`, also where embeddings and output layer are one."""
    ends = {"embed_tokens", "lm_head"} & {*config[0].get("modules_to_save", []), *config[0].get("target_modules", [])}
    for kind in ("tied", "untied") if ends or "trainable_token_indices" in config[0] else ("untied",):
        base, plain = bases[kind], bases[f"plain_{kind}"]
        odd = adapter(tmp_path / f"odd {kind}", base, **config[0])
        [line] = mix(tmp_path / kind, {"odd": odd, "plain": plain}, base)
        assert re.match(f"policy 'odd', an? .*{config[1]}.* is merged into the reference .* MiB of memory", line)
        assert not is_adapter(tmp_path / kind / "policies/odd")
        assert_mixture(tmp_path / kind, as_peft(base, odd), as_peft(base, plain))


def test_a_converted_pissa_adapter_is_a_plain_one(bases: dict[str, Path], tmp_path: Path) -> None:
    """Saved with the adapter that it began as, PEFT writes a LoRA of twice the rank, of the unchanged base."""
    base, plain = bases["untied"], bases["plain_untied"]
    start = get_peft_model(
        LlamaForCausalLM.from_pretrained(base),
        LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM"),
    )
    start.peft_config["default"].init_lora_weights = True
    start.save_pretrained(tmp_path / "start")
    start.peft_config["default"].init_lora_weights = "pissa"
    for name, parameter in start.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1
    trained = logprobs(start)
    start.save_pretrained(tmp_path / "odd", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert not mix(tmp_path / "mixed", {"odd": tmp_path / "odd", "plain": plain}, base)
    assert_mixture(tmp_path / "mixed", trained, as_peft(base, plain))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_adapter_in_half_precision_is_what_its_file_says(
    dtype: torch.dtype, bases: dict[str, Path], tmp_path: Path
) -> None:
    base, plain = bases["untied"], bases["plain_untied"]
    odd = adapter(tmp_path / "odd", base)
    rewrite(odd / "adapter_model.safetensors", lambda state: {k: v.to(dtype) for k, v in state.items()})
    mix(tmp_path / "mixed", {"odd": odd, "plain": plain}, base)
    assert_mixture(tmp_path / "mixed", as_peft(base, odd), as_peft(base, plain))


def lose(key: str) -> Callable[[Path], None]:
    def damage(odd: Path) -> None:
        rewrite(odd / "adapter_model.safetensors", lambda state: {k: v for k, v in state.items() if key not in k})

    return damage


def spoil(value: float, file: str = "adapter_model.safetensors", key: str = "layers.1.self_attn.v_proj") -> Any:
    def damage(odd: Path) -> None:
        def change(state: dict[str, Tensor]) -> dict[str, Tensor]:
            next(tensor for name, tensor in state.items() if key in name)[0, 0] = value
            return state

        rewrite(odd / file, change)

    return damage


def renamed(odd: Path) -> None:
    rewrite(
        odd / "adapter_model.safetensors", lambda state: {k.replace("lora_A", "lora_Q"): v for k, v in state.items()}
    )


def emptied(odd: Path) -> None:
    save_file({}, odd / "adapter_model.safetensors")


def pickled(odd: Path) -> None:
    (odd / "adapter_model.safetensors").rename(odd / "adapter_model.bin")


def cut(odd: Path) -> None:
    content = (odd / "adapter_model.safetensors").read_bytes()
    (odd / "adapter_model.safetensors").write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("config", "damage", "complaint"),
    [
        ({}, spoil(float("nan")), r"adapter_model\.safetensors: the tensor '.*layers\.1.*v_proj.*' holds 1 values of"),
        ({}, spoil(float("inf")), r"adapter_model\.safetensors: the tensor '.*layers\.1.*v_proj.*' holds 1 values of"),
        ({"use_dora": True}, spoil(float("nan")), r"the tensor '.*layers\.1.*v_proj.*' holds 1 values of"),
        ({}, lose("layers.1.self_attn.q_proj"), r"does not fit .* tensors are missing from it .*layers\.1.*q_proj"),
        ({"use_dora": True}, lose("magnitude_vector"), r"6 tensors are missing from it .*lora_magnitude_vector"),
        ({"modules_to_save": ["lm_head"]}, lose("lm_head"), "does not fit the reference model: .*lm_head"),
        ({"bias": "all"}, lose("q_proj.base_layer.bias"), "2 tensors are missing from it .*bias"),
        ({}, renamed, "12 find no place|6 find no place"),
        ({}, emptied, "tensors are missing from it"),
        ({}, pickled, r"has no adapter_model\.safetensors but adapter_model\.bin.*can run code.*convert it"),
        ({}, cut, r"adapter_model\.safetensors: the file is damaged"),
        ({}, lambda odd: change(odd, peft_type="IA3"), "peft_type is 'IA3'; only LORA"),
        ({}, lambda odd: change(odd, gate_lora=3), r"sets gate_lora: 3, which PEFT .* does not know .*remove it"),
        ({}, lambda odd: change(odd, init_lora_weights="pissa_niter_4"), "pissa_niter_4', which changed the base's"),
        ({}, lambda odd: change(odd, init_lora_weights="loftq"), "loftq', which changed the base's weights"),
        ({"lora_bias": True}, lambda odd: None, "PEFT cannot merge this adapter .* the base layer has no bias"),
    ],
)
def test_what_no_mixture_can_hold_is_refused_before_anything_is_written(
    config: dict[str, Any], damage: Callable[[Path], None], complaint: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    odd = adapter(tmp_path / "odd", bases["untied"], **config)
    damage(odd)
    with pytest.raises(ModelError, match=complaint) as error:
        mix(tmp_path / "out" / "mixed", {"plain": bases["plain_untied"], "odd": odd}, bases["untied"])
    assert str(odd) in str(error.value)
    assert not [*(tmp_path / "out").rglob("*")]


def test_a_newer_peft_may_write_settings_that_change_nothing(bases: dict[str, Path], tmp_path: Path) -> None:
    odd = change(adapter(tmp_path / "odd", bases["untied"]), new_one=None, new_two=False, new_three={}, new_four=[])
    assert not look_at(odd, str(bases["untied"])).has_to_merge


def test_an_adapter_of_another_model_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    """Also one that has to be merged; no weights of the reference are opened to see it."""
    for name, changes in {"wider": {"hidden_size": 64}, "deeper": {"num_hidden_layers": 3}}.items():
        other = tiny_llama(tmp_path / name, tiny_tokenizer(), seed=0, **changes)
        for kind in ({}, {"use_dora": True}):
            odd = adapter(tmp_path / f"{name}{len(kind)}", other, **kind)
            with pytest.raises(ModelError, match="does not fit the reference model"):
                check_comparable("theirs", str(odd), str(bases["untied"]))
            with pytest.raises(ModelError, match="does not fit the reference model"):
                mix(tmp_path / "mixed", {"odd": odd, "plain": bases["plain_untied"]}, bases["untied"])
    assert not (tmp_path / "mixed").exists()


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_keys_with_and_without_pefts_prefix_are_one_adapter(
    prefix: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    base, plain = bases["untied"], bases["plain_untied"]
    odd = adapter(tmp_path / "odd", base)
    expected = as_peft(base, odd)
    rewrite(
        odd / "adapter_model.safetensors",
        lambda state: {prefix + key.removeprefix("base_model.model."): tensor for key, tensor in state.items()},
    )
    mix(tmp_path / "mixed", {"odd": odd, "plain": plain}, base)
    assert_mixture(tmp_path / "mixed", expected, as_peft(base, plain))


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


def test_a_reference_that_is_not_finite_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    base = Path(shutil.copytree(bases["untied"], tmp_path / "base"))
    spoil(float("nan"), "model.safetensors", "layers.1.mlp.up_proj")(base)
    with pytest.raises(ModelError, match=r"base/model\.safetensors: the tensor 'model\.layers\.1\.mlp\.up_proj"):
        mix(tmp_path / "mixed", {"plain": bases["plain_untied"]}, base)
    assert not (tmp_path / "mixed").exists()


@pytest.mark.parametrize(
    ("trained_from", "is_told"),
    [("owner/another-1B", True), ("elsewhere/untied", False), ("/hub/models--me--untied/snapshots/0a1", False)],
)
def test_an_adapter_that_names_another_base_is_told(
    trained_from: str, is_told: bool, bases: dict[str, Path], tmp_path: Path
) -> None:
    odd = change(adapter(tmp_path / "odd", bases["untied"]), base_model_name_or_path=trained_from)
    told = mix(tmp_path / "mixed", {"odd": odd}, bases["untied"])
    assert [f"trained from {trained_from}, and the reference is" in line for line in told] == [True] * is_told


#: Mixture-of-experts models by the names that transformers 4 gave their experts' layers: gate, up, down.
EXPERTS: dict[str, tuple[Callable[[], PreTrainedModel], str, tuple[str, str, str]]] = {
    "mixtral": (
        lambda: MixtralForCausalLM(MixtralConfig(**MOE, num_local_experts=4, num_experts_per_tok=2)),
        "block_sparse_moe.experts",
        ("w1", "w3", "w2"),
    ),
    "qwen3_moe": (
        lambda: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**MOE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
        ),
        "mlp.experts",
        ("gate_proj", "up_proj", "down_proj"),
    ),
}


@pytest.mark.parametrize("kind", EXPERTS)
def test_one_lora_for_each_expert_is_what_transformers_4_meant(kind: str, tmp_path: Path) -> None:
    """Each expert's weights gain its own s B A, by hand; transformers 5 keeps all experts in one tensor."""
    make, experts, (gate, up, down) = EXPERTS[kind]
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    tensors: dict[str, Tensor] = {}
    updates: dict[tuple[int, int, str], Tensor] = {}
    for layer, expert, name in product(range(2), range(4), (gate, up, down)):
        inputs, outputs = (64, 32) if name == down else (32, 64)
        a, b = 0.3 * torch.randn(4, inputs), 0.3 * torch.randn(outputs, 4)
        key = f"base_model.model.model.layers.{layer}.{experts}.{expert}.{name}"
        tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
        updates[layer, expert, name] = 2 * b @ a
    (tmp_path / "odd").mkdir()
    save_file(tensors, tmp_path / "odd" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8}
    text = json.dumps({**settings, "target_modules": [gate, up, down]})
    (tmp_path / "odd" / "adapter_config.json").write_text(text)
    mix(tmp_path / "mixed", {"odd": tmp_path / "odd"}, tmp_path / "base")
    with torch.no_grad():
        for layer, expert in product(range(2), range(4)):
            fused = model.model.layers[layer].mlp.experts
            both = torch.cat([updates[layer, expert, gate], updates[layer, expert, up]])
            fused.gate_up_proj[expert] += both
            fused.down_proj[expert] += updates[layer, expert, down]
    found = MixtureForCausalLM.from_pretrained(tmp_path / "mixed")
    torch.testing.assert_close(logprobs(found), logprobs(model), atol=1e-5, rtol=0)
