"""The score table of design 5.2, from files of any size or from memory: what the fit needs, prompt by prompt.

A table is streamed twice: its keys first, which say where each row belongs, then its values, put there as they come.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mpo_ray.data.score_files import (
    ScoreFile,
    ScoreTableError,
    TableInMemory,
    check_columns,
    numbers,
    open_files,
    refuse_value,
)
from mpo_ray.data.score_rows import RowKeys, ratio_names, read_keys
from mpo_ray.maths.sample_table import BLOCK_ROWS, SampleTable, log_proposal

Values = NDArray[np.floating]
#: Values beyond this many bytes are kept in a file instead of memory.
MEMORY_LIMIT = 1 << 30


@dataclass(frozen=True, slots=True)
class Storage:
    """Where arrays lie: in memory as float64, or, for large tables, as float32 in a file that has no name.

    The file is in the temporary directory (TMPDIR), mapped into memory, and gone with the last array that uses it,
    also when the process is killed. float32 is exact to 7 digits: 1e-5 nats at a log-ratio of 100.
    """

    dtype: type[np.float64 | np.float32]
    in_file: bool

    @classmethod
    def of_size(cls, num_values: int, memory_limit: int) -> Storage:
        fits = num_values * np.dtype(np.float64).itemsize <= memory_limit
        return cls(np.float64, False) if fits else cls(np.float32, True)

    def empty(self, *shape: int) -> Values:
        """An array to be filled. Raises ScoreTableError if the temporary directory has no room for it."""
        if not self.in_file:
            return np.empty(shape, self.dtype)
        size = int(np.prod(shape)) * np.dtype(self.dtype).itemsize
        with tempfile.TemporaryFile(prefix="mpo_ray-scores-") as file:
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
            except OSError as error:
                raise ScoreTableError(
                    f"{tempfile.gettempdir()}: no room for {size / 2**30:.1f} GiB of scores ({error.strerror}). Set "
                    "TMPDIR to a directory on a disk with more room."
                ) from None
            return np.asarray(np.memmap(file, self.dtype, "r+", shape=shape))


@dataclass(frozen=True, slots=True, eq=False)
class ScoreTable:
    """N scored responses of P prompts for K objectives. Rows of a prompt lie together, ordered by sample_id.

    objectives: K names
    prompt_ids: (P,) texts, in the order of their first appearance
    starts: (P + 1,) rows starts[p] … starts[p + 1] − 1 are the responses of prompt p; the numbers may differ
    proposals: names of who drew rows, `reference` first, whether it drew some or not
    drawn_by: (N,) the number of the proposal that drew each row, 0 for the reference
    log_ratios: (N, K) ℓ_k, nats
    log_proposal: (N,) log p̄/π_ref of the balance heuristic over all of a prompt's rows, nats (design 2.2, eq. 6a)
    rewards: (N, K), or None unless all objectives have a column reward_<objective>
    log_ref: (N,) log π_ref(y|x), nats, or None; num_tokens: (N,) length of the response, or None
    storage: where the arrays lie
    """

    objectives: tuple[str, ...]
    prompt_ids: pa.Array
    starts: NDArray[np.int64]
    proposals: tuple[str, ...]
    drawn_by: NDArray[np.int16]
    log_ratios: Values
    log_proposal: Values
    rewards: Values | None
    log_ref: Values | None
    num_tokens: Values | None
    storage: Storage

    @property
    def num_prompts(self) -> int:
        return len(self.starts) - 1

    @property
    def num_rows(self) -> int:
        return len(self.drawn_by)

    def proposal_rows(self) -> dict[str, int]:
        """How many rows each proposal drew."""
        counts = np.bincount(self.drawn_by, minlength=len(self.proposals)).tolist()
        return dict(zip(self.proposals, counts, strict=True))

    def rows(self, estimator: Literal["paper", "balanced"]) -> slice | NDArray[np.int64]:
        """The rows that an estimator uses: those that π_ref drew (paper), or all (balanced)."""
        if estimator == "balanced" or not self.drawn_by.any():
            return slice(None)
        return np.flatnonzero(self.drawn_by == 0)

    def samples(self, estimator: Literal["paper", "balanced"], objectives: Sequence[str] | None = None) -> SampleTable:
        """The numeric table of an estimator, for some or all objectives, in the order asked for.

        paper: the rows that π_ref drew, log_proposal 0. balanced: all rows, weighed by who drew the prompt's rows;
        the objectives left out still count as proposals. Prompts may have different numbers of rows and count alike:
        F is the mean over prompts of log Ẑ, and each Ẑ is a mean over that prompt's own rows.

        Raises ScoreTableError for an unknown objective, and for prompts with fewer than 2 rows of the estimator:
        with one response, F is linear in λ, and its minimum always a vertex.
        """
        chosen = list(self.objectives if objectives is None else objectives)
        for name in chosen:
            if name not in self.objectives:
                raise ScoreTableError(
                    f"the score table has no objective {name!r}; it has {', '.join(self.objectives)}."
                )
        rows, starts = self.rows(estimator), self.starts
        if not isinstance(rows, slice):
            starts = np.searchsorted(rows, self.starts)
        self._check_num_responses(np.diff(starts), estimator)
        columns = [self.objectives.index(name) for name in chosen]
        log_ratios = self._take(self.log_ratios, rows, columns)
        if estimator == "balanced" or isinstance(rows, slice):
            return SampleTable(log_ratios, self.log_proposal, starts)
        return SampleTable(log_ratios, np.zeros(len(rows), self.storage.dtype), starts)

    def _check_num_responses(self, num_responses: NDArray[np.int64], estimator: str) -> None:
        few = np.flatnonzero(num_responses < 2)
        if len(few):
            what, else_do = (
                ("responses", "")
                if estimator == "balanced"
                else ("responses drawn by the reference", ", or use the balanced estimator")
            )
            raise ScoreTableError(
                f"{len(few)} of {self.num_prompts} prompts have fewer than 2 {what}; the first is "
                f"{self.prompt_ids[int(few[0])].as_py()!r} with {num_responses[few[0]]}. With one response F is linear "
                f"in the weights and always runs to a vertex: draw at least 2 for each prompt{else_do}, or leave these "
                "prompts out."
            )

    def _take(self, values: Values, rows: slice | NDArray[np.int64], columns: list[int]) -> Values:
        if isinstance(rows, slice) and columns == list(range(values.shape[1])):
            return values
        numbers = np.arange(self.num_rows) if isinstance(rows, slice) else rows
        taken = self.storage.empty(len(numbers), len(columns))
        for first in range(0, len(numbers), BLOCK_ROWS):
            block = numbers[first : first + BLOCK_ROWS]
            taken[first : first + BLOCK_ROWS] = values[block][:, columns]
        return taken


def open_scores(
    paths: str | Sequence[str],
    objectives: Sequence[str] | None = None,
    *,
    min_objectives: int = 2,
    memory_limit: int = MEMORY_LIMIT,
) -> ScoreTable:
    """Read Parquet, CSV and JSON Lines files (the latter two also .gz), directories, globs, local or as URLs.

    objectives: None for every column log_ratio_<objective>, in the order of the file
    min_objectives: fewer are refused; with one there is nothing to weigh
    memory_limit: bytes; values that need more go to a file as float32, else they are float64 in memory. The keys of
        the rows, about 30 bytes each, are in memory always; the files never are

    Rows of a prompt may lie anywhere in the files. Raises ScoreTableError for what cannot be used, naming its place.
    """
    return _read(open_files(paths), objectives, min_objectives, memory_limit)


def scores_from_table(
    table: pa.Table,
    objectives: Sequence[str] | None = None,
    *,
    name: str = "score table",
    min_objectives: int = 2,
    memory_limit: int = MEMORY_LIMIT,
) -> ScoreTable:
    """As `open_scores`, from a table in memory; `name` stands for the file in messages."""
    return _read([TableInMemory(table, name)], objectives, min_objectives, memory_limit)


def _read(
    files: Sequence[ScoreFile], objectives: Sequence[str] | None, min_objectives: int, memory_limit: int
) -> ScoreTable:
    columns = list(dict.fromkeys(column for file in files for column in file.columns))
    names = _choose_objectives(files[0].name, columns, objectives, min_objectives)
    ratios = [f"log_ratio_{name}" for name in names]
    rewards = [f"reward_{name}" for name in names if f"reward_{name}" in columns]
    rewards = rewards if len(rewards) == len(names) else []
    single = [column for column in ("log_ref", "num_tokens") if column in columns]
    for file in files:
        check_columns(file, [*ratios, *rewards, *single])

    keys = read_keys(files)
    storage = Storage.of_size(keys.num_rows * (len(ratios) + len(rewards) + len(single) + 1), memory_limit)
    arrays = {column: storage.empty(keys.num_rows) for column in single}
    log_ratios, proposal = storage.empty(keys.num_rows, len(ratios)), storage.empty(keys.num_rows)
    reward_values = storage.empty(keys.num_rows, len(rewards)) if rewards else None
    counts, destinations = keys.counts(), keys.destinations()
    policies = [f"log_ratio_{name}" for name in keys.proposals[1:]]

    wanted = list(dict.fromkeys([*ratios, *rewards, *single, *policies]))
    for first, values in _batches(files, wanted, keys, storage.dtype):
        rows = slice(first, first + len(values))
        to = rows if destinations is None else destinations[rows]
        of = {column: values[:, number] for number, column in enumerate(wanted)}
        log_ratios[to] = values[:, : len(ratios)]
        if reward_values is not None:
            reward_values[to] = values[:, len(ratios) : len(ratios) + len(rewards)]
        for column, array in arrays.items():
            array[to] = of[column]
        proposals = np.column_stack([np.zeros(len(values)), *(of[column] for column in policies)])
        proposal[to] = log_proposal(proposals, counts[keys.prompts[rows]].astype(np.float64))
    drawn_by = keys.drawn_by if keys.order is None else keys.drawn_by[keys.order]
    return ScoreTable(
        names,
        keys.prompt_ids,
        keys.starts(),
        keys.proposals,
        drawn_by,
        log_ratios,
        proposal,
        reward_values,
        arrays.get("log_ref"),
        arrays.get("num_tokens"),
        storage,
    )


def _choose_objectives(
    name: str, columns: Sequence[str], objectives: Sequence[str] | None, min_objectives: int
) -> tuple[str, ...]:
    chosen = tuple(ratio_names(columns) if objectives is None else objectives)
    if not chosen:
        raise ScoreTableError(
            f"{name}: no column log_ratio_<objective>; its columns are {', '.join(columns)}. A score table has the "
            "log-ratio of each policy, in nats."
        )
    if len(set(chosen)) < len(chosen):
        raise ScoreTableError(f"objectives {', '.join(chosen)}: one is named twice.")
    if len(chosen) < min_objectives:
        raise ScoreTableError(
            f"{name}: the only objective is {chosen[0]!r}; there is nothing to weigh. Give the table a column "
            "log_ratio_<objective> for each of at least 2 objectives."
        )
    return chosen


def _batches(
    files: Sequence[ScoreFile], columns: Sequence[str], keys: RowKeys, dtype: type[np.float64 | np.float32]
) -> Iterator[tuple[int, Values]]:
    """Yield (number of the first row, (rows, columns) values), all of them checked."""
    first, most = 0, np.finfo(dtype).max
    for file in files:
        for batch in file.batches(columns):
            values = np.column_stack([numbers(batch[column], column, file.name) for column in columns])
            finite = np.abs(values) <= most
            if first + len(values) <= keys.num_rows:
                if not finite.all():
                    row, column = (int(number) for number in np.argwhere(~finite)[0])
                    raise refuse_value(
                        keys.places.of(first + row),
                        columns[column],
                        batch[columns[column]][row].as_py(),
                        prompt=keys.prompt_ids[int(keys.prompts[first + row])].as_py(),
                        sample=keys.samples[first + row],
                    )
                yield first, values
            first += len(values)
    if first != keys.num_rows:
        raise ScoreTableError(
            f"{', '.join(keys.places.names)}: had {keys.num_rows} rows, and {first} a moment later. Read it when "
            "nothing writes to it."
        )
