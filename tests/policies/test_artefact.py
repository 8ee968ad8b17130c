"""The artefact on disk: what it holds, that it may be moved, and what is refused when it is opened."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import mpo_ray  # noqa: F401 - registers the mixture with transformers
from mpo_ray.policies.artefact import write_artefact
from mpo_ray.policies.loading import ModelError
from tests.policies.material import WEIGHTS, ids_of, paths, write
from tests.tiny import next_logprobs, tiny_llama, tiny_lora, tiny_tokenizer


def test_the_artefact_holds_what_the_design_lists(artefact: Path) -> None:
    config = json.loads((artefact / "config.json").read_text())
    assert config["model_type"] == "mpo_mixture"
    assert config["objectives"] == list(WEIGHTS)
    assert config["weights"] == WEIGHTS
    assert config["reference"] == "reference"
    assert len({*config["policy_digests"].values()}) == 3
    assert AutoConfig.from_pretrained(artefact).vocab_size == len(AutoTokenizer.from_pretrained(artefact))
    assert json.loads((artefact / "fit.json").read_text()) == {"method": "fixed"}
    assert AutoTokenizer.from_pretrained(artefact).chat_template
    assert (artefact / "generation_config.json").is_file()
    assert all(list((artefact / "policies" / name).glob("*.safetensors")) for name in WEIGHTS)
    assert not [path for path in artefact.rglob("*") if path.suffix in {".bin", ".pt"}]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_permissions_follow_the_umask_and_not_the_policies(material: Path, tmp_path: Path, umask: int) -> None:
    """safetensors writes for the owner alone, and a hard link would keep that; the policies stay as they are."""
    source = material / "lora" / "positive" / "adapter_model.safetensors"
    assert source.stat().st_mode & 0o777 == 0o600
    before = os.umask(umask)
    try:
        write(material, tmp_path / "mixture", "lora")
    finally:
        os.umask(before)
    for path in (tmp_path / "mixture" / "policies").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path
    assert source.stat().st_mode & 0o777 == 0o600


def test_a_moved_artefact_still_opens(artefact: Path, tmp_path: Path) -> None:
    """Nothing inside it names the place where it was written."""
    shutil.copytree(artefact, tmp_path / "moved")
    moved = AutoModelForCausalLM.from_pretrained(tmp_path / "moved")
    original = AutoModelForCausalLM.from_pretrained(artefact)
    assert torch.equal(next_logprobs(moved, [1, 8, 9]), next_logprobs(original, [1, 8, 9]))


def test_saving_a_mixture_from_memory_is_refused_with_what_to_do(artefact: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"copying its directory; .*write_artefact"):
        AutoModelForCausalLM.from_pretrained(artefact).save_pretrained(tmp_path / "saved")


def unlinked_copy(material: Path, directory: Path, kind: str = "lora") -> Path:
    """An artefact that shares no file with the material, so that a test may damage it."""
    write(material, directory / "linked", kind)
    return Path(shutil.copytree(directory / "linked", directory / "copy"))


@pytest.mark.parametrize(
    "file", ["policies/concise/adapter_model.safetensors", "policies/detailed/adapter_config.json"]
)
def test_a_corrupted_policy_file_is_refused_by_name(file: str, material: Path, tmp_path: Path) -> None:
    copy = unlinked_copy(material, tmp_path)
    content = bytearray((copy / file).read_bytes())
    content[-5] ^= 1
    (copy / file).write_bytes(content)
    with pytest.raises(ModelError, match=f"{file}: the file is damaged or was altered"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_missing_and_added_files_are_refused_by_name(material: Path, tmp_path: Path) -> None:
    copy = unlinked_copy(material, tmp_path)
    (copy / "policies/positive/extra.json").write_text("{}")
    with pytest.raises(ModelError, match=r"positive/extra\.json: the file was added"):
        AutoModelForCausalLM.from_pretrained(copy)
    os.remove(copy / "policies/positive/extra.json")
    os.remove(copy / "policies/positive/adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"positive/adapter_model\.safetensors: the file is missing"):
        AutoModelForCausalLM.from_pretrained(copy)
    shutil.rmtree(copy / "policies/positive")
    with pytest.raises(ModelError, match="positive: this policy of the mixture is missing"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_another_reference_under_the_adapters_is_refused(material: Path, tmp_path: Path) -> None:
    copy = unlinked_copy(material, tmp_path)
    tiny_llama(copy / "reference", tiny_tokenizer(), seed=99)
    with pytest.raises(ModelError, match="the reference model is not the one"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_a_reference_outside_the_artefact_is_named_and_needed(material: Path, tmp_path: Path) -> None:
    reference = shutil.copytree(material / "reference", tmp_path / "base")
    config = write_artefact(
        tmp_path / "artefact",
        objectives=paths(material, "lora"),
        reference=reference,
        copy_reference=False,
        weights=WEIGHTS,
        fit={},
    )
    assert config.reference == str(reference)
    AutoModelForCausalLM.from_pretrained(tmp_path / "artefact")
    shutil.rmtree(reference)
    with pytest.raises(ModelError, match=r"the reference model .*base, which is not there"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "artefact")


def test_policies_with_different_tokenizers_are_refused(material: Path, tmp_path: Path) -> None:
    """Adapters too: each policy's directory holds the tokenizer it was trained with."""
    other = tiny_tokenizer(["the", "a", "movie"])
    tiny_lora(tmp_path / "other", material / "reference", seed=5, tokenizer=other)
    with pytest.raises(
        ModelError, match="'positive' and 'concise' have different vocabularies: 25 and 10 tokens; first"
    ):
        write_artefact(
            tmp_path / "artefact",
            objectives={"positive": material / "lora" / "positive", "concise": tmp_path / "other"},
            reference=material / "reference",
            copy_reference=True,
            weights={"positive": 1.0},
            fit={},
        )


