"""Pairs, and a judge to put them to, for the tests of the judge."""

from __future__ import annotations

from typing import Any

from mpo_ray.evaluation.judge import Judgements, Pair, judge_pairs
from mpo_ray.evaluation.judge_cache import AnswerCache
from mpo_ray.evaluation.judge_client import ChatClient
from mpo_ray.evaluation.judge_cost import Budget
from mpo_ray.evaluation.judge_prompt import JudgePrompt

OWN = JudgePrompt.load(None)


def pair(response: str, reference: str, prompt: str = "Say hello.", candidate: str = "mpo") -> Pair:
    return Pair(candidate, "concise", f"id of {prompt}", prompt, response, reference)


SHORT_WINS = [pair("Hi.", "Good day to you.", f"Say hello {n}.") for n in range(4)]


def judge(url: str, cache: AnswerCache, pairs: list[Pair], **changes: Any) -> Judgements:
    budget = changes.pop("budget", None) or Budget(max_tokens=64, spent=cache.spent)
    concurrency = changes.pop("concurrency", 2)
    prompt, criteria = changes.pop("prompt", OWN), changes.pop("criteria", {})
    settings = {"retries": 1, "timeout_s": 60.0, "max_tokens": 64, "pause": lambda seconds: None, **changes}
    with ChatClient(url, settings.pop("model", "judge-1"), budget=budget, **settings) as client:
        return judge_pairs(
            pairs,
            prompt=prompt,
            criteria=criteria,
            client=client,
            budget=budget,
            cache=cache,
            concurrency=concurrency,
        )


def kinds(judgements: Judgements) -> list[str]:
    return [judgement.outcome.kind for judgement in judgements.of_pairs]
