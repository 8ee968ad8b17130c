"""Who is compared: the reference, the policies, their mixtures and soups, other models, and the grid for the front.

A candidate is a record that names a distribution. Opening its model is the matter of `candidate_models`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

from mpo_ray.config import Evaluation
from mpo_ray.maths.simplex import simplex_grid, uniform
from mpo_ray.records import FIT_PREFIX, GRID_PREFIX, MPO, MPO_TOKENWISE, REFERENCE, SOUP_MPO, SOUP_UNIFORM, UNIFORM

#: Digits of a weight that tell two candidates apart.
WEIGHT_DIGITS = 9


@dataclass(frozen=True, slots=True)
class Candidate:
    """One distribution over completions.

    kind: `reference`; `mixture`; `soup`, the average of parameters; `model`, another model
    weights: λ of a mixture or soup, in the order of the objectives
    path: a model's directory or hub id
    particles: 1 decodes a mixture token by token (equation 7), more draw it whole (design 2.3)
    """

    kind: Literal["reference", "mixture", "soup", "model"]
    weights: tuple[float, ...] | None = None
    path: str | None = None
    particles: int = 1

    def as_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Candidate:
        value = json.loads(text)
        weights = value["weights"]
        return cls(**{**value, "weights": None if weights is None else tuple(weights)})

    @property
    def distribution(self) -> Candidate:
        """The record that stands for all candidates with the same distribution.

        Mixture and soup at a vertex of the simplex are both the one policy. Weights are rounded to 9 digits.
        """
        if self.weights is None:
            return self
        weights = tuple(round(weight, WEIGHT_DIGITS) for weight in self.weights)
        if max(weights) == 1.0:
            return Candidate("mixture", weights)
        return Candidate(self.kind, weights, particles=self.particles)

    @property
    def rows_per_token(self) -> int:
        """How many model rows a token of a completion needs: K for K policies with weight, times the particles."""
        same = self.distribution
        policies = sum(weight > 0 for weight in same.weights or ()) if same.kind == "mixture" else 1
        return policies * same.particles

    @property
    def is_proper_mixture(self) -> bool:
        """Whether it multiplies distributions: a mixture of two policies or more."""
        return self.kind == "mixture" and sum(weight > 0 for weight in self.distribution.weights or ()) > 1


def named_candidates(
    objectives: Sequence[str],
    fit: Mapping[str, Any],
    evaluation: Evaluation,
    models: Mapping[str, str],
    *,
    particles: int = 1,
) -> dict[str, Candidate]:
    """Every candidate that has a name, in the order of the tables, MPO last.

    fit: what fit.json holds: `weights`, and the other fits under `alternatives`
    models: name → directory or hub id
    particles: that mixtures are decoded with; of more than 1, MPO's λ is there token by token as well
    """
    num = len(objectives)
    even = tuple(uniform(num).tolist())
    fitted = _vector(fit["weights"], objectives)
    vertices = {name: tuple(float(other == name) for other in objectives) for name in objectives}
    mixture = partial(Candidate, "mixture", particles=particles)
    found = {REFERENCE: Candidate("reference")} | {n: Candidate("mixture", w) for n, w in vertices.items()}
    found[UNIFORM] = mixture(even)
    if evaluation.soups and num > 1:
        found |= {SOUP_UNIFORM: Candidate("soup", even), SOUP_MPO: Candidate("soup", fitted)}
    if evaluation.fits:
        others = (fit.get("alternatives") or {}).items()
        found |= {f"{FIT_PREFIX}{n}": mixture(_vector(o["weights"], objectives)) for n, o in others}
    found |= {n: mixture(_vector(w, objectives)) for n, w in evaluation.mixtures.items()}
    found |= {name: Candidate("model", path=path) for name, path in models.items()}
    if particles > 1 and num > 1:
        found[MPO_TOKENWISE] = Candidate("mixture", fitted)
    return found | {MPO: mixture(fitted)}


def grid_candidates(num_objectives: int, evaluation: Evaluation, *, particles: int = 1) -> dict[str, Candidate]:
    """Mixtures, and soups where they are asked for, at every point of a grid over the simplex."""
    if evaluation.grid is None or num_objectives < 2:
        return {}
    points = [tuple(point) for point in simplex_grid(num_objectives, evaluation.grid).tolist()]
    found = {f"{GRID_PREFIX}{i}": Candidate("mixture", point, particles=particles) for i, point in enumerate(points)}
    if evaluation.soups:
        found |= {f"{GRID_PREFIX}soup-{i}": Candidate("soup", point) for i, point in enumerate(points)}
    return found


def _vector(weights: Mapping[str, float], objectives: Sequence[str]) -> tuple[float, ...]:
    return tuple(float(weights.get(name, 0.0)) for name in objectives)
