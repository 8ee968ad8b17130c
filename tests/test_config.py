"""The run file: what a right one means, and that every wrong one is refused by place, value and remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mpo_ray.config import RunConfig
from mpo_ray.records import check_weights, digest
from mpo_ray.run_file import load_config, parse_config
from tests.run_files import complaint


def test_a_minimal_file_gets_its_defaults_and_states_them(raw: dict[str, Any]) -> None:
    """What as_json says is the whole configuration: reading it again gives the same."""
    config = parse_config(raw)
    assert config.samples.samples_per_prompt == 4
    assert list(config.objectives) == ["helpful", "harmless"]
    again = parse_config(config.as_json())
    assert again == config
    assert again.digest == config.digest


def test_the_digest_names_the_content(raw: dict[str, Any]) -> None:
    """A default that is written out changes nothing; another value does."""
    config = parse_config(raw)
    assert parse_config(raw, ["fit.bsmd.steps=2000"]).digest == config.digest
    assert parse_config(raw, ["fit.bsmd.steps=2001"]).digest != config.digest


@pytest.mark.parametrize(
    ("place", "value", "expected"),
    [
        (("polices",), {}, "polices: unknown key; did you mean 'policies'?"),
        (("policies",), {"betta": 1.0}, "policies.betta: unknown key; did you mean 'beta'?"),
        (("policies",), {"lora": {"rnak": 4}}, "policies.lora.rnak: unknown key; did you mean 'rank'?"),
        (("policies",), {"workers": {"num_worker": 2}}, "policies.workers.num_worker: unknown key; did you mean 'num_"),
        (("objectives", "helpful", "rewrad"), "x", "objectives.helpful.rewrad: unknown key; did you mean 'reward'?"),
        (
            ("objectives", "helpful", "preferences"),
            {"pth": "x"},
            "objectives.helpful.preferences.pth: unknown key; did you mean 'path'?",
        ),
        (("fit",), {"zzzzz": 1}, "fit.zzzzz: unknown key; known keys: method, estimator, bsmd, decoded, weights,"),
    ],
)
def test_an_unknown_key_is_refused_and_the_nearest_known_one_named(
    raw: dict[str, Any], place: tuple[str, ...], value: object, expected: str
) -> None:
    """At the top, inside a section, inside an optional section, inside an objective."""
    below = raw
    for key in place[:-1]:
        below = below[key]
    below[place[-1]] = value
    assert expected in complaint(raw)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=many", "seed: Input should be a valid integer"),
        ("seed=many", "(got 'many')"),
        ("seed=-1", "seed: Input should be greater than or equal to 0 (got -1)"),
        ("policies.beta=0", "policies.beta: Input should be greater than 0 (got 0)"),
        ("policies.beta=.nan", "policies.beta: Input should be a finite number"),
        ("policies.loss=ppo", "policies.loss: Input should be 'dpo' or 'ipo' (got 'ppo')"),
        ("policies.zero_stage=4", "policies.zero_stage: Input should be 0, 1, 2 or 3 (got 4)"),
        ("data.heldout_share=1.5", "data.heldout_share: Input should be less than or equal to 1 (got 1.5)"),
        ("name=my run", "name: String should match pattern"),
        ("name=../elsewhere", "name: String should match pattern"),
        ("objectives={}", "objectives: Dictionary should have at least 1 item"),
        ("objectives.helpful=text", "objectives.helpful: Input should be a valid dictionary"),
        ("decoding.particles=0", "decoding.particles: Input should be greater than 0 (got 0)"),
        ("serve.port=70000", "serve.port: Input should be less than or equal to 65535 (got 70000)"),
    ],
)
def test_a_wrong_type_or_value_is_refused_with_place_and_value(
    raw: dict[str, Any], override: str, expected: str
) -> None:
    """`place: what is wrong (got value)`."""
    assert expected in complaint(raw, override)


def test_a_missing_key_is_named_and_all_problems_are_told_at_once(raw: dict[str, Any]) -> None:
    """One run of the command shows everything that has to be mended."""
    del raw["reference"]
    raw["objectives"]["helpful"] = {}
    raw["seed"] = "x"
    message = complaint(raw)
    assert message.startswith("run.yaml: 3 problem(s):")
    assert "reference: this key is required" in message
    assert "objectives.helpful.preferences: this key is required" in message
    assert "seed:" in message


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (
            {"helpful": 1.5, "harmless": -0.5},
            "fit.weights: the weight of 'harmless' is -0.5; weights are finite and at",
        ),
        ({"helpful": 0.5, "harmless": 0.6}, "sum to 1.1, not 1; divide each by 1.1"),
        ({"helpful": 0.0, "harmless": 0.0}, "all weights are 0"),
        ({"helpfull": 1.0}, "fit.weights: unknown objective 'helpfull'; the objectives are helpful, harmless."),
    ],
)
def test_fixed_weights_off_the_simplex_are_refused(raw: dict[str, Any], weights: object, expected: str) -> None:
    """λ_k ≥ 0, Σ_k λ_k = 1, one of the run's objectives each."""
    raw["fit"] = {"method": "fixed", "weights": weights}
    assert expected in complaint(raw)


