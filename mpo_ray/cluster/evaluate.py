"""What a Ray Data actor does with one part of the evaluation: completions of one candidate, their rewards and KL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import torch

from mpo_ray.cluster.score import draw, load_rewards, log_ratios, sequences, with_rewards
from mpo_ray.config import Actors
from mpo_ray.data.tokens import collate
from mpo_ray.evaluation.rewards import IMPLICIT
from mpo_ray.maths.sequence_logprob import sequence_kl
from mpo_ray.policies.loading import load_model, load_tokenizer
from mpo_ray.policies.mixture import MixtureForCausalLM
from mpo_ray.policies.policy_set import PolicySet


class CandidateEvaluator:
    """Prompts and a candidate → a completions table. All candidates but the reference are mixtures."""

    def __init__(
        self,
        artefact: str,
        reference: str,
        policies: Mapping[str, str],
        rewards: Mapping[str, str],
        beta: float,
        actors: dict[str, Any],
        num_completions: int,
        max_new_tokens: int,
        temperature: float,
    ) -> None:
        self._actors = Actors.model_validate(actors)
        self._tokenizer = load_tokenizer(artefact)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._mixture = MixtureForCausalLM.from_pretrained(artefact, device_map=device)
        self._reference = load_model(reference, precision=self._actors.precision).to(device)
        self._rewards = load_rewards(rewards, self._actors)
        self._scored: PolicySet | None = None
        self._names = list(policies)
        if IMPLICIT in rewards.values():
            self._scored = PolicySet(reference, policies, precision=self._actors.precision)
        self._beta = beta
        self._drawing: dict[str, Any] = {
            "num": num_completions,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
        }

    def __call__(self, table: pa.Table, values: dict[str, Any]) -> pa.Table:
        """values: `candidate`; `weights`, λ in the order of the objectives, none for the reference; `seed`."""
        weights = values["weights"]
        model: Any = self._reference
        if weights is not None:
            self._mixture.set_weights(dict(zip(self._mixture.objectives, map(float, weights), strict=True)))
            model = self._mixture
        rows = draw(model, self._tokenizer, table, seed=int(values["seed"]), **self._drawing)
        kl = [0.0] * rows.num_rows if weights is None else self._kl(rows)
        pad_id = self._tokenizer.pad_token_id
        ratios = {} if self._scored is None else log_ratios(self._scored, self._names, rows, self._actors, pad_id)
        rows = with_rewards(rows, self._rewards, self._tokenizer, ratios, self._beta)
        lengths = [len(ids) for ids in rows["response_ids"].to_pylist()]
        return (
            rows.append_column("candidate", pa.array([str(values["candidate"])] * rows.num_rows))
            .append_column("num_tokens", pa.array(lengths, pa.int32()))
            .append_column("kl", pa.array(kl, pa.float64()))
            .drop_columns(["prompt_ids", "response_ids"])
            .rename_columns({"sample_id": "completion_id"})
        )

    @torch.no_grad()
    def _kl(self, rows: pa.Table) -> list[float]:
        """Σ_t KL(q_t ‖ π_ref,t) along each completion, nats: it estimates KL(q ‖ π_ref)."""
        items = sequences(rows)
        values: list[float] = []
        for start in range(0, len(items), self._actors.batch_size):
            batch = collate(items[start : start + self._actors.batch_size], pad_id=self._tokenizer.pad_token_id)
            batch = batch.to(self._mixture.device)
            given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
            logits, reference = self._mixture(**given).logits, self._reference(**given).logits
            values += sequence_kl(logits, reference, batch.completion_mask).double().tolist()
        return values
