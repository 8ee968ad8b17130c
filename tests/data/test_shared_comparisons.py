"""Real preferences of the shared material, read as comparisons."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpo_ray.config_training import Source
from mpo_ray.data.comparisons import check_refused, read_comparisons
from mpo_ray.records import prompt_id
from tests.data.parsed import reasons


def test_hh_harmless_is_read_as_transcripts(shared: Path) -> None:
    """2,312 rows, of which 4 have a chosen reply of white space only: the published file's own."""
    parsed = read_comparisons(Source(path=str(shared / "data/hh/harmless.jsonl.gz")), "harmless")
    assert (parsed.form, parsed.num_rows, len(parsed.comparisons)) == ("transcripts", 2312, 2308)
    assert {refusal.reason for refusal in parsed.refused} == {"the reply in 'chosen' is empty"}
    assert [refusal.where.rpartition(":")[2] for refusal in parsed.refused] == ["87", "517", "926", "1104"]
    for c in parsed.comparisons:
        assert isinstance(c.prompt, str)
        assert c.prompt.endswith("\n\nAssistant:")
        assert "\n\nHuman:" not in c.chosen + c.rejected
    check_refused(parsed, objective="harmless", allow=0.01)


def test_hh_helpful_is_read_as_pairs_and_shares_no_prompt_with_harmless(shared: Path) -> None:
    parsed = read_comparisons(Source(path=str(shared / "data/hh/helpful.jsonl.gz")), "helpful")
    assert (parsed.form, parsed.num_rows, len(parsed.comparisons)) == ("pairs", 729, 728)
    assert reasons(parsed) == ["field 'rejected' is empty"]
    harmless = read_comparisons(Source(path=str(shared / "data/hh/harmless.jsonl.gz")), "harmless")
    both = [{prompt_id(c.prompt) for c in objective.comparisons} for objective in (parsed, harmless)]
    assert not both[0] & both[1]


@pytest.mark.parametrize(
    ("objective", "num_ties", "num_empty"), [("positive", 0, 42), ("concise", 146, 42), ("aspects", 2736, 13)]
)
def test_the_imdb_pairs_give_each_objective_its_comparisons_less_its_ties(
    shared: Path, objective: str, num_ties: int, num_empty: int
) -> None:
    """42 of the 5,812 rows have an empty response (the model ended at once); ties are skipped before that is seen."""
    parsed = read_comparisons(Source(path=str(shared / "testbed/imdb/pairs.jsonl.gz")), objective)
    assert (parsed.form, parsed.num_rows, len(parsed.refused)) == ("labels", 5812, num_empty)
    assert set(reasons(parsed)) == {"field 'a' is empty", "field 'b' is empty"}
    assert len(parsed.comparisons) == 5812 - num_ties - num_empty
    assert parsed.skipped == ({"ties": num_ties} if num_ties else {})
    check_refused(parsed, objective=objective, allow=0.01)
