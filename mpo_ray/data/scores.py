"""The score table as an array: log-ratios by prompt, sample and objective (design 5.2)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mpo_ray.data.sources import DataError


def read_log_ratios(scores: pa.Table, objectives: Sequence[str]) -> NDArray[np.float64]:
    """ℓ as (prompts, samples, objectives), nats: prompts in the order of their ids, samples in the order of theirs.

    Raises DataError for a missing column, a value that is not finite, or prompts with different numbers of samples.
    """
    for name in ("prompt_id", "sample_id", *(f"log_ratio_{objective}" for objective in objectives)):
        if name not in scores.column_names:
            raise DataError(f"score table: no column {name!r}; its columns are {', '.join(scores.column_names)}.")
    ordered = scores.sort_by([("prompt_id", "ascending"), ("sample_id", "ascending")])
    _, counts = np.unique(ordered["prompt_id"].to_numpy(), return_counts=True)
    if counts.min() != counts.max():
        raise DataError(
            f"score table: prompts have from {counts.min()} to {counts.max()} samples; the fit needs the same number "
            "for each."
        )
    columns = [ordered[f"log_ratio_{objective}"].to_numpy() for objective in objectives]
    values = np.stack(columns, axis=-1).astype(np.float64)
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        raise DataError(
            f"score table: log_ratio_{objectives[column]} of prompt {ordered['prompt_id'][int(row)]} is "
            f"{values[row, column]}; log-ratios are finite."
        )
    return values.reshape(len(counts), counts[0], len(objectives))
