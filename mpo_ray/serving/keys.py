"""API keys: who is let in, and how often."""

from __future__ import annotations

import hashlib
import hmac
import math
import time
from collections.abc import Callable, Sequence

from mpo_ray.serving.errors import ApiError

#: Whose requests are counted where no key is asked for.
NO_KEY = ""


class Keys:
    """The keys of an endpoint, as SHA-256 digests. Without any, everybody is let in."""

    def __init__(self, digests: Sequence[str]) -> None:
        self._digests = tuple(digest.lower() for digest in digests)

    def owner(self, authorization: str | None) -> str:
        """The digest of the key in an `Authorization` header. Raises ApiError 401.

        The key is compared with every digest, each in constant time, so that time tells nothing of them.
        """
        if not self._digests:
            return NO_KEY
        scheme, _, key = (authorization or "").partition(" ")
        given = hashlib.sha256(key.strip().encode("utf-8", "replace")).hexdigest()
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        if scheme.lower() != "bearer" or not any(matches):
            raise ApiError(
                401, "send the API key as `Authorization: Bearer KEY`; it is missing or wrong.", code="invalid_api_key"
            )
        return given


class RateLimit:
    """A bucket of requests for each key, that fills up evenly. per_minute: its size too; None for no limit."""

    def __init__(self, per_minute: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute, self._clock = per_minute, clock
        self._buckets: dict[str, tuple[float, float]] = {}  # owner → requests left, and when

    def take(self, owner: str) -> None:
        """Count one request. Raises ApiError 429, which says when to come again."""
        if self._per_minute is None:
            return
        now, size = self._clock(), max(self._per_minute, 1.0)
        left, then = self._buckets.get(owner, (size, now))
        left = min(size, left + (now - then) * self._per_minute / 60)
        if left < 1:
            self._buckets[owner] = left, now
            seconds = math.ceil((1 - left) * 60 / self._per_minute)
            raise ApiError(
                429,
                f"this key may make {self._per_minute:g} requests a minute; try again in {seconds} s.",
                code="rate_limit_exceeded",
                retry_after=seconds,
            )
        self._buckets[owner] = left - 1, now
