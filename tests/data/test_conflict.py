"""The conflict report says in numbers and in a sentence whether objectives disagree."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from mpo_ray.config_training import Source
from mpo_ray.data.comparisons import read_comparisons
from mpo_ray.data.conflict import conflict_report, rank_correlation
from mpo_ray.records import Comparison


def compare(prompt: str, chosen: str, rejected: str, **values: float) -> Comparison:
    return Comparison(f"{prompt}/{chosen}/{rejected}", prompt, chosen, rejected, **values)


def both_ways(num: int, num_opposite: int) -> dict[str, list[Comparison]]:
    """`num` shared pairs, of which `num_opposite` are judged in opposite ways; ids and orders differ."""
    first = [compare(f"p{i}", f"x{i * 7 % 5}", "x9" if i % 2 else "w") for i in range(num)]
    second = [
        compare(c.prompt, c.rejected, c.chosen) if i < num_opposite else c
        for i, c in enumerate(first)  # type: ignore[arg-type]
    ]
    return {"first": first, "second": second[::-1]}


@pytest.mark.parametrize(
    ("num_opposite", "verdict"),
    [(0, "do not conflict"), (4, "do not conflict"), (5, "in part"), (25, "are unrelated"), (31, "conflict: ")],
)
def test_disagreement_is_the_share_of_shared_pairs_with_opposite_preferences(num_opposite: int, verdict: str) -> None:
    (pair,) = conflict_report(both_ways(50, num_opposite)).pairs
    assert (pair.num_shared_prompts, pair.num_shared_pairs) == (50, 50)
    assert pair.disagreement == pytest.approx(num_opposite / 50)
    assert verdict in pair.sentence
    assert ("one policy would do" in pair.sentence) == (num_opposite < 5)


def test_the_rank_correlation_of_labels_is_one_minus_twice_the_disagreement() -> None:
    """Each pair counts in both orders, so the ±1 labels have mean 0 whichever response is called the first."""
    for num_opposite in (0, 3, 10, 20):
        (pair,) = conflict_report(both_ways(20, num_opposite)).pairs
        assert pair.rank_correlation == pytest.approx(1 - 2 * num_opposite / 20)


def test_objectives_without_shared_pairs_cannot_be_compared() -> None:
    first = [compare("p", "x", "y")]
    apart = conflict_report({"first": first, "second": [compare("q", "x", "y")]}).pairs[0]
    assert (apart.num_shared_prompts, apart.num_shared_pairs) == (0, 0)
    assert (apart.disagreement, apart.rank_correlation) == (None, None)
    assert "first and second share no prompts, so they cannot be compared" in apart.sentence
    near = conflict_report({"first": first, "second": [compare("p", "x", "z")]}).pairs[0]
    assert "share no response pairs, though 1 prompts" in near.sentence


def test_margins_are_ranked_where_all_have_one() -> None:
    """Signs agree on every pair; the order of the margins is reversed, which the rank correlation shows."""
    first = [compare(f"p{i}", "x", "y", margin=1.0 + i) for i in range(9)]
    second = [compare(f"p{i}", "x", "y", margin=10.0 - i) for i in range(9)]
    (pair,) = conflict_report({"first": first, "second": second}).pairs
    assert pair.disagreement == 0.0
    assert pair.rank_correlation is not None
    assert pair.rank_correlation < 0.9
    without = [compare(f"p{i}", "x", "y") for i in range(9)]
    assert conflict_report({"first": first, "second": without}).pairs[0].rank_correlation == pytest.approx(1.0)


def test_several_judgements_of_one_pair_count_as_their_weighted_majority() -> None:
    first = [compare("p", "x", "y"), compare("p", "y", "x", weight=3.0)]
    first += [compare("r", "x", "y", weight=3.0), compare("r", "y", "x")]
    first += [compare("q", "x", "y"), compare("q", "y", "x")]
    second = [compare("p", "y", "x"), compare("r", "x", "y"), compare("q", "x", "y")]
    (pair,) = conflict_report({"first": first, "second": second}).pairs
    assert (pair.num_shared_pairs, pair.disagreement) == (2, 0.0)


def num_words(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [float(len(response.split())) for response in responses]


def brevity(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [-float(len(response)) for response in responses]


def test_rewards_compare_objectives_that_share_no_prompts() -> None:
    comparisons = {
        "long": [compare("p", "a b c", "a"), compare("p", "a b", "c")],
        "short": [compare("q", "a", "a b c d"), compare("q", "z", "y")],
    }
    (pair,) = conflict_report(comparisons, {"long": num_words, "short": brevity}).pairs
    assert (pair.num_shared_prompts, pair.num_shared_pairs) == (2, 3), "the pair z, y is a tie for both"
    assert (pair.disagreement, pair.rank_correlation) == (1.0, pytest.approx(-1.0))
    one_reward = conflict_report(comparisons, {"long": num_words}).pairs[0]
    assert one_reward.disagreement is None


def test_a_reward_is_asked_once_about_each_response() -> None:
    asked: list[tuple[str, str]] = []

    def counted(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        asked.extend(zip(prompts, responses, strict=True))
        return num_words(prompts, responses)

    given = both_ways(10, 5)
    conflict_report({**given, "third": given["first"]}, dict.fromkeys(("first", "second", "third"), counted))
    assert max(asked.count(key) for key in asked) == 3, "once for each of three objectives"


def test_a_reward_that_does_not_answer_each_response_is_named() -> None:
    given = both_ways(2, 1)
    with pytest.raises(ValueError, match="objective 'first' gave 1 values for 4 responses, 1 of them finite"):
        conflict_report(given, {"first": lambda p, r: [1.0], "second": num_words})
    with pytest.raises(ValueError, match="'other' is no objective; the objectives are first, second"):
        conflict_report(given, {"other": num_words})


def test_the_rank_correlation_gives_ties_their_mean_rank() -> None:
    """Ranks of x are 1.5 1.5 3 4 and of y are 4 3 1.5 1.5: covariance −4.0 / 4, variances 4.5 / 4 each."""
    x, y = np.array([1.0, 1.0, 2.0, 9.0]), np.array([8.0, 7.0, 0.0, 0.0])
    assert rank_correlation(x, y) == pytest.approx(-4.0 / 4.5)
    assert rank_correlation(x, np.exp(x)) == pytest.approx(1.0)
    assert rank_correlation(x, np.ones(4)) is None
    assert rank_correlation(x[:1], y[:1]) is None


def test_the_report_is_json_and_text_with_one_line_for_each_two_objectives() -> None:
    given = both_ways(4, 2)
    report = conflict_report({**given, "third": given["first"]})
    assert [(pair["first"], pair["second"]) for pair in json.loads(json.dumps(report.as_json()))] == [
        ("first", "second"),
        ("first", "third"),
        ("second", "third"),
    ]
    assert report.as_text().splitlines() == [pair.sentence for pair in report.pairs]
    assert "nothing to be in conflict" in conflict_report({"first": given["first"]}).as_text()


def test_the_imdb_objectives_conflict_as_their_rewards_are_correlated(shared: Path) -> None:
    """Rewards correlate by −0.04 (positive, concise), 0.00 (positive, aspects) and −0.38 (concise, aspects)."""
    source = Source(path=str(shared / "testbed/imdb/pairs.jsonl.gz"))
    names = ("positive", "concise", "aspects")
    report = conflict_report({name: read_comparisons(source, name).comparisons for name in names})
    by_name = {(pair.first, pair.second): pair for pair in report.pairs}
    assert by_name["positive", "concise"].num_shared_pairs == 5812 - 146 - 42
    for pair, low, high in (
        (by_name["positive", "concise"], 0.45, 0.58),
        (by_name["positive", "aspects"], 0.45, 0.58),
        (by_name["concise", "aspects"], 0.62, 0.85),
    ):
        assert pair.disagreement is not None
        assert low < pair.disagreement < high, pair


def test_the_hh_objectives_share_no_prompts(shared: Path) -> None:
    given = {
        name: read_comparisons(Source(path=str(shared / f"data/hh/{name}.jsonl.gz")), name).comparisons
        for name in ("helpful", "harmless")
    }
    assert "helpful and harmless share no prompts" in conflict_report(given).as_text()
