"""The conflict report: whether objectives disagree, before anything is trained for a trade-off between them.

If they agree, no weight and no bound changes much and one policy would do (design 2.4, trap 6).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpo_ray.records import Comparison, encode_prompt, encode_reply

#: (prompts as text, responses) → one reward each.
Reward = Callable[[list[str], list[str]], Sequence[float]]
#: A prompt as `encode_prompt` writes it.
EncodedPrompt = tuple[str, bool]
#: A prompt and two responses in alphabetical order: the same for all objectives, whichever response they prefer.
ResponsePair = tuple[EncodedPrompt, str, str]
#: How much an objective prefers the first response of a pair to the second; negative if it prefers the second.
Preferences = dict[ResponsePair, float]

#: Below this share of opposite preferences one policy would do; the paper's setting is well above it.
AGREEMENT = 0.1
#: Opposite preferences in this range are what two objectives that know nothing of each other have.
UNRELATED = (0.4, 0.6)


@dataclass(frozen=True, slots=True)
class PairConflict:
    """How far two objectives want different things.

    num_shared_pairs: response pairs on which both have a preference; num_shared_prompts: prompts that both know.
    disagreement: share of the shared pairs on which they prefer opposite responses; None if there are none.
    rank_correlation: Spearman's, of their preferences; None if there are none, or an objective is indifferent.
    """

    first: str
    second: str
    num_shared_prompts: int
    num_shared_pairs: int
    disagreement: float | None
    rank_correlation: float | None
    sentence: str


@dataclass(frozen=True, slots=True)
class ConflictReport:
    """One entry for each two objectives, in the order of the objectives."""

    pairs: list[PairConflict]

    def as_json(self) -> list[dict[str, Any]]:
        return [asdict(pair) for pair in self.pairs]

    def as_text(self) -> str:
        return (
            "\n".join(pair.sentence for pair in self.pairs) or "One objective: there is nothing to be in conflict with."
        )


def conflict_report(
    comparisons: Mapping[str, Sequence[Comparison]], rewards: Mapping[str, Reward] | None = None
) -> ConflictReport:
    """Compare the objectives two by two.

    Where both have a reward, it is asked about the response pairs of both of them, and what is compared is the
    difference between the two rewards of a pair. Else both objectives' labels on the response pairs that they share
    are compared: as margins where every label has one, as ±1 where not. Each pair enters the rank correlation in
    both orders, so that it does not depend on which response is called the first.
    """
    labels = {name: _read_labels(given) for name, given in comparisons.items()}
    rewards = rewards or {}
    unknown = sorted(set(rewards) - set(labels))
    if unknown:
        raise ValueError(f"rewards: {unknown[0]!r} is no objective; the objectives are {', '.join(labels)}.")
    scored = {name: _Scores(name, reward) for name, reward in rewards.items()}
    pairs = []
    for first, second in combinations(labels, 2):
        if first in scored and second in scored:
            asked = sorted({_key(comparison) for name in (first, second) for comparison in comparisons[name]})
            pairs.append(_compare(first, second, scored[first].of(asked), scored[second].of(asked)))
        else:
            pairs.append(_compare(first, second, *_same_unit(labels[first], labels[second])))
    return ConflictReport(pairs)


def rank_correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> float | None:
    """Spearman's rank correlation of two arrays (N,), equal values having the mean of their ranks.

    None if it is not defined: fewer than two values, or all values of x or of y equal.
    """
    ranks = [_average_ranks(x), _average_ranks(y)]
    if len(x) < 2 or any(np.ptp(r) == 0 for r in ranks):
        return None
    return float(np.clip(np.corrcoef(ranks)[0, 1], -1.0, 1.0))


def _average_ranks(x: NDArray[np.float64]) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = np.cumsum(counts) - (counts - 1) / 2
    return ranks[inverse]


def _key(comparison: Comparison) -> ResponsePair:
    low, high = sorted(encode_reply(reply)[0] for reply in (comparison.chosen, comparison.rejected))
    return encode_prompt(comparison.prompt), low, high


@dataclass(frozen=True, slots=True)
class _Labels:
    """An objective's labels per response pair: weighted sums over its judgements, as signs and as margins."""

    signs: Preferences
    margins: Preferences | None


