"""A judge's answers on disk: one JSON line per answer, appended as it arrives, so that no answer is paid for twice.

Lines are only ever added. A process killed while it writes leaves at most one unfinished line at the end; the next
opening cuts it off.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mpo_ray.evaluation.judge_client import Answer, JudgeError
from mpo_ray.records import digest


def answer_key(text: str, settings: Mapping[str, Any]) -> str:
    """Name a question by its content: the messages and everything that shapes the answer, but not the URL."""
    return digest({**settings, "messages": [{"role": "user", "content": text}]})


class AnswerCache:
    """The answers of one file. Threads may share it; processes may not write to it at the same time."""

    def __init__(self, path: Path) -> None:
        """Read the answers of `path`, which need not exist yet. Raises JudgeError for a line that is no answer."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(path, len(whole))
        self._answers: dict[str, Answer] = {}
        self.spent = 0.0
        for number, line in enumerate(whole.splitlines(), start=1):
            key, answer = _read_line(line, f"{path}, line {number}")
            self._answers[key] = answer
            self.spent += answer.cost
        self._path = path
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: str) -> Answer | None:
        return self._answers.get(key)

    def add(self, key: str, answer: Answer) -> None:
        """Keep an answer; it is on disk when this returns."""
        line = json.dumps({"key": key, **asdict(answer)}, ensure_ascii=True).encode() + b"\n"
        with self._lock:
            with self._path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            self._answers[key] = answer


def _read_line(line: bytes, where: str) -> tuple[str, Answer]:
    try:
        values = json.loads(line)
        key, answer = values.pop("key"), Answer(**values)
        if not isinstance(key, str) or not isinstance(answer.text, str):
            raise TypeError("key and text are strings")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise JudgeError(
            f"{where}: not an answer of the judge ({error}). Delete this line; its question is asked again."
        ) from None
    return key, Answer(answer.text, answer.prompt_tokens, answer.completion_tokens, float(answer.cost))
