"""What vLLM tells of each of its steps, for an engine's statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase


class StepLog(StatLoggerBase):  # type: ignore[misc]
    """Calls `heard` after each step with its figures."""

    def __init__(self, heard: Callable[..., None]) -> None:
        self._heard = heard

    def record(self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any) -> None:
        if scheduler_stats is None:
            return
        figures = dict.fromkeys(("prompt_tokens", "admitted", "queue_seconds"), 0.0)
        if iteration_stats is not None:
            ended = iteration_stats.finished_requests
            figures = {
                "prompt_tokens": iteration_stats.prompt_token_stats.computed,
                "admitted": len(iteration_stats.time_to_first_tokens_iter),
                "queue_seconds": sum(request.queued_time for request in ended),
            }
        self._heard(running=scheduler_stats.num_running_reqs, usage=scheduler_stats.kv_cache_usage, **figures)

    def log_engine_initialized(self) -> None:
        pass
