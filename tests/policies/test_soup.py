"""Soups are parameter averages: checked tensor by tensor, for adapters, full weights and both together."""

from itertools import permutations
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from mpo_ray.policies.loading import ModelError, load_model, load_policy
from mpo_ray.policies.soup import load_soup, soup_factors
from tests.tiny import next_logprobs, tiny_llama, tiny_lora, tiny_tokenizer

IDS = [1, 8, 9, 10, 12]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A reference, two adapters of it, and a policy with full weights."""
    root: Path = tmp_path_factory.mktemp("soup")
    tokenizer = tiny_tokenizer()
    base = tiny_llama(root / "base", tokenizer, seed=0)
    return {
        "base": str(base),
        "first": str(tiny_lora(root / "first", base, seed=1)),
        "second": str(tiny_lora(root / "second", base, seed=2)),
        "whole": str(tiny_llama(root / "whole", tokenizer, seed=3)),
    }


def soup(places: dict[str, str], weights: dict[str, float]):
    return load_soup(places["base"], {name: places[name] for name in weights}, weights)


def effective(places: dict[str, str], name: str) -> dict[str, torch.Tensor]:
    """A policy's weights from its files alone: W + s B A, with s = alpha/r = 2."""
    if name == "whole":
        return load_file(Path(places[name]) / "model.safetensors")
    state = load_file(Path(places["base"]) / "model.safetensors")
    factors = load_file(Path(places[name]) / "adapter_model.safetensors")
    for key in [key for key in factors if key.endswith("lora_A.weight")]:
        target = key.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
        state[target] = state[target] + 2 * factors[key.replace("lora_A", "lora_B")] @ factors[key]
    return state


@pytest.mark.parametrize(
    "weights",
    [
        {"first": 0.5, "second": 0.5},
        {"first": 0.2, "whole": 0.8},
        {"first": 0.3, "whole": 0.5, "second": 0.2},
        {"first": 1.0, "second": 0.0},
    ],
)
def test_a_soup_is_the_average_of_the_effective_weights(places: dict[str, str], weights: dict[str, float]) -> None:
    """θ_λ = Σ_k λ_k (W + s_k B_k A_k), every tensor; adapters, full weights, and mixed."""
    state = soup(places, weights).state_dict()
    parts = {name: effective(places, name) for name in weights}
    assert set(parts["first"]) == set(state)
    for key, tensor in state.items():
        expected = sum(weight * parts[name][key].double() for name, weight in weights.items())
        torch.testing.assert_close(tensor.double(), expected, atol=1e-6, rtol=1e-6)


def test_the_average_of_the_factors_is_another_model(places: dict[str, str]) -> None:
    """½(B₁A₁ + B₂A₂) ≠ (½B₁ + ½B₂)(½A₁ + ½A₂): the soup is the former."""
    key = "model.layers.0.mlp.up_proj.weight"
    prefix = "base_model.model.model.layers.0.mlp.up_proj.lora_"
    factors = [load_file(Path(places[name]) / "adapter_model.safetensors") for name in ("first", "second")]
    a, b = (sum(f[f"{prefix}{side}.weight"] for f in factors) / 2 for side in "AB")
    of_factors = load_file(Path(places["base"]) / "model.safetensors")[key] + 2 * b @ a
    state = soup(places, {"first": 0.5, "second": 0.5}).state_dict()
    assert (state[key] - of_factors).abs().max() > 0.1


def test_one_hot_weights_are_the_policy(places: dict[str, str]) -> None:
    """The next-token distribution of the policy as PEFT runs it, or of the full weights."""
    for name in ("first", "whole"):
        weights = {other: float(other == name) for other in ("second", "whole", "first")}
        found = next_logprobs(soup(places, weights), IDS)
        expected = next_logprobs(load_policy(places[name], places["base"]), IDS)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_tied_embeddings_are_averaged_once(tmp_path: Path) -> None:
    """Two names of one tensor: the average is λ₁E₁ + λ₂E₂ and not that twice over; and they stay tied."""
    tokenizer = tiny_tokenizer()
    paths = {n: str(tiny_llama(tmp_path / n, tokenizer, seed=i, tie_word_embeddings=True)) for i, n in enumerate("abc")}
    soup = load_soup(paths["a"], {"b": paths["b"], "c": paths["c"]}, {"b": 0.25, "c": 0.75})
    tensors = [load_file(Path(paths[n]) / "model.safetensors")["model.embed_tokens.weight"] for n in "bc"]
    torch.testing.assert_close(soup.get_input_embeddings().weight.data, 0.25 * tensors[0] + 0.75 * tensors[1])
    assert soup.get_input_embeddings().weight is soup.get_output_embeddings().weight


