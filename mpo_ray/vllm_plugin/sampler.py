"""vLLM in actors that draw: completions of the reference, of a policy, and of the mixture with any λ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mpo_ray.decoding.drafts import Rules
from mpo_ray.decoding.offline import Completion, Recipe, check_recipe, row_seed
from mpo_ray.decoding.protocol import GenerationRequest
from mpo_ray.decoding.sampler import Room
from mpo_ray.policies.mixture_config import MixtureConfig
from mpo_ray.records import REFERENCE
from mpo_ray.run import StageError
from mpo_ray.vllm_plugin.offline import open_llm


class VllmSampler:
    """`EnsembleSampler.draw` by vLLM, token by token.

    vLLM computes every policy that it holds for every token. So it holds the reference alone, one policy alone, or all
    policies, whichever was drawn from last: another one closes it first.
    """

    def __init__(
        self,
        reference: str,
        policies: Mapping[str, str],
        *,
        room: Room,
        precision: str = "fp32",
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        """room, arguments: as of `open_llm`"""
        self._paths = {REFERENCE: reference, **policies}
        self._policies = tuple(policies)
        self._how: dict[str, Any] = {"precision": precision, "room": room, "further": arguments or {}}
        self._latest: _Opened | None = None

    def draw(
        self, prompts: Sequence[Sequence[int]], recipe: Recipe, *, num: int, end_ids: Sequence[int], seed: int
    ) -> list[list[Completion]]:
        """As `MixtureSampler.draw`, in token mode and without log Z_t.

        Random numbers are vLLM's: a seed gives the same completions again, but not those of the project's own engine.
        Raises ModelError for what vLLM cannot hold, RequestError, StageError.
        """
        if recipe.mode.kind != "token" or recipe.mode.log_z:
            raise ValueError(f"vLLM draws a run's completions token by token without log Z_t, not by {recipe.mode}")
        recipe = replace(recipe, weights={name: weight for name, weight in recipe.weights.items() if weight != 0})
        opened = self._holding(tuple(recipe.weights) if len(recipe.weights) == 1 else self._policies)
        for prompt in prompts:
            check_recipe(recipe, opened.config, prompt, opened.context)
        # all prompts before the second completion of each, which then finds its prompt computed
        requests = [
            recipe.request(f"{row}/{sample}", prompt, seed=row_seed(seed, row, sample))
            for sample in range(num)
            for row, prompt in enumerate(prompts)
        ]
        found = opened.complete(requests, tuple(end_ids))
        return [found[row :: len(prompts)] for row in range(len(prompts))]

    def close(self) -> None:
        """Give back what vLLM holds. The next draw opens it again."""
        if self._latest is not None:
            from vllm.distributed import cleanup_dist_env_and_memory

            self._latest.llm.llm_engine.engine_core.shutdown()
            self._latest = None
            cleanup_dist_env_and_memory()

    def _holding(self, names: tuple[str, ...]) -> _Opened:
        if self._latest is None or self._latest.names != names:
            self.close()
            policies = {name: self._paths[name] for name in names}
            self._latest = _Opened(names, *open_llm(self._paths[REFERENCE], policies, own={}, **self._how))
        return self._latest


@dataclass(frozen=True, slots=True)
class _Opened:
    """An `LLM` that holds the policies of these names."""

    names: tuple[str, ...]
    llm: Any
    config: MixtureConfig

    @property
    def context(self) -> int:
        return int(self.llm.model_config.max_model_len)

    def complete(self, requests: Sequence[GenerationRequest], end_ids: tuple[int, ...]) -> list[Completion]:
        """One completion for each, in their order. Raises StageError where the logits are not numbers."""
        answers = self.llm.generate(
            [{"prompt_token_ids": list(request.prompt_ids)} for request in requests],
            [self._parameters(request, end_ids) for request in requests],
            use_tqdm=False,
        )
        return [_completion(answer.outputs[0], end_ids) for answer in answers]

    def _parameters(self, request: GenerationRequest, end_ids: tuple[int, ...]) -> Any:
        from mpo_ray.vllm_plugin.completions import sampling_parameters

        weights = [float((request.weights or {}).get(name, 0.0)) for name in self.names]
        rules = Rules.of(request, end_ids, None)
        made = sampling_parameters(request, weights, rules, request.sampling.seed, measured=False)
        made.logprobs = 0  # of the drawn token, which tells whether the logits are numbers
        return made


def _completion(found: Any, end_ids: tuple[int, ...]) -> Completion:
    tokens = tuple(found.token_ids)
    if not all(math.isfinite(place[token].logprob) for token, place in zip(tokens, found.logprobs, strict=True)):
        raise StageError("the model's logits are not numbers for a prompt of this run.")
    return Completion(tokens, finish_reason="stop" if tokens[-1] in end_ids else "length")
