"""Completions for whoever waits for all of them: a recipe and prompts in, finished completions out, in order."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from mpo_ray.decoding.engine import MixtureEngine
from mpo_ray.decoding.need import Need
from mpo_ray.decoding.protocol import (
    Delta,
    Diagnostics,
    EngineError,
    FinishReason,
    GenerationRequest,
    Mode,
    NothingAcceptedError,
    Sampling,
)
from mpo_ray.decoding.request_check import check_request
from mpo_ray.policies.mixture_config import MixtureConfig
from mpo_ray.run import StageError


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the completions of many prompts have in common. Their seeds differ: `sampling.seed` is not used.

    weights: λ by objective, on the simplex
    """

    sampling: Sampling
    mode: Mode
    weights: Mapping[str, float]

    def request(
        self, name: str, prompt_ids: Sequence[int], *, seed: int, continues_text: bool = False
    ) -> GenerationRequest:
        sampling = replace(self.sampling, seed=seed)
        return GenerationRequest(name, tuple(prompt_ids), sampling, self.mode, self.weights, continues_text)

    def as_json(self) -> dict[str, Any]:
        """Everything that decides over a completion beside prompt, seed and model, as JSON values."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        del values["sampling"]["seed"]
        return values


@dataclass(frozen=True, slots=True)
class Completion:
    """A completion to its end, its end token among `tokens`.

    error: why there is none, where rejection accepted nothing; then the rest is empty
    """

    tokens: tuple[int, ...] = ()
    text: str = ""
    finish_reason: FinishReason | None = None
    diagnostics: Diagnostics | None = None
    error: str | None = None

    @property
    def ended(self) -> bool:
        """Whether its end came before the limit: its last token is then an end token, unless a stop string ended it."""
        return self.finish_reason == "stop"

    @property
    def log_z_hat(self) -> float | None:
        """log Ẑ of its particles, nats; Σ_t log Z_t where there is one, in token mode; None where not measured."""
        found = self.diagnostics
        return None if found is None else found.log_z if found.mode == "token" else found.log_z_hat


@dataclass(slots=True)
class _Room:
    """A runner that has not been opened yet; it will have lanes enough for one request."""

    vocab_size: int
    context: int

    def refusal(self, need: Need) -> str | None:
        return None


def check_recipe(recipe: Recipe, config: MixtureConfig, prompt_ids: Sequence[int], context: int | None = None) -> None:
    """Refuse, before a model is opened, what the engine would refuse for this prompt. Raises RequestError.

    context: tokens of prompt and completion, at most, beside the model's own
    """
    limits = [limit for limit in (context, config.max_position_embeddings) if limit is not None]
    room = _Room(config.vocab_size or 0, min(limits, default=1 << 30))
    check_request(recipe.request("check", prompt_ids, seed=0), recipe.weights, room, config.objectives)


def lanes_for(recipe: Recipe, max_num_seqs: int) -> int:
    """Lanes to open: as many as wanted, and enough for one completion."""
    return max(max_num_seqs, recipe.mode.particles)


def row_seed(seed: int, row: int, sample: int) -> int:
    """The seed of a prompt's completion, from its place alone: who is decoded beside it plays no part."""
    return int(np.random.SeedSequence([seed, row, sample]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def complete(
    engine: MixtureEngine,
    requests: Sequence[GenerationRequest],
    *,
    show: Callable[[int, int], None] = lambda done, total: None,
) -> list[Completion]:
    """Decode all requests, as many at a time as the engine has room for; one outcome for each, in their order.

    The ids of the requests are all different. show: is told how many of how many are done
    Raises RequestError for one that cannot be served, StageError where the engine cannot go on with one.
    """
    num_done = 0
    waiting = deque(requests)
    parts: dict[str, list[Delta]] = {request.id: [] for request in requests}
    failed: dict[str, str] = {}
    while waiting or engine.has_work:
        while waiting and engine.num_waiting < engine.max_waiting:
            engine.submit(waiting.popleft())
        for name, item in engine.step():
            if isinstance(item, Delta):
                parts[name].append(item)
            elif isinstance(item, NothingAcceptedError):
                failed[name] = str(item)
            elif isinstance(item, EngineError):
                raise StageError(str(item)) from item
            else:
                raise item
            if name in failed or parts[name][-1].finish_reason is not None:
                num_done += 1
                show(num_done, len(requests))
    return [Completion(error=failed[name]) if name in failed else _joined(deltas) for name, deltas in parts.items()]


def _joined(deltas: Sequence[Delta]) -> Completion:
    last = deltas[-1]
    tokens = tuple(token for delta in deltas for token in delta.tokens)
    return Completion(tokens, "".join(delta.text for delta in deltas), last.finish_reason, last.diagnostics)
