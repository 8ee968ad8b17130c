"""What a Ray Data actor does with one part of the evaluation: completions of one candidate, their rewards and KL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from mpo_ray.cluster.engines import Draws, can_draw, room_of, sampler_of
from mpo_ray.cluster.score import draw, load_rewards, log_ratios, sequences, with_rewards
from mpo_ray.config import Scoring
from mpo_ray.data.end_tokens import model_ends
from mpo_ray.decoding.sampler import EnsembleSampler, MixtureSampler, sampling_recipe
from mpo_ray.evaluation.candidate_models import CandidateModels
from mpo_ray.evaluation.candidates import Candidate
from mpo_ray.evaluation.divergence import divergences, tilts
from mpo_ray.evaluation.rewards import IMPLICIT
from mpo_ray.policies.ensemble import Ensemble
from mpo_ray.policies.loading import load_rendering
from mpo_ray.policies.mixture import mixture_of_one
from mpo_ray.records import REFERENCE


class CandidateEvaluator:
    """Prompts and a candidate → a completions table. Reference and policies are held once."""

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
        temperature: float,
    ) -> None:
        self._actors = Scoring.model_validate(actors)
        self._rendering = load_rendering(reference, **rendering)
        self._ensemble = Ensemble(reference, policies, precision=self._actors.precision)
        self._models = CandidateModels(self._ensemble, reference, policies)
        self._rewards = load_rewards(rewards, self._actors)
        self._names = list(policies)
        self._with_log_ratios = IMPLICIT in rewards.values()
        self._beta = beta
        self._sampler = sampler_of(self._ensemble, reference, policies, self._actors)
        self._whole = EnsembleSampler(self._ensemble, room_of(self._actors))
        self._of_other: tuple[Candidate, MixtureSampler] | None = None
        self._num = num_completions
        self._drawing: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}

    def __call__(self, table: pa.Table, values: dict[str, Any]) -> pa.Table:
        """values: `candidate`, a record as JSON; `seed`; `num_prompts`, how many of the table's first prompts."""
        candidate = Candidate.from_json(str(values["candidate"]))
        table = table.slice(0, int(values["num_prompts"]))
        if self._of_other is not None and self._of_other[0] != candidate:
            self._of_other = None  # it holds a model, which goes before another one is opened
        with self._ensemble.model(REFERENCE) as reference, self._models.open(candidate) as model:
            return self._completions(table, candidate, model, reference, int(values["seed"]))

    def _sampler_of(self, candidate: Candidate, model: Any) -> tuple[Draws, dict[str, float]]:
        """Who draws the candidate's completions, and the λ to draw with. model: of the candidate"""
        sampler = self._sampler if can_draw(self._actors, candidate) else self._whole
        if candidate.kind == "reference":
            return sampler, {REFERENCE: 1.0}
        if candidate.kind == "mixture":
            assert candidate.weights is not None
            return sampler, dict(zip(self._names, candidate.weights, strict=True))
        if self._of_other is None:
            self._of_other = candidate, MixtureSampler(mixture_of_one(candidate.kind, model), room_of(self._actors))
        return self._of_other[1], {candidate.kind: 1.0}

    def _completions(self, table: pa.Table, candidate: Candidate, model: Any, reference: Any, seed: int) -> pa.Table:
        ends = () if candidate.path is None else model_ends(candidate.path)  # of a model that is not the run's
        whole = candidate.particles > 1
        sampler, weights = self._sampler_of(candidate, model)
        recipe = sampling_recipe(weights, particles=candidate.particles, **self._drawing)
        how: dict[str, Any] = {"num": self._num, "seed": seed, "with_log_z": whole, "further_ends": ends}
        rows = draw(sampler, recipe, self._rendering, table, **how)
        pad_id = self._rendering.tokenizer.pad_token_id
        kl = log_z = [0.0] * rows.num_rows
        how = {"batch_size": self._actors.batch_size, "pad_id": pad_id}
        if whole:
            log_z = rows["log_z"].to_pylist()
            rows = rows.drop_columns("log_z")
            tilted = tilts(model, reference, sequences(rows), **how)
            kl = [tilt - normalizer for tilt, normalizer in zip(tilted, log_z, strict=True)]
        elif candidate.kind != "reference":
            kl, dropped = divergences(model, reference, sequences(rows), **how)
            log_z = dropped if candidate.is_proper_mixture else log_z
        ratios: dict[str, list[float]] = {}
        if self._with_log_ratios:
            ratios = log_ratios(self._ensemble, self._names, rows, self._actors, pad_id)
        rows = with_rewards(rows, self._rewards, self._rendering, ratios, self._beta)
        lengths = [len(ids) for ids in rows["response_ids"].to_pylist()]
        return (
            rows.append_column("num_tokens", pa.array(lengths, pa.int32()))
            .append_column("kl", pa.array(kl, pa.float64()))
            .append_column("log_z", pa.array(log_z, pa.float64()))
            .drop_columns(["prompt_ids", "response_ids"])
            .rename_columns({"sample_id": "completion_id"})
        )
