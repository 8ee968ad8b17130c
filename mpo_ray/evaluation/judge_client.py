"""One question to a language model behind an OpenAI-compatible URL: requests, retries, and errors that say what to do.

The key is sent to that URL and stands nowhere else: not in messages, not in what an error quotes of an answer.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Self

import httpx

from mpo_ray.evaluation.judge_cost import Budget

#: The first wait before a retry, and the longest, in seconds; a server that asks for more is told so.
FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 300.0
TRANSIENT = {408, 409, 425, 429}
REFUSED = {400, 413, 422}
SHOWN_CHARACTERS = 300
#: What some servers call max_tokens; they say so when they refuse the usual name.
OTHER_LIMIT = "max_completion_tokens"

CHECK_URL = (
    "Start the judge's server, or correct evaluation.judge.url: it is the base URL, such as http://127.0.0.1:8000/v1."
)
BE_PATIENT = "Lower evaluation.judge.concurrency, raise its retries, or wait."


class JudgeError(ValueError):
    """The judge cannot be used as configured, or does not answer."""


class RefusedError(ValueError):
    """The judge refuses this one question (too long for it, filtered, …); others may pass."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a judge wrote, its tokens as the server counted them (None if it did not), and its price."""

    text: str
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cost: float = 0.0


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why an attempt may be repeated, what to do if it fails for good, and the wait that the server asks for."""

    reason: str
    remedy: str
    retry_after: float = 0.0


class ChatClient:
    """Asks one model. Threads may share a client; its `budget` is asked before every request."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        budget: Budget,
        api_key: str | None = None,
        api_key_env: str | None = None,
        temperature: float = 0.0,
        max_tokens: int = 256,
        retries: int = 4,
        timeout_s: float = 60.0,
        pause: Callable[[float], object] | None = None,
    ) -> None:
        """api_key_env: where the key came from, for messages; pause: waits so many seconds before a retry."""
        self._url = url.rstrip("/")
        self.settings: Mapping[str, Any] = {"model": model, "temperature": temperature, "max_tokens": max_tokens}
        self._budget = budget
        self._key = (api_key or "").strip()
        self._key_env = api_key_env
        self._retries = retries
        self._limit_name = "max_tokens"
        self._stopped = threading.Event()
        self._pause = self._stopped.wait if pause is None else pause
        self.num_answers = 0
        _check_url(url)
        if not (self._key.isascii() and self._key.isprintable()):
            raise JudgeError(f"The key in the environment variable {api_key_env} holds characters that no key has.")
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._http = httpx.Client(headers=headers, timeout=timeout_s, limits=httpx.Limits(max_connections=None))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def stop(self) -> None:
        """Let threads that wait for a retry give up."""
        self._stopped.set()

    def ask(self, text: str) -> Answer:
        """The model's answer to one message.

        429, 5xx, timeouts and broken connections are tried again, each time after twice the wait (with jitter), or
        after what Retry-After says where that is longer. Raises JudgeError for what a retry cannot mend and when the
        retries are spent, RefusedError where only this question is refused, CapReachedError before the cap.
        """
        failure = _Failure("", "")
        for attempt in range(self._retries + 1):
            if attempt:
                backoff = min(FIRST_WAIT_S * 2 ** (attempt - 1), LONGEST_WAIT_S)
                jitter = random.uniform(0.0, 0.5)  # noqa: S311
                self._pause(max(backoff * (1.0 + jitter), failure.retry_after + jitter))
            if self._stopped.is_set():
                raise JudgeError(f"{self._who}: stopped.")
            outcome = self._attempt(text)
            if isinstance(outcome, Answer):
                return outcome
            failure = outcome
        raise JudgeError(
            f"{self._who} failed {self._retries + 1} time(s) in a row, the last time with: {failure.reason}. "
            f"{failure.remedy} Answers so far are kept: the same command goes on from there."
        )

    def check(self) -> None:
        """Ask for the list of models, which costs nothing. Raises JudgeError if the model cannot be reached there."""
        try:
            response = self._http.get(f"{self._url}/models")
        except httpx.HTTPError as error:
            failure = self._broken(error)
            raise JudgeError(f"{self._who}: {failure.reason}. {failure.remedy}") from None
        if response.status_code != httpx.codes.OK:
            raise JudgeError(self._explained(response))
        try:
            names = [str(model["id"]) for model in response.json()["data"]]
        except (ValueError, TypeError, KeyError):
            raise JudgeError(
                f"{self._who}: /models answers no list of models but {self._quoted(response)}. "
                "evaluation.judge.url is the base URL, such as http://127.0.0.1:8000/v1."
            ) from None
        if self.settings["model"] not in names:
            shown = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
            raise JudgeError(f"{self._who}: no such model there. Set evaluation.judge.model to one of: {shown}")

    def _attempt(self, text: str) -> Answer | _Failure:
        """One request. Raises as `ask`, but not for what may be tried again."""
        body = {"messages": [{"role": "user", "content": text}], **self.settings}
        body[self._limit_name] = body.pop("max_tokens")
        with self._budget.promise(text) as promise:
            try:
                response = self._http.post(f"{self._url}/chat/completions", json=body)
            except httpx.HTTPError as error:
                if not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout):
                    promise.settle(None)  # the server may have answered, and ask its price, though nobody heard it
                return self._broken(error)
            if response.status_code == httpx.codes.OK:
                content, usage = _read_answer(response)
                cost = promise.settle(usage)
                if content is None:
                    return _Failure(f"an answer that is no chat completion: {self._quoted(response)}", CHECK_URL)
                self.num_answers += 1
                prompt_tokens, completion_tokens = usage or (None, None)
                return Answer(content, prompt_tokens, completion_tokens, cost)
        if response.status_code in TRANSIENT or response.status_code >= 500:
            wait = _retry_after(response)
            if wait > LONGEST_WAIT_S:
                raise JudgeError(f"{self._explained(response)} It asks to wait {wait:.0f} s: repeat the command then.")
            return _Failure(f"{response.status_code} {self._quoted(response)}", BE_PATIENT, wait)
        if response.status_code in REFUSED:
            if OTHER_LIMIT in response.text and OTHER_LIMIT not in body:
                self._limit_name = OTHER_LIMIT
                return self._attempt(text)
            raise RefusedError(f"{response.status_code} {self._quoted(response)}")
        raise JudgeError(self._explained(response))

    def _broken(self, error: httpx.HTTPError) -> _Failure:
        if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
            return _Failure("no answer in time", "Raise evaluation.judge.timeout_s, or lower its concurrency.")
        return _Failure(f"no connection ({self._redacted(str(error))})", CHECK_URL)

    def _explained(self, response: httpx.Response) -> str:
        """What a status that no retry mends means, and what to do."""
        said = f"{self._who} answers {response.status_code}: {self._quoted(response)}."
        if response.status_code in (401, 403):
            if not self._key:
                return f"{said} No key was sent: name the variable that holds it in evaluation.judge.api_key_env."
            return f"{said} The key in the environment variable {self._key_env} is not accepted; correct it."
        if response.status_code == 404:
            return f"{said} Either evaluation.judge.model is not served there, or the URL is wrong. {CHECK_URL}"
        if response.is_redirect:
            return f"{said} It points to {response.headers.get('location')}; set evaluation.judge.url to where that is."
        return said

    @property
    def _who(self) -> str:
        return f"The judge at {self._url} (model {self.settings['model']!r})"

    def _quoted(self, response: httpx.Response) -> str:
        text = " ".join(response.text.split())
        return self._redacted(text)[:SHOWN_CHARACTERS] or "(nothing)"

    def _redacted(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _check_url(url: str) -> None:
    """Refuse what is no base URL, or would put a secret where it is shown. Raises JudgeError."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise JudgeError(f"evaluation.judge.url {url!r}: {error}. {CHECK_URL}") from None
    if parsed.userinfo or parsed.query:
        raise JudgeError(
            f"evaluation.judge.url for {parsed.host} holds a password or a query. Put the key into an environment "
            "variable and name it in evaluation.judge.api_key_env."
        )
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise JudgeError(f"evaluation.judge.url {url!r} is no http or https URL. {CHECK_URL}")


def _read_answer(response: httpx.Response) -> tuple[str | None, tuple[int, int] | None]:
    """Text and usage of a chat completion; no text where it is none. A message without content is the empty text."""
    try:
        values = response.json()
        content = values["choices"][0]["message"].get("content") or ""
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return None, None
    try:
        usage = (int(values["usage"]["prompt_tokens"]), int(values["usage"]["completion_tokens"]))
    except (ValueError, TypeError, KeyError):
        return str(content), None
    return str(content), usage if min(usage) >= 0 else None


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the server asks to wait: a number or a date; 0 without either."""
    value = response.headers.get("retry-after", "")
    try:
        return max(0.0, float(value)) if value.replace(".", "", 1).isdecimal() else _until(value)
    except (ValueError, TypeError):
        return 0.0


def _until(date: str) -> float:
    return max(0.0, parsedate_to_datetime(date).timestamp() - time.time())