def test_it_is_a_plain_model_in_the_precision_that_was_asked_for(places: dict[str, str]) -> None:
    found = load_soup(places["base"], {"first": places["first"]}, {"first": 1.0}, precision="bf16")
    assert type(found).__name__ == "LlamaForCausalLM"
    assert found.dtype == torch.bfloat16
    assert not found.training


def test_policies_of_different_shapes_have_no_average(places: dict[str, str], tmp_path: Path) -> None:
    wide = str(tiny_llama(tmp_path / "wide", tiny_tokenizer(), seed=0, hidden_size=64))
    with pytest.raises(
        ModelError, match=r"'whole' and 'wide' have no parameter average: lm_head\.weight has the shapes"
    ):
        load_soup(places["base"], {"whole": places["whole"], "wide": wide}, {"whole": 0.5, "wide": 0.5})


def test_weights_off_the_simplex_are_refused(places: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"the soup's weights: .* sum to 1\.5"):
        soup(places, {"first": 1.0, "second": 0.5})


@pytest.mark.filterwarnings("ignore")  # PEFT's own, of tied embeddings
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_of_one_end_of_a_tied_model_is_averaged(target: str, tmp_path: Path) -> None:
    """Merging it must not change the other end: the soup of it alone computes what PEFT computes."""
    base = tiny_llama(tmp_path / "base", tiny_tokenizer(), seed=0, tie_word_embeddings=True)
    adapter = tiny_lora(tmp_path / "adapter", base, seed=1, target_modules=[target])
    one = load_soup(str(base), {"a": str(adapter)}, {"a": 1.0})
    expected = next_logprobs(PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), str(adapter)), IDS)
    torch.testing.assert_close(next_logprobs(one, IDS), expected, atol=1e-5, rtol=0)
    half = load_soup(str(base), {"a": str(adapter), "b": str(base)}, {"a": 0.5, "b": 0.5})
    for layer, other in (("lm_head", one.lm_head), ("model.embed_tokens", one.model.embed_tokens)):
        mean = (other.weight + load_model(str(base)).lm_head.weight) / 2
        torch.testing.assert_close(half.get_submodule(layer).weight, mean)


@pytest.mark.parametrize("order", list(permutations(("tied", "untied", "tied too"))))
def test_the_mean_of_both_output_layers_whichever_policy_comes_first(order: tuple[str, ...], tmp_path: Path) -> None:
    """Also after it was written and opened again; a tied policy's output layer is its embeddings."""
    tokenizer = tiny_tokenizer()
    weights = {"tied": 0.5, "untied": 0.3, "tied too": 0.2}
    places = {
        name: str(tiny_llama(tmp_path / name, tokenizer, seed, tie_word_embeddings=name != "untied"))
        for seed, name in enumerate(weights)
    }
    models = {name: load_model(place) for name, place in places.items()}
    soup = load_soup(places["tied"], {name: places[name] for name in order}, weights)
    soup.save_pretrained(tmp_path / "soup")
    for found in (soup, load_model(str(tmp_path / "soup"))):
        for layer in ("lm_head", "model.embed_tokens"):
            mean = sum(weight * models[name].get_submodule(layer).weight for name, weight in weights.items())
            torch.testing.assert_close(found.get_submodule(layer).weight, mean)


@pytest.mark.parametrize("rank", [None, 3])
def test_the_soup_s_factors_are_its_best_approximation_of_their_rank(places: dict[str, str], rank: int | None) -> None:
    """B A = Σ_k λ_k s_k B_k A_k at the sum of the ranks; below it what is lost is the smaller singular values."""
    weights = {"first": 0.3, "second": 0.7}
    found = soup_factors({name: places[name] for name in weights}, weights, rank=rank)
    base = load_file(Path(places["base"]) / "model.safetensors")
    parts = {name: effective(places, name) for name in weights}
    assert len(found) == 14
    for layer, (a, b) in found.items():
        key = f"{layer}.weight"
        update = sum(weights[name] * (parts[name][key] - base[key]) for name in weights)
        values = torch.linalg.svdvals(update)
        assert a.shape[0] == b.shape[1] == (rank or 8)
        lost = values[a.shape[0] :].square().sum().sqrt()
        assert float((update - b @ a).norm()) == pytest.approx(float(lost), rel=1e-3, abs=1e-4)
