"""MOPO's pool of design 5.2, from files or from memory: candidates of each prompt with their win probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mpo_ray.data.score_files import (
    PROMPT,
    ScoreFile,
    ScoreTableError,
    TableInMemory,
    check_columns,
    numbers,
    open_files,
)
from mpo_ray.maths.pool import Pool

RESPONSE, WIN, LOG_REF = "response_id", "win_", "log_ref"


@dataclass(frozen=True, slots=True, eq=False)
class PoolTable:
    """A pool with the names of its objectives and rows; the order of the rows is that of the prompts' appearance.

    objectives: the primary one first, then the bounded ones; prompt_ids, response_ids: (N,) of every row, as they came
    """

    objectives: tuple[str, ...]
    pool: Pool
    prompt_ids: pa.Array
    response_ids: pa.Array


def open_pool(paths: str | Sequence[str], primary: str, secondary: Sequence[str]) -> PoolTable:
    """Read a pool from Parquet, CSV and JSON Lines files, directories, globs, local or as URLs.

    Raises ScoreTableError for what cannot be used, naming the file, the row's prompt and response, and the value.
    """
    return _read(open_files(paths), primary, secondary)


def pool_from_table(table: pa.Table, primary: str, secondary: Sequence[str], *, name: str = "pool") -> PoolTable:
    """As `open_pool`, from a table in memory; `name` stands for the file in messages."""
    return _read([TableInMemory(table, name)], primary, secondary)


def _read(files: Sequence[ScoreFile], primary: str, secondary: Sequence[str]) -> PoolTable:
    objectives = (primary, *secondary)
    wins = [WIN + name for name in objectives]
    for file in files:
        _check_objectives(file, objectives)
        check_columns(file, [PROMPT, RESPONSE])
    columns = [PROMPT, RESPONSE, *wins, *([LOG_REF] if LOG_REF in files[0].columns else [])]
    for file in files:
        check_columns(file, columns)
    name = ", ".join(file.name for file in files)
    batches = [pa.Table.from_batches([batch]) for file in files for batch in file.batches(columns)]
    table = pa.concat_tables(batches, promote_options="permissive") if batches else pa.table({})
    if table.num_rows == 0:
        raise ScoreTableError(f"{name}: no rows; a pool has at least 2 candidates of at least one prompt.")
    rows = table.combine_chunks()
    prompts, responses = rows[PROMPT].combine_chunks(), rows[RESPONSE].combine_chunks()
    values = {column: numbers(rows[column].combine_chunks(), column, name) for column in columns[2:]}
    for column, found in values.items():
        bad = ~np.isfinite(found) if column == LOG_REF else ~((found >= 0) & (found <= 1))
        if bad.any():
            row = int(bad.argmax())
            allowed = "a finite number of nats" if column == LOG_REF else "a probability in [0, 1]"
            seen = rows[column][row].as_py()
            raise ScoreTableError(
                f"{name}: {column} of prompt {prompts[row].as_py()!r}, response {responses[row].as_py()!r} is "
                f"{'empty' if seen is None else seen}; it must be {allowed}. Compute it again or leave the row out."
            )
    owner, order = _grouped(prompts)
    starts = np.concatenate([[0], np.cumsum(np.bincount(owner))])
    _check_rows(name, prompts, responses, owner, order, starts)
    primary_wins = values[wins[0]][order]
    secondary_wins = np.stack([values[c][order] for c in wins[1:]], axis=1) if secondary else np.zeros((len(owner), 0))
    pool = Pool.of_samples(primary_wins, secondary_wins, starts)
    if LOG_REF in values:
        pool = Pool(primary_wins, secondary_wins, normalised(values[LOG_REF][order], starts), starts)
    taken = pa.array(order)
    return PoolTable(objectives, pool, prompts.take(taken), responses.take(taken))


def _check_objectives(file: ScoreFile, objectives: Sequence[str]) -> None:
    known = [column.removeprefix(WIN) for column in file.columns if column.startswith(WIN)]
    for name in objectives:
        if name not in known:
            raise ScoreTableError(
                f"{file.name}: unknown objective {name!r}: there is no column {WIN + name!r}. The pool has "
                f"{', '.join(known) or 'no column win_<objective>'}."
            )


def _grouped(prompts: pa.Array) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The number of every row's prompt by first appearance, and the order that brings prompts together."""
    if prompts.null_count:
        raise ScoreTableError(f"{PROMPT} is empty in {prompts.null_count} rows; every candidate belongs to a prompt.")
    owner = pc.dictionary_encode(prompts).indices.to_numpy(zero_copy_only=False).astype(np.int64)
    return owner, np.argsort(owner, kind="stable")


def _check_rows(
    name: str,
    prompts: pa.Array,
    responses: pa.Array,
    owner: NDArray[np.int64],
    order: NDArray[np.int64],
    starts: NDArray[np.int64],
) -> None:
    sizes = np.diff(starts)
    few = np.flatnonzero(sizes < 2)
    if few.size:
        raise ScoreTableError(
            f"{name}: {few.size} of {len(sizes)} prompts have a single candidate; the first is "
            f"{prompts[int(order[starts[few[0]]])].as_py()!r}. A policy cannot prefer one candidate to itself: give "
            "every prompt at least 2, better 8 or more, or leave these prompts out."
        )
    which = pc.dictionary_encode(responses).indices.to_numpy(zero_copy_only=False).astype(np.int64)
    keys = owner * (int(which.max()) + 1) + which
    unique, counts = np.unique(keys, return_counts=True)
    if len(unique) < len(keys):
        row = int(np.flatnonzero(keys == unique[counts.argmax()])[1])
        raise ScoreTableError(
            f"{name}: prompt {prompts[row].as_py()!r} has the response {responses[row].as_py()!r} {counts.max()} "
            "times; (prompt_id, response_id) must be unique."
        )


def normalised(log_ref: NDArray[np.float64], starts: NDArray[np.int64]) -> NDArray[np.float64]:
    """log π_ref over the candidates of each prompt: shares that sum to 1 over rows starts[p] … starts[p + 1] − 1."""
    totals = np.logaddexp.reduceat(log_ref, starts[:-1])
    return np.asarray(log_ref - np.repeat(totals, np.diff(starts)))
