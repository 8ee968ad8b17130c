"""The rows of a score table by prompt and sample: who they are, who drew them, and where each belongs.

Knows keys only, so that the values of a table larger than memory can be put in their place as they stream by.
"""

from __future__ import annotations

import difflib
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mpo_ray.data.score_files import (
    PROMPT,
    PROPOSAL,
    SAMPLE,
    ScoreFile,
    ScoreTableError,
    check_columns,
    refuse_value,
)

REFERENCE = "reference"
#: Texts that wait to be numbered together with those already known.
PENDING_TEXTS = 1 << 22


@dataclass(frozen=True, slots=True)
class Places:
    """Says of a row's number in the stream of all files which row of which file it is."""

    names: Sequence[str]
    ends: Sequence[int]

    def of(self, row: int) -> str:
        file = bisect_right(self.ends, row)
        return f"{self.names[file]} row {row - (self.ends[file - 1] if file else 0) + 1}"


@dataclass(frozen=True, slots=True, eq=False)
class RowKeys:
    """The N rows of P prompts, in the order in which they are read.

    prompt_ids: (P,) texts, in the order of their first appearance
    prompts: (N,) the number of each row's prompt
    samples: (N,) sample_id
    proposals: names of who drew rows, `reference` first, whether it drew some or not
    drawn_by: (N,) the number of the proposal that drew each row
    order: (N,) rows sorted by prompt, then by sample; None where they are read in that order
    places: where each row stands in its file, for messages
    """

    prompt_ids: pa.Array
    prompts: NDArray[np.int32]
    samples: NDArray[np.int64]
    proposals: tuple[str, ...]
    drawn_by: NDArray[np.int16]
    order: NDArray[np.int64] | None
    places: Places

    @property
    def num_rows(self) -> int:
        return len(self.prompts)

    def starts(self) -> NDArray[np.int64]:
        """(P + 1,) in the sorted rows: those of prompt p are starts[p] … starts[p + 1] − 1."""
        counts = np.bincount(self.prompts, minlength=len(self.prompt_ids))
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    def counts(self) -> NDArray[np.int64]:
        """(P, J) n_j: how many rows of each prompt each proposal drew (design 2.2, eq. 6a)."""
        num_prompts, num_proposals = len(self.prompt_ids), len(self.proposals)
        cells = self.prompts.astype(np.int64) * num_proposals + self.drawn_by
        return np.bincount(cells, minlength=num_prompts * num_proposals).reshape(num_prompts, num_proposals)

    def destinations(self) -> NDArray[np.int64] | None:
        """(N,) where each row belongs among the sorted rows; None where it stands there already."""
        if self.order is None:
            return None
        destinations = np.empty_like(self.order)
        destinations[self.order] = np.arange(self.num_rows)
        return destinations


def read_keys(files: Sequence[ScoreFile]) -> RowKeys:
    """Read and check prompt_id, sample_id and proposal of all rows.

    A file without the column `proposal` holds samples of the reference. Raises ScoreTableError for a column or key
    that is missing or of a wrong type, a (prompt, sample) that is there twice, a proposal whose policy has no column
    log_ratio_<proposal>, and if there are no rows.
    """
    # The policies in the order of the columns, so that a sum over them has the same last digit however rows lie.
    prompts, proposals = _Numbering(), _Numbering(known=[REFERENCE, *ratio_names(files[0].columns)])
    samples: list[NDArray[np.int64]] = []
    num_rows, ends = 0, []
    for file in files:
        check_columns(file, [PROMPT, SAMPLE])
        columns = [PROMPT, SAMPLE] + [PROPOSAL] * (PROPOSAL in file.columns)
        start = num_rows
        for batch in file.batches(columns):
            where = Places([file.name], [num_rows - start + batch.num_rows])
            prompts.add(_texts(batch[PROMPT], PROMPT, where, num_rows - start))
            samples.append(_whole_numbers(batch, where, num_rows - start))
            drawn_by = batch[PROPOSAL] if PROPOSAL in columns else pa.repeat(REFERENCE, batch.num_rows)
            proposals.add(_texts(drawn_by, PROPOSAL, where, num_rows - start))
            num_rows += batch.num_rows
        ends.append(num_rows)
    places = Places([file.name for file in files], ends)
    if not num_rows:
        raise ScoreTableError(f"{', '.join(places.names)}: the score table has no rows; there is nothing to fit.")
    if num_rows > np.iinfo(np.int32).max:
        raise ScoreTableError(f"the score table has {num_rows} rows; at most {np.iinfo(np.int32).max} can be read.")
    prompt_ids, numbers = prompts.finish()
    names, drawn_by = proposals.finish()
    for column, texts, rows in ((PROMPT, prompt_ids, numbers), (PROPOSAL, names, drawn_by)):
        if (empty := pc.index(texts, "").as_py()) >= 0:
            raise ScoreTableError(f"{places.of(int(np.argmax(rows == empty)))}: {column} is empty. {_EVERY_ROW}")
    used = np.union1d([0], np.flatnonzero(np.bincount(drawn_by)))
    proposal_names, drawn_by = tuple(names.take(used).to_pylist()), np.searchsorted(used, drawn_by).astype(np.int16)
    _check_proposals(proposal_names, drawn_by, files, places)
    row_samples = np.concatenate(samples)
    order = _sorted(numbers, row_samples)
    _check_unique(prompt_ids, numbers, row_samples, order, places)
    return RowKeys(prompt_ids, numbers, row_samples, proposal_names, drawn_by, order, places)


