"""Models as a CPU decodes them fastest: changed by whoever opens them, and the same models still."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen3Config

from benchmarks.family_models import make_model
from mpo_ray.decoding.offline import Recipe
from mpo_ray.decoding.open_engine import open_engine, runner_of
from mpo_ray.decoding.protocol import Mode, Sampling
from mpo_ray.decoding.runner import MixtureRunner
from mpo_ray.decoding.sampler import EnsembleSampler, Room
from mpo_ray.policies import cpu
from mpo_ray.policies.adapters import AdapterStack
from mpo_ray.policies.artefact import write_artefact
from mpo_ray.policies.cpu import optimize_for_cpu
from mpo_ray.policies.ensemble import Ensemble
from mpo_ray.policies.families import FAMILIES
from mpo_ray.policies.loading import ModelError, load_model
from mpo_ray.policies.mixture import mixture_of_one
from mpo_ray.policies.packed_linear import PackedLinear, can_pack
from mpo_ray.policies.ragged_attention import carries_states
from mpo_ray.policies.short_norm import ShortNorm
from tests.tiny import TINY_SIZES, tiny_llama, tiny_lora, tiny_tokenizer

SIZES = {**TINY_SIZES, "vocab_size": 40}
IDS = torch.randint(3, 40, (2, 14), generator=torch.Generator().manual_seed(0))


def count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(type(module) is kind for module in model.modules())


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A base, two adapters of it, and full weights."""
    root = tmp_path_factory.mktemp("cpu")
    base = tiny_llama(root / "base", tiny_tokenizer(), seed=0)
    adapters = {f"adapter {seed}": str(tiny_lora(root / str(seed), base, seed=seed)) for seed in (1, 2)}
    return {"base": str(base), **adapters, "full": str(tiny_llama(root / "full", tiny_tokenizer(), seed=3))}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
def test_a_family_is_the_same_afterwards(family: str) -> None:
    """Logits to 1e-4, of a text and of the tokens after it one by one; layers with states stay as they are."""
    model = make_model(family)
    with torch.no_grad():
        expected = decoded(model)
        assert optimize_for_cpu(model) == (carries_states(model.config) is None)
        for found, own in zip(decoded(model), expected, strict=True):
            torch.testing.assert_close(found, own, atol=1e-4, rtol=1e-4)


