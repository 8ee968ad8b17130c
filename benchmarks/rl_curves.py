"""The learning curves of reinforcement learning: what every update brought, over the processor time it had taken."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
BELOW = ("#000000", "#D55E00")
SMOOTHED_OVER = 10


def running_mean(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Mean of the last `width` values at each place, of all there are before that."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return np.asarray((total[ends] - total[starts]) / (ends - starts))


def write_curves(path: Path, trained: Mapping[str, Mapping[str, Any]]) -> None:
    """One column for each method: expected normalised reward of each objective above, J and KL below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        2, len(trained), figsize=(5.2 * len(trained), 6.4), squeeze=False, sharex="col", layout="constrained"
    )
    for (upper, lower), (method, training) in zip(axes.T, trained.items(), strict=True):
        curve = training["curve"]
        spent = [row["processor_seconds"] for row in curve]
        lines = {name: [row["rewards"][name] for row in curve] for name in curve[0]["rewards"]}
        below = {
            "J = R − β KL": [row["goal"] for row in curve],
            "KL to the reference, nats": [row["kl"] for row in curve],
        }
        for axis, shown, colours in ((upper, lines, COLOURS), (lower, below, BELOW)):
            for (name, values), colour in zip(shown.items(), colours, strict=False):
                array = np.asarray(values, dtype=np.float64)
                axis.plot(spent, array, color=colour, alpha=0.25, linewidth=0.8)
                axis.plot(spent, running_mean(array, SMOOTHED_OVER), color=colour, label=name)
            axis.axhline(0.0, color="0.6", linewidth=0.8)
            axis.grid(alpha=0.3)
            axis.legend(frameon=False, fontsize="small")
        upper.set_title(f"{method} ({training['updates']} updates)")
        lower.set_xlabel("processor-seconds")
    unit = next(iter(trained.values()))["reward"]
    axes[0][0].set_ylabel(f"normalised reward ({unit})")
    axes[1][0].set_ylabel("J, and KL in nats")
    figure.savefig(path, dpi=120)
    plt.close(figure)
