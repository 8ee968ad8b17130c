"""One mixture by five ways: engine rows, a `set_adapter` loop, PEFT models, merged weights, modules of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import PhiConfig, PhiForCausalLM, PreTrainedModel

from mpo_ray.decoding.branch import Piece
from mpo_ray.decoding.need import Need
from mpo_ray.decoding.runner import MixtureRunner
from mpo_ray.maths.log_linear import mix_logprobs
from mpo_ray.policies.adapters import AdapterStack
from mpo_ray.policies.mixture import MixtureForCausalLM
from mpo_ray.policies.mixture_config import MixtureConfig
from tests.policies.test_adapters import ARCHITECTURES, SIZES, base_model, save_adapters

IDS = [[1, 8, 9, 10, 11, 7, 6], [1, 12, 5, 6, 7, 3, 3]]
WEIGHTS = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def adapters(architecture: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Ranks, scalings and adapted modules that differ from one to the next."""
    return save_adapters(tmp_path_factory.mktemp(architecture), architecture)


@pytest.fixture(scope="module")
def expected(architecture: str, adapters: dict[str, Path]) -> torch.Tensor:
    """Σ_k λ_k log π_k (B, T, V), every policy a PEFT model by itself."""
    return mixed([PeftModel.from_pretrained(base_model(architecture), str(path)) for path in adapters.values()])


@torch.no_grad()
def mixed(policies: list[Any]) -> torch.Tensor:
    logprobs = torch.stack([policy(torch.tensor(IDS)).logits.double().log_softmax(-1) for policy in policies])
    return mix_logprobs(logprobs, WEIGHTS)


def by_engine(mixture: MixtureForCausalLM) -> torch.Tensor:
    """As the engine decodes it: the first sequence three tokens ahead of the second, one token a step."""
    runner = MixtureRunner(mixture, max_num_seqs=3)
    lanes = [runner.open(Need((0, 1, 2), (), 64))[0][0] for _ in IDS]
    weights = WEIGHTS.tolist()
    rows: list[list[torch.Tensor]] = [[], []]

    def run(*steps: tuple[int, int, int]) -> None:
        pieces = [Piece(lanes[n], IDS[n][start:end], start, weights, end - start, True) for n, start, end in steps]
        found = runner.run(pieces).logits
        for n, start, end in steps:
            rows[n] += found[: end - start]
            found = found[end - start :]

    run((0, 0, 3))
    for place in range(3, 7):
        run((0, place, place + 1), (1, place - 3, place - 2))
    run((1, 4, 7))
    return torch.stack([torch.stack(one) for one in rows])


def mixture_of(stack: AdapterStack | None, full: dict[str, PreTrainedModel], names: list[str]) -> MixtureForCausalLM:
    weights = dict(zip(names, WEIGHTS.tolist(), strict=True))
    return MixtureForCausalLM(
        MixtureConfig(names, weights, vocab_size=25, max_position_embeddings=64), adapters=stack, full=full
    ).eval()


def merged(architecture: str, path: Path) -> PreTrainedModel:
    return PeftModel.from_pretrained(base_model(architecture), str(path)).merge_and_unload().eval()  # type: ignore[no-any-return]


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_rows_of_one_base_are_the_mixture(architecture: str, adapters: dict[str, Path], expected: torch.Tensor) -> None:
    stack = AdapterStack(base_model(architecture), adapters)
    assert_close(by_engine(mixture_of(stack, {}, [*adapters])), expected)


def test_a_loop_over_set_adapter_is_the_mixture(
    architecture: str, adapters: dict[str, Path], expected: torch.Tensor
) -> None:
    (first, *others) = adapters
    model = PeftModel.from_pretrained(base_model(architecture), str(adapters[first]), first)
    for name in others:
        model.load_adapter(str(adapters[name]), name)
    logprobs = []
    for name in adapters:
        model.set_adapter(name)
        with torch.no_grad():
            logprobs.append(model(torch.tensor(IDS)).logits.double().log_softmax(-1))
    assert_close(mix_logprobs(torch.stack(logprobs), WEIGHTS), expected)


def test_merged_weights_are_the_mixture_by_plain_passes_and_by_the_engine(
    architecture: str, adapters: dict[str, Path], expected: torch.Tensor
) -> None:
    full = {name: merged(architecture, path) for name, path in adapters.items()}
    assert_close(mixed(list(full.values())), expected)
    assert_close(by_engine(mixture_of(None, full, [*adapters])), expected)


def test_a_stack_beside_a_model_of_its_own_is_the_mixture(
    architecture: str, adapters: dict[str, Path], expected: torch.Tensor
) -> None:
    names = [*adapters]
    stack = AdapterStack(base_model(architecture), {name: adapters[name] for name in (names[0], names[2])})
    full = {names[1]: merged(architecture, adapters[names[1]])}
    assert_close(by_engine(mixture_of(stack, full, names)), expected)


def phi(seed: int) -> PreTrainedModel:
    """Its output head has a bias, here a large one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = PhiForCausalLM(PhiConfig(**SIZES)).eval()
        model.lm_head.bias.data.normal_(std=3.0)
    return model  # type: ignore[no-any-return]


def test_the_bias_of_a_head_counts_by_the_weights_of_the_policies_behind_it() -> None:
    """Two models decode in one step: one sequence of both, one of the first alone, one of the second alone."""
    full = {"first": phi(1), "second": phi(2)}
    config = MixtureConfig([*full], {"first": 0.3, "second": 0.7}, vocab_size=25, max_position_embeddings=64)
    runner = MixtureRunner(MixtureForCausalLM(config, adapters=None, full=full).eval(), max_num_seqs=3)
    weights = ((0.3, 0.7), (1.0, 0.0), (0.0, 1.0))
    taking_part = [tuple(k for k, weight in enumerate(one) if weight) for one in weights]
    lanes = [runner.open(Need(policies, (), 64))[0][0] for policies in taking_part]
    with torch.no_grad():
        logprobs = [model(torch.tensor(IDS[:1])).logits[0].double().log_softmax(-1) for model in full.values()]

    for separate in (False, True):
        pieces = [Piece(lane, IDS[0], 0, one, 7, separate) for lane, one in zip(lanes, weights, strict=True)]
        found = runner.run(pieces).logits.double().log_softmax(-1).split(7)
        for rows, (first, second) in zip(found, weights, strict=True):
            expected = (first * logprobs[0] + second * logprobs[1]).log_softmax(-1)
            torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-5)