def decoded(model: Any) -> list[Tensor]:
    """The logits of a text, and of each of its tokens where transformers' cache is kept."""
    found = [model(IDS).logits]
    if carries_states(model.config) is None:
        cache = None
        for token in IDS.T:
            output = model(token[:, None], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(output.logits)
    return found


@pytest.mark.parametrize(
    "config", [LlamaConfig(**SIZES), Qwen2Config(**SIZES), Qwen3Config(**SIZES), Gemma3TextConfig(**SIZES)], ids=str
)
def test_in_bfloat16_weights_are_packed_where_that_is_quicker_and_nothing_else_is_changed(config: Any) -> None:
    """Logits to 3 % of the largest; three products less in every layer whose weights are packed."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()
    plain = count(model, nn.Linear)
    with torch.no_grad():
        expected = model(IDS).logits.float()
        assert optimize_for_cpu(model) is can_pack(model)
        found = model(IDS).logits
    packed = plain - 3 * config.num_hidden_layers if can_pack(model) else 0
    assert (count(model, PackedLinear), count(model, nn.Linear)) == (packed, 0 if packed else plain)
    assert count(model, ShortNorm) == 0
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.03 * float(expected.abs().max()), rtol=0.0)


@pytest.mark.parametrize("dtype", cpu.DTYPES)
def test_large_logits_are_compared_by_their_size(dtype: torch.dtype) -> None:
    """A real model's reach 30, so that bfloat16 alone has them 2 apart: it is neither refused nor decoded slowly."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).to(dtype).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(200)
        assert float(model(IDS).logits.abs().max()) > 20
    optimize_for_cpu(model)
    assert isinstance(runner_of(mixture_of_one("only", model), max_num_seqs=1), MixtureRunner)


def test_doing_it_twice_is_doing_it_once() -> None:
    for dtype in cpu.DTYPES:
        model = LlamaForCausalLM(LlamaConfig(**SIZES)).to(dtype).eval()
        assert optimize_for_cpu(model) or dtype == torch.bfloat16
        kinds, expected = [type(module) for module in model.modules()], model(IDS).logits
        optimize_for_cpu(model)
        assert [type(module) for module in model.modules()] == kinds
        assert torch.equal(model(IDS).logits, expected)


@torch.no_grad()
def test_under_every_adapter_it_is_the_same(places: dict[str, str]) -> None:
    names = [name for name in places if name.startswith("adapter")]
    stack = AdapterStack(load_model(places["base"]), {name: places[name] for name in names})
    groups = ["reference", *names]
    expected = stack(groups, input_ids=IDS.repeat(3, 1) % 20).logits
    assert optimize_for_cpu(stack)
    assert count(stack, PackedLinear) > 0
    torch.testing.assert_close(stack(groups, input_ids=IDS.repeat(3, 1) % 20).logits, expected, atol=1e-5, rtol=1e-5)


class ReadsAWeight(LlamaForCausalLM):
    """Multiplies by the weight of a layer itself."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + self.model.layers[0].mlp.down_proj.weight.sum()
        return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_reads_weights_stays_as_it_is(dtype: torch.dtype) -> None:
    model = ReadsAWeight(LlamaConfig(**SIZES)).to(dtype).eval()
    kinds = [type(module) for module in model.modules()]
    assert not optimize_for_cpu(model)
    assert [type(module) for module in model.modules()] == kinds
    model(IDS)


def test_another_precision_stays_as_it_is() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).to(torch.float16)
    assert not optimize_for_cpu(model)
    assert count(model, ShortNorm) == 0


def test_a_model_that_would_not_be_the_same_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(model: Any) -> None:
        model.get_input_embeddings().weight.mul_(2)

    monkeypatch.setattr(cpu, "shorten_norms", spoil)
    with pytest.raises(ModelError, match="LlamaForCausalLM: its logits differ by"):
        optimize_for_cpu(LlamaForCausalLM(LlamaConfig(**SIZES)))


def test_a_decoder_takes_a_model_as_it_is() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    kinds = [type(module) for module in model.modules()]
    MixtureRunner(mixture_of_one("only", model), max_num_seqs=1)
    assert [type(module) for module in model.modules()] == kinds


def test_whoever_opens_models_to_draw_from_them_changes_them(places: dict[str, str], tmp_path: Path) -> None:
    """The engine of an artefact, and an ensemble that is drawn from; not one that scores."""
    policies = {name.replace(" ", ""): place for name, place in places.items() if name != "base"}
    write_artefact(
        tmp_path,
        objectives=policies,
        reference=places["base"],
        copy_reference=False,
        weights=dict.fromkeys(policies, 1 / 3),
        fit={},
    )
    runner: Any = open_engine(str(tmp_path), max_num_seqs=1)._runner
    assert all(count(branch._model, PackedLinear) > 0 for branch in runner._branches.values())
    ensemble = Ensemble(places["base"], policies)
    ensemble.logprobs(["reference", *policies], [([1, 8], [9, 10])], batch_size=4, pad_id=0)
    models = [ensemble.stack, *ensemble.full.values()]
    assert all(model is not None and count(model, PackedLinear) == 0 for model in models)
    recipe = Recipe(Sampling(2), Mode(), {"full": 1.0})
    EnsembleSampler(ensemble, Room(1)).draw([[1, 8]], recipe, num=1, end_ids=[2], seed=0)
    assert all(model is not None and count(model, PackedLinear) > 0 for model in models)
