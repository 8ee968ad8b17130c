"""What an actor of the decoded fit does: completions of the mixture at some λ, scored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from mpo_ray.cluster.engines import room_of
from mpo_ray.cluster.score import draw, load_rewards, log_ratios, with_rewards
from mpo_ray.config import Scoring
from mpo_ray.decoding.sampler import EnsembleSampler, sampling_recipe
from mpo_ray.policies.ensemble import Ensemble
from mpo_ray.policies.loading import load_rendering


class MixtureDecoder:
    """Prompts and λ → completions of the mixture, their rewards and log Ẑ. Every model is held once."""

    def __init__(
        self,
        reference: str,
        policies: Mapping[str, str],
        rewards: Mapping[str, str],
        beta: float,
        actors: dict[str, Any],
        rendering: dict[str, Any],
        num_completions: int,
        max_new_tokens: int,
        particles: int,
        with_log_ratios: bool,
    ) -> None:
        self._actors = Scoring.model_validate(actors)
        self._names, self._beta = list(policies), beta
        self._rendering = load_rendering(reference, **rendering)
        self._rewards = load_rewards(rewards, self._actors)
        self._ensemble = Ensemble(reference, policies, precision=self._actors.precision)
        self._with_log_ratios = with_log_ratios
        self._sampler = EnsembleSampler(self._ensemble, room_of(self._actors))
        self._num, self._drawing = num_completions, {"max_new_tokens": max_new_tokens, "particles": particles}

    def __call__(self, table: pa.Table, values: dict[str, Any]) -> pa.Table:
        """values: `weights`, λ in the order of the objectives; `seed`."""
        weights = dict(zip(self._names, values["weights"], strict=True))
        recipe = sampling_recipe(weights, temperature=1.0, log_z=True, **self._drawing)
        seed = int(values["seed"])
        rows = draw(self._sampler, recipe, self._rendering, table, num=self._num, seed=seed, with_log_z=True)
        ratios: dict[str, list[float]] = {}
        if self._with_log_ratios:
            ratios = log_ratios(self._ensemble, self._names, rows, self._actors, self._rendering.tokenizer.pad_token_id)
            for name, column in ratios.items():
                rows = rows.append_column(f"log_ratio_{name}", pa.array(column, pa.float64()))
        rows = with_rewards(rows, self._rewards, self._rendering, ratios, self._beta)
        lengths = [len(ids) for ids in rows["response_ids"].to_pylist()]
        return rows.append_column("num_tokens", pa.array(lengths, pa.int32()))
