"""An enumerable world in the place of the model: the engine itself decodes it, with exact answers to compare with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from mpo_ray.decoding.branch import Piece, Predictions
from mpo_ray.decoding.engine import Event, MixtureEngine
from mpo_ray.decoding.need import Need
from mpo_ray.decoding.protocol import Delta, GenerationRequest, Mode, Sampling
from mpo_ray.maths.log_linear import log_normalizer, mix_logprobs
from tests.world import END, PROMPT_TOKEN, Response, Table


class WorldRunner:
    """K tables as policies. A lane holds the tokens that were computed in it, as rows of a cache would."""

    context = 64
    has_reference = False

    def __init__(self, policies: Sequence[Table], num_rows: int = 4096) -> None:
        self._policies = policies
        self.shares_prompts = False
        self.num_policies, self.vocab_size = len(policies), len(policies[0][()])
        self.kv_blocks = num_rows
        self.lanes: dict[int, dict[int, int]] = {}
        self._sizes: dict[int, int] = {}
        self._next = 0

    def kv_blocks_used(self) -> int:
        return sum(self._sizes.values())

    def refusal(self, need: Need) -> str | None:
        return "there are not as many rows" if need.num_seqs * len(need.policies) > self.kv_blocks else None

    def fits(self, need: Need) -> bool:
        return need.num_seqs * len(need.policies) <= self.kv_blocks - self.kv_blocks_used()

    def open(self, need: Need) -> tuple[list[int], int]:
        lanes = list(range(self._next, self._next + need.num_seqs))
        self._next += need.num_seqs
        for lane in lanes:
            self.lanes[lane], self._sizes[lane] = {}, len(need.policies)
        return lanes, 0

    def close(self, lanes: Sequence[int], *, spoiled: bool = False) -> None:
        for lane in lanes:
            del self.lanes[lane], self._sizes[lane]

    def copy(self, pairs: Sequence[tuple[int, int]], length: int) -> None:
        found = [{place: self.lanes[source][place] for place in range(length)} for source, _ in pairs]
        for (_, target), tokens in zip(pairs, found, strict=True):
            self.lanes[target] = tokens

    def run(self, pieces: Sequence[Piece]) -> Predictions:
        rows, weights = [], []
        for piece in pieces:
            held = self.lanes[piece.lane]
            held.update({piece.start + place: token for place, token in enumerate(piece.tokens)})
            end = piece.start + len(piece.tokens)
            for place in range(end - piece.wanted, end):
                prefix = tuple(held[t] for t in range(1, place + 1))
                rows.append([policy[prefix] for policy in self._policies])
                weights.append(piece.weights)
        if not rows:
            return Predictions(torch.zeros(0, self.vocab_size), torch.zeros(0), [])
        logprobs = torch.tensor(np.array(rows)).transpose(0, 1)
        logits = mix_logprobs(logprobs, torch.tensor(weights, dtype=torch.float64).T)
        return Predictions(logits, log_normalizer(logits), [{} for _ in rows])


def engine_of(policies: Sequence[Table], num_rows: int = 4096, **settings: int) -> MixtureEngine:
    """An engine over these tables, whose objectives are named by their numbers."""
    names = {str(k): 1 / len(policies) for k in range(len(policies))}
    settings = {"max_waiting": 10**6, **settings}
    return MixtureEngine(WorldRunner(policies, num_rows), names, eos_ids=[END], tokenizer=None, **settings)


def drain(engine: MixtureEngine) -> dict[str, list[Delta]]:
    """Step until nothing is left; what was said of each request. An exception of one is raised."""
    told: dict[str, list[Delta]] = {}
    while engine.has_work:
        for request_id, item in _checked(engine.step()):
            told.setdefault(request_id, []).append(item)
    return told


def responses(
    engine: MixtureEngine, weights: Sequence[float], mode: Mode, *, num: int, max_tokens: int, first_seed: int = 0
) -> tuple[list[Response], list[Delta]]:
    """`num` completions of the world's prompt, with seeds one after the other, and their last deltas."""
    by_name = {str(k): weight for k, weight in enumerate(weights)}
    for seed in range(first_seed, first_seed + num):
        sampling = Sampling(max_tokens, seed=seed)
        engine.submit(GenerationRequest(f"{seed:06}", (PROMPT_TOKEN,), sampling, mode, by_name))
    told = drain(engine)
    drawn = [tuple(token for delta in told[name] for token in delta.tokens) for name in sorted(told)]
    return drawn, [told[name][-1] for name in sorted(told)]


def tables(case: Mapping[str, list[dict[str, list[float]]]]) -> list[Table]:
    """The policies of a case of `sequence.json`."""
    return [
        {
            tuple(int(part) for part in prefix.strip("[]").split(",") if part.strip()): np.array(row)
            for prefix, row in policy.items()
        }
        for policy in case["next_token_logprobs"]
    ]


def _checked(events: Sequence[Event]) -> list[tuple[str, Delta]]:
    for _, item in events:
        if isinstance(item, Exception):
            raise item
    return events  # type: ignore[return-value]
