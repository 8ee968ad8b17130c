"""Problems of a run's data, kept so that one does not hide the next."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from mpo_ray.data.files import DataError


class DataProblemsError(DataError):
    """Everything that is wrong with the data of a run, one message for each problem."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__(tuple(problems))
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return "\n".join(self.problems)


class Problems:
    """Messages in the order in which the problems were met, each once."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def kept(self) -> _Kept:
        """A block whose error is kept; what stands behind the block goes on."""
        return _Kept(self.messages)

    def raise_all(self) -> None:
        """Raise DataProblemsError if there are any."""
        if self.messages:
            raise DataProblemsError(self.messages)


class _Kept:
    def __init__(self, messages: list[str]) -> None:
        self._messages = messages

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if not isinstance(error, ValueError | OSError):
            return False
        if str(error) not in self._messages:
            self._messages.append(str(error))
        return True
