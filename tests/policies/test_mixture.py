"""The mixture artefact as a transformers model: its next-token distribution is the product of the policies' own."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import mpo_ray  # noqa: F401 - registers the mixture with transformers
from mpo_ray.data.tokens import collate, shared_prompts
from mpo_ray.decoding.sampler import MixtureSampler, Room, sampling_recipe
from mpo_ray.policies.artefact import write_artefact
from mpo_ray.policies.loading import load_policy
from mpo_ray.policies.mixture import MixtureForCausalLM
from tests.policies.material import WEIGHTS, ids_of, paths, write
from tests.tiny import next_logprobs, tiny_tokenizer


@pytest.fixture
def model(artefact: Path) -> MixtureForCausalLM:
    return AutoModelForCausalLM.from_pretrained(artefact)


@pytest.fixture(scope="module")
def policies(material: Path, kind: str) -> list[torch.nn.Module]:
    """The policies, each loaded by itself, without the mixture."""
    return [load_policy(str(path), str(material / "reference")) for path in paths(material, kind).values()]


def product(policies: list[torch.nn.Module], weights: Mapping[str, float], ids: list[int]) -> torch.Tensor:
    """q(v) = Π_k π_k(v | ids)^λ_k / Z, by the definition, in float64."""
    mixed = sum(weight * next_logprobs(policy, ids) for policy, weight in zip(policies, weights.values(), strict=True))
    return torch.softmax(mixed, dim=-1)


def test_next_token_distributions_are_the_explicit_product(artefact, model, policies) -> None:
    """q_t(v) = Π_k π_k(v | y_<t)^λ_k / Z_t at every position, to 1e-5   (design 2.3, eq. 7)"""
    assert type(model) is MixtureForCausalLM
    ids = ids_of(artefact, "the film was very good and I liked it not at all")
    q = torch.softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
    for position in range(len(ids)):
        expected = product(policies, WEIGHTS, ids[: position + 1])
        torch.testing.assert_close(q[position], expected, atol=1e-5, rtol=0)
    separate = [torch.softmax(next_logprobs(policy, ids), -1) for policy in policies]
    assert all((q[-1] - one).abs().max() > 0.01 for one in separate), "the policies are alike; the test shows nothing"


def test_the_logits_are_the_sum_of_log_probabilities_itself(artefact, model, policies) -> None:
    """Σ_k λ_k log π_k, so logsumexp of the logits is log Z_t ≤ 0."""
    ids = ids_of(artefact)
    expected = sum(w * next_logprobs(p, ids) for p, w in zip(policies, WEIGHTS.values(), strict=True))
    logits = model(torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(logits.double(), expected, atol=1e-4, rtol=0)
    assert logits.logsumexp(-1) < 0


def test_decoding_with_the_cache_is_decoding_without(artefact, model) -> None:
    """One token at a time through the K caches gives the logits of one pass over the whole sequence."""
    ids = torch.tensor([ids_of(artefact, "the film was very good and I liked it")])
    whole = model(ids).logits
    cache = None
    for position in range(ids.shape[1]):
        output = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        torch.testing.assert_close(output.logits[:, 0], whole[:, position], atol=1e-4, rtol=0)
    cached, plain = (
        model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=use_cache) for use_cache in (True, False)
    )
    assert cached.tolist() == plain.tolist()


def test_rows_of_a_padded_batch_are_the_single_rows(artefact, model) -> None:
    """Left padding changes nothing, greedily decoded."""
    tokenizer = AutoTokenizer.from_pretrained(artefact, padding_side="left")
    texts = ["the", "the film was very good and", "I liked it"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    together = model.generate(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=10, do_sample=False
    )[:, batch.input_ids.shape[1] :]
    for row, text in enumerate(texts):
        ids = tokenizer(text, return_tensors="pt").input_ids
        alone = model.generate(ids, max_new_tokens=10, do_sample=False)[0, ids.shape[1] :]
        assert together[row, : len(alone)].tolist() == alone.tolist()


def test_padding_does_not_shift_absolute_positions(tmp_path: Path) -> None:
    """A model with learned positions, unlike rotary ones, sees a shift: padded rows are still the single rows."""
    tokenizer = tiny_tokenizer()
    for seed, name in enumerate(("reference", "positive")):
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3
        )
        GPT2LMHeadModel(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    write_artefact(
        tmp_path / "artefact",
        objectives={"positive": tmp_path / "positive"},
        reference=tmp_path / "reference",
        copy_reference=False,
        weights={"positive": 1.0},
        fit={},
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "artefact")
    padded = torch.tensor([[0, 0, 0, 1, 7, 9]])
    output = model.generate(padded, attention_mask=(padded != 0).long(), max_new_tokens=8, do_sample=False)[0, 6:]
    alone = model.generate(torch.tensor([[1, 7, 9]]), max_new_tokens=8, do_sample=False)[0, 3:]
    assert output.tolist() == alone.tolist()


def test_greedy_generation_is_the_explicit_loop(artefact, model, policies) -> None:
    """argmax_v Π_k π_k(v | y_<t)^λ_k, token by token."""
    ids = ids_of(artefact)
    expected = list(ids)
    for _ in range(15):
        expected.append(int(product(policies, WEIGHTS, expected).argmax()))
        if expected[-1] == model.generation_config.eos_token_id[0]:
            break
    generated = model.generate(torch.tensor([ids]), max_new_tokens=15, do_sample=False)[0]
    assert generated.tolist() == expected


def test_sampling_follows_the_product(artefact, model, policies) -> None:
    """By default `generate` draws from q itself: the counts of 4000 first tokens agree by a χ² bound at five sigma."""
    ids, draws = ids_of(artefact), 4000
    torch.manual_seed(0)
    tokens = model.generate(torch.tensor([ids]), max_new_tokens=1, num_return_sequences=draws)[:, -1]
    expected = draws * product(policies, WEIGHTS, ids)
    counts = torch.bincount(tokens, minlength=len(expected)).double()
    likely = expected > 5
    statistic = ((counts - expected) ** 2 / expected)[likely].sum()
    freedom = int(likely.sum()) - 1
    assert freedom >= 3
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_at_a_vertex_the_mixture_is_that_policy_and_no_other_is_run(artefact, model, policies, monkeypatch) -> None:
    """λ = e_k gives π_k; a policy with weight 0 is not run."""
    ids = ids_of(artefact)
    run_branch = MixtureForCausalLM._run
    for k, name in enumerate(WEIGHTS):
        model.set_weights({name: 1.0})
        run: list[int] = []
        with monkeypatch.context() as patch:

            def counted(self, place, policies, run=run, **inputs):
                run.extend([*policies] * (len(inputs["input_ids"]) // len(policies)))
                return run_branch(self, place, policies, **inputs)

            patch.setattr(MixtureForCausalLM, "_run", counted)
            logits = model(torch.tensor([ids])).logits[0, -1]
        torch.testing.assert_close(logits.double(), next_logprobs(policies[k], ids), atol=1e-5, rtol=0)
        assert run == [k]


def test_every_row_may_have_its_own_weights(artefact, model, policies) -> None:
    """`mixture_weights` (B, K): row b is Π_k π_k^λ_bk, in one forward pass and in `generate`."""
    ids = ids_of(artefact)
    rows = [
        {"positive": 1.0, "concise": 0.0, "detailed": 0.0},
        {"positive": 0.0, "concise": 0.4, "detailed": 0.6},
        WEIGHTS,
    ]
    weights = torch.tensor([list(row.values()) for row in rows])
    batch = torch.tensor([ids] * 3)
    q = torch.softmax(model(batch, mixture_weights=weights).logits[:, -1].double(), dim=-1)
    for row, expected in zip(q, rows, strict=True):
        torch.testing.assert_close(row, product(policies, expected, ids), atol=1e-5, rtol=0)
    together = model.generate(batch, mixture_weights=weights, max_new_tokens=8, do_sample=False)
    for row, own in zip(together, rows, strict=True):
        model.set_weights(own)
        alone = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0]
        assert row[: len(alone)].tolist() == alone.tolist()
    assert len({tuple(row) for row in together.tolist()}) > 1


def test_weights_can_be_given_when_loading(artefact, policies) -> None:
    """Objectives left out have weight 0; both ways of loading take them."""
    ids = ids_of(artefact)
    for cls in (AutoModelForCausalLM, MixtureForCausalLM):
        model = cls.from_pretrained(artefact, weights={"concise": 0.25, "detailed": 0.75})
        q = torch.softmax(model(torch.tensor([ids])).logits[0, -1].double(), dim=-1)
        expected = product(policies, {"positive": 0.0, "concise": 0.25, "detailed": 0.75}, ids)
        torch.testing.assert_close(q, expected, atol=1e-5, rtol=0)


def test_beam_search_reorders_every_cache(artefact, model) -> None:
    """Beams with cache equal beams without."""
    ids = torch.tensor([ids_of(artefact)])
    with_cache, without = (
        model.generate(ids, max_new_tokens=8, num_beams=3, do_sample=False, use_cache=use) for use in (True, False)
    )
    assert with_cache.tolist() == without.tolist()


def test_sampling_of_a_mixture_is_generation_row_by_row(artefact, model) -> None:
    """Greedy, prompts of different lengths: what the engine draws is what transformers' `generate` does."""
    prompts = [ids_of(artefact, text) for text in ("the", "the film was very good and", "I liked it", "not at all")]
    recipe = sampling_recipe(WEIGHTS, max_new_tokens=12, temperature=0.0)
    ends = model.generation_config.eos_token_id
    alone = [
        model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    drawn = MixtureSampler(model, Room(3)).draw(prompts, recipe, num=2, end_ids=ends, seed=0)
    assert [[list(completion.tokens) for completion in group] for group in drawn] == [[ids, ids] for ids in alone]


def test_predictions_of_completions_are_those_of_the_whole_model(artefact, model) -> None:
    """Packed, the prompt shared: the logits of `forward` at the places that predict the completions."""
    rows = [([1, 8, 9], [10, 11, 2]), ([1, 8, 9], [12, 2]), ([1, 9, 8, 7], [2])]
    for weights in (WEIGHTS, {"concise": 1.0}, {"positive": 0.5, "detailed": 0.5}):
        model.set_weights(weights)
        found = model.predictions(replace(collate(rows, pad_id=0), prompt_rows=shared_prompts(rows)))
        expected = [
            model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1] for prompt, completion in rows
        ]
        torch.testing.assert_close(found, torch.cat(expected), atol=1e-4, rtol=1e-5)


