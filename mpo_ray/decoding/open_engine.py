"""From a mixture artefact to the engine that decodes it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mpo_ray.data.rendering import artefact_ends
from mpo_ray.decoding.engine import PROMPT_TOKENS, MixtureEngine
from mpo_ray.decoding.need import check_pool
from mpo_ray.decoding.runner import MixtureRunner
from mpo_ray.decoding.sequence_runner import SequenceRunner
from mpo_ray.policies.cpu import optimize_for_cpu
from mpo_ray.policies.loading import load_tokenizer
from mpo_ray.policies.mixture import MixtureForCausalLM, mixture_config
from mpo_ray.policies.precision import AUTO, PRECISIONS, resolve
from mpo_ray.policies.ragged_attention import NotInBlocksError

logger = logging.getLogger(__name__)


def open_engine(
    artefact: str,
    *,
    max_num_seqs: int,
    context: int | None = None,
    kv_cache_gib: float | None = None,
    least_tokens: int | None = None,
    precision: str = AUTO,
    weights: Mapping[str, float] | None = None,
    max_waiting: int = 1024,
    prompt_tokens: int = PROMPT_TOKENS,
) -> MixtureEngine:
    """Open the artefact, on the GPU where there is one, with a KV cache for at most `max_num_seqs` sequences.

    context: tokens of a sequence, at most and by default the model's own; weights: in the place of the artefact's
    kv_cache_gib: of the KV cache; a share of what is free if absent
    least_tokens: of one request, for which the KV cache has to be large enough
    precision: of weights and KV cache: fp32, bf16, fp16; auto: see `precision.resolve`
    Raises ModelError, ValueError.
    """
    return engine_of(
        open_mixture(artefact, precision=precision, weights=weights),
        load_tokenizer(artefact),
        max_num_seqs=max_num_seqs,
        context=context,
        kv_cache_gib=kv_cache_gib,
        least_tokens=least_tokens,
        max_waiting=max_waiting,
        prompt_tokens=prompt_tokens,
    )


def open_mixture(
    artefact: str, *, precision: str = AUTO, weights: Mapping[str, float] | None = None
) -> MixtureForCausalLM:
    """Open an artefact to draw from it, as `open_engine`: it can be neither trained nor saved."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = PRECISIONS[resolve(precision, mixture_config(Path(artefact)), device)]
    mixture = MixtureForCausalLM.from_pretrained(artefact, weights=weights, device_map=device, dtype=dtype)
    for branch in mixture.branches:
        optimize_for_cpu(branch)
    return mixture


def engine_of(
    mixture: MixtureForCausalLM,
    tokenizer: Any,
    *,
    max_num_seqs: int,
    context: int | None = None,
    kv_cache_gib: float | None = None,
    least_tokens: int | None = None,
    max_waiting: int = 1024,
    prompt_tokens: int = PROMPT_TOKENS,
) -> MixtureEngine:
    """The engine of a mixture that is open already, which it leaves as it was. As `open_engine`."""
    ends = artefact_ends(mixture.generation_config, tokenizer)
    runner = runner_of(mixture, max_num_seqs=max_num_seqs, context=context, kv_cache_gib=kv_cache_gib)
    if least_tokens is not None:
        check_pool(runner.num_tokens, runner.bytes_per_token, min(least_tokens, runner.context))
    logger.info("%s", runner)
    return MixtureEngine(
        runner,
        {name: mixture.config.weights[name] for name in mixture.objectives},
        eos_ids=ends,
        tokenizer=tokenizer,
        max_waiting=max_waiting,
        prompt_tokens=prompt_tokens,
    )


def runner_of(
    mixture: MixtureForCausalLM, *, max_num_seqs: int, context: int | None = None, kv_cache_gib: float | None = None
) -> MixtureRunner | SequenceRunner:
    """The fastest runner that gives the models' own distributions; a warning says where it is the slow one."""
    room: dict[str, Any] = {"max_num_seqs": max_num_seqs, "context": context, "kv_cache_gib": kv_cache_gib}
    try:
        return MixtureRunner(mixture, **room)
    except NotInBlocksError as error:
        logger.warning(
            "This mixture is decoded in transformers' own cache, one sequence after the other, which is slower: its "
            "cache cannot lie in KV-cache blocks. %s.",
            error,
        )
    return SequenceRunner(mixture, **room)
