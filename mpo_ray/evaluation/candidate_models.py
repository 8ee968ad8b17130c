"""Opening the model of a candidate when it is first asked for, and keeping what the next one is likely to need."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch

from mpo_ray.evaluation.candidates import Candidate
from mpo_ray.policies.given import find_policy
from mpo_ray.policies.loading import PRECISIONS, load_model, load_policy
from mpo_ray.policies.mixture import MixtureForCausalLM
from mpo_ray.policies.soup import load_soup


class CandidateModels:
    """The reference and the mixture are opened once; of soups and other models, the latest is kept."""

    def __init__(self, artefact: str, reference: str, policies: Mapping[str, str], *, precision: str) -> None:
        self._artefact, self._policies = artefact, dict(policies)
        self._reference_path, self._precision = reference, precision
        self._latest: tuple[Candidate, Any] | None = None

    def open(self, candidate: Candidate) -> Any:
        """A causal LM on the GPU where there is one. The mixture is one object, whose weights are set here."""
        if candidate.kind == "reference":
            return self.reference
        if candidate.kind == "mixture":
            self.mixture.set_weights(self._by_objective(candidate))
            return self.mixture
        if self._latest is None or self._latest[0] != candidate:
            self._latest = None  # before the next one is opened, so that both are never in memory
            self._latest = candidate, self._load(candidate).to(_device())
        return self._latest[1]

    @cached_property
    def reference(self) -> Any:
        return load_model(self._reference_path, precision=self._precision).to(_device())

    @cached_property
    def mixture(self) -> MixtureForCausalLM:
        dtype = PRECISIONS[self._precision]
        return MixtureForCausalLM.from_pretrained(self._artefact, dtype=dtype, device_map=_device())

    def _load(self, candidate: Candidate) -> Any:
        if candidate.kind == "soup":
            weights = self._by_objective(candidate)
            return load_soup(self._reference_path, self._policies, weights, precision=self._precision)
        assert candidate.path is not None
        return load_policy(str(find_policy(candidate.path)), self._reference_path, precision=self._precision)

    def _by_objective(self, candidate: Candidate) -> dict[str, float]:
        assert candidate.weights is not None
        return dict(zip(self._policies, candidate.weights, strict=True))


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
