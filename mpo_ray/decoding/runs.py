"""How a request becomes a completion, and the plainest way: token by token (design 2.3).

A run is told the distributions of the places that it asked for, says which tokens to draw from which of them, and is
told what was drawn. Its random numbers are its own, so that a completion does not depend on who is decoded beside it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mpo_ray.decoding.branch import Piece, Predictions
from mpo_ray.decoding.drafts import Draft, Rules, prompt_logprobs, token_logprob
from mpo_ray.decoding.need import Need, need_of
from mpo_ray.decoding.protocol import Delta, Diagnostics, GenerationRequest, TokenLogprob
from mpo_ray.decoding.runner_protocol import Runner
from mpo_ray.decoding.token_choice import LARGEST_UNIFORM, Draw, History
from mpo_ray.records import REFERENCE


@dataclass(frozen=True, slots=True)
class Place:
    """The distribution of one next token: logits (V,) up to a constant, log Z_t (NaN if not measured), log π_k by k."""

    logits: Tensor
    log_z: float
    policies: Mapping[int, Tensor]


class Run(ABC):
    """What all runs share: lanes, and the prompt, which is computed in pieces in the first lane."""

    #: Whether log Z_t decides over anything.
    needs_log_z = True

    def __init__(
        self, request: GenerationRequest, weights: Sequence[float], rules: Rules, names: Sequence[str]
    ) -> None:
        """weights: (K,) λ that is decoded; names: of the K policies, perhaps with the reference as one more."""
        self.request, self._weights, self._rules, self._names = request, weights, rules, names
        self.policies = tuple(k for k, weight in enumerate(weights) if weight != 0)
        sampling = request.sampling
        self._drawn_by = replace(sampling, temperature=1.0) if self.needs_log_z else sampling  # λ/τ has it already
        self._separate = self.needs_log_z or request.mode.log_z or sampling.policy_logprobs
        self._computed = 0  # of the prompt
        self._prompt_logprobs: list[TokenLogprob | None] = [None]
        self._told_prompt = not sampling.prompt_logprobs
        self._asked: list[Draft] = []  # whose last tokens the step computes
        self._drafts: list[Draft] = []
        self.lanes: list[int] = []
        self.finished = False

    @property
    def num_lanes(self) -> int:
        return self.request.mode.particles

    @property
    def need(self) -> Need:
        return need_of(self.request, self.policies)

    @property
    def prompt_left(self) -> int:
        return len(self.request.prompt_ids) - self._computed

    def start(self, lanes: Sequence[int], num_computed: int = 0) -> None:
        """num_computed: tokens of the prompt that the first lane holds already"""
        self.lanes, self._computed = list(lanes), num_computed

    def pieces(self, prompt_budget: int) -> list[Piece]:
        """What to compute in this step: a piece of the prompt, of at most this many tokens, or the newest tokens."""
        prompt = self.request.prompt_ids
        if self.prompt_left:
            start, end = self._computed, min(self._computed + prompt_budget, len(prompt))
            whole = self.request.sampling.prompt_logprobs
            wanted = end - start if whole else int(end == len(prompt))
            return [Piece(self.lanes[0], prompt[start:end], start, self._weights, wanted, self._separate)]
        self._asked = [draft for draft in self._drafts if draft.finish is None]
        return [
            Piece(
                draft.lane,
                (draft.tokens[-1],),
                len(prompt) + len(draft.tokens) - 1,
                self._weights,
                1,
                self._separate,
            )
            for draft in self._asked
        ]

    def see(self, pieces: Sequence[Piece], places: Sequence[Place], runner: Runner) -> list[tuple[Place, Draw]] | None:
        """Take in what was computed; returns the draws to make, or None where it is still the prompt's turn."""
        if self.prompt_left:
            return self._see_prompt(pieces[0], places, runner)
        return self._draws(places, runner)

    @abstractmethod
    def take(self, tokens: Sequence[int], draws: Sequence[tuple[Place, Draw]]) -> Delta | None:
        """Take the tokens drawn; returns what can be said of them. Sets `finished`."""

    @abstractmethod
    def _begin(self, place: Place, runner: Runner) -> list[tuple[Place, Draw]]:
        """The draws of the first token. place: what follows the prompt."""

    @abstractmethod
    def _draws(self, places: Sequence[Place], runner: Runner) -> list[tuple[Place, Draw]]:
        """The draws of the next tokens. places: one for each of `_asked`."""

    def _see_prompt(self, piece: Piece, places: Sequence[Place], runner: Runner) -> list[tuple[Place, Draw]] | None:
        sampling, prompt = self.request.sampling, self.request.prompt_ids
        end = piece.start + len(piece.tokens)
        if sampling.prompt_logprobs:
            following = prompt[piece.start + 1 : end + 1]
            if following:
                logits = torch.stack([place.logits for place in places[: len(following)]])
                self._prompt_logprobs += prompt_logprobs(logits, following, num_top=sampling.num_logprobs or 0)
        self._computed = end
        if self.prompt_left or sampling.max_tokens == 0:
            return None
        return self._begin(places[-1], runner)

    def prompt_only(self) -> Delta | None:
        """The answer to a request for no token, once its prompt is computed."""
        if self.prompt_left or self.request.sampling.max_tokens > 0:
            return None
        self.finished = True
        return self._told(Delta(finish_reason="length", diagnostics=self._diagnostics()))

    def _told(self, delta: Delta) -> Delta:
        """With the prompt's log-probabilities, if they were not told yet."""
        if self._told_prompt:
            return delta
        self._told_prompt = True
        return Delta(
            delta.tokens,
            delta.text,
            delta.logprobs,
            tuple(self._prompt_logprobs),
            delta.finish_reason,
            delta.stop,
            delta.diagnostics,
        )

    def _draft(self, lane: int, *, reads_text: bool) -> Draft:
        text = self._rules.text_stream() if reads_text else None
        return Draft(lane, text, History(frozenset(self.request.prompt_ids)))

    def _draw(self, draft: Draft, place: Place, uniform: float) -> tuple[Place, Draw]:
        return place, Draw(self._drawn_by, draft.history, min(uniform, LARGEST_UNIFORM), self._rules.end_ids)

    def _record(self, draft: Draft, token: int, place: Place) -> None:
        """Keep what the request wants to know of a drawn token."""
        sampling = self.request.sampling
        if not math.isnan(place.log_z):
            draft.log_z += place.log_z
        if sampling.num_logprobs is not None:
            by_policy = {self._names[k]: float(row[token]) for k, row in place.policies.items()}
            draft.logprobs.append(
                token_logprob(
                    place.logits,
                    token,
                    num_top=sampling.num_logprobs,
                    by_policy=by_policy if sampling.policy_logprobs else None,
                    log_z=None if math.isnan(place.log_z) else place.log_z,
                )
            )

    def _diagnostics(self, draft: Draft | None = None, **figures: float | None) -> Diagnostics:
        measured = draft is not None and self._separate
        return Diagnostics(
            mode=self.request.mode.kind,
            weights={
                name: weight
                for name, weight in zip(self._names, self._weights, strict=True)
                if weight or name != REFERENCE
            },
            log_z=draft.log_z if draft is not None and measured else None,
            **figures,  # type: ignore[arg-type]
        )

    def _whole(self, draft: Draft, **figures: float | None) -> Delta:
        """A finished draft as one delta; its text is made now."""
        self.finished = True
        text, reader = "", self._draft(draft.lane, reads_text=True)
        if reader.text is not None:
            text = "".join(reader.extend(token, self._rules) for token in draft.tokens)
        return self._told(
            Delta(
                tuple(draft.tokens),
                text,
                tuple(draft.logprobs),
                finish_reason=draft.finish,
                stop=draft.stop,
                diagnostics=self._diagnostics(draft, **figures),
            )
        )


