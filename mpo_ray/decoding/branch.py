"""One model of a mixture with its cache in blocks: a stack of adapters on one base, or a policy of its own.

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
from mpo_ray.policies.block_attention import BlockLayout, KVCache, Segment
from mpo_ray.policies.block_reads import singles_of, stretch_of
from mpo_ray.policies.kv_blocks import BlockPool, Row
from mpo_ray.policies.probe import MOST_DIFFERENCE, PROBE, WINDOW, difference, probe_ids
from mpo_ray.policies.ragged_attention import NotInBlocksError, blocks_refusal, laid_out, ragged_inputs
from mpo_ray.policies.short_windows import short_windows
from mpo_ray.records import REFERENCE

#: A factor of the logits that is nearer to 1 is rounding.
LEAST_SCALING = 1e-3


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
    pool, cache: the blocks of its sequences, those of the probe before `reserve`
    bytes_per_token: of one sequence under one policy
    """

    def __init__(self, module: nn.Module, objectives: Sequence[str], policies: tuple[int, ...]) -> None:
        """Leaves the model as it was. Raises NotInBlocksError."""
        self._stack = module if isinstance(module, AdapterStack) else None
        self.policies = policies if self._stack is None else (len(objectives), *policies)
        self.pool, self.cache = BlockPool(2), KVCache(2)  # for the probe
        model: Any = module.base if isinstance(module, AdapterStack) else module
        self._model = model
        self._names = {k: [*objectives, REFERENCE][k] for k in self.policies}
        self._device: torch.device = model.device
        config = model.config.get_text_config()
        self.vocab_size: int = config.vocab_size
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self._scale = 1.0
        self._check_blocks()
        self._bias = self._head_bias()
        self.bytes_per_token: int = self.cache.bytes_per_token

    def reserve(self, num_blocks: int) -> None:
        """Make room for as many blocks, all of them free. Raises what a lack of memory raises."""
        self.pool, self.cache = BlockPool(num_blocks), KVCache(num_blocks, like=self.cache)

    def run(
        self,
        pieces: Sequence[Piece],
        lanes: Mapping[int, Mapping[int, Row]],
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
            logits = self._head(mixed)
            if self._bias is not None:
                shares = by.new_zeros(total, 1).index_add_(0, into, by)
                logits += (shares - 1) * self._bias
            parts.append(logits)
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
        if self._scale != 1.0:
            logits = logits * self._scale
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap

    @torch.inference_mode()
    def _head_bias(self) -> Tensor | None:
        """What the head adds to every row, (V,), or None where that is nothing.

        A row of Σ λ_k h_k gets it once. Due is Σ λ_k times it, which is less than once where other models have a part.
        """
        embeddings = self._model.get_input_embeddings().weight
        bias = self._head(embeddings.new_zeros(1, self._model.get_output_embeddings().in_features))[0]
        return bias if bias.any() else None

    def _hidden(
        self, pieces: Sequence[Piece], lanes: Mapping[int, Mapping[int, Row]], work: Sequence[tuple[int, int]]
    ) -> Tensor:
        """The last hidden states of the wanted places, (rows, d), in the order of `work`. Rows have their blocks."""
        tokens: list[int] = []
        places: list[int] = []
        positions: list[int] = []
        singles: list[int] = []
        lengths: list[int] = []
        single_rows: list[Row] = []
        ends: list[int] = []
        several: dict[int, list[tuple[int, Row]]] = {}
        for k, i in work:
            piece, row, first = pieces[i], lanes[pieces[i].lane][k], len(tokens)
            num = len(piece.tokens)
            tokens += piece.tokens
            positions += range(piece.start, piece.start + num)
            places += row.places(piece.start, piece.start + num)
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
                rows=stretch_of(
                    [row for _, row in found],
                    pieces[i].start + len(pieces[i].tokens),
                    self.cache.num_tokens,
                    self._device,
                ),
                start=pieces[i].start,
            )
            for i, found in several.items()
        ]
        layout = BlockLayout(
            self.cache,
            self._index(places),
            singles_of(single_rows, lengths, self.cache.num_tokens, self._device) if singles else None,
            self._index(singles) if segments else None,
            segments,
        )
        inputs = ragged_inputs(self._index(tokens), self._index(positions))
        with self._groups(work, pieces), laid_out(self._model, layout):
            states: Tensor = self._model.get_decoder()(**inputs, use_cache=False).last_hidden_state[0]
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
    def _check_blocks(self) -> None:
        """Compare a probe in blocks with what the model gives by itself. Raises NotInBlocksError.

        Its windows are short meanwhile, so that the probe reaches beyond them.
        """
        name = type(self._model).__name__
        if (refusal := blocks_refusal(self._model.config)) is not None:
            raise NotInBlocksError(f"{name}: {refusal}")
        with short_windows(self._model, WINDOW):
            self._compare({k: self._plain_logits(k) for k in self.policies[-2:]})

    def _plain_logits(self, policy: int) -> Tensor:
        """What the model itself says of a policy after each token of a probe, (T, V)."""
        with self._groups([(policy, 0)], [self._probe(0, len(PROBE))]):
            logits: Tensor = self._model(input_ids=torch.tensor([probe_ids(self._model)], device=self._device)).logits
        return logits[0].float()

    def _measure_scale(self, expected: Tensor) -> None:
        """Some families multiply the head's logits by a number. expected: the probe's logits, (T, V)."""
        if self._softcap is not None:
            return
        with self._groups([(self.policies[-1], 0)], [self._probe(0, len(PROBE))]):
            inputs = torch.tensor([probe_ids(self._model)], device=self._device)
            hidden = self._model.get_decoder()(input_ids=inputs).last_hidden_state[0]
        self._scale = 1.0
        plain, wanted = self._head(hidden).double(), expected.double()
        scale = float((plain * wanted).sum() / plain.square().sum())
        self._scale = scale if abs(scale - 1) > LEAST_SCALING else 1.0

    def _compare(self, expected: Mapping[int, Tensor]) -> None:
        """Compare the probe of one policy in three pieces, and of two in one pass. Raises NotInBlocksError."""
        name = type(self._model).__name__
        last = self.policies[-1]
        passes = [[(last, self._probe(start, end))] for start, end in ((0, 5), (5, 6), (6, 8))]
        if len(expected) > 1:
            passes.append([(k, self._probe(0, len(PROBE) - n)) for n, k in enumerate(expected)])
        try:
            self._measure_scale(expected[last])
            found = [self._of_probe(work) for work in passes]
        except Exception as error:  # an architecture of which nothing is known can fail in any way
            raise NotInBlocksError(f"{name}: it cannot be run there ({type(error).__name__}: {error})") from error
        own = [expected[k][piece.start : piece.start + piece.wanted] for work in passes for k, piece in work]
        apart = difference(torch.cat([rows for results in found for rows in results]), torch.cat(own))
        if not apart <= MOST_DIFFERENCE[self._model.dtype]:
            raise NotInBlocksError(f"{name}: its logits there differ by {apart:.2g} of their size from its own")

    def _of_probe(self, work: Sequence[tuple[int, Piece]]) -> Sequence[Tensor]:
        """The logits of pieces of the probe, each of one policy, in one pass."""
        pieces = [piece for _, piece in work]
        lane = {k: Row([n], [[n, 1]]) for n, (k, _) in enumerate(work)}
        hidden = self._hidden(pieces, {0: lane}, [(k, n) for n, (k, _) in enumerate(work)])
        return self._head(hidden).split_with_sizes([piece.wanted for piece in pieces])

    def _probe(self, start: int, end: int) -> Piece:
        return Piece(0, probe_ids(self._model)[start:end], start, (1.0,), end - start, separate=True)
