"""One model of a mixture in slots: a stack of adapters on one base, or a policy of its own.

From pieces of sequences to hidden states, and from these to the mixture's logits. A model that would be decoded wrongly
is refused when it is put in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpo_ray.policies.adapters import AdapterStack
from mpo_ray.policies.loading import ModelError
from mpo_ray.policies.packed_linear import can_pack, pack_linears
from mpo_ray.policies.short_norm import shorten_norms
from mpo_ray.policies.slots import Layout, Segment, Slots, reading, singles_of
from mpo_ray.records import REFERENCE

#: How far a model may be, in logits, from itself in slots, before its architecture is refused: float32, and bfloat16.
MOST_DIFFERENCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}
PROBE = (3, 5, 4, 1, 6, 2, 7, 3)


@dataclass(frozen=True, slots=True)
class Piece:
    """New tokens of a lane, from position `start` on. The distributions after the last `wanted` of them are wanted.

    weights: (K,) λ, 0 for policies that the lane leaves out
    separate: also log Z_t and each policy's distribution; else one row goes through the output head, which is as exact
    """

    lane: int
    tokens: Sequence[int]
    start: int
    weights: Sequence[float]
    wanted: int
    separate: bool


@dataclass(frozen=True, slots=True)
class Predictions:
    """The distributions wanted of a step's pieces, in order, W in all.

    logits: (W, V) Σ_k λ_k log π_k(v), nats, up to a constant of each row where the piece is not `separate`
    log_z: (W,) log Z_t, NaN where the piece is not `separate`; policies: log π_k (V,) by k, or nothing
    """

    logits: Tensor
    log_z: Tensor
    policies: Sequence[Mapping[int, Tensor]]


class Branch:
    """One model of the mixture: a stack of adapters on one base, or a policy of its own.

    policies: the numbers of those it holds; the base without an adapter, which a stack can run as well, comes first
    """

    def __init__(
        self, module: nn.Module, objectives: Sequence[str], policies: tuple[int, ...], num_lanes: int, context: int
    ) -> None:
        self._stack = module if isinstance(module, AdapterStack) else None
        self.policies = policies if self._stack is None else (len(objectives), *policies)
        self.slots = Slots(num_lanes * len(policies), context)
        model: Any = module.base if isinstance(module, AdapterStack) else module
        self._model = model
        self._names = {k: [*objectives, REFERENCE][k] for k in self.policies}
        self._device: torch.device = model.device
        config = model.config.get_text_config()
        self.vocab_size: int = config.vocab_size
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)
        _check_architecture(type(self._model).__name__, config)
        expected = self._plain_logits()
        if can_pack(self._model):
            pack_linears(self._model)
            shorten_norms(self._model)
        self._check(expected)

    def run(
        self,
        pieces: Sequence[Piece],
        lanes: Mapping[int, Mapping[int, int]],
        total: int,
        separate: Sequence[bool],
        policies: list[dict[int, Tensor]],
    ) -> Tensor | None:
        """Σ λ_k log π_k over this model's policies, (W, V), or None where no piece asks them; fills `policies`."""
        work = [(k, i) for k in self.policies for i, piece in enumerate(pieces) if k in lanes[piece.lane]]
        if not work:
            return None
        hidden = self._hidden(pieces, lanes, work)
        firsts, place = [], 0
        for piece in pieces:
            firsts.append(place)
            place += piece.wanted
        targets = [firsts[i] + j for k, i in work for j in range(pieces[i].wanted)]
        if not targets:
            return None
        factors = [pieces[i].weights[k] for k, i in work for _ in range(pieces[i].wanted)]
        owners = [k for k, i in work for _ in range(pieces[i].wanted)]
        apart = [n for n, target in enumerate(targets) if separate[target] or self._softcap is not None]
        together = [n for n, target in enumerate(targets) if not (separate[target] or self._softcap is not None)]
        parts = []
        if together:
            mixed = hidden.new_zeros(total, hidden.shape[1])
            rows, into, by = self._tensors(together, [targets[n] for n in together], [factors[n] for n in together])
            mixed.index_add_(0, into, hidden[rows] * by.to(hidden.dtype))
            parts.append(self._head(mixed))
        if apart:
            rows, into, by = self._tensors(apart, [targets[n] for n in apart], [factors[n] for n in apart])
            logprobs = self._head(hidden[rows]).log_softmax(-1)
            parts.append(logprobs.new_zeros(total, logprobs.shape[1]).index_add_(0, into, logprobs * by))
            for n, row in zip(apart, logprobs, strict=True):
                policies[targets[n]][owners[n]] = row
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def _tensors(self, rows: list[int], into: list[int], by: list[float]) -> tuple[Tensor, Tensor, Tensor]:
        return self._index(rows), self._index(into), torch.tensor(by, device=self._device)[:, None]

    def _head(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._model.get_output_embeddings()(hidden).float()
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap

    def _hidden(
        self, pieces: Sequence[Piece], lanes: Mapping[int, Mapping[int, int]], work: Sequence[tuple[int, int]]
    ) -> Tensor:
        """The last hidden states of the wanted places, (rows, d), in the order of `work`."""
        tokens: list[int] = []
        places: list[int] = []
        positions: list[int] = []
        singles: list[int] = []
        lengths: list[int] = []
        single_rows: list[int] = []
        ends: list[int] = []
        several: dict[int, list[tuple[int, int]]] = {}
        for k, i in work:
            piece, row, first = pieces[i], lanes[pieces[i].lane][k], len(tokens)
            num = len(piece.tokens)
            tokens += piece.tokens
            positions += range(piece.start, piece.start + num)
            begin = row * self.slots.row_tokens + piece.start
            places += range(begin, begin + num)
            if num == 1:
                singles.append(first)
                single_rows.append(row)
                lengths.append(piece.start + 1)
            else:
                several.setdefault(i, []).append((first, row))
            ends += range(first + num - piece.wanted, first + num)
        segments = [
            Segment(
                tokens=self._index([list(range(first, first + len(pieces[i].tokens))) for first, _ in found]),
                rows=self._index([row for _, row in found]),
                start=pieces[i].start,
            )
            for i, found in several.items()
        ]
        layout = Layout(
            self.slots,
            self._index(places),
            singles_of(single_rows, lengths, self._device) if singles else None,
            self._index(singles) if segments else None,
            segments,
        )
        inputs = {
            "input_ids": self._index(tokens)[None],
            "position_ids": self._index(positions)[None],
            # transformers hands a mask of four dimensions through as it is; here it keeps it from building one
            "attention_mask": torch.empty(1, 1, 1, 1, device=self._device),
            "use_cache": False,
        }
        with self._groups(work, pieces), reading(self._model, layout):
            states: Tensor = self._model.get_decoder()(**inputs).last_hidden_state[0]
        return states if len(ends) == len(states) else states[self._index(ends)]

    @contextmanager
    def _groups(self, work: Sequence[tuple[int, int]], pieces: Sequence[Piece]) -> Iterator[None]:
        if self._stack is None:
            yield
            return
        sizes: dict[int, int] = {}
        for k, i in work:
            sizes[k] = sizes.get(k, 0) + len(pieces[i].tokens)
        with self._stack.running([self._names[k] for k in sizes], list(sizes.values())):
            yield

    def _index(self, values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._device)

    @torch.inference_mode()
    def _plain_logits(self) -> Tensor:
        """What the model itself says after each token of a probe, (T, V), for its last policy."""
        with self._groups([(self.policies[-1], 0)], [_probe(0, len(PROBE))]):
            logits: Tensor = self._model(input_ids=torch.tensor([self._probe_tokens()], device=self._device)).logits
        return logits[0].float()

    @torch.inference_mode()
    def _check(self, expected: Tensor) -> None:
        """Compare the probe in slots, in two pieces, with what the model gave by itself. Raises ModelError."""
        lanes = {0: {self.policies[-1]: 0}}
        work = [(self.policies[-1], 0)]
        tokens = self._probe_tokens()
        parts = [_probe(start, end, tokens) for start, end in ((0, 5), (5, 6), (6, 8))]
        found = torch.cat([self._head(self._hidden([part], lanes, work)) for part in parts])
        difference = float((found - expected).abs().max())
        if not difference <= MOST_DIFFERENCE.get(self._model.dtype, 0.5):
            raise ModelError(
                f"{type(self._model).__name__}: decoded with its cache in slots, its logits differ by {difference:.2g} "
                f"from its own. {_UNSUPPORTED}"
            )

    def _probe_tokens(self) -> list[int]:
        return [token % self.vocab_size for token in PROBE]


_UNSUPPORTED = (
    "The engine does not support this architecture; it does Llama, Mistral, Qwen2, Qwen3 and Gemma. Decode this one "
    "with the mixture's own generate()."
)


def _check_architecture(name: str, config: Any) -> None:
    """Refuse what a short probe cannot show: other attention than full or sliding, positions that depend on others.

    Raises ModelError.
    """
    other = sorted(set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"})
    if other:
        raise ModelError(f"{name}: it has layers of the type {other[0]!r}. {_UNSUPPORTED}")
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {str(part.get("rope_type")) for part in (rope, *rope.values()) if isinstance(part, dict)}
    changing = sorted(kinds & {"dynamic", "longrope"})
    if changing:
        raise ModelError(
            f"{name}: its rotary positions are {changing[0]!r}: they change with the longest sequence of a batch. "
            f"{_UNSUPPORTED}"
        )


def _probe(start: int, end: int, tokens: Sequence[int] = PROBE) -> Piece:
    return Piece(0, tokens[start:end], start, (1.0,), end - start, separate=True)
