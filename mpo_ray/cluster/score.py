"""What the Ray Data actors do with one part: reference log-probabilities, samples, scores.

Each class loads its models once; calling it turns one table of prompts or responses into one with more columns.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import pyarrow as pa

from mpo_ray.cluster.engines import Draws, PolicyLogprobs, sampler_of, scorer_of
from mpo_ray.config import Actors, Scoring
from mpo_ray.data.rendering import Rendering
from mpo_ray.decoding.offline import Recipe
from mpo_ray.decoding.sampler import sampling_recipe
from mpo_ray.decoding.text_stream import text_behind
from mpo_ray.evaluation.rewards import IMPLICIT, Reward, load_reward
from mpo_ray.policies.ensemble import Ensemble, Sequences
from mpo_ray.policies.loading import load_rendering
from mpo_ray.records import REFERENCE, decode_prompt, decode_reply


class PairReference:
    """Comparisons → token ids and log π_ref of both completions, so that training needs no second model."""

    def __init__(self, reference: str, actors: dict[str, Any], rendering: dict[str, Any]) -> None:
        """rendering: settings of `Rendering`"""
        self._actors = Scoring.model_validate(actors)
        self._rendering = load_rendering(reference, **rendering)
        self._policies = Ensemble(reference, {}, precision=self._actors.precision)

    def __call__(self, table: pa.Table, values: dict[str, Any]) -> pa.Table:
        rows = table.to_pylist()
        prompts = [decode_prompt(row["prompt"], row["is_chat"]) for row in rows]
        columns: dict[str, list[Any]] = {"id": [row["id"] for row in rows]}
        for side in ("chosen", "rejected"):
            replies = [decode_reply(row[side], row.get(f"{side}_is_message", False)) for row in rows]
            finished = [not row.get(f"{side}_is_cut", False) for row in rows]
            ids = [
                self._rendering.ids(prompt, reply, finished=whole)
                for prompt, reply, whole in zip(prompts, replies, finished, strict=True)
            ]
            columns["prompt_ids"], columns[f"{side}_ids"] = (list(part) for part in zip(*ids, strict=True))
            columns[f"log_ref_{side}"] = logprobs(
                self._policies, [REFERENCE], ids, self._actors, self._rendering.tokenizer.pad_token_id
            )[REFERENCE]
        columns["weight"] = [r["weight"] for r in rows]
        return pa.table(columns)


class Sampler:
    """Prompts → m responses each from one proposal at temperature 1, with log π_ref of the whole sequence.

    A proposal is π_ref or a policy; the distribution is not truncated, so that equation (6a) holds.
    """

    def __init__(
        self,
        reference: str,
        policies: Mapping[str, str],
        actors: dict[str, Any],
        rendering: dict[str, Any],
        num_samples: int,
        max_new_tokens: int,
    ) -> None:
        self._actors = Scoring.model_validate(actors)
        self._rendering = load_rendering(reference, **rendering)
        decoded = policies if self._actors.engine == "mpo" else {}  # vLLM opens them itself
        self._ensemble = Ensemble(reference, decoded, precision=self._actors.precision)
        self._sampler = sampler_of(self._ensemble, reference, policies, self._actors)
        self._num_samples, self._max_new_tokens = num_samples, max_new_tokens

    def __call__(self, table: pa.Table, values: dict[str, Any]) -> pa.Table:
        """values: `proposal`; `first_id`, the sample_id of its first response to each prompt; `seed`."""
        recipe = sampling_recipe({values["proposal"]: 1.0}, max_new_tokens=self._max_new_tokens, temperature=1.0)
        seed = int(values["seed"])
        samples = draw(self._sampler, recipe, self._rendering, table, num=self._num_samples, seed=seed)
        pad_id = self._rendering.tokenizer.pad_token_id
        log_ref = logprobs(self._ensemble, [REFERENCE], sequences(samples), self._actors, pad_id)[REFERENCE]
        ids = [values["first_id"] + index for index in samples["sample_id"].to_pylist()]
        lengths = [len(response) for response in samples["response_ids"].to_pylist()]
        return (
            samples.set_column(samples.column_names.index("sample_id"), "sample_id", pa.array(ids, pa.int32()))
            .append_column("proposal", pa.array([values["proposal"]] * samples.num_rows))
            .append_column("num_tokens", pa.array(lengths, pa.int32()))
            .append_column("log_ref", pa.array(log_ref, pa.float64()))
        )


class SampleScorer:
    """Samples → log-ratio of every policy and reward of every objective: the score table (design 5.2).

    Columns that the samples come with are kept as they are.
    """

    def __init__(
        self,
        reference: str,
        policies: Mapping[str, str],
        rewards: Mapping[str, str],
        beta: float,
        actors: dict[str, Any],
        rendering: dict[str, Any],
    ) -> None:
        self._actors = Scoring.model_validate(actors)
        self._rendering = load_rendering(reference, **rendering)
        self._names = list(policies)
        self._policies = scorer_of(reference, policies, self._actors)
        self._rewards = load_rewards(rewards, self._actors)
        self._beta = beta

    def __call__(self, table: pa.Table, values: dict[str, Any]) -> pa.Table:
        names = [name for name in self._names if f"log_ratio_{name}" not in table.column_names]
        new = log_ratios(self._policies, names, table, self._actors, self._rendering.tokenizer.pad_token_id)
        for name, column in new.items():
            table = table.append_column(f"log_ratio_{name}", pa.array(column, pa.float64()))
        ratios = {name: table[f"log_ratio_{name}"].to_pylist() for name in self._names}
        rewards = {name: r for name, r in self._rewards.items() if f"reward_{name}" not in table.column_names}
        return with_rewards(table, rewards, self._rendering, ratios, self._beta)


def draw(
    sampler: Draws,
    recipe: Recipe,
    rendering: Rendering,
    prompts: pa.Table,
    *,
    num: int,
    seed: int,
    with_log_z: bool = False,
    further_ends: Collection[int] = (),
) -> pa.Table:
    """Sample `num` completions for every row of a prompt table; one row per completion.

    further_ends: what ends a completion of this model beside the rendering's own end tokens
    with_log_z: add the column `log_z` in nats, log Ẑ of the completion's particles: with one, Σ_t log Z_t (design 2.3),
        which the recipe then has to measure
    """
    rows = prompts.to_pylist()
    ids = [rendering.prompt_ids(decode_prompt(r["prompt"], r["is_chat"])) for r in rows]
    ends = sorted({*rendering.ends, *further_ends})
    drawn = sampler.draw(ids, recipe, num=num, end_ids=ends, seed=seed)
    columns: dict[str, list[Any]] = {name: [] for name in _SAMPLE_SCHEMA.names}
    for row, prompt_ids, completions in zip(rows, ids, drawn, strict=True):
        for index, completion in enumerate(completions):
            tokens = list(completion.tokens)
            words = tokens[:-1] if completion.ended else tokens  # an end may be no special token
            # a text goes on from its prompt, a chat's reply stands alone
            response = text_behind(rendering.tokenizer, () if row["is_chat"] else prompt_ids, words)
            cells = (
                row["prompt_id"],
                index,
                row["prompt"],
                row["is_chat"],
                response,
                prompt_ids,
                tokens,
                completion.ended,
            )
            for name, cell in zip(_SAMPLE_SCHEMA.names, cells, strict=True):
                columns[name].append(cell)
    table = pa.table(columns, schema=_SAMPLE_SCHEMA)
    if not with_log_z:
        return table
    return table.append_column("log_z", pa.array([c.log_z_hat for row in drawn for c in row], pa.float64()))


_SAMPLE_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample_id", pa.int32()),
        ("prompt", pa.string()),
        ("is_chat", pa.bool_()),
        ("response", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("response_ids", pa.list_(pa.int32())),
        ("finished", pa.bool_()),
    ]
)


def sequences(table: pa.Table) -> list[tuple[list[int], list[int]]]:
    """The token ids of a sample table's rows: (prompt, completion)."""
    return list(zip(table["prompt_ids"].to_pylist(), table["response_ids"].to_pylist(), strict=True))


