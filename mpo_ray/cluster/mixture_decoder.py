"""What an actor of the decoded fit does: completions of the mixture at some λ, scored."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from mpo_ray.cluster.score import draw, load_rewards, log_ratios, with_rewards
from mpo_ray.config import Scoring
from mpo_ray.policies.artefact import write_artefact
from mpo_ray.policies.loading import load_rendering
from mpo_ray.policies.mixture import MixtureForCausalLM
from mpo_ray.policies.policy_set import PolicySet


class MixtureDecoder:
    """Prompts and λ → completions of the mixture, their rewards and log Ẑ.

    The mixture artefact is written after the fit, so one for the game is made in a directory that goes when it is
    loaded, of links to the policies.
    """

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
        with tempfile.TemporaryDirectory(prefix="mpo-ray-mixture-") as directory:
            write_artefact(
                Path(directory),
                objectives={name: Path(path) for name, path in policies.items()},
                reference=reference,
                copy_policies=False,
                copy_reference=False,
                weights={name: 1 / len(policies) for name in policies},
                fit={},
                precision=self._actors.precision,
            )
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self._mixture = MixtureForCausalLM.from_pretrained(directory, device_map=device)
        self._scored: PolicySet | None = None
        if with_log_ratios:
            self._scored = PolicySet(reference, policies, precision=self._actors.precision)
        self._drawing: dict[str, Any] = {
            "num": num_completions,
            "max_new_tokens": max_new_tokens,
            "temperature": 1.0,
            "particles": particles,
        }

    def __call__(self, table: pa.Table, values: dict[str, Any]) -> pa.Table:
        """values: `weights`, λ in the order of the objectives; `seed`."""
        self._mixture.set_weights(dict(zip(self._names, values["weights"], strict=True)))
        seed = int(values["seed"])
        rows = draw(self._mixture, self._rendering, table, seed=seed, with_log_z=True, **self._drawing)
        ratios: dict[str, list[float]] = {}
        if self._scored is not None:
            ratios = log_ratios(self._scored, self._names, rows, self._actors, self._rendering.tokenizer.pad_token_id)
            for name, column in ratios.items():
                rows = rows.append_column(f"log_ratio_{name}", pa.array(column, pa.float64()))
        rows = with_rewards(rows, self._rewards, self._rendering, ratios, self._beta)
        lengths = [len(ids) for ids in rows["response_ids"].to_pylist()]
        return rows.append_column("num_tokens", pa.array(lengths, pa.int32()))