class TokenRun(Run):
    """Draw from q_t, token after token: the token-level mixture."""

    needs_log_z = False

    def __init__(
        self, request: GenerationRequest, weights: Sequence[float], rules: Rules, names: Sequence[str]
    ) -> None:
        super().__init__(request, weights, rules, names)
        self._random = np.random.default_rng(request.sampling.seed)

    def _begin(self, place: Place, runner: Runner) -> list[tuple[Place, Draw]]:
        self._drafts = self._asked = [self._draft(self.lanes[0], reads_text=True)]
        return self._draws([place], runner)

    def _draws(self, places: Sequence[Place], runner: Runner) -> list[tuple[Place, Draw]]:
        return [self._draw(self._drafts[0], places[0], float(self._random.random()))]

    def take(self, tokens: Sequence[int], draws: Sequence[tuple[Place, Draw]]) -> Delta | None:
        [token], [draft] = tokens, self._drafts
        self._record(draft, token, draws[0][0])
        text = draft.extend(token, self._rules)
        self.finished = draft.finish is not None
        return self._told(
            Delta(
                (token,),
                text,
                tuple(draft.logprobs[-1:]),
                finish_reason=draft.finish,
                stop=draft.stop,
                diagnostics=self._diagnostics(draft) if self.finished else None,
            )
        )


def places_of(predictions: Predictions, log_z: Sequence[float], rows: Sequence[int]) -> list[Place]:
    """The rows of a step's predictions, one after the other. log_z: of all rows, as numbers."""
    return [Place(predictions.logits[row], log_z[row], predictions.policies[row]) for row in rows]
