"""The judge's stage: a language model compares every candidate's completions with the reference's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from mpo_ray.cluster.progress import bars
from mpo_ray.config import Judge
from mpo_ray.evaluation.judge import Judgements, Pair, judge_pairs
from mpo_ray.evaluation.judge_cache import AnswerCache
from mpo_ray.evaluation.judge_client import ChatClient, JudgeError
from mpo_ray.evaluation.judge_cost import Budget
from mpo_ray.evaluation.judge_prompt import JudgePrompt
from mpo_ray.evaluation.judgements import Outcome, Tally, judged_candidates, tally
from mpo_ray.records import GRID_PREFIX, REFERENCE, decode_prompt, digest, turns_of
from mpo_ray.run import Run
from mpo_ray.stages.stage import Context, Stage
from mpo_ray.whole_files import write_file

CACHE = "evaluation/judge_cache.jsonl"
RESULT = "evaluation/judge.json"
TABLE = "evaluation/judge.parquet"
SCHEMA = pa.schema(
    {name: pa.string() for name in ("candidate", "objective", "prompt_id", "prompt", "response", "reference")}
    | {"outcome": pa.string(), "score": pa.float64()}
    | {"answer_candidate_first": pa.string(), "answer_candidate_second": pa.string()}
)


def judge(context: Context) -> dict[str, Any]:
    """Judge one completion per prompt of every candidate against the reference's, for every objective."""
    settings = context.config.evaluation.judge
    if settings is None:
        raise JudgeError("evaluation.judge is not set: give the judge's url and model in the run file.")
    objectives = list(context.config.objectives)
    completions = context.run.read_table("evaluation/completions.parquet")
    pairs = pairs_to_judge(completions, objectives, settings.num_prompts, context.config.seed)
    with _kept_cache(context.run) as path, bars(context.console) as shown:
        cache = AnswerCache(path)
        budget = _budget(settings, cache.spent)
        with _client(settings, budget) as client:
            judgements = judge_pairs(
                pairs,
                prompt=JudgePrompt.load(settings.template),
                criteria=settings.criteria,
                client=client,
                budget=budget,
                cache=cache,
                concurrency=settings.concurrency,
                progress=lambda done, total: shown.show("questions", done, total),
            )
    result = judge_result(context, pairs, judgements)
    for line in result["remarks"]:
        context.console.print(f"  {line}", markup=False)
    context.run.write_table(TABLE, _table(pairs, judgements))
    context.run.write_json(RESULT, result)
    minima = {name: c["minimum_win_rate"] for name, c in result["candidates"].items()}
    return {name: None if minimum is None else minimum["value"] for name, minimum in minima.items()}


def pairs_to_judge(completions: pa.Table, objectives: list[str], num_prompts: int, seed: int) -> list[Pair]:
    """The first completion of each candidate beside the reference's, for some of the prompts.

    Prompts come one after the other with all their pairs, so that a cost cap cuts off whole prompts and is fair to all
    candidates. Points of the grid are left out. Raises JudgeError if a candidate lacks a prompt.
    """
    columns = ["candidate", "prompt_id", "completion_id", "prompt", "is_chat", "response"]
    first: dict[tuple[str, str], dict[str, Any]] = {}
    for row in completions.select(columns).sort_by("completion_id").to_pylist():
        first.setdefault((row["candidate"], row["prompt_id"]), row)
    candidates = [c for c in dict.fromkeys(c for c, _ in first) if c != REFERENCE and not c.startswith(GRID_PREFIX)]
    prompts = sorted((p for c, p in first if c == REFERENCE), key=lambda p: digest(["judge", seed, p]))[:num_prompts]
    pairs = []
    for prompt in prompts:
        given = first[REFERENCE, prompt]
        for candidate in sorted(candidates):
            if (candidate, prompt) not in first:
                raise JudgeError(f"Candidate {candidate!r} has no completion of prompt {prompt!r}; evaluate again.")
            response = first[candidate, prompt]["response"]
            text = _as_text(given["prompt"], given["is_chat"])
            pairs += [Pair(candidate, o, prompt, text, response, given["response"]) for o in objectives]
    return pairs


def judge_result(context: Context, pairs: list[Pair], judgements: Judgements) -> dict[str, Any]:
    """What judge.json holds: the judge, what was asked and paid, win rates and counts by candidate, and remarks."""
    config = context.config
    assert config.evaluation.judge is not None
    outcomes: dict[str, dict[str, list[Outcome]]] = {}
    for pair, judgement in zip(pairs, judgements.of_pairs, strict=True):
        by_objective = outcomes.setdefault(pair.candidate, {o: [] for o in config.objectives})
        by_objective[pair.objective].append(judgement.outcome)
    settings, evaluation = config.evaluation.judge, config.evaluation
    counts = tally([judgement.outcome for judgement in judgements.of_pairs])
    candidates = judged_candidates(
        outcomes, draws=evaluation.bootstrap_draws, confidence=evaluation.confidence, seed=config.seed
    )
    return {
        "model": settings.model,
        "objectives": list(config.objectives),
        "num_prompts": len({pair.prompt_id for pair in pairs}),
        "num_comparisons": len(pairs),
        "num_questions": judgements.num_questions,
        "num_asked_now": judgements.num_asked,
        "cost": judgements.cost,
        "cost_cap": settings.cost_cap,
        "cost_cap_needed": judgements.cap_needed,
        "confidence": evaluation.confidence,
        "draws": evaluation.bootstrap_draws,
        "position_bias": counts.position_bias,
        "candidates": {name: candidate.as_json() for name, candidate in candidates.items()},
        "remarks": _remarks(counts, len(pairs), judgements, settings),
    }


