"""Completions of the sequence-level mixture π_λ, by sequential Monte Carlo over the token-level one (design 2.3).

Every completion is the outcome of N particles of its own. N = 1 is token-level decoding; the distribution tends to π_λ
as N grows, with a bias of O(1/N).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mpo_ray.decoding.batch import LARGEST_UNIFORM, Completion, DecodedBatch, cut, sample_completions
from mpo_ray.maths.log_linear import log_normalizer
from mpo_ray.maths.resampling import drawn_particle, effective_number, log_mean_weight, systematic_ancestors
from mpo_ray.policies.mixture import MixtureForCausalLM


def sample_mixture(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    num_particles: int,
    temperature: float,
    num_completions: int,
    max_new_tokens: int,
    end_ids: Sequence[int],
    pad_id: int,
    seed: int,
) -> list[list[Completion]]:
    """Draw token by token with one particle, for which any causal language model serves, and whole with more.

    end_ids: each ends a completion; see `sample_completions`
    Raises ValueError for particles that cannot be, or another temperature than 1 with more than one.
    """
    special: dict[str, Any] = {"end_ids": end_ids, "pad_id": pad_id}
    how = {"num_completions": num_completions, "max_new_tokens": max_new_tokens, "seed": seed, **special}
    check_particles(num_particles, temperature)
    if num_particles == 1:
        return sample_completions(model, prompts, temperature=temperature, **how)
    return sample_from_particles(model, prompts, num_particles=num_particles, **how)


def check_particles(num_particles: int, temperature: float) -> None:
    """Refuse what `sample_mixture` cannot draw, before a model is opened. Raises ValueError."""
    if num_particles < 1:
        raise ValueError(f"particles: {num_particles} is below 1; 1 decodes token by token, more draw whole answers.")
    if num_particles > 1 and temperature != 1.0:
        raise ValueError(
            f"temperature: {temperature:g}, and {num_particles} particles draw from π_λ, which has the temperature 1; "
            "leave one of both out."
        )


@torch.no_grad()
def sample_from_particles(
    model: MixtureForCausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    num_completions: int,
    num_particles: int,
    max_new_tokens: int,
    end_ids: Sequence[int],
    pad_id: int,
    seed: int,
) -> list[list[Completion]]:
    """Draw `num_completions` per prompt from π_λ, each from `num_particles` particles.

    A particle is weighed by Π_t Z_t. A group whose effective number falls below N/2 is resampled before its next token
    is drawn: ended particles keep their weight and stay. One particle is returned with probability ∝ its weight, with
    its Σ_t log Z_t, the group's unbiased estimate Ẑ as `log_z_hat`, nats, and the effective number at the end. A
    completion that is cut at `max_new_tokens` keeps its weight.
    """
    groups, num = len(prompts) * num_completions, num_particles
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(max_new_tokens, groups * num, generator=generator, dtype=torch.float64)
    shifts = torch.rand(max_new_tokens + 1, groups, generator=generator, dtype=torch.float64)
    uniforms, shifts = uniforms.clamp(max=LARGEST_UNIFORM).to(model.device), shifts.to(model.device)
    ends = torch.tensor(end_ids, device=model.device)
    drawn = torch.full((groups * num, max_new_tokens), end_ids[0], device=model.device)
    zeros = torch.zeros(groups, num, dtype=torch.float64, device=model.device)
    log_weights, log_z, log_z_hat = zeros.clone(), zeros.clone(), zeros[:, 0].clone()
    batch = DecodedBatch(model, prompts, num_completions * num, pad_id)
    alive = torch.ones(groups * num, dtype=torch.bool, device=model.device)
    everyone = torch.arange(groups * num, device=model.device)
    for step in range(max_new_tokens):
        factors = zeros.flatten().clone()
        factors[batch.rows] = log_normalizer(batch.logits).double() * alive[batch.rows]
        log_weights += factors.view(groups, num)
        log_z += factors.view(groups, num)
        thin = (effective_number(log_weights) < num / 2) & alive.view(groups, num).any(1)
        if bool(thin.any()):
            ancestors = everyone.view(groups, num).clone()
            ancestors[thin] = ancestors[thin].gather(1, systematic_ancestors(log_weights[thin], shifts[step, thin]))
            log_z_hat[thin] += log_mean_weight(log_weights[thin])
            log_weights[thin] = 0.0
            flat = ancestors.flatten()
            drawn, alive, log_z = drawn[flat], alive[flat], log_z.flatten()[flat].view(groups, num)
            places = torch.full_like(everyone, -1)
            places[batch.rows] = torch.arange(len(batch.rows), device=model.device)
            batch.select(places[flat[alive]], everyone[alive])
        if not batch.step(drawn, alive, uniforms, place=step, temperature=1.0, ends=ends):
            break
    return _outcomes(drawn, log_weights, log_z, log_z_hat, shifts[-1], end_ids, num_completions)


def _outcomes(
    drawn: Tensor,
    log_weights: Tensor,
    log_z: Tensor,
    log_z_hat: Tensor,
    uniforms: Tensor,
    end_ids: Sequence[int],
    num_completions: int,
) -> list[list[Completion]]:
    """One particle of every group, as completions by prompt."""
    groups, num = log_weights.shape
    chosen = drawn_particle(log_weights, uniforms)
    rows = drawn.view(groups, num, -1)[torch.arange(groups), chosen].tolist()
    sums = log_z.gather(1, chosen[:, None])[:, 0].tolist()
    totals = (log_z_hat + log_mean_weight(log_weights)).tolist()
    sizes = effective_number(log_weights).tolist()
    found = [
        cut(ids, end_ids, log_z=own, log_z_hat=total, effective_number=size)
        for ids, own, total, size in zip(rows, sums, totals, sizes, strict=True)
    ]
    return [found[i : i + num_completions] for i in range(0, groups, num_completions)]