def _read_labels(comparisons: Sequence[Comparison]) -> _Labels:
    signs: Preferences = defaultdict(float)
    margins: Preferences = defaultdict(float)
    for comparison in comparisons:
        key = _key(comparison)
        signed = comparison.weight if encode_reply(comparison.chosen)[0] == key[1] else -comparison.weight
        signs[key] += signed
        margins[key] += signed * (comparison.margin or 0.0)
    has_margins = all(comparison.margin is not None for comparison in comparisons)
    return _Labels({key: float(np.sign(value)) for key, value in signs.items()}, dict(margins) if has_margins else None)


def _same_unit(first: _Labels, second: _Labels) -> tuple[Preferences, Preferences]:
    if first.margins is not None and second.margins is not None:
        return first.margins, second.margins
    return first.signs, second.signs


class _Scores:
    """One reward's answers, each text asked for once."""

    def __init__(self, name: str, reward: Reward) -> None:
        self.name, self.reward = name, reward
        self.known: dict[tuple[EncodedPrompt, str], float] = {}

    def of(self, pairs: Sequence[ResponsePair]) -> Preferences:
        texts = dict.fromkeys((prompt, text) for prompt, *both in pairs for text in both)
        new = [key for key in texts if key not in self.known]
        values = self.reward([prompt[0] for prompt, _ in new], [response for _, response in new]) if new else []
        if len(values) != len(new) or not all(map(math.isfinite, values)):
            raise ValueError(
                f"The reward of objective {self.name!r} gave {len(values)} values for {len(new)} responses, "
                f"{sum(map(math.isfinite, values))} of them finite. It must give one finite number for each."
            )
        self.known.update(zip(new, map(float, values), strict=True))
        return {pair: self.known[pair[0], pair[1]] - self.known[pair[0], pair[2]] for pair in pairs}


def _compare(first: str, second: str, preferences: Preferences, others: Preferences) -> PairConflict:
    num_prompts = len({pair[0] for pair in preferences} & {pair[0] for pair in others})
    shared = [pair for pair in preferences if pair in others]
    x = np.array([preferences[pair] for pair in shared], dtype=np.float64)
    y = np.array([others[pair] for pair in shared], dtype=np.float64)
    both = (x != 0) & (y != 0)
    num_pairs = int(both.sum())
    disagreement = float(np.mean(np.sign(x[both]) != np.sign(y[both]))) if num_pairs else None
    correlation = rank_correlation(np.concatenate([x, -x]), np.concatenate([y, -y]))
    sentence = f"{first} and {second} {_judge(num_prompts, num_pairs, disagreement, correlation)}"
    return PairConflict(first, second, num_prompts, num_pairs, disagreement, correlation, sentence)


def _judge(num_prompts: int, num_pairs: int, disagreement: float | None, correlation: float | None) -> str:
    if disagreement is None:
        what = "prompts" if num_prompts == 0 else f"response pairs, though {num_prompts} prompts"
        return f"share no {what}, so they cannot be compared; rewards for both would tell."
    if disagreement < AGREEMENT:
        verdict, advice = "do not conflict", ": one policy would do for both"
    elif disagreement < UNRELATED[0]:
        verdict, advice = "conflict in part", ""
    elif disagreement <= UNRELATED[1]:
        verdict, advice = "are unrelated", ": which of them counts more decides about as often as not"
    else:
        verdict, advice = "conflict", ": what helps one mostly hurts the other"
    evidence = f"they prefer opposite responses in {disagreement:.0%} of {num_pairs} pairs"
    ranks = "" if correlation is None else f" (rank correlation {correlation:+.2f})"
    return f"{verdict}: {evidence}{ranks}{advice}."
