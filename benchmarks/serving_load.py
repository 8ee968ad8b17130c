"""A locust file: a number of users ask the endpoint for streams until every request of a file has been asked once.

Run by benchmarks/serving.py; alone:  locust --headless --locustfile benchmarks/serving_load.py --host URL --users 32
--spawn-rate 1000  with LOAD_REQUESTS (JSON list of request bodies) and LOAD_RESULTS (where a JSON list of what was seen
of each goes) in the environment.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from pathlib import Path
from typing import Any

import gevent
from locust import FastHttpUser, events, task

_REQUESTS: deque[dict[str, Any]] = deque(json.loads(Path(os.environ["LOAD_REQUESTS"]).read_text(encoding="utf-8")))
_EXPECTED = len(_REQUESTS)
_SEEN: list[dict[str, Any]] = []


class Reader(FastHttpUser):
    """Streams one completion after the other."""

    @task
    def read(self) -> None:
        if not _REQUESTS:
            gevent.sleep(0.05)
            return
        body, record = _REQUESTS.popleft(), {"start": time.perf_counter(), "first": None, "tokens": 0}
        with self.client.post("/v1/completions", json=body, stream=True, catch_response=True) as response:
            record["status"] = response.status_code
            while line := response.stream.readline(b"\n"):
                if record["first"] is None and line.startswith(b"data:"):
                    record["first"] = time.perf_counter()
                if b'"usage":{' in line or b'"usage": {' in line:
                    record["tokens"] = json.loads(line[5:])["usage"]["completion_tokens"]
        record["end"] = time.perf_counter()
        _SEEN.append(record)
        if len(_SEEN) == _EXPECTED:
            gevent.spawn(self.environment.runner.quit)  # which ends this user too


@events.quitting.add_listener
def _write(environment: Any, **_: Any) -> None:
    Path(os.environ["LOAD_RESULTS"]).write_text(json.dumps(_SEEN), encoding="utf-8")