_EVERY_ROW = "Every row names its prompt, its sample and, where the column is there, who drew it."


class _Numbering:
    """Numbers texts in the order of their first appearance, without a Python string for each row."""

    def __init__(self, known: Sequence[str] = ()) -> None:
        self._known = pa.array(known, pa.large_string())
        self._pending: list[pa.Array] = []
        self._num_pending = 0
        self._numbers: list[NDArray[np.int32]] = []
        self._num_settled = 0

    def add(self, texts: pa.DictionaryArray) -> None:
        self._numbers.append(texts.indices.to_numpy().astype(np.int32) + np.int32(self._num_pending))
        self._pending.append(texts.dictionary.cast(pa.large_string()))
        self._num_pending += len(texts.dictionary)
        if self._num_pending > max(PENDING_TEXTS, len(self._known)):
            self._settle()

    def finish(self) -> tuple[pa.Array, NDArray[np.int32]]:
        """The texts, and the number of each row's."""
        self._settle()
        return self._known, np.concatenate(self._numbers)

    def _settle(self) -> None:
        encoded = pa.concat_arrays([self._known, *self._pending]).dictionary_encode()
        numbers = encoded.indices.to_numpy()[len(self._known) :]
        for batch in range(self._num_settled, len(self._numbers)):
            self._numbers[batch] = numbers[self._numbers[batch]]
        self._known, self._pending, self._num_pending = encoded.dictionary, [], 0
        self._num_settled = len(self._numbers)


def _texts(column: pa.Array, name: str, places: Places, start: int) -> pa.DictionaryArray:
    """The column's distinct texts and their indices; whole numbers are ids too, as the text of their digits.

    They may be stored as floats.
    """
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if column.null_count:
        row = start + int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
        raise ScoreTableError(f"{places.of(row)}: {name} is empty. {_EVERY_ROW}")
    plain = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    if name == PROMPT and pa.types.is_floating(kind) and bool(pc.all(pc.equal(plain, pc.floor(plain))).as_py()):
        plain = plain.cast(pa.int64())
        kind = plain.type
    if not (is_text or (name == PROMPT and pa.types.is_integer(kind))):
        wanted = "texts or whole numbers" if name == PROMPT else "texts"
        raise ScoreTableError(
            f"{places.names[0]}: the column {name!r} has the type {column.type}; it must hold {wanted}."
        )
    return plain.dictionary_encode()


def _whole_numbers(batch: pa.RecordBatch, places: Places, start: int) -> NDArray[np.int64]:
    column = batch[SAMPLE]
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        raise ScoreTableError(
            f"{places.names[0]}: the column {SAMPLE!r} has the type {column.type}; it must hold whole numbers."
        )
    values = column.to_numpy(zero_copy_only=False)
    if column.null_count or not pa.types.is_integer(column.type):
        bad = np.isnan(values) | np.not_equal(values, np.rint(values))
        if bad.any():
            row = int(np.argmax(bad))
            seen = None if column[row].as_py() is None else float(values[row])
            raise refuse_value(places.of(start + row), SAMPLE, seen, prompt=batch[PROMPT][row].as_py(), sample="?")
    return np.asarray(values, np.int64)


def _check_proposals(
    names: Sequence[str], drawn_by: NDArray[np.int16], files: Sequence[ScoreFile], places: Places
) -> None:
    for number, name in enumerate(names):
        for file in files:
            if number and f"log_ratio_{name}" not in file.columns:
                known = [REFERENCE, *ratio_names(file.columns)]
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ScoreTableError(
                    f"{places.of(int(np.argmax(drawn_by == number)))}: the proposal {name!r} has no column "
                    f"'log_ratio_{name}' in {file.name}; {hint}What a policy drew is weighed by that policy's "
                    f"log-ratio. Proposals can be {', '.join(known)}: add the column, or leave these rows out."
                )


def ratio_names(columns: Iterable[str]) -> list[str]:
    """The names of the policies that a table has log-ratios of, in the order of its columns."""
    return [column.removeprefix("log_ratio_") for column in columns if column.startswith("log_ratio_")]


def _sorted(prompts: NDArray[np.int32], samples: NDArray[np.int64]) -> NDArray[np.int64] | None:
    step, same = np.diff(prompts), np.diff(samples)
    if ((step > 0) | ((step == 0) & (same >= 0))).all():
        return None
    return np.asarray(np.lexsort((samples, prompts)))


def _check_unique(
    prompt_ids: pa.Array,
    prompts: NDArray[np.int32],
    samples: NDArray[np.int64],
    order: NDArray[np.int64] | None,
    places: Places,
) -> None:
    p, s = (prompts, samples) if order is None else (prompts[order], samples[order])
    twice = (p[1:] == p[:-1]) & (s[1:] == s[:-1])
    if twice.any():
        at = int(np.argmax(twice))
        first, second = (at, at + 1) if order is None else sorted(int(row) for row in order[at : at + 2])
        raise ScoreTableError(
            f"prompt {prompt_ids[int(p[at])].as_py()!r}, sample {s[at]} is there twice: {places.of(first)} and "
            f"{places.of(second)}. Leave one out, or give each response of a prompt its own sample_id, whoever drew it."
        )