def test_weights_come_back_in_the_order_of_the_objectives() -> None:
    """An objective that is left out has weight 0."""
    found = check_weights({"b": 0.25, "a": 0.75}, ["a", "c", "b"], where="here")
    assert list(found.items()) == [("a", 0.75), ("c", 0.0), ("b", 0.25)]


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"fit": {"method": "fixed"}}, "weights go with method `fixed` and only with it; method is 'fixed'"),
        (
            {"fit": {"weights": {"helpful": 1.0}}},
            "weights go with method `fixed` and only with it; method is 'decoded'",
        ),
        ({"samples": {"samples_per_prompt": 1}}, "samples.samples_per_prompt: Input should be greater than or equal"),
        (
            {"policies": {"batch_size": 30, "micro_batch_size": 8}},
            "policies: batch_size 30 is not a multiple of micro_batch_size × num_workers = 8",
        ),
        (
            {"policies": {"batch_size": 8, "micro_batch_size": 8, "workers": {"num_workers": 2}}},
            "batch_size 8 is not a multiple of micro_batch_size × num_workers = 16",
        ),
        ({"serve": {"min_replicas": 5}}, "serve: max_replicas 4 is below min_replicas 5"),
        ({"serve": {"vllm": {"seed": 1}}}, "serve: vllm: these arguments are for engine: vllm; set it, or leave"),
        ({"scoring": {"vllm": {"seed": 1}}}, "scoring: vllm: these arguments are for engine: vllm; set it, or leave"),
        ({"scoring": {"engine": "vllm", "vllm": {"runner": "x"}}}, "scoring: vllm.runner: it follows from the"),
        ({"serve": {"engine": "vllm", "vllm": {"model": "x"}}}, "serve: vllm.model: it follows from the artefact and"),
        ({"objectives": {"mpo": {"preferences": {"embedded": "pairs"}}}}, "objective 'mpo': names are"),
        ({"objectives": {"reference": {"preferences": {"embedded": "pairs"}}}}, "objective 'reference': names are"),
        ({"objectives": {"a/b": {"preferences": {"embedded": "pairs"}}}}, "objective 'a/b': names are"),
        ({"objectives": {"a": {"preferences": {}}}}, "give exactly one of path, hub, embedded; got none"),
        (
            {"objectives": {"a": {"preferences": {"path": "x", "hub": "y"}}}},
            "objectives.a.preferences: give exactly one of path, hub, embedded; got ['path', 'hub']",
        ),
    ],
)
def test_values_that_do_not_go_together_are_refused(
    raw: dict[str, Any], section: dict[str, Any], expected: str
) -> None:
    """Each with the values seen."""
    assert expected in complaint({**raw, **section})


@pytest.mark.parametrize(
    ("evaluation", "expected"),
    [
        (
            {"mixtures": {"mine": {"helpful": 0.9}}},
            "evaluation.mixtures.mine: the weights {'helpful': 0.9, 'harmless':",
        ),
        ({"mixtures": {"mine": {"helpfull": 1.0}}}, "evaluation.mixtures.mine: unknown objective 'helpfull'"),
        ({"mixtures": {"soup-mpo": {"helpful": 1.0}}}, "evaluation.mixtures: 'soup-mpo': names are letters"),
        ({"mixtures": {"fit-mine": {"helpful": 1.0}}}, "evaluation.mixtures: 'fit-mine': names are letters"),
        ({"mixtures": {"helpful": {"helpful": 1.0}}}, "evaluation.mixtures: 'helpful' already names another candidate"),
        ({"models": {"grid-1": "x"}}, "evaluation.models: 'grid-1': names are letters"),
        ({"models": {"a/b": "x"}}, "evaluation.models: 'a/b': names are letters"),
        (
            {"models": {"mine": "x"}, "mixtures": {"mine": {"helpful": 1.0}}},
            "evaluation.models: 'mine' already names another candidate; every candidate needs a name of its own",
        ),
    ],
)
def test_candidates_that_cannot_be_told_apart_or_weighed_are_refused(
    raw: dict[str, Any], evaluation: dict[str, Any], expected: str
) -> None:
    """Given weights are on the simplex, and every candidate of the evaluation has a name of its own."""
    assert expected in complaint({**raw, "evaluation": evaluation})


@pytest.mark.parametrize("name", ["soup-uniform", "soup-mpo", "fit-paper", "grid-soup-3"])
def test_an_objective_cannot_have_the_name_of_a_candidate(raw: dict[str, Any], name: str) -> None:
    assert f"objective '{name}': names are" in complaint({**raw, "objectives": {name: raw["objectives"]["helpful"]}})