def test_threads_may_share_a_mixture(artefact, model) -> None:
    """Each with its own weights: none sees the other's policies."""
    ids, wrong = torch.tensor([ids_of(artefact)]), []
    rows = [torch.tensor([row]) for row in ([1.0, 0.0, 0.0], [0.0, 0.0, 1.0])]
    expected = [model(ids, mixture_weights=row).logits for row in rows]

    def work(index: int) -> None:
        for _ in range(20):
            if not torch.allclose(model(ids, mixture_weights=rows[index]).logits, expected[index], atol=1e-4):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_cache_that_holds_more_policies_stays_whole(artefact, model) -> None:
    """Weights that leave a policy out for one step do not leave a hole in its past."""
    ids = torch.tensor([ids_of(artefact, "the film was very good")])
    vertex, all_three = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([list(WEIGHTS.values())])
    cache = model(ids[:, :3], mixture_weights=all_three, use_cache=True).past_key_values
    model(ids[:, 3:4], mixture_weights=vertex, past_key_values=cache)
    found = model(ids[:, 4:], mixture_weights=all_three, past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(found, model(ids).logits[:, -1], atol=1e-4, rtol=0)


def test_the_loss_is_that_of_the_normalised_mixture(artefact, model, policies) -> None:
    """Mean of −log q(y_t | y_<t): the constant log Z_t has no say."""
    ids = ids_of(artefact, "the film was very good")
    loss = model(torch.tensor([ids]), labels=torch.tensor([ids])).loss
    expected = [-product(policies, WEIGHTS, ids[:t])[ids[t]].log() for t in range(1, len(ids))]
    assert float(loss) == pytest.approx(float(sum(expected)) / len(expected), abs=1e-5)


def test_a_cache_from_other_weights_is_refused(model, artefact) -> None:
    """A policy without a past cannot join in the middle of a sequence."""
    ids = torch.tensor([ids_of(artefact)])
    model.set_weights({"positive": 1.0})
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values was filled while"):
        model(ids[:, -1:], past_key_values=cache, mixture_weights=torch.tensor([[0.5, 0.5, 0.0]]))


@pytest.mark.parametrize("weights", [[[0.5, 0.5]], [[0.0, 0.0, 0.0]], [[float("nan"), 0.5, 0.5]]])
def test_row_weights_of_the_wrong_form_are_refused(weights: list[list[float]], model, artefact) -> None:
    with pytest.raises(ValueError, match="mixture_weights"):
        model(torch.tensor([ids_of(artefact)]), mixture_weights=torch.tensor(weights))


@pytest.mark.parametrize(
    ("weights", "complaint"),
    [
        ({"positive": 1.5, "concise": -0.5}, "weight of 'concise' is -0.5"),
        ({"positive": 0.5, "concise": 0.4}, "sum to 0.9, not 1"),
        ({"positive": 0.5, "kind": 0.5}, "unknown objective 'kind'"),
    ],
)
def test_weights_off_the_simplex_are_refused_everywhere(
    weights, complaint, artefact, model, material, tmp_path
) -> None:
    with pytest.raises(ValueError, match=complaint):
        write(material, tmp_path / "artefact", "lora", weights)
    with pytest.raises(ValueError, match=complaint):
        AutoModelForCausalLM.from_pretrained(artefact, weights=weights)
    with pytest.raises(ValueError, match=complaint):
        model.set_weights(weights)


def test_the_package_is_light_until_a_mixture_is_opened(artefact: Path) -> None:
    """Neither the package nor the command loads torch; transformers alone then opens the artefact, in a new process."""
    code = f"""
import sys, mpo_ray, mpo_ray.cli
assert "torch" not in sys.modules
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained({str(artefact)!r})).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "MixtureForCausalLM", done.stderr


def test_a_gpu_that_is_asked_for_by_its_number_is_not_taken_for_the_cpu(artefact: Path) -> None:
    for where in (0, {"": 0}):
        if torch.cuda.is_available():
            assert AutoModelForCausalLM.from_pretrained(artefact, device_map=where).device == torch.device("cuda:0")
        else:
            with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA|accelerator"):
                AutoModelForCausalLM.from_pretrained(artefact, device_map=where)
