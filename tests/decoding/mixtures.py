"""Tiny mixtures, and the engine over them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import chisquare

from mpo_ray.decoding.engine import MixtureEngine
from mpo_ray.decoding.open_engine import open_engine
from mpo_ray.decoding.protocol import Delta, GenerationRequest, Mode, Sampling
from tests.world_runner import drain

KINDS = ("lora", "full", "mixed")
#: Token ids of prompts of different lengths.
PROMPTS = ((1, 8, 9, 10), (1, 9), (1, 12, 13, 7, 8, 9, 10, 11, 14, 15), (1,))
EOS = 2
Response = tuple[int, ...]


def engine_of(artefact: Path, **settings: Any) -> MixtureEngine:
    return open_engine(str(artefact), **{"max_num_seqs": 8, **settings})


def request(number: int | str, prompt: Sequence[int], *, mode: Mode | None = None, **fields: Any) -> GenerationRequest:
    """A request of 12 tokens, greedy unless told otherwise."""
    weights: Mapping[str, float] | None = fields.pop("weights", None)
    sampling = Sampling(**{"max_tokens": 12, "temperature": 0.0, **fields})
    return GenerationRequest(str(number), tuple(prompt), sampling, mode or Mode(), weights)


def completed(engine: MixtureEngine, requests: Sequence[GenerationRequest]) -> list[list[Delta]]:
    """What is said of each request when all are submitted at once."""
    for one in requests:
        engine.submit(one)
    told = drain(engine)
    return [told[one.id] for one in requests]


def tokens(deltas: Sequence[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.tokens]


def p_value(found: Sequence[Response], logprobs: Mapping[Response, float]) -> float:
    """χ² of the counts; responses that are expected less than 5 times are one cell."""
    counts = Counter(found)
    expected = np.exp(list(logprobs.values())) * len(found)
    observed = np.array([counts[y] for y in logprobs], dtype=float)
    assert observed.sum() == len(found)
    rare = expected < 5
    cells = [np.append(values[~rare], values[rare].sum()) for values in (observed, expected)]
    return float(chisquare(*cells).pvalue)
