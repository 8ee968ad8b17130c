"""What a user can do wrong at the command line, and what it says; nothing expensive starts first."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from mpo_ray.cli import main
from mpo_ray.run import Run
from mpo_ray.run_lock import locked
from tests import tiny_run
from tests.evaluation.judge_server import JudgeServer
from tests.tiny import WORDS, tiny_llama, tiny_lora, tiny_tokenizer

PAIRS = [{"prompt": f"the film {w}", "chosen": "good", "rejected": "bad"} for w in WORDS]


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A config of one objective on local files and a tiny local model."""
    model = tiny_llama(tmp_path / "model", tiny_tokenizer(), seed=0)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    path = tmp_path / "run.yaml"
    path.write_text(
        f"name: mine\nstorage: {tmp_path / 'runs'}\nreference: {{model: {model}}}\n"
        f"objectives:\n  good: {{preferences: {{path: {tmp_path / 'pairs.jsonl'}}}}}\n"
        "samples: {max_new_tokens: 8}\nevaluation: {max_new_tokens: 8}\ndata: {heldout_share: 0.3}\n"
    )
    return path


def _check(run_file: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str]:
    status = main(["check", str(run_file), *more])
    return status, capsys.readouterr().out


@pytest.mark.usefixtures("ray_cluster")
class TestCheck:
    def test_a_sound_config_passes_and_no_run_is_begun(
        self, run_file: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        status, out = _check(run_file, capsys)
        assert status == 0, out
        assert "nothing would stop this run" in out
        assert not (run_file.parent / "runs" / "mine" / "config.yaml").exists()

    def test_every_problem_is_reported_not_only_the_first(
        self, run_file: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (run_file.parent / "model" / "model.safetensors").rename(run_file.parent / "model" / "pytorch_model.bin")
        with (run_file.parent / "pairs.jsonl").open("a") as file:
            file.write('{"prompt": "the film", "chosen": "good"}\n')
        status, out = _check(run_file, capsys, "--set", "scoring.gpus_per_actor=1", "--set", "seed=1")
        assert status == 1
        assert "problem  reference model" in out
        assert "pytorch_model.bin" in out
        assert "problem  resources: scoring: each needs 1 CPU and 1 GPU" in out
        assert "problem  data: objective 'good': 1 of 19 rows are bad" in out
        assert "3 problem(s)" in out

    def test_mopo_s_workers_are_among_the_resources(self, run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Those of all problems, and of one that has its own."""
        large = "{workers: {cpus_per_worker: 64}}"
        problem = "mopo.problems.kind={primary: good}"
        status, out = _check(run_file, capsys, "--set", problem, "--set", f"mopo.training={large}")
        assert status == 1
        assert "problem  resources: mopo.training.workers: each needs 64 CPU" in out
        own = f"mopo.problems.kind.training={large}"
        assert (
            "mopo.problems.kind.training.workers: each needs 64 CPU"
            in _check(run_file, capsys, "--set", problem, "--set", own)[1]
        )

    @pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here; make test-vllm scores with it")
    def test_an_engine_that_is_not_installed_is_named(self, run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        status, out = _check(run_file, capsys, "--set", "scoring.engine=vllm")
        assert status == 1
        assert "problem  scoring engine: scoring.engine: vllm is not installed here. Install it beside" in out

    def test_a_reward_that_cannot_be_imported_is_named(
        self, run_file: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        status, out = _check(run_file, capsys, "--set", "objectives.good.reward=no_such_module:score")
        assert status == 1
        assert "objectives.good.reward: 'no_such_module' cannot be imported" in out

    def test_a_judge_that_does_not_answer_or_lacks_its_key_is_named(
        self, run_file: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with JudgeServer() as server:
            judge = f"evaluation.judge={{url: {server.url}, model: judge-1}}"
            status, out = _check(run_file, capsys, "--set", judge)
            assert "ok       judge" in out
            assert status == 0
        for more, problem in ((), "no connection"), (("api_key_env=NO_SUCH_KEY",), "variable NO_SUCH_KEY"):
            given = [item for setting in more for item in ("--set", f"evaluation.judge.{setting}")]
            status, out = _check(run_file, capsys, "--set", judge, *given)
            assert status == 1
            assert "problem  judge: " in out
            assert problem in out

    def test_prompts_longer_than_the_context_are_found(
        self, run_file: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with (run_file.parent / "pairs.jsonl").open("a") as file:
            file.write(json.dumps({"prompt": "film " * 70, "chosen": "good", "rejected": "bad"}) + "\n")
        status, out = _check(run_file, capsys)
        assert status == 1
        assert "1 of 19 pairs are longer than" in out
        assert "the model's context 64" in out

    def test_unwritable_storage_is_found(self, run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (run_file.parent / "runs").write_text("a file in the way")
        status, out = _check(run_file, capsys)
        assert status == 1
        assert "problem  run name and storage" in out
        assert "cannot be written" in out

    def test_how_labels_were_read_is_told_in_words_before_anything_is_paid_for(
        self, run_file: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A preference that is turned round is seen there. Lines are not wrapped, on a narrow screen either."""
        rows = [
            {"prompt": f"{row['prompt']}", "response_0": row["rejected"], "response_1": row["chosen"], "better_id": 1}
            for row in PAIRS
        ]
        path = run_file.parent / "labels.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = f"{{path: {path}, rename: {{better_id: good}}}}"
        assert main(["check", str(run_file), "--set", f"objectives.good.preferences={source}"]) == 0
        told = capsys.readouterr().err
        first = PAIRS[0]
        example = f'after "{first["prompt"]}", "{first["chosen"]}" is preferred to "{first["rejected"]}"'
        assert (
            "good is read from the column 'better_id'; the number is that of the response that is preferred: "
            f"1 → response_1 is preferred.\n  for example {path}:1, labelled 1: {example}\n"
        ) in told
        assert main(["check", str(run_file), "--set", f"objectives.good.preferences={source}", "--json"]) == 0
        reading = json.loads(capsys.readouterr().out)["counts"]["good"]["reading"]
        assert reading["column"] == "better_id"
        assert reading["means"] == {"1": "response_1 is preferred"}
        assert reading["example"].endswith(example)

    def test_the_conflict_report_is_printed(self, run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        other = f"objectives.bad={{preferences: {{path: {run_file.parent}/pairs.jsonl}}}}"
        status = main(["check", str(run_file), "--set", other, "--json"])
        result = json.loads(capsys.readouterr().out)
        assert status == 0
        [pair] = result["conflict"]
        assert (pair["first"], pair["second"], pair["disagreement"]) == ("good", "bad", 0.0)
        assert "do not conflict" in pair["sentence"]


def test_an_unknown_key_is_refused_with_the_nearest_one(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(run_file), "--set", "policies.betta=0.1"]) == 1
    assert "policies.betta: unknown key; did you mean 'beta'?" in capsys.readouterr().err


def test_a_missing_run_file_is_an_error_in_json_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(tmp_path / "none.yaml"), "--json"]) == 1
    assert "no such run file" in json.loads(capsys.readouterr().out)["error"]


def test_a_reward_model_without_safetensors_stops_a_run_before_anything_starts(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward" / "config.json").write_text("{}")
    (tmp_path / "reward" / "pytorch_model.bin").write_bytes(b"pickle")
    assert main(["run", str(run_file), "--set", f"objectives.good.reward={tmp_path}/reward"]) == 1
    assert "has no model.safetensors but pytorch_model.bin" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "mine" / "manifest.json").exists()


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here; make test-vllm draws with it")
def test_an_engine_that_is_not_installed_stops_a_run_before_anything_starts(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for verb in ("run", "train", "evaluate"):
        assert main([verb, str(run_file), "--set", "scoring.engine=vllm"]) == 1
        assert "scoring.engine: vllm is not installed here. Install it beside" in capsys.readouterr().err
    assert not (run_file.parent / "runs" / "mine" / "manifest.json").exists()


@pytest.mark.usefixtures("ray_cluster")
def test_a_verb_that_the_config_has_no_use_for_says_so(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reference", str(run_file)]) == 1
    assert "it has no reference.sft; the reference is used as it is" in capsys.readouterr().err


@pytest.mark.usefixtures("ray_cluster")
def test_training_goes_on_without_a_reference_to_train(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What `jobs/train_policies.py` calls: the stage of the reference is done where the config has it."""
    assert main(["train", str(run_file)]) == 1
    assert "stage 'pairs' needs 'data', which is not complete" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "give a run file, or a pool of your own with --table FILE --primary NAME --out DIR"),
        (["run.yaml", "--table", "x.parquet"], "give a run file, or a pool of your own"),
        (["--table", "x.parquet", "--out", "x"], "--primary is missing: a pool of your own needs --primary NAME and"),
        (["--table", "x.parquet", "--primary", "x"], "--out is missing"),
    ],
)
def test_mopo_needs_a_run_file_or_a_whole_pool(
    capsys: pytest.CaptureFixture[str], given: list[str], message: str
) -> None:
    assert main(["mopo", *given]) == 1
    assert message in capsys.readouterr().err


OF_A_TABLE = {
    "mopo": "--primary x, --bound x=0.5, --tau 0.08, --radius 0, --variant lagrangian, --sigma 0.01, --out x",
    "fit": "--out x, --method exact, --estimator balanced, --weights x=1, --steps 5, --bootstrap-draws 0, --seed 0",
}


@pytest.mark.parametrize(
    ("verb", "given"), [(v, text.split()) for v in OF_A_TABLE for text in OF_A_TABLE[v].split(",")]
)
def test_what_goes_with_a_table_is_refused_beside_a_run_file(
    capsys: pytest.CaptureFixture[str], verb: str, given: list[str]
) -> None:
    """It would have no effect; that holds for a default as well, and for `fit --at`."""
    for more in ([], ["--at", "x=1"]) if verb == "fit" else ([],):
        assert main([verb, "run.yaml", *given, *more]) == 1
        expected = f"{given[0]} goes with --table. A run takes its settings from the run file: write it there, or give"
        assert expected in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["fit", "mopo"])
@pytest.mark.parametrize("given", [["--set", "seed=1"], ["--update"], ["--address", "auto"]])
def test_what_goes_with_a_run_file_is_refused_beside_a_table(
    capsys: pytest.CaptureFixture[str], verb: str, given: list[str]
) -> None:
    assert main([verb, "--table", "x.parquet", "--out", "x", *given]) == 1
    assert f"{given[0]} goes with a run file; with --table, leave it out" in capsys.readouterr().err


def test_serving_something_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(tmp_path)]) == 1
    assert "is not a run directory" in capsys.readouterr().err


def test_the_quickstart_names_no_file_outside_the_repository() -> None:
    assert "${" not in tiny_run.CONFIG.read_text()
    assert ".." not in tiny_run.CONFIG.read_text()


def test_a_judge_without_its_key_stops_a_run_before_it_begins(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = "evaluation.judge={url: 'http://127.0.0.1:9/v1', model: judge-1, api_key_env: NO_SUCH_KEY}"
    assert main(["run", str(run_file), "--set", judge]) == 1
    assert "The environment variable NO_SUCH_KEY (evaluation.judge.api_key_env) is not set" in capsys.readouterr().err


def test_a_second_command_on_a_run_is_refused_before_ray_starts(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every verb that writes into the run; afterwards the lock is the first one's still."""
    with locked(Run(str(run_file.parent / "runs"), "mine"), "mpo-ray train"):
        for verb in ("run", "data", "train", "fit", "export", "evaluate"):
            assert main([verb, str(run_file)]) == 1
            assert "is in use by `mpo-ray train`, process " in capsys.readouterr().err
        assert not (run_file.parent / "runs" / "mine" / "config.yaml").exists()


def test_a_home_directory_stands_for_its_sign_at_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shell leaves it in --out=~/x and in NAME=~/x."""
    monkeypatch.setenv("HOME", str(tmp_path))
    base = tiny_llama(tmp_path / "base", tiny_tokenizer(), seed=0)
    for seed, name in enumerate(("a", "b")):
        tiny_lora(tmp_path / name, base, seed=seed)
    assert main(["mix", "a=~/a", "b=~/b", "--reference=~/base", "--out=~/mixture"]) == 0, capsys.readouterr().err
    assert (tmp_path / "mixture" / "config.json").is_file()
