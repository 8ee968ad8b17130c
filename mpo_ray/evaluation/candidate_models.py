"""The model of a candidate: one of the ensemble's, or one that is opened for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from mpo_ray.evaluation.candidates import Candidate
from mpo_ray.policies.cpu import optimize_for_cpu
from mpo_ray.policies.ensemble import Ensemble
from mpo_ray.policies.given import find_policy
from mpo_ray.policies.loading import load_policy
from mpo_ray.policies.mixture import MixtureForCausalLM, mixture_of
from mpo_ray.policies.soup import load_soup
from mpo_ray.records import REFERENCE


class CandidateModels:
    """The reference and the mixture are the ensemble's; of soups and other models, the latest is kept."""

    def __init__(self, ensemble: Ensemble, reference: str, policies: Mapping[str, str]) -> None:
        self._ensemble, self._policies = ensemble, dict(policies)
        self._reference, self._precision = reference, ensemble.precision
        self._latest: tuple[Candidate, Any] | None = None

    @contextmanager
    def open(self, candidate: Candidate) -> Iterator[Any]:
        """A causal LM, while the block runs. The mixture is one object, whose weights are set here."""
        if candidate.kind == "reference":
            with self._ensemble.model(REFERENCE) as model:
                yield model
        elif candidate.kind == "mixture":
            self._mixture.set_weights(self._by_objective(candidate))
            yield self._mixture
        else:
            if self._latest is None or self._latest[0] != candidate:
                self._latest = None  # before the next one is opened, so that both are never in memory
                model = self._load(candidate).to(self._ensemble.device)
                optimize_for_cpu(model)
                self._latest = candidate, model
            yield self._latest[1]

    @cached_property
    def _mixture(self) -> MixtureForCausalLM:
        return mixture_of(self._ensemble)

    def _load(self, candidate: Candidate) -> Any:
        if candidate.kind == "soup":
            weights = self._by_objective(candidate)
            return load_soup(self._reference, self._policies, weights, precision=self._precision)
        assert candidate.path is not None
        return load_policy(str(find_policy(candidate.path)), self._reference, precision=self._precision)

    def _by_objective(self, candidate: Candidate) -> dict[str, float]:
        assert candidate.weights is not None
        return dict(zip(self._policies, candidate.weights, strict=True))
