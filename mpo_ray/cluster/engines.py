"""Which engine an actor of a run draws and scores with: the project's own, or vLLM (`scoring.engine`).

vLLM draws the reference, the policies and their mixtures token by token, and gives log π_k of samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from mpo_ray.config import Actors, Scoring
from mpo_ray.decoding.offline import Completion, Recipe
from mpo_ray.decoding.sampler import EnsembleSampler, Room
from mpo_ray.evaluation.candidates import Candidate
from mpo_ray.policies.ensemble import Ensemble, Sequences

#: Arguments of vLLM's that say where and how fast it works, and not what comes out.
_PLACEMENT_OF_VLLM = frozenset(
    {"block_size", "distributed_executor_backend", "enable_chunked_prefill", "enable_prefix_caching", "enforce_eager",
     "gpu_memory_utilization", "kv_cache_memory_bytes", "max_model_len", "max_num_batched_tokens", "max_num_seqs",
     "tensor_parallel_size"}
)  # fmt: skip


class PolicyLogprobs(Protocol):
    """What knows log π of completions: an `Ensemble`, or what does its work."""

    def logprobs(
        self, names: Sequence[str], sequences: Sequences, *, batch_size: int, pad_id: int
    ) -> dict[str, list[float]]: ...


class Draws(Protocol):
    """What draws completions: `EnsembleSampler`, `MixtureSampler`, `VllmSampler`."""

    def draw(
        self, prompts: Sequence[Sequence[int]], recipe: Recipe, *, num: int, end_ids: Sequence[int], seed: int
    ) -> list[list[Completion]]: ...


def actor_device(actors: Actors) -> str:
    """Where actors have their models."""
    return "cuda" if actors.gpus_per_actor else "cpu"


def room_of(actors: Scoring) -> Room:
    return Room(actors.batch_size, actors.kv_cache_gib)


def scorer_of(reference: str, policies: Mapping[str, str], scoring: Scoring) -> PolicyLogprobs:
    """What gives log π_k of samples. Opens the policies."""
    if scoring.engine == "mpo":
        return Ensemble(reference, policies, precision=scoring.precision)
    from mpo_ray.vllm_plugin.scoring import VllmEnsemble  # another package's, which may not be there

    how: dict[str, Any] = {"precision": scoring.precision, "room": room_of(scoring), "arguments": scoring.vllm}
    return VllmEnsemble(reference, policies, **how)


def sampler_of(ensemble: Ensemble, reference: str, policies: Mapping[str, str], scoring: Scoring) -> Draws:
    """What draws token by token from the reference, the policies and their mixtures.

    ensemble: what the actor scores with; vLLM opens the models itself, in the same precision
    """
    if scoring.engine == "mpo":
        return EnsembleSampler(ensemble, room_of(scoring))
    from mpo_ray.vllm_plugin.sampler import VllmSampler  # another package's, which may not be there

    how: dict[str, Any] = {"precision": ensemble.precision, "room": room_of(scoring), "arguments": scoring.vllm}
    return VllmSampler(reference, policies, **how)


def can_draw(scoring: Scoring, candidate: Candidate) -> bool:
    """Whether the run's engine draws this candidate's completions; the project's own draws the others."""
    return scoring.engine == "mpo" or (candidate.kind in ("reference", "mixture") and candidate.particles == 1)


def drawing_inputs(scoring: Scoring) -> list[Any]:
    """What the engine adds to the digest of what is drawn.

    Nothing where it is the project's own: a run that was made before there was another keeps what it drew.
    """
    if scoring.engine == "mpo":
        return []
    return [scoring.engine, {name: v for name, v in scoring.vllm.items() if name not in _PLACEMENT_OF_VLLM}]
