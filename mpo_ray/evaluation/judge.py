"""Comparing completions with the reference's by a language model: both orders, every answer kept as it arrives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from mpo_ray.evaluation.judge_cache import AnswerCache, answer_key
from mpo_ray.evaluation.judge_client import ChatClient, JudgeError, RefusedError
from mpo_ray.evaluation.judge_cost import Budget, CapReachedError
from mpo_ray.evaluation.judge_prompt import REMINDER, JudgePrompt
from mpo_ray.evaluation.judgements import IDENTICAL, Outcome, Reading, combine, parse_verdict


@dataclass(frozen=True, slots=True)
class Pair:
    """A candidate's completion and the reference's, of one prompt, to be compared for one objective."""

    candidate: str
    objective: str
    prompt_id: str
    prompt: str
    response: str
    reference: str


@dataclass(frozen=True, slots=True)
class Judgement:
    """The outcome of a pair, with the answers to its two orders, candidate first and candidate second."""

    outcome: Outcome
    answers: tuple[str, str] = ("", "")


@dataclass(frozen=True, slots=True)
class Judgements:
    """The outcomes of all pairs, in their order, and what they took."""

    of_pairs: list[Judgement]
    num_questions: int
    num_asked: int  # answers that came from the server now; the rest were known
    cost: float  # of this run's judging so far, known answers included
    cap_needed: float | None  # a cost cap that would do, by estimates; None if nothing is missing for it
    refusal: str | None  # why the first refused question was refused


@dataclass(frozen=True, slots=True)
class _Read:
    verdict: Reading
    answer: str = ""


def judge_pairs(
    pairs: Sequence[Pair],
    *,
    prompt: JudgePrompt,
    criteria: Mapping[str, str],
    client: ChatClient,
    budget: Budget,
    cache: AnswerCache,
    concurrency: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Judgements:
    """Ask about every pair in both orders, in the order of the pairs, until all are answered or the cap is reached.

    Identical responses are not asked about. A question that occurs twice is asked once, and one that the cache knows
    not at all. An answer without a verdict is asked for once more, with a reminder of the form.
    criteria: objective → what the judge is told of it; its name if absent
    Raises JudgeError where the judge cannot be used; what was answered until then is in the cache.
    """

    def question(pair: Pair, a: str, b: str) -> str:
        criterion = criteria.get(pair.objective, pair.objective)
        return prompt.render(
            objective=pair.objective, criterion=criterion, prompt=pair.prompt, response_a=a, response_b=b
        )

    questions = [
        None
        if pair.response == pair.reference
        else (question(pair, pair.response, pair.reference), question(pair, pair.reference, pair.response))
        for pair in pairs
    ]
    texts = list(dict.fromkeys(text for both in questions if both for text in both))
    read = _in_threads(texts, _Reader(client, cache), concurrency, progress)
    refusal = next((read[text].answer for text in texts if read[text].verdict == "refused"), None)
    missing = [text for text in texts if read[text].verdict == "missing"]
    cap_needed = budget.spent + sum(map(budget.estimate, missing)) if missing else None
    if texts and all(one.verdict in ("refused", "missing") for one in read.values()):
        raise JudgeError(_nothing_read(budget, cap_needed, refusal))

    def judgement(both: tuple[str, str] | None) -> Judgement:
        if both is None:
            return Judgement(IDENTICAL)
        first, second = (read[text] for text in both)
        return Judgement(combine(first.verdict, second.verdict), (first.answer, second.answer))

    return Judgements(
        of_pairs=[judgement(both) for both in questions],
        num_questions=len(texts),
        num_asked=client.num_answers,
        cost=budget.spent,
        cap_needed=cap_needed,
        refusal=refusal,
    )


def _nothing_read(budget: Budget, cap_needed: float | None, refusal: str | None) -> str:
    if cap_needed is not None:
        return (
            f"evaluation.judge.cost_cap {budget.cap:g} does not pay for one more question: {budget.spent:.4g} is "
            f"spent. About {cap_needed:.4g} would do for all."
        )
    return (
        f"The judge refused every question, the first with: {refusal}. Look at model, temperature, max_tokens and "
        "template of evaluation.judge, or give a model with a longer context."
    )


class _Reader:
    """From a question to what was read of its answer."""

    def __init__(self, client: ChatClient, cache: AnswerCache) -> None:
        self._client = client
        self._cache = cache
        self.stop = client.stop

    def __call__(self, text: str) -> _Read:
        read = _Read("unparsed")
        for attempt in (text, text + REMINDER):
            key = answer_key(attempt, self._client.settings)
            answer = self._cache.get(key)
            if answer is None:
                try:
                    answer = self._client.ask(attempt)
                except CapReachedError:
                    return _Read("missing")
                except RefusedError as error:
                    return _Read("refused", str(error))
                self._cache.add(key, answer)
            verdict = parse_verdict(answer.text)
            if verdict is not None:
                return _Read(verdict, answer.text)
            read = _Read("unparsed", answer.text)
        return read


def _in_threads(
    texts: Sequence[str], reader: _Reader, concurrency: int, progress: Callable[[int, int], None]
) -> dict[str, _Read]:
    """Read all texts, `concurrency` at a time. The first error ends it, after the answers under way are kept."""
    read: dict[str, _Read] = {}
    with ThreadPoolExecutor(concurrency, thread_name_prefix="judge") as pool:
        futures: dict[Future[_Read], str] = {pool.submit(reader, text): text for text in texts}
        try:
            for future in as_completed(futures):
                read[futures[future]] = future.result()
                progress(len(read), len(texts))
        except BaseException:
            reader.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return read
