"""MOPO's policy step: behaviour cloning of ρ π_ref on all candidates of a prompt at once (design 2.4, eq. 11).

Knows one batch: its candidates, its loss and its statistics. How multipliers follow from those is in `multipliers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, PositiveFloat, model_validator

from mpo_ray.config_training import Share, Strict
from mpo_ray.data.tokens import TokenBatch, collate, shared_prompts
from mpo_ray.maths.pool import Pool
from mpo_ray.maths.robust import dual_moments
from mpo_ray.maths.simplex import Array

#: How far the mean of ρ under π_ref may be from 1, for a prompt's candidates as they are read.
NORMALIZED = 1e-3


class Problem(Strict):
    """What is maximised, and what is bounded (design 2.4, eq. 8).

    secondary: J objectives; bounds: b of each, a win probability; adaptive: whether it follows equation (13)
    tau: τ, win probability per nat; radius: ε of equation (12), nats, 0 for none; sigma: strength of the barrier
    """

    primary: str
    secondary: list[str]
    bounds: list[Share]
    adaptive: list[bool]
    tau: PositiveFloat
    radius: float = Field(0.0, ge=0.0)
    variant: Literal["lagrangian", "barrier"] = "lagrangian"
    sigma: PositiveFloat = 0.01

    @model_validator(mode="after")
    def _one_bound_each(self) -> Problem:
        if not len(self.secondary) == len(self.bounds) == len(self.adaptive):
            raise ValueError(
                f"{len(self.secondary)} secondary objectives have {len(self.bounds)} bounds, {len(self.adaptive)} of "
                "them said to be adaptive or not; give one of each per objective"
            )
        return self


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """A prompt and its m ≥ 2 candidates, tokenised.

    log_reference: (m,) log π_ref of each among them, nats, which sums to 1; primary: (m,) p̄; secondary: (m, J) q̄
    ratio: (m,) ρ of the solved pool, with mean 1 under π_ref
    """

    prompt_ids: Sequence[int]
    response_ids: Sequence[Sequence[int]]
    log_reference: Array
    primary: Array
    secondary: Array
    ratio: Array

    @classmethod
    def of_row(cls, row: dict[str, Any], *, num_secondary: int) -> Self:
        """Read a row of the parts of a training run. Raises ValueError where it is no distribution over candidates."""
        found = cls(
            row["prompt_ids"],
            row["response_ids"],
            np.array(row["log_reference"], dtype=np.float64),
            np.array(row["primary"], dtype=np.float64),
            np.array(row["secondary"], dtype=np.float64).reshape(-1, num_secondary),
            np.array(row["ratio"], dtype=np.float64),
        )
        shares = np.exp(found.log_reference)
        mean = float(shares @ found.ratio)
        if abs(shares.sum() - 1) > NORMALIZED or abs(mean - 1) > NORMALIZED:
            raise ValueError(
                f"prompt {row['prompt_id']}: the shares of its {len(shares)} candidates sum to {shares.sum():.4f}, and "
                f"ρ has mean {mean:.4f} under them; both must be 1 (design 2.4, eq. 9). Make the candidates anew from "
                "the solved pool."
            )
        return found

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + max(len(ids) for ids in self.response_ids)


def token_batch(batch: Sequence[Candidates], *, pad_id: int) -> TokenBatch:
    """All candidates of all prompts, prompt after prompt: N rows."""
    sequences = [(c.prompt_ids, ids) for c in batch for ids in c.response_ids]
    return replace(collate(sequences, pad_id=pad_id), prompt_rows=shared_prompts(sequences))


def pool_of(batch: Sequence[Candidates], log_ratios: Array | None = None) -> Pool:
    """The batch as a pool under π_ref, or under another policy of known log-ratio to it.

    log_ratios: (N,) log π(y|x) − log π_ref(y|x), nats. Its shares are exp(log π_ref + log-ratio), over their sum within
    the candidates of a prompt: self-normalised, so an expectation under them has bias O(1/m).
    """
    starts = np.cumsum([0, *(len(c.response_ids) for c in batch)])
    log_shares = np.concatenate([c.log_reference for c in batch])
    if log_ratios is not None:
        moved = log_shares + log_ratios
        log_shares = moved - np.repeat(np.logaddexp.reduceat(moved, starts[:-1]), np.diff(starts))
    return Pool(
        np.concatenate([c.primary for c in batch]),
        np.concatenate([c.secondary for c in batch]),
        log_shares,
        starts,
    )


def cloning_loss(logprobs: torch.Tensor, pool: Pool, rho: Array) -> torch.Tensor:
    """−E_x Σ_y π_ref(y) ρ(y) log π_ψ(y|x)   (design 2.4, eq. 11)

    logprobs: (N,) log π_ψ(y|x), nats, with gradient; rho: (N,) ρ, an array, so that no gradient can pass through it
    Returns a scalar, nats per prompt. The mean over prompts; within one, π_ref ρ sums to 1 over its candidates.
    """
    weights = torch.as_tensor(np.exp(pool.joint_log_reference) * rho, dtype=logprobs.dtype, device=logprobs.device)
    return -(weights * logprobs).sum()


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """Means over prompts: those of parts with equally many prompts average to those of the whole.

    primary: E[ρ p̄]; values: (J,) E[ρ q̄_j]; moments: (J, 2) `robust.dual_moments` of ρ q̄_j at the χ in force
    effective_share: effective sample size of π_ref ρ, as a share of a prompt's candidates
    kl: KL(π_ref ρ‖first π_ref) between distributions over a prompt's candidates, nats
    """

    primary: float
    values: Array
    moments: Array
    effective_share: float
    kl: float

    def as_array(self) -> Array:
        return np.concatenate([[self.primary, self.effective_share, self.kl], self.values, self.moments.ravel()])

    @classmethod
    def of_array(cls, array: Array) -> Statistics:
        rest = array[3:]
        size = len(rest) // 3
        return cls(float(array[0]), rest[:size], rest[size:].reshape(size, 2), float(array[1]), float(array[2]))


def statistics(pool: Pool, rho: Array, first: Pool, log_chi: Array) -> Statistics:
    """What a batch says of ρ.   (design 2.4, eqs. 8 to 12)

    pool: under the π_ref in force; rho: (N,) ρ; first: the same candidates under the π_ref of the beginning
    log_chi: (J,) log χ, of the unit of win probability
    """
    weights, starts = np.exp(pool.log_reference) * rho, pool.starts[:-1]
    carry = 1.0 / np.add.reduceat(np.square(weights), starts)
    moved = np.where(weights > 0, np.log(np.maximum(weights, np.finfo(np.float64).tiny)) - first.log_reference, 0.0)
    products = rho[:, None] * pool.secondary
    moments = [
        dual_moments(pool.joint_log_reference, column, chi) for column, chi in zip(products.T, log_chi, strict=True)
    ]
    return Statistics(
        primary=float(pool.expectation(rho * pool.primary)),
        values=pool.expectation(products),
        moments=np.array(moments).reshape(-1, 2),
        effective_share=float((carry / np.diff(pool.starts)).mean()),
        kl=float(weights @ moved / pool.num_prompts),
    )


def policy_statistics(batch: Sequence[Candidates], log_ratios: Array, log_chi: Array) -> Statistics:
    """The same of a policy: ρ is π_ψ/π_ref, self-normalised. log_ratios: (N,) log π_ψ − log π_ref, nats"""
    first, moved = pool_of(batch), pool_of(batch, log_ratios)
    return statistics(first, np.exp(moved.log_reference - first.log_reference), first, log_chi)
