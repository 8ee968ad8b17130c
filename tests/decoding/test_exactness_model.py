"""The modes of the engine with a real two-layer model, whose every response can be enumerated: cache rows that move."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpo_ray.decoding.engine import MixtureEngine
from mpo_ray.decoding.open_engine import open_engine
from mpo_ray.decoding.protocol import Mode
from mpo_ray.maths.log_linear import log_normalizer
from mpo_ray.policies.artefact import write_artefact
from mpo_ray.policies.mixture import MixtureForCausalLM
from tests.decoding.mixtures import EOS, Response, completed, p_value, request, tokens
from tests.tiny import tiny_llama, tiny_lora, tiny_tokenizer

WEIGHTS = {"warm": 0.6, "brief": 0.4}
PROMPT, LIMIT, PASSES = (1, 7, 8), 3, 1e-4


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two LoRA policies over 10 tokens, far from each other."""
    root = tmp_path_factory.mktemp("exact")
    reference = tiny_llama(root / "reference", tiny_tokenizer(("a", "b", "c")), 0, initializer_range=0.3)
    policies = {name: tiny_lora(root / name, reference, seed) for seed, name in enumerate(WEIGHTS, start=3)}
    write_artefact(
        root / "artefact", objectives=policies, reference=reference, copy_reference=True, weights=WEIGHTS, fit={}
    )
    return root / "artefact"


@pytest.fixture(scope="module")
def engine(artefact: Path) -> MixtureEngine:
    return open_engine(str(artefact), max_num_seqs=512, max_waiting=10**5)


@pytest.fixture(scope="module")
def exact(artefact: Path) -> dict[str, dict[Response, float]]:
    """log q(y) and Σ log Z_t of every response, by plain forward passes, and log π_λ(y) from them (eq. 7)."""
    model = MixtureForCausalLM.from_pretrained(artefact)
    log_q: dict[Response, float] = {}
    log_z: dict[Response, float] = {}
    growing: dict[Response, tuple[float, float]] = {(): (0.0, 0.0)}
    for _ in range(LIMIT):
        prefixes, grown = list(growing), {}
        with torch.no_grad():
            mixed = model(torch.tensor([[*PROMPT, *prefix] for prefix in prefixes])).logits[:, -1].double()
        factors = log_normalizer(mixed)
        for row, prefix in enumerate(prefixes):
            q, z = growing[prefix]
            for token in range(mixed.shape[1]):
                y, values = (*prefix, token), (q + float(mixed[row, token] - factors[row]), z + float(factors[row]))
                if token == EOS or len(y) == LIMIT:
                    log_q[y], log_z[y] = values
                else:
                    grown[y] = values
        growing = grown
    total = np.logaddexp.reduce([log_q[y] + log_z[y] for y in log_q])
    return {
        "token": log_q,
        "log_z": log_z,
        "sequence": {y: log_q[y] + log_z[y] - total for y in log_q},
        "total": {(): float(total)},
    }


def drawn(engine: MixtureEngine, mode: Mode, num: int) -> list[tuple[Response, float, float | None]]:
    """Responses, their Σ log Z_t, and log Ẑ."""
    asked = [request(seed, PROMPT, mode=mode, max_tokens=LIMIT, temperature=1.0, seed=seed) for seed in range(num)]
    found = []
    for deltas in completed(engine, asked):
        told = deltas[-1].diagnostics
        assert told is not None
        assert told.log_z is not None
        found.append((tuple(tokens(deltas)), told.log_z, told.log_z_hat))
    return found


def test_token_mode_draws_from_q_and_not_from_the_sequence_level_mixture(
    engine: MixtureEngine, exact: dict[str, dict[Response, float]]
) -> None:
    found = [y for y, _, _ in drawn(engine, Mode(), 1500)]
    assert p_value(found, exact["token"]) > PASSES
    assert p_value(found, exact["sequence"]) < PASSES


def test_rejection_draws_from_the_sequence_level_mixture(
    engine: MixtureEngine, exact: dict[str, dict[Response, float]]
) -> None:
    found = [y for y, _, _ in drawn(engine, Mode("rejection", 4, 10_000), 1500)]
    assert p_value(found, exact["sequence"]) > PASSES


def test_64_particles_draw_from_the_sequence_level_mixture_and_estimate_z_without_bias(
    engine: MixtureEngine, exact: dict[str, dict[Response, float]]
) -> None:
    results = drawn(engine, Mode("smc", 64), 400)
    assert p_value([y for y, _, _ in results], exact["sequence"]) > PASSES
    z_hat = np.exp([value or 0.0 for _, _, value in results])
    assert z_hat.mean() == pytest.approx(np.exp(exact["total"][()]), abs=4 * z_hat.std() / np.sqrt(len(z_hat)))


@pytest.mark.parametrize(
    ("mode", "temperature"),
    [(Mode(), 1.0), (Mode("rejection", 4, 10_000), 1.0), (Mode("smc", 8), 0.3)],
    ids=["token", "rejection", "smc"],
)
def test_log_z_is_that_of_the_tokens_that_came_out(
    mode: Mode, temperature: float, engine: MixtureEngine, artefact: Path
) -> None:
    """From rows of the cache that were copied, taken again and resampled, as from one plain pass over the tokens.

    λ/τ with τ = 0.3 sets the particles apart from the first token on.
    """
    model = MixtureForCausalLM.from_pretrained(artefact)
    weights = torch.tensor([list(WEIGHTS.values())]) / (temperature if mode.kind == "smc" else 1.0)
    fields: dict[str, Any] = {"max_tokens": 8, "temperature": temperature}
    for deltas in completed(engine, [request(n, PROMPT, mode=mode, seed=n, **fields) for n in range(150)]):
        ids = tokens(deltas)
        with torch.no_grad():
            mixed = model(torch.tensor([[*PROMPT, *ids]]), mixture_weights=weights).logits[0, len(PROMPT) - 1 : -1]
        told = deltas[-1].diagnostics
        assert told is not None
        assert told.log_z == pytest.approx(float(log_normalizer(mixed.double()).sum()), abs=1e-3)