def log_ratios(
    policies: PolicyLogprobs, names: list[str], table: pa.Table, actors: Actors, pad_id: int
) -> dict[str, list[float]]:
    """ℓ_k = log π_k − log π_ref of every row and objective, nats; log π_ref is the table's own where it has it."""
    known = "log_ref" in table.column_names
    found = logprobs(policies, [*names, *([] if known else [REFERENCE])], sequences(table), actors, pad_id)
    reference = table["log_ref"].to_pylist() if known else found[REFERENCE]
    return {name: [a - b for a, b in zip(found[name], reference, strict=True)] for name in names}


def logprobs(
    policies: PolicyLogprobs, names: list[str], rows: Sequences, actors: Actors, pad_id: int
) -> dict[str, list[float]]:
    """log π of every completion under each of the named models, nats."""
    return policies.logprobs(names, rows, batch_size=actors.batch_size, pad_id=pad_id)


def load_rewards(specs: Mapping[str, str], actors: Actors) -> dict[str, Reward | None]:
    """Rewards by objective; None stands for the implicit one."""
    return {
        name: None if spec == IMPLICIT else load_reward(spec, objective=name, batch_size=actors.batch_size)
        for name, spec in specs.items()
    }


def with_rewards(
    table: pa.Table,
    rewards: Mapping[str, Reward | None],
    rendering: Rendering,
    ratios: Mapping[str, list[float]],
    beta: float,
) -> pa.Table:
    """Append a column `reward_<objective>` for every objective; the implicit reward is β ℓ_k (design 2.1)."""
    prompts = [
        rendering.prompt_text(decode_prompt(prompt, is_chat))
        for prompt, is_chat in zip(table["prompt"].to_pylist(), table["is_chat"].to_pylist(), strict=True)
    ]
    responses = table["response"].to_pylist()
    for name, reward in rewards.items():
        values = [beta * ratio for ratio in ratios[name]] if reward is None else reward(prompts, responses)
        table = table.append_column(f"reward_{name}", pa.array(values, pa.float64()))
    return table
