"""MOPO's stages on a tiny world: the pool, what every policy learns from, its training, and its certificate."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from rich.console import Console

from mpo_ray.config import RunConfig
from mpo_ray.data.sources import DataError
from mpo_ray.evaluation.metrics import Metrics
from mpo_ray.maths.constrained import ratio, solve_lagrangian
from mpo_ray.maths.pool import Pool
from mpo_ray.policies.artefact import write_artefact
from mpo_ray.policies.ensemble import Ensemble
from mpo_ray.policies.loading import load_policy
from mpo_ray.records import REFERENCE
from mpo_ray.run import Run
from mpo_ray.stages.constrained import SHORT, certify_policies, solve, train
from mpo_ray.stages.evaluating import evaluate
from mpo_ray.stages.pipeline import run_single
from mpo_ray.stages.stage import Context
from mpo_ray.storage import RunError
from tests.tiny import tiny_llama, tiny_lora, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("ray_cluster")

WORDS = ["the film", "a plot", "acting was", "a long film", "very short"]
NUM_PROMPTS, NUM_CANDIDATES = 30, 6
PROBLEMS = {
    "loose": {"primary": "good", "bounds": {"short": 0.0}},
    "tight": {"primary": "good", "bounds": {"short": "reference + 0.1"}},
}


def length(prompts: list[str], responses: list[str]) -> list[float]:
    """The reward of objective short."""
    return [-float(len(response.split())) for response in responses]


def goods(prompts: list[str], responses: list[str]) -> list[float]:
    """The reward of objective good."""
    return [float(response.count("good") - response.count("bad")) for response in responses]


def config(root: Path, **changes: Any) -> RunConfig:
    objective = {"preferences": {"path": "unused.jsonl"}}
    rewards = {"good": f"{__file__}:goods", "short": f"{__file__}:length"}
    training = {"epochs": 4, "batch_size": 9, "micro_batch_size": 3, "learning_rate": 0.02, "lora": {"rank": 4}}
    values = {
        "name": "run",
        "storage": str(root),
        "reference": {"model": str(root / "base")},
        "objectives": {name: {**objective, "reward": reward} for name, reward in rewards.items()},
        "evaluation": {"completions_per_prompt": 2, "max_new_tokens": 5, "bootstrap_draws": 50, "soups": False},
        "mopo": {"problems": PROBLEMS, "candidates": "reference", "training": training, **changes},
    }
    return RunConfig.model_validate(values)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory as the stages before leave it: policies, mixture, fit, scored samples, prompts to evaluate on.

    Candidates are words; those that are good are long, so the objectives are opposed.
    """
    root: Path = tmp_path_factory.mktemp("runs")
    tokenizer = tiny_tokenizer()
    base = tiny_llama(root / "base", tokenizer, seed=0)
    run = Run.open(config(root))
    for seed, name in enumerate(("good", "short"), start=1):
        tiny_lora(run.local / "policies" / name, base, seed=seed)
        run.write_json(f"policies/{name}/training.json", {"inputs": f"training of {name}"})
    policies = {name: run.local / "policies" / name for name in ("good", "short")}
    even = {"good": 0.5, "short": 0.5}
    write_artefact(
        run.local / "mixture", objectives=policies, reference=base, copy_reference=False, weights=even, fit={}
    )
    run.write_json("fit.json", {"weights": even, "alternatives": {}})
    prompts = [{"prompt_id": f"{i:016x}", "prompt": text, "is_chat": False} for i, text in enumerate(WORDS)]
    run.write_table("prompts/evaluation/part-00000.parquet", pa.Table.from_pylist(prompts), inputs="prompts")
    rng = np.random.default_rng(0)
    good, bad, end = (tokenizer.convert_tokens_to_ids(token) for token in ("good", "bad", "</s>"))
    rows = []
    for p in range(NUM_PROMPTS):
        for m in range(NUM_CANDIDATES):
            words = [good] * (m // 2 + 1) if m % 2 else [bad] * int(rng.integers(1, 3))
            rows.append(
                {
                    "prompt_id": f"{p:04d}",
                    "sample_id": m,
                    "proposal": REFERENCE,
                    "prompt_ids": [1, 7 + p % 8],
                    "response_ids": [*words, end],
                    "log_ratio_good": float(rng.normal()),
                    "log_ratio_short": float(rng.normal()),
                    "reward_good": float(len(words)) * (1 if words[0] == good else -1),
                    "reward_short": -float(len(words)),
                }
            )
    run.write_table("scores/reference-part-00000.parquet", pa.Table.from_pylist(rows), inputs="scores")
    return root


def context(root: Path, **changes: Any) -> Context:
    given = config(root, **changes)
    return Context(given, Run.open(given, update=True), Console(file=io.StringIO(), width=120))


def _said(given: Context) -> str:
    """What was printed, without its line breaks."""
    return " ".join(given.console.file.getvalue().split())


@pytest.fixture(scope="module")
def solved(storage: Path) -> Context:
    found = context(storage)
    solve(found)
    return found


@pytest.fixture(scope="module")
def trained(solved: Context) -> Context:
    train(solved)
    return solved


@pytest.fixture(scope="module")
def evaluated(trained: Context) -> Context:
    evaluate(trained)
    return trained


def candidates(run: Run, name: str, side: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = run.read_table(f"mopo/{name}/candidates/{side}-00000.parquet").to_pylist()
    return rows


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_policy_learns_from_the_optimum_on_the_training_prompts(solved: Context, name: str) -> None:
    """ρ and the multipliers are those of `solve_lagrangian` on the rows that are written; held-out ones are others."""
    rows, heldout = candidates(solved.run, name, "train"), candidates(solved.run, name, "heldout")
    assert len(rows) + len(heldout) == NUM_PROMPTS
    assert not {row["prompt_id"] for row in rows} & {row["prompt_id"] for row in heldout}
    primary = np.concatenate([row["primary"] for row in rows])
    secondary = np.concatenate([row["secondary"] for row in rows])
    pool = Pool.of_samples(primary, secondary, np.arange(len(rows) + 1) * NUM_CANDIDATES)
    result = solved.run.read_json(f"mopo/{name}/mopo.json")
    expected = solve_lagrangian(pool, np.array([result["bounds"]["short"]]), tau=0.08)
    assert result["multipliers"]["short"] == pytest.approx(expected.multipliers[0])
    np.testing.assert_allclose(np.concatenate([row["ratio"] for row in rows]), expected.ratio)
    assert result["bounds"]["short"] == pytest.approx(0.0 if name == "loose" else 0.6)
    assert bool(expected.multipliers[0] > 0) is (name == "tight")
    aside = Pool.of_samples(
        np.concatenate([row["primary"] for row in heldout]),
        np.concatenate([row["secondary"] for row in heldout]),
        np.arange(len(heldout) + 1) * NUM_CANDIDATES,
    )
    rho = ratio(aside, expected.multipliers, 0.08)
    assert result["heldout_values"]["short"] == pytest.approx(float(aside.expectation(rho * aside.secondary[:, 0])))
    assert all(len(row["response_ids"]) == NUM_CANDIDATES for row in rows)


def test_win_probabilities_of_policies_or_rewards_are_chosen_by_the_config(storage: Path, solved: Context) -> None:
    by_rewards = solved.run.read_table("mopo/pool.parquet")
    implicit = context(storage, wins="implicit", link="bradley_terry", problems={"x": PROBLEMS["loose"]})
    solve(implicit)
    assert not implicit.run.read_table("mopo/pool.parquet")["win_good"].equals(by_rewards["win_good"])
    solve(solved)  # as it was, for the tests that follow


def test_a_policy_is_nearer_to_its_optimum_than_the_reference(trained: Context) -> None:
    """KL from π_ref ρ falls: the policy gives the candidates of large ρ more, relative to the others."""
    run = trained.run
    for name in PROBLEMS:
        policies = Ensemble(str(trained.config.reference.model), {name: str(run.fetch(f"mopo/{name}/policy"))})
        gained = []
        for row in candidates(run, name, "heldout"):
            pairs = [(row["prompt_ids"], ids) for ids in row["response_ids"]]
            logprobs = policies.logprobs([REFERENCE, name], pairs, batch_size=6, pad_id=0)
            target = np.exp(row["log_reference"]) * np.array(row["ratio"])
            gained.append(float(target @ (np.array(logprobs[name]) - np.array(logprobs[REFERENCE]))))
        assert np.mean(gained) > 0.5, name


def test_policies_differ_as_their_bounds_do(trained: Context) -> None:
    """The tighter bound on shortness makes a long candidate less likely against a short one."""
    places = {name: str(trained.run.fetch(f"mopo/{name}/policy")) for name in PROBLEMS}
    policies = Ensemble(str(trained.config.reference.model), places)
    tokenizer = tiny_tokenizer()
    good, end = tokenizer.convert_tokens_to_ids("good"), tokenizer.eos_token_id
    pairs = [([1, 7 + p], [good] * num + [end]) for p in range(8) for num in (3, 1)]
    found = policies.logprobs(list(PROBLEMS), pairs, batch_size=8, pad_id=0)
    loose, tight = (np.array(found[name]).reshape(8, 2) @ [1.0, -1.0] for name in PROBLEMS)
    assert (tight < loose).all()


def test_nothing_is_trained_again_from_the_same_inputs(trained: Context) -> None:
    before = {name: trained.run.fetch(f"mopo/{name}/policy/training.json").stat().st_mtime_ns for name in PROBLEMS}
    train(trained)
    after = {name: trained.run.fetch(f"mopo/{name}/policy/training.json").stat().st_mtime_ns for name in PROBLEMS}
    assert after == before


def test_policies_are_evaluated_like_any_other_and_certified(evaluated: Context) -> None:
    run = evaluated.run
    certify_policies(evaluated)
    metrics = Metrics.from_json(run.read_json("evaluation/metrics.json"))
    assert set(metrics.candidates) == {REFERENCE, "good", "short", "uniform", "mopo-loose", "mopo-tight", "mpo"}
    assert metrics.label("mopo-tight") == "MOPO tight"
    assert metrics.candidates["mopo-tight"].kl.value > 0.1
    for name in PROBLEMS:
        certificate = run.read_json(f"mopo/{name}/certificate.json")
        rates = metrics.candidates[f"mopo-{name}"].win_rates
        assert certificate["primary"]["good"]["value"] == pytest.approx(rates["good"].value)
        found = certificate["bounds"]["short"]
        assert found["value"] == pytest.approx(rates["short"].value)
        assert found["bound"] == pytest.approx(0.0 if name == "loose" else 0.6)
    assert metrics.pareto.hypervolume.num_mopo == 2
    assert metrics.pareto.hypervolume.mopo.value > 0
    assert "not met" not in _said(evaluated)


def test_a_policy_that_misses_its_bound_is_told_what_to_do_unless_it_is_done(evaluated: Context, storage: Path) -> None:
    node = "evaluation/completions.parquet"
    rows = evaluated.run.read_table(node)
    own = pc.equal(rows["candidate"], "mopo-tight")
    lost = pc.if_else(own, -100.0, rows["reward_short"])
    evaluated.run.write_table(node, rows.set_column(rows.column_names.index("reward_short"), "reward_short", lost))
    cloned = context(storage)
    certify_policies(cloned)
    assert "bound 0.600: not met" in _said(cloned)
    assert f"caution: tight: {SHORT}" in _said(cloned)
    online = {"epochs": 4, "method": "online", "values_of": "policy"}
    answered = context(storage, problems={"tight": {**PROBLEMS["tight"], "training": online}})
    certify_policies(answered)
    assert "bound 0.600: not met" in _said(answered)
    assert "caution" not in _said(answered)
    evaluated.run.write_table(node, rows)


def test_the_exported_policy_opens_like_any_other(trained: Context) -> None:
    path = str(trained.run.fetch("mopo/tight/policy"))
    assert load_policy(path, str(trained.config.reference.model)).num_parameters() > 0
    record = json.loads(Path(path, "training.json").read_text())
    assert record["steps"] == 12
    assert record["heldout"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"problems": {"x": {"primary": "good", "bounds": {"short": 0.99}}}},
            r"mopo\.problems\.x: bound short ≥ 0\.9900 cannot be met: the best that any policy on this pool",
        ),
        ({"heldout_share": 0.0001}, r"none of the pool's 180 candidates has a prompt for the heldout side"),
    ],
)
def test_what_cannot_be_solved_is_refused_before_anything_is_trained(
    storage: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        solve(context(storage, **changes))


def test_labels_that_no_two_objectives_share_are_refused(storage: Path) -> None:
    given = context(storage, wins="labels")
    for name, prompt in {"good": 7, "short": 8}.items():
        pairs = {"prompt_ids": [[1, prompt]], "chosen_ids": [[9, 2]], "rejected_ids": [[10, 2]]}
        given.run.write_table(f"reference_logprobs/{name}/train-00000.parquet", pa.table(pairs))
    with pytest.raises(ValueError, match="pairs that good and short label alike: no prompt has two candidates"):
        solve(given)


def test_labels_make_the_pool_where_they_are_shared(storage: Path) -> None:
    given = context(storage, wins="labels", heldout_share=0.3)
    for name in ("good", "short"):
        pairs = [([1, 7 + p], [9, 2], [10, 11, 2]) for p in range(8)]
        prompts, chosen, rejected = zip(*pairs, strict=True)
        columns = {"prompt_ids": prompts, "chosen_ids": chosen, "rejected_ids": rejected}
        if name == "short":
            columns = {**columns, "chosen_ids": rejected, "rejected_ids": chosen}
        given.run.write_table(f"reference_logprobs/{name}/train-00000.parquet", pa.table(columns))
    solve(given)
    pool = given.run.read_table("mopo/pool.parquet")
    assert pool.num_rows == 16
    assert pc.add(pool["win_good"], pool["win_short"]).to_pylist() == [1.0] * 16


def test_a_config_without_problems_says_so(storage: Path) -> None:
    given = config(storage).model_copy(update={"mopo": None})
    plain = Context(given, Run.open(given, update=True), Console(file=io.StringIO()))
    with pytest.raises(RunError, match=r"this config has no stage 'pool': it has no section `mopo`\."):
        run_single(plain, "pool", "mopo")
