"""Token lengths of tables, as `check` shows them."""

from mpo_ray.data.lengths import Spread, TableLengths, lengths_table, spread


def test_figures_are_lengths_that_occur() -> None:
    """Of 1 … 100: 50 of them are at most 50, 95 at most 95. Of two the smaller one covers half."""
    assert spread(range(100, 0, -1)) == Spread(50, 95, 100, 50.5)
    assert spread([7, 3]) == Spread(3, 7, 7, 5.0)
    assert spread([4]) == Spread(4, 4, 4, 4.0)


def test_a_table_of_prompts_alone_has_no_figures_of_replies() -> None:
    pairs = TableLengths(
        "helpful", "pairs", 1200, Spread(40, 900, 1800, 100.0), Spread(50, 300, 512, 60.0), Spread(9, 9, 9, 9.0), 0.125
    )
    prompts = TableLengths("prompts for the fit", "prompts", 8, Spread(3, 4, 5, 3.5), None, None, 0.0)
    assert lengths_table([pairs, prompts]).splitlines() == [
        "                                  prompt tokens          reply tokens",
        "                            rows  median  95 %  longest  median  95 %  longest  too long",
        "helpful              1,200 pairs      40   900    1,800      50   300      512    12.5 %",
        "prompts for the fit    8 prompts       3     4        5                            0.0 %",
    ]
    assert [TableLengths.from_json(table.as_json()) for table in (pairs, prompts)] == [pairs, prompts]