def check_judge_settings(context: Context) -> None:
    """Refuse what would stop the judge before its first question, without asking it. Raises JudgeError."""
    settings = context.config.evaluation.judge
    if settings is None:
        return
    JudgePrompt.load(settings.template)
    _client(settings, _budget(settings, 0.0)).close()
    unknown = sorted(set(settings.criteria) - set(context.config.objectives))
    if unknown:
        known = ", ".join(context.config.objectives)
        raise JudgeError(f"evaluation.judge.criteria names {unknown[0]!r}; the objectives are {known}.")
    if settings.cost_cap is not None and not settings.price_per_million_input + settings.price_per_million_output:
        raise JudgeError(
            f"evaluation.judge.cost_cap is {settings.cost_cap:g}, but both prices are 0, so nothing would ever reach "
            "it. Set price_per_million_input and price_per_million_output."
        )


def check_judge(context: Context) -> None:
    """As `check_judge_settings`; also ask the URL whether it serves the model. Raises JudgeError."""
    check_judge_settings(context)
    settings = context.config.evaluation.judge
    if settings is not None:
        with _client(settings, _budget(settings, 0.0)) as client:
            client.check()


def _client(settings: Judge, budget: Budget) -> ChatClient:
    key = os.environ.get(settings.api_key_env, "") if settings.api_key_env else None
    if key is not None and not key.strip():
        raise JudgeError(
            f"The environment variable {settings.api_key_env} (evaluation.judge.api_key_env) is not set. Put the "
            "judge's key into it, or remove api_key_env if the judge needs none."
        )
    return ChatClient(
        settings.url,
        settings.model,
        budget=budget,
        api_key=key,
        api_key_env=settings.api_key_env,
        temperature=settings.temperature,
        max_tokens=settings.max_tokens,
        retries=settings.retries,
        timeout_s=settings.timeout_s,
    )


def _budget(settings: Judge, spent: float) -> Budget:
    return Budget(
        input_price=settings.price_per_million_input,
        output_price=settings.price_per_million_output,
        max_tokens=settings.max_tokens,
        cap=settings.cost_cap,
        spent=spent,
    )


@contextmanager
def _kept_cache(run: Run) -> Iterator[Path]:
    """The cache as a file of this machine; other storage gets it when the block ends, however it ends."""
    path = run.local / CACHE
    if run.is_local:
        yield path
        return
    stored = (run.read_text(CACHE) or "").splitlines()
    here = path.read_text(encoding="utf-8").splitlines() if path.exists() else []  # of a process that was killed
    write_file(path, "".join(f"{line}\n" for line in dict.fromkeys([*stored, *here])).encode())
    try:
        yield path
    finally:
        run.write_bytes(CACHE, path.read_bytes())


def _as_text(text: str, is_chat: bool) -> str:
    prompt = decode_prompt(text, is_chat)
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{role}: {turn}" for role, turn in turns_of(prompt))


def _remarks(counts: Tally, num: int, judgements: Judgements, settings: Judge) -> list[str]:
    """What a reader must know of the numbers: what they leave out, and why."""
    remarks = []
    if counts.missing:
        remarks.append(
            f"{counts.missing} of {num} comparisons are missing: the next question might have exceeded "
            f"evaluation.judge.cost_cap {settings.cost_cap:g} ({judgements.cost:.4g} spent). "
            f"By estimates a cap of {judgements.cap_needed:.4g} would do; what is there is not paid for again."
        )
    if counts.unparsed:
        remarks.append(
            f"{counts.unparsed} of {num} comparisons have an answer whose last line is no verdict, also when asked "
            f"again; they are left out. {TABLE} holds the answers. Perhaps evaluation.judge.max_tokens is too small."
        )
    if counts.refused:
        remarks.append(f"The judge refused {counts.refused} of {num} comparisons: {judgements.refusal}.")
    return remarks


def _table(pairs: list[Pair], judgements: Judgements) -> pa.Table:
    """A row per comparison, so that every verdict can be looked at."""
    return pa.Table.from_pylist(
        [
            {
                "candidate": pair.candidate,
                "objective": pair.objective,
                "prompt_id": pair.prompt_id,
                "prompt": pair.prompt,
                "response": pair.response,
                "reference": pair.reference,
                "outcome": judgement.outcome.kind,
                "score": judgement.outcome.score,
                "answer_candidate_first": judgement.answers[0],
                "answer_candidate_second": judgement.answers[1],
            }
            for pair, judgement in zip(pairs, judgements.of_pairs, strict=True)
        ],
        schema=SCHEMA,
    )


def _depends_on(context: Context) -> Any:
    """What the verdicts, and how many are paid for, depend on; not where the judge is, nor how it is reached."""
    settings = context.config.evaluation.judge
    if settings is None:
        return None
    free = {"url", "api_key_env", "template", "concurrency", "retries", "timeout_s"}
    if settings.cost_cap is None:
        free |= {"price_per_million_input", "price_per_million_output"}
    return [settings.model_dump(exclude=free), JudgePrompt.load(settings.template).source]


JUDGE = Stage(
    name="judge",
    title="Judge",
    after=("evaluation",),
    outputs=lambda context: [RESULT, TABLE],
    depends_on=_depends_on,
    work=judge,
)
