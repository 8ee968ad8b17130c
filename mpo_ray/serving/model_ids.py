"""Model ids: the mixture, each policy and the reference by itself, and the mixture at weights that the id names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mpo_ray.records import REFERENCE, check_weights, parse_weights
from mpo_ray.serving.errors import ApiError
from mpo_ray.serving.served import Served


def model_ids(served: Served) -> list[str]:
    """Those that can be listed: the mixture, each policy, and the reference where it is served."""
    references = [REFERENCE] if served.has_reference else []
    return [served.name, *(f"{served.name}/{policy}" for policy in [*served.objectives, *references])]


def parse_model_id(model: str, served: Served) -> dict[str, float] | None:
    """The weights that a model id asks for: `name` none, `name/objective` a vertex, `name@helpful=0.7,harmless=0.3`.

    `name/reference` asks for what the policies were trained from, which has a weight on no simplex.
    Raises ApiError: 404 for an unknown model, 400 for weights off the simplex.
    """
    name, objectives = served.name, served.objectives
    if model == name:
        return None
    if served.has_reference and model == f"{name}/{REFERENCE}":
        return {REFERENCE: 1.0}
    if model.startswith(f"{name}/") and (objective := model[len(name) + 1 :]) in objectives:
        return {one: float(one == objective) for one in objectives}
    if not model.startswith(f"{name}@"):
        ids = ", ".join(model_ids(served))
        raise ApiError(404, f"the model {model[:100]!r} does not exist; there are {ids}.", "model", "model_not_found")
    try:
        weights = parse_weights(model[len(name) + 1 :], where=f"model {name}@…")
    except ValueError as error:
        raise ApiError(400, str(error), "model") from None
    return checked_weights(weights, objectives, "model")


def checked_weights(weights: Mapping[str, float], objectives: Sequence[str], place: str) -> dict[str, float]:
    """λ in the order of the objectives. Raises ApiError off the simplex."""
    try:
        return check_weights(weights, objectives, where=place)
    except ValueError as error:
        raise ApiError(400, str(error), place) from None