def test_a_policy_without_safetensors_is_refused(material: Path, tmp_path: Path) -> None:
    policy = Path(shutil.copytree(material / "full" / "concise", tmp_path / "concise"))
    (policy / "model.safetensors").rename(policy / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"has no model\.safetensors but pytorch_model\.bin"):
        write_artefact(
            tmp_path / "artefact",
            objectives={"concise": policy},
            reference=material / "reference",
            copy_reference=True,
            weights={"concise": 1.0},
            fit={},
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_is_a_choice_at_loading(artefact: Path, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(artefact, dtype=dtype)
    assert model.dtype == dtype
    assert model(torch.tensor([ids_of(artefact)])).logits.dtype == torch.float32
    with pytest.raises(ModelError, match="float64 is not supported"):
        AutoModelForCausalLM.from_pretrained(artefact, dtype=torch.float64)


def test_unknown_keywords_are_refused_when_loading(artefact: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded with load_in_8bit"):
        AutoModelForCausalLM.from_pretrained(artefact, load_in_8bit=True)


def ends_of(artefact: Path) -> list[int]:
    return list(json.loads((artefact / "generation_config.json").read_text())["eos_token_id"])


def test_the_end_tokens_are_those_that_transformers_would_use_for_every_model(tmp_path: Path) -> None:
    """A config.json without generation_config, and full policies with an end token of their own."""
    tokenizer = tiny_tokenizer()
    ends = {"reference": [2, 7, 9], "a": 11, "b": [2, 12]}
    for seed, (name, end) in enumerate(ends.items()):
        tiny_llama(tmp_path / name, tokenizer, seed, eos_token_id=end)
    (tmp_path / "reference" / "generation_config.json").unlink()
    (tmp_path / "a" / "generation_config.json").unlink()
    how = {"copy_reference": False, "weights": {"a": 0.5, "b": 0.5}, "fit": {}}
    policies = {name: tmp_path / name for name in "ab"}
    write_artefact(tmp_path / "mixed", objectives=policies, reference=tmp_path / "reference", **how)
    assert ends_of(tmp_path / "mixed") == [2, 7, 9, 11, 12]
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "mixed")
    assert opened.generation_config.eos_token_id == [2, 7, 9, 11, 12]


def test_the_end_that_the_template_writes_is_among_them_and_its_values_are_defaults(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} {{ m.content }} <turn> {% endfor %}"
        "{% if add_generation_prompt %}assistant {% if brief %}short {% endif %}{% endif %}"
    )
    for seed, name in enumerate(("reference", "a")):
        tiny_llama(tmp_path / name, tokenizer, seed)
    write_artefact(
        tmp_path / "mixed",
        objectives={"a": tmp_path / "a"},
        reference=tmp_path / "reference",
        copy_reference=False,
        weights={"a": 1.0},
        fit={},
        template_values={"brief": True},
        text="plain",
    )
    assert ends_of(tmp_path / "mixed") == [2, tokenizer.convert_tokens_to_ids("<turn>")]
    written = AutoTokenizer.from_pretrained(tmp_path / "mixed")
    rendered = written.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == "user hi <turn> assistant short "
    assert AutoConfig.from_pretrained(tmp_path / "mixed").text == "plain"
