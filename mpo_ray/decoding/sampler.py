"""Completions of models that are open, drawn by the engine: what a run's stages sample with.

The KV cache is there while completions are drawn, and as large as the prompts at hand need; scoring has the memory
meanwhile. What is drawn depends on a prompt, its row, number and seed, whoever is decoded beside it. Rounding alone may
differ where other rows share a product, which can turn a token whose probability lies at the drawn number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mpo_ray.decoding.engine import MixtureEngine
from mpo_ray.decoding.need import check_pool
from mpo_ray.decoding.offline import Completion, Recipe, complete, row_seed
from mpo_ray.decoding.open_engine import runner_of
from mpo_ray.decoding.protocol import Mode, Sampling
from mpo_ray.policies.ensemble import Ensemble
from mpo_ray.policies.mixture import MixtureForCausalLM, mixture_of, mixture_of_one
from mpo_ray.records import REFERENCE

#: Tokens of prompts that a step computes, at most: nobody waits for the next token of a completion.
PROMPT_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Room:
    """What a sampler may take. max_num_seqs: sequences that are decoded at a time; a completion's particles are several

    kv_cache_gib: of the KV cache, at most; a share of what is free if absent
    """

    max_num_seqs: int
    kv_cache_gib: float | None = None


class MixtureSampler:
    """Draws from one mixture, with any λ."""

    def __init__(self, mixture: MixtureForCausalLM, room: Room) -> None:
        self._runner = runner_of(mixture, max_num_seqs=1, context=1)
        self._objectives, self._room = mixture.objectives, room

    def draw(
        self, prompts: Sequence[Sequence[int]], recipe: Recipe, *, num: int, end_ids: Sequence[int], seed: int
    ) -> list[list[Completion]]:
        """`num` completions of each prompt, token ids alone. end_ids: each ends a completion

        A completion's random numbers are those of `row_seed(seed, row of the prompt, number)`.
        Raises ModelError where the KV cache does not hold the longest one, RequestError for one beyond the model's
        context, StageError.
        """
        longest = max(map(len, prompts)) + max(1, recipe.sampling.max_tokens)
        most = max(self._room.max_num_seqs, recipe.mode.particles)
        wanted = min(most, len(prompts) * num * recipe.mode.particles)
        names = dict.fromkeys((*self._objectives, REFERENCE))  # one of them is the reference where it is drawn alone
        taking_part = [k for k, name in enumerate(names) if recipe.weights.get(name, 0.0)]
        room: dict[str, Any] = {"kv_cache_gib": self._room.kv_cache_gib, "policies": taking_part}
        self._runner.reserve(max_num_seqs=wanted, context=longest, **room)
        try:
            # a request beyond the context is refused for that, by the engine
            fits = min(longest, self._runner.context)
            check_pool(self._runner.num_tokens, self._runner.bytes_per_token, fits)
            engine = MixtureEngine(
                self._runner,
                dict.fromkeys(self._objectives, 1 / len(self._objectives)),
                eos_ids=end_ids,
                tokenizer=None,
                max_waiting=len(prompts) * num,
                prompt_tokens=PROMPT_TOKENS,
            )
            # all prompts before the second completion of each, which then finds its prompt computed
            found = complete(
                engine,
                [
                    recipe.request(f"{row}/{sample}", prompt, seed=row_seed(seed, row, sample))
                    for sample in range(num)
                    for row, prompt in enumerate(prompts)
                ],
            )
        finally:
            self._runner.reserve(max_num_seqs=1, context=1)
        return [found[row :: len(prompts)] for row in range(len(prompts))]


class EnsembleSampler:
    """Draws from what an ensemble holds: the mixture with any λ, a policy (λ 1), the reference (`{"reference": 1}`)."""

    def __init__(self, ensemble: Ensemble, room: Room) -> None:
        """Changes the models for being drawn from, here and not at the first draw: scores are the same at any time."""
        self._ensemble, self._room = ensemble.for_decoding(), room

    def draw(
        self, prompts: Sequence[Sequence[int]], recipe: Recipe, *, num: int, end_ids: Sequence[int], seed: int
    ) -> list[list[Completion]]:
        """As `MixtureSampler.draw`."""
        alone = REFERENCE in recipe.weights and self._ensemble.adapters is None
        sampler = self._reference if alone else self._mixture
        return sampler.draw(prompts, recipe, num=num, end_ids=end_ids, seed=seed)

    @cached_property
    def _mixture(self) -> MixtureSampler:
        return MixtureSampler(mixture_of(self._ensemble), self._room)

    @cached_property
    def _reference(self) -> MixtureSampler:
        stack = self._ensemble.stack
        assert stack is not None
        return MixtureSampler(mixture_of_one(REFERENCE, stack.base), self._room)


def sampling_recipe(
    weights: Mapping[str, float], *, max_new_tokens: int, temperature: float, particles: int = 1, log_z: bool = False
) -> Recipe:
    """How a run draws: no top-k, no top-p, no penalties (design 2.3).

    particles: 1 decodes token by token, more draw from the sequence-level mixture, at the temperature 1
    log_z: whether Σ_t log Z_t is measured token by token; with particles log Ẑ always is
    Raises ValueError for particles that cannot be.
    """
    if particles < 1:
        raise ValueError(f"particles: {particles} is below 1; 1 decodes token by token, more draw whole answers.")
    if particles > 1 and temperature != 1.0:
        raise ValueError(
            f"temperature: {temperature:g}, and {particles} particles draw from π_λ, which has the temperature 1; "
            "leave one of both out."
        )
    sampling = Sampling(max_new_tokens, temperature=temperature)
    mode = Mode(log_z=log_z) if particles == 1 else Mode("smc", particles=particles)
    return Recipe(sampling, mode, weights)
