"""Score tables of enumerable worlds: one world per prompt, so that what rows estimate is a sum over responses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from mpo_ray.data.scores import ScoreTable, scores_from_table
from tests.world import Array, Response, World

NAMES = ("warm", "brief", "exact")
PROPOSALS = ("reference", *NAMES)


def worlds(num_prompts: int, *, spread: float = 1.0, num_policies: int = 3) -> list[World]:
    return [World.random(seed, spread=spread, num_policies=num_policies) for seed in range(num_prompts)]


def reward(name: str, response: Response) -> float:
    """Rewards that have nothing to do with the policies: they are read off the response."""
    return {"warm": float(response.count(1)), "brief": -float(len(response)), "exact": float(response.count(2))}[name]


def score_rows(
    of: Sequence[World], *, each: int, proposals: Sequence[str] = PROPOSALS, seed: int = 0, rewards: bool = True
) -> pa.Table:
    """`each` responses of every proposal for every world, as a run's score table has them."""
    rng = np.random.default_rng(seed)
    columns: dict[str, list[object]] = {}

    def put(name: str, value: object) -> None:
        columns.setdefault(name, []).append(value)

    for prompt, world in enumerate(of):
        logprobs = {"reference": world.log_reference}
        logprobs |= {name: world.log_policies[:, k] for k, name in enumerate(NAMES[: world.log_policies.shape[1]])}
        sample = 0
        for proposal in proposals:
            for row in rng.choice(len(world.responses), size=each, p=np.exp(logprobs[proposal])):
                put("prompt_id", f"p{prompt}")
                put("sample_id", sample)
                put("proposal", proposal)
                put("log_ref", float(world.log_reference[row]))
                put("num_tokens", len(world.responses[row]))
                for name in list(logprobs)[1:]:
                    put(f"log_ratio_{name}", float(logprobs[name][row] - world.log_reference[row]))
                    if rewards:
                        put(f"reward_{name}", reward(name, world.responses[row]))
                sample += 1
    return pa.table(columns)


def scores(of: Sequence[World], **how: object) -> ScoreTable:
    return scores_from_table(score_rows(of, **how))  # type: ignore[arg-type]


def tables_of(log_ratios: Array, *, rewards: Array | None = None, num_tokens: Array | None = None) -> ScoreTable:
    """A table of π_ref's samples from (P, S, K) log-ratios."""
    prompts, samples, size = log_ratios.shape
    columns = {
        "prompt_id": [f"p{p}" for p in range(prompts) for _ in range(samples)],
        "sample_id": [s for _ in range(prompts) for s in range(samples)],
    }
    table = pa.table(columns)
    for k in range(size):
        table = table.append_column(f"log_ratio_{NAMES[k]}", pa.array(log_ratios[:, :, k].ravel()))
        if rewards is not None:
            table = table.append_column(f"reward_{NAMES[k]}", pa.array(rewards[:, :, k].ravel()))
    if num_tokens is not None:
        table = table.append_column("num_tokens", pa.array(num_tokens.ravel()))
    return scores_from_table(table)
