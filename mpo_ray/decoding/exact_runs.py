"""Completions of the sequence-level mixture π_λ: by sequential Monte Carlo, and by rejection (design 2.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from mpo_ray.decoding.acceptance import Attempt, Attempts
from mpo_ray.decoding.drafts import Draft, Rules
from mpo_ray.decoding.protocol import Delta, GenerationRequest
from mpo_ray.decoding.runner_protocol import Runner
from mpo_ray.decoding.runs import Place, Run, TokenRun
from mpo_ray.decoding.token_choice import Draw
from mpo_ray.maths.resampling import drawn_particle, effective_number, log_mean_weight, systematic_ancestors


class ParticleRun(Run):
    """Draw from π_λ in the limit of many particles: sequential Monte Carlo over the token-level mixture.

    A particle is weighed by Π_t Z_t. Where fewer than half of them count, they are resampled before their next token is
    drawn; ended ones keep their weight and stay. One is returned with probability ∝ its weight. Ẑ is unbiased.
    """

    def __init__(
        self, request: GenerationRequest, weights: Sequence[float], rules: Rules, names: Sequence[str]
    ) -> None:
        super().__init__(request, weights, rules, names)
        self._random = np.random.default_rng(request.sampling.seed)
        self._log_weights = torch.zeros(1, self.num_lanes, dtype=torch.float64)
        self._log_z_hat = 0.0

    def _begin(self, place: Place, runner: Runner) -> list[tuple[Place, Draw]]:
        others = self.lanes[1:]
        if others:
            runner.copy([(self.lanes[0], lane) for lane in others], len(self.request.prompt_ids))
        reads = bool(self.request.sampling.stop)
        self._drafts = [self._draft(lane, reads_text=reads) for lane in self.lanes]
        self._asked = list(self._drafts)
        return self._draws([place] * len(self._drafts), runner)

    def _draws(self, places: Sequence[Place], runner: Runner) -> list[tuple[Place, Draw]]:
        numbers = {draft.lane: n for n, draft in enumerate(self._drafts)}
        at: dict[int, Place] = {numbers[draft.lane]: place for draft, place in zip(self._asked, places, strict=True)}
        factors = [at[n].log_z if n in at else 0.0 for n in range(self.num_lanes)]
        self._log_weights += torch.tensor([factors], dtype=torch.float64)
        if float(effective_number(self._log_weights)) < self.num_lanes / 2:
            at = self._resample(at, runner)
        self._asked = [draft for draft in self._drafts if draft.finish is None]
        uniforms = self._random.random(self.num_lanes)
        return [
            self._draw(draft, at[n], float(uniforms[n])) for n, draft in enumerate(self._drafts) if draft.finish is None
        ]

    def _resample(self, at: Mapping[int, Place], runner: Runner) -> dict[int, Place]:
        """Draw the particles again, with the rows of their caches; returns the places of those that go on."""
        shift = torch.tensor([self._random.random()], dtype=torch.float64)
        ancestors: list[int] = systematic_ancestors(self._log_weights, shift)[0].tolist()
        self._log_z_hat += float(log_mean_weight(self._log_weights))
        self._log_weights.zero_()
        moved = [(self.lanes[a], self.lanes[n]) for n, a in enumerate(ancestors) if a != n and a in at]
        if moved:
            length = len(self.request.prompt_ids) + max(len(self._drafts[a].tokens) for a in ancestors if a in at)
            runner.copy(moved, length)
        self._drafts = [self._drafts[a].fork(self.lanes[n]) for n, a in enumerate(ancestors)]
        return {n: at[a] for n, a in enumerate(ancestors) if a in at}

    def take(self, tokens: Sequence[int], draws: Sequence[tuple[Place, Draw]]) -> Delta | None:
        for draft, token, (place, _) in zip(self._asked, tokens, draws, strict=True):
            self._record(draft, token, place)
            draft.extend(token, self._rules)
        if any(draft.finish is None for draft in self._drafts):
            return None
        chosen = int(drawn_particle(self._log_weights, torch.tensor([self._random.random()])))
        return self._whole(
            self._drafts[chosen],
            log_z_hat=self._log_z_hat + float(log_mean_weight(self._log_weights)),
            effective_sample_size=float(effective_number(self._log_weights)),
            particles=self.num_lanes,
        )


class RejectionRun(Run):
    """Draw from π_λ: attempts from q, several side by side, by the rule of `acceptance`."""

    def __init__(
        self, request: GenerationRequest, weights: Sequence[float], rules: Rules, names: Sequence[str]
    ) -> None:
        super().__init__(request, weights, rules, names)
        self._attempts = Attempts(request.sampling.seed, request.mode.max_attempts)
        self._in_lane: dict[int, Attempt] = {}
        self._first: Place | None = None
        self._answer: Draft | None = None

    def _begin(self, place: Place, runner: Runner) -> list[tuple[Place, Draw]]:
        others = self.lanes[1:]
        if others:
            runner.copy([(self.lanes[0], lane) for lane in others], len(self.request.prompt_ids))
        self._first = Place(place.logits.clone(), place.log_z, {k: row.clone() for k, row in place.policies.items()})
        draws = [self._attempt(lane) for lane in self.lanes]
        return self._going([draw for draw in draws if draw is not None])

    def _draws(self, places: Sequence[Place], runner: Runner) -> list[tuple[Place, Draw]]:
        draws = []
        for draft, place in zip(self._asked, places, strict=True):
            attempt = self._in_lane[draft.lane]
            if attempt.survives(place.log_z):
                draws.append((draft, self._draw(draft, place, float(attempt.random.random()))))
                continue
            again = self._attempt(draft.lane)
            if again is not None:
                draws.append(again)
        return self._going(draws)

    def _going(self, draws: Sequence[tuple[Draft, tuple[Place, Draw]]]) -> list[tuple[Place, Draw]]:
        self._drafts = self._asked = [draft for draft, _ in draws]
        if not draws and self._answer is None:
            self._attempts.figures("Use sequential Monte Carlo (particles), or more attempts.")
        return [draw for _, draw in draws]

    def _attempt(self, lane: int) -> tuple[Draft, tuple[Place, Draw]] | None:
        """Begin attempts in a lane, whose rows still hold the prompt, until one gets past its first token."""
        first = self._first
        assert first is not None
        while (attempt := self._attempts.begin()) is not None:
            if attempt.survives(first.log_z):
                self._in_lane[lane] = attempt
                draft = self._draft(lane, reads_text=bool(self.request.sampling.stop))
                return draft, self._draw(draft, first, float(attempt.random.random()))
        return None

    def take(self, tokens: Sequence[int], draws: Sequence[tuple[Place, Draw]]) -> Delta | None:
        for draft, token, (place, _) in zip(self._asked, tokens, draws, strict=True):
            self._record(draft, token, place)
            draft.extend(token, self._rules)
            if draft.finish is not None and self._attempts.accept(self._in_lane[draft.lane]):
                self._answer = draft
        if self._answer is None:
            return None
        going = [draft for draft in self._drafts if draft.finish is None]
        self._drafts = [draft for draft in going if not self._attempts.is_late(self._in_lane[draft.lane])]
        if self._drafts:
            return None
        return self._whole(self._answer, **self._attempts.figures(""))


def run_of(request: GenerationRequest, weights: Sequence[float], rules: Rules, names: Sequence[str]) -> Run:
    """The run that a request asks for. weights: (K,) λ, before the temperature of the exact modes (λ/τ)."""
    if request.mode.kind == "token":
        return TokenRun(request, weights, rules, names)
    tempered = [weight / request.sampling.temperature for weight in weights]
    kinds = {"smc": ParticleRun, "rejection": RejectionRun}
    return kinds[request.mode.kind](request, tempered, rules, names)