def test_labels_are_texts_whatever_yaml_makes_of_them(raw: dict[str, Any]) -> None:
    """Keys of one kind, so that a digest of them exists."""
    means: dict[Any, str] = {0: "first", 1: "second", 0.5: "tie", "tie": "tie", -1: "missing"}
    objective = next(iter(raw["objectives"].values()))
    objective["label_means"] = means
    config = RunConfig.model_validate(raw)
    found = next(iter(config.objectives.values())).label_means
    assert found == {str(label): meaning for label, meaning in means.items()}
    assert digest(found)
    objective["label_means"] = {0: "best"}
    with pytest.raises(ValueError, match="label_means"):
        RunConfig.model_validate(raw)


def test_accumulation_is_what_is_left_of_the_batch(raw: dict[str, Any]) -> None:
    """batch_size = micro_batch_size × num_workers × accumulation."""
    raw["policies"] = {"batch_size": 32, "micro_batch_size": 4, "workers": {"num_workers": 2}}
    assert parse_config(raw).policies.accumulation == 4


def test_a_configuration_cannot_be_changed(raw: dict[str, Any]) -> None:
    """It names a run: its digest must stay true."""
    config: Any = parse_config(raw)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3
    assert isinstance(config, RunConfig)


def test_particles_and_another_temperature_than_1_are_refused_together(raw: dict[str, Any]) -> None:
    """π_λ is defined at temperature 1; token by token any temperature goes."""
    message = complaint(raw, "decoding.particles=4", "evaluation.temperature=0.7")
    assert "evaluation.temperature is 0.7, and the 4 decoding.particles draw from π_λ" in message
    assert "set it to 1, or decoding.particles to 1" in message
    assert parse_config(raw, ["evaluation.temperature=0.7"]).decoding.particles == 1
    assert parse_config(raw, ["decoding.particles=4"]).evaluation.temperature == 1.0


MOPO = {"problems": {"kind": {"primary": "helpful", "bounds": {"harmless": "reference - 0.02"}}}}


def test_mopo_s_problems_name_objectives_and_bounds(raw: dict[str, Any]) -> None:
    """Bounds are numbers or texts; settings that are left out have the paper's τ and no radius."""
    assert parse_config(raw).mopo is None
    mopo = parse_config({**raw, "mopo": MOPO}).mopo
    assert mopo is not None
    assert mopo.problems["kind"].bounds == {"harmless": "reference - 0.02"}
    assert (mopo.tau, mopo.radius, mopo.variant) == (0.08, 0.0, "lagrangian")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("mopo.problems={}", "mopo.problems: Dictionary should have at least 1 item"),
        ("mopo.problems.kind.primary=helpfull", "mopo.problems.kind: unknown objective 'helpfull'; the objectives are"),
        ("mopo.problems.kind.bounds={harm: 0.5}", "mopo.problems.kind: unknown objective 'harm'"),
        (
            "mopo.problems.kind.bounds={helpful: 0.5}",
            "the primary objective 'helpful' is maximised, and cannot be bounded",
        ),
        ("mopo.problems.kind.bounds={harmless: 1.2}", "problems.kind: bound harmless: 1.2 is no win probability"),
        ("mopo.problems.kind.bounds={harmless: much}", "problems.kind: bound harmless: 'much' is no win probability"),
        (
            "mopo.problems.kind.bounds={harmless: adaptive}",
            "the bound of 'harmless' is adaptive, and follows an online training; set the training's method to online",
        ),
        ("mopo.tau=0", "mopo.tau: Input should be greater than 0 (got 0)"),
        ("mopo.radius=-0.1", "mopo.radius: Input should be greater than or equal to 0 (got -0.1)"),
        ("mopo.problems={'a b': {primary: helpful}}", "mopo.problems: 'a b': names are letters, digits, - and _"),
        ("mopo.training.values_of=policy", "values_of is policy, and the method is offline"),
        ("mopo.training.batch_size=6", "batch_size 6 is not a multiple of micro_batch_size × num_workers = 4"),
    ],
)
def test_a_problem_that_makes_no_sense_is_refused(raw: dict[str, Any], override: str, expected: str) -> None:
    assert expected in complaint({**raw, "mopo": MOPO}, override)


def test_candidates_that_nobody_draws_are_refused(raw: dict[str, Any]) -> None:
    drawn = ("mopo.candidates=reference", "samples.proposals=policies")
    assert "π_ref draws no candidates; set samples.proposals to all" in complaint({**raw, "mopo": MOPO}, *drawn)
    assert parse_config(
        {**raw, "mopo": MOPO}, ["mopo.training.method=online", "mopo.problems.kind.bounds.harmless=adaptive"]
    )


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[1].glob("configs/*.yaml")), ids=lambda path: path.stem)
def test_every_run_file_of_the_project_is_sound(path: Path) -> None:
    assert load_config(path).objectives
