"""`mpo-ray mix` and `generate` at the command line: what they write, refuse and say."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from mpo_ray.cli import main
from mpo_ray.data.rendering import Rendering
from mpo_ray.policies.loading import load_policy
from tests.tiny import tiny_llama, tiny_lora, tiny_tokenizer


class TestMix:
    @pytest.fixture
    def given(self, tmp_path: Path) -> list[str]:
        """Two policies of one base, as the arguments of `mpo-ray mix`."""
        base = str(tiny_llama(tmp_path / "base", tiny_tokenizer(), seed=0))
        for seed, name in enumerate(("helpful", "bounded"), start=1):
            tiny_lora(tmp_path / name, base, seed=seed)
        names = [f"{name}={tmp_path / name}" for name in ("helpful", "bounded")]
        return [*names, "--reference", base, "--out", str(tmp_path / "mixed")]

    def test_the_mixture_answers_as_its_policies_do(
        self, given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """All weight on one policy: what that policy alone writes."""
        assert main(["mix", *given, "--weights", "helpful=0.3,bounded=0.7", "--json"]) == 0
        written = json.loads(capsys.readouterr().out)
        assert written == {"out": str(tmp_path / "mixed"), "weights": {"helpful": 0.3, "bounded": 0.7}, "notes": []}
        tokenizer = tiny_tokenizer()
        ids = torch.tensor([Rendering(tokenizer).prompt_ids(({"role": "user", "content": "the film"},))])
        greedy = ["--prompt", "the film", "--temperature", "0", "--max-tokens", "6", "--json"]
        for name in ("helpful", "bounded"):
            assert main(["generate", written["out"], "--weights", f"{name}=1", *greedy]) == 0
            policy = load_policy(str(tmp_path / name), str(tmp_path / "base"))
            own = policy.generate(ids, do_sample=False, max_new_tokens=6, pad_token_id=0)[0, ids.shape[1] :]
            assert json.loads(capsys.readouterr().out)["text"] == tokenizer.decode(own, skip_special_tokens=True)

    def test_weights_are_even_unless_they_are_given(self, given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["mix", *given, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["weights"] == {"helpful": 0.5, "bounded": 0.5}

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (["--weights", "helpful=0.3"], "sum to 0.3, not 1"),
            (["--weights", "polite=1"], "unknown objective 'polite'"),
            (["--weights", "helpful=0.4,helpful=0.6"], "'helpful' has two weights"),
            (["bounded=elsewhere"], "'bounded=elsewhere': write NAME=DIR, once for each policy"),
            (["a/b=elsewhere"], "'a/b': names are letters, digits, - and _"),
            (["other=nowhere"], "nowhere: no such directory, and as a hub id it could not be fetched"),
        ],
    )
    def test_what_cannot_be_mixed_is_refused(
        self, given: list[str], capsys: pytest.CaptureFixture[str], more: list[str], message: str
    ) -> None:
        assert main(["mix", *given[:2], *more, *given[2:]]) == 1
        assert message in capsys.readouterr().err

    def test_a_directory_with_something_in_it_is_left_alone(
        self, given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "mixed").mkdir()
        (tmp_path / "mixed" / "notes").write_text("mine")
        assert main(["mix", *given]) == 1
        assert f"--out {tmp_path / 'mixed'} is there already" in capsys.readouterr().err
        assert [path.name for path in (tmp_path / "mixed").iterdir()] == ["notes"]


@pytest.mark.slow
class TestGenerate:
    def test_it_answers_from_a_run_and_with_other_weights(
        self, finished_run: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        given = ["generate", str(finished_run), "--prompt", "review the old hotel in oslo", "--json"]
        greedy = [*given, "--temperature", "0", "--max-tokens", "12"]
        answers = []
        for weights in ("positive=1", "concise=1"):
            assert main([*greedy, "--weights", weights]) == 0
            answers.append(json.loads(capsys.readouterr().out)["text"])
        assert answers[0] != answers[1]

    @pytest.mark.parametrize(
        ("weights", "message"),
        [
            ("positive=0.7,concise=0.7", "sum to 1.4, not 1"),
            ("positive=1.5,concise=-0.5", "at least 0"),
            ("polite=1", "unknown objective 'polite'"),
            ("positive", "is not objective=weight"),
        ],
    )
    def test_wrong_weights_are_refused(
        self, finished_run: Path, capsys: pytest.CaptureFixture[str], weights: str, message: str
    ) -> None:
        assert main(["generate", str(finished_run), "--prompt", "x", "--weights", weights]) == 1
        assert message in capsys.readouterr().err

    def test_particles_draw_the_whole_answer(self, finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        given = ["generate", str(finished_run), "--prompt", "review the old hotel in oslo", "--json", "--seed", "3"]
        answers = []
        for particles in ("1", "16", "16"):
            assert main([*given, "--particles", particles]) == 0
            answers.append(json.loads(capsys.readouterr().out)["text"])
        assert answers[0] != answers[1] == answers[2]

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (["--particles", "0"], "particles 0, max_attempts 1000: both are 1 or more"),
            (
                ["--particles", "4", "--temperature", "0"],
                "an exact mode draws whole sequences; use a temperature above 0",
            ),
            (["--method", "rejection", "--temperature", "2"], "use sequential Monte Carlo"),
        ],
    )
    def test_particles_that_cannot_be_are_refused(
        self, finished_run: Path, capsys: pytest.CaptureFixture[str], given: list[str], message: str
    ) -> None:
        assert main(["generate", str(finished_run), "--prompt", "x", *given]) == 1
        assert message in capsys.readouterr().err

    def test_a_damaged_policy_is_refused_by_name(
        self, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shutil.copytree(finished_run / "mixture", tmp_path / "mixture")
        weights = tmp_path / "mixture" / "policies" / "concise" / "adapter_model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.unlink()
        weights.write_bytes(content)
        assert main(["generate", str(tmp_path / "mixture"), "--prompt", "x"]) == 1
        assert "adapter_model.safetensors: the file is damaged or was altered" in capsys.readouterr().err
