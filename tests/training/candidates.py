"""Candidates for tests: a few prompts of a tiny vocabulary, each with a few short responses and win probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mpo_ray.training.constrained import Candidates, Problem

PROBLEM = Problem(
    primary="helpful", secondary=["harmless", "concise"], bounds=[0.55, 0.5], adaptive=[False, True], tau=0.2
)


def candidates(num_prompts: int, *, seed: int) -> list[Candidates]:
    """Prompts with 3 to 5 candidates of unequal reference shares; the first secondary opposes the primary."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(num_prompts):
        size = int(rng.integers(3, 6))
        primary = rng.uniform(0.1, 0.9, size)
        logits = rng.normal(0, 0.3, size)
        tilt = rng.normal(0, 0.5, size)
        log_reference = logits - np.logaddexp.reduce(logits)
        found.append(
            Candidates(
                prompt_ids=[1, 7 + number],
                response_ids=[[*(7 + rng.integers(0, 16, int(rng.integers(1, 5)))).tolist(), 2] for _ in range(size)],
                log_reference=log_reference,
                primary=primary,
                secondary=np.column_stack([1 - primary, rng.uniform(0.1, 0.9, size)]),
                ratio=np.exp(tilt) / (np.exp(log_reference) @ np.exp(tilt)),
            )
        )
    return found


def as_row(number: int, given: Candidates) -> dict[str, object]:
    """The row of a job's Parquet parts."""
    arrays = {name: getattr(given, name).tolist() for name in ("log_reference", "primary", "secondary", "ratio")}
    ids = {"prompt_ids": list(given.prompt_ids), "response_ids": [list(r) for r in given.response_ids]}
    return {"prompt_id": f"p{number}", **ids, **arrays}


def logprobs(model: Any, given: Candidates) -> torch.Tensor:
    """(m,) log π(y|x) of the candidates, one forward pass each, from all logits."""
    rows = []
    for ids in given.response_ids:
        whole = torch.tensor([[*given.prompt_ids, *ids]])
        predicted = torch.log_softmax(model(input_ids=whole).logits[0, :-1].float(), dim=-1)
        taken = predicted.gather(1, whole[0, 1:, None])[:, 0]
        rows.append(taken[len(given.prompt_ids) - 1 :].sum())
    return torch.stack(rows)


@torch.no_grad()
def fixed_logprobs(model: Any, given: Candidates) -> np.ndarray:
    return logprobs(model, given).double().numpy()
