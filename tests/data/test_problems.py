"""Problems of the data are kept until all of them are known."""

import pickle

import pytest

from mpo_ray.data.files import DataError
from mpo_ray.data.problems import DataProblemsError, Problems


def test_what_was_met_is_raised_together_in_its_order_and_once() -> None:
    problems = Problems()
    for text in ("first", "second", "first"):
        with problems.kept():
            raise DataError(text)
    with pytest.raises(DataProblemsError) as error:
        problems.raise_all()
    assert str(error.value) == "first\nsecond"
    assert pickle.loads(pickle.dumps(error.value)).problems == ("first", "second")


def test_nothing_is_raised_where_nothing_was_met_and_a_defect_of_the_program_is_not_kept() -> None:
    problems = Problems()
    with pytest.raises(ZeroDivisionError), problems.kept():
        _ = 1 / 0
    problems.raise_all()
