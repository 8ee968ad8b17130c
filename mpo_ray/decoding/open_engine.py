"""From a mixture artefact to the engine that decodes it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from mpo_ray.data.rendering import artefact_ends
from mpo_ray.decoding.engine import PROMPT_TOKENS, MixtureEngine
from mpo_ray.decoding.runner import MixtureRunner, Runner
from mpo_ray.decoding.sequence_runner import SequenceRunner
from mpo_ray.policies.loading import load_tokenizer
from mpo_ray.policies.mixture import MixtureForCausalLM
from mpo_ray.policies.slot_support import NotInSlotsError

logger = logging.getLogger(__name__)


def open_engine(
    artefact: str,
    *,
    num_lanes: int,
    context: int | None = None,
    weights: Mapping[str, float] | None = None,
    max_waiting: int = 1024,
    prompt_tokens: int = PROMPT_TOKENS,
) -> MixtureEngine:
    """Open the artefact, on the GPU where there is one, and reserve the memory of `num_lanes` sequences.

    context: tokens of a sequence, at most and by default the model's own; weights: in the place of the artefact's
    Raises ModelError, ValueError.
    """
    mixture = MixtureForCausalLM.from_pretrained(artefact, weights=weights, device_map="auto")
    return engine_of(
        mixture,
        load_tokenizer(artefact),
        num_lanes=num_lanes,
        context=context,
        max_waiting=max_waiting,
        prompt_tokens=prompt_tokens,
    )


def engine_of(
    mixture: MixtureForCausalLM,
    tokenizer: Any,
    *,
    num_lanes: int,
    context: int | None = None,
    max_waiting: int = 1024,
    prompt_tokens: int = PROMPT_TOKENS,
) -> MixtureEngine:
    """The engine of a mixture that is open already, which it leaves as it was. As `open_engine`."""
    ends = artefact_ends(mixture.generation_config, tokenizer)
    return MixtureEngine(
        runner_of(mixture, num_lanes=num_lanes, context=context),
        {name: mixture.config.weights[name] for name in mixture.objectives},
        eos_ids=ends,
        tokenizer=tokenizer,
        max_waiting=max_waiting,
        prompt_tokens=prompt_tokens,
    )


def runner_of(mixture: MixtureForCausalLM, *, num_lanes: int, context: int | None = None) -> Runner:
    """The fastest runner that gives the models' own distributions; a warning says where it is the slow one."""
    try:
        return MixtureRunner(mixture, num_lanes=num_lanes, context=context)
    except NotInSlotsError as error:
        logger.warning(
            "This mixture is decoded in transformers' own cache, one sequence after the other, which is slower: its "
            "cache cannot lie in the engine's rows. %s.",
            error,
        )
    return SequenceRunner(mixture, num_lanes=num_lanes, context=context)
