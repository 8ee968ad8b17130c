"""vLLM's own `LLM` over mixture artefacts: every token is that of the explicit product of the policies."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from mpo_ray.policies.artefact import policy_path, write_artefact
from mpo_ray.policies.families import FAMILIES
from mpo_ray.policies.loading import ModelError
from mpo_ray.policies.mixture import MixtureForCausalLM
from mpo_ray.run import directory_digest, file_digest
from tests.vllm_plugin.mixtures import MARKS, NAMES, TOKENIZER, WEIGHTS, logits, requests, write_mixture

pytestmark = MARKS


@pytest.fixture
def open_llm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """An engine in this process; at most one at a time."""
    for name, value in {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }.items():
        monkeypatch.setenv(name, os.environ.get(name, value))
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    def opened(artefact: Path, **settings: Any) -> Any:
        return LLM(str(artefact), dtype="float32", enforce_eager=True, max_num_seqs=8, **settings)

    yield opened
    cleanup_dist_env_and_memory()


@pytest.mark.parametrize(
    ("family", "kinds"),
    [(one.model_type, "afa" if one.name == "Qwen2" else "aaa") for one in FAMILIES if one.on_vllm] + [("llama", "fff")],
    ids=lambda value: str(value),
)
def test_greedy_tokens_and_log_probabilities_are_the_products(
    family: str, kinds: str, tmp_path: Path, open_llm: Callable[..., Any]
) -> None:
    """Many requests, 8 at a time, with the artefact's weights and with their own, one-hot ones among them; to 1e-3."""
    artefact = write_mixture(tmp_path, family, kinds)
    check_greedy(open_llm(artefact), artefact, 200 if family == "llama" else 40)


@pytest.mark.parametrize("by_mkl", [True, False], ids=["MKL", "oneDNN"])
def test_either_library_multiplies_the_same(
    by_mkl: bool, tmp_path: Path, open_llm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which of them it is depends on the processor; with biases."""
    from mpo_ray.policies import packed_linear
    from mpo_ray.vllm_plugin import adapted

    if by_mkl and not packed_linear._has_mkl():
        pytest.skip("this build of torch has no MKL")
    for module in (packed_linear, adapted):
        monkeypatch.setattr(module, "packs_by_mkl", lambda: by_mkl)
    artefact = write_mixture(tmp_path, "qwen2", "aaa")
    llm = open_llm(artefact)
    check_greedy(llm, artefact, 40)
    assert bool(llm.apply_model(count_packed)[0]) == by_mkl


def count_packed(model: Any) -> int:
    return sum(hasattr(module, "packed") for module in model.modules())


def test_a_mixture_divided_among_two_processes_is_the_same(tmp_path: Path, open_llm: Callable[..., Any]) -> None:
    """Tensor parallelism, of adapters and of full weights, with biases, and one key-value head that both need.

    A head for each is divided in `test_scoring.py`.
    """
    artefact = write_mixture(tmp_path, "qwen2", "afa")
    check_greedy(open_llm(artefact, tensor_parallel_size=2), artefact, 40)


def check_greedy(llm: Any, artefact: Path, number: int) -> None:
    """So many requests have the tokens of the explicit product, and its log-probabilities to 1e-3."""
    from vllm import SamplingParams

    asked = requests(number)
    answers = llm.generate(
        [{"prompt_token_ids": prompt} for prompt, *_ in asked],
        [
            SamplingParams(
                temperature=0.0,
                max_tokens=length,
                logprobs=0,
                ignore_eos=True,
                extra_args=None if given is None else {"mixture_weights": given},
            )
            for _, given, _, length in asked
        ],
        use_tqdm=False,
    )
    model = MixtureForCausalLM.from_pretrained(artefact)
    for (prompt, _, weights, length), answer in zip(asked, answers, strict=True):
        drawn = list(answer.outputs[0].token_ids)
        assert len(drawn) == length
        expected = logits(model, prompt + drawn, weights)[len(prompt) - 1 : -1].log_softmax(-1)
        assert drawn == expected.argmax(-1).tolist()
        for place, (token, told) in enumerate(zip(drawn, answer.outputs[0].logprobs, strict=True)):
            assert told[token].logprob == pytest.approx(float(expected[place, token]), abs=1e-3)


def test_log_z_comes_with_raw_logits(tmp_path: Path, open_llm: Callable[..., Any]) -> None:
    """log Z_t of every place, by the two tokens past the vocabulary, to 1e-4; none of them is ever drawn."""
    from vllm import SamplingParams

    from mpo_ray.vllm_plugin.log_z import NUM_COLUMNS, read_log_z

    artefact = write_mixture(tmp_path, "llama", "afa")
    llm = open_llm(artefact, logprobs_mode="raw_logits")
    asked = requests(12)
    answers = llm.generate(
        [{"prompt_token_ids": prompt} for prompt, *_ in asked],
        [
            SamplingParams(
                temperature=1.0,
                seed=number,
                max_tokens=length,
                logprobs=1 + NUM_COLUMNS,
                ignore_eos=True,
                detokenize=False,
                extra_args=None if given is None else {"mixture_weights": given},
            )
            for number, (_, given, _, length) in enumerate(asked)
        ],
        use_tqdm=False,
    )
    model = MixtureForCausalLM.from_pretrained(artefact)
    size, differing = len(TOKENIZER), 0
    for (prompt, _, weights, _), answer in zip(asked, answers, strict=True):
        drawn = list(answer.outputs[0].token_ids)
        assert max(drawn) < size
        expected = logits(model, prompt + drawn, weights)[len(prompt) - 1 : -1].logsumexp(-1)
        for place, told in enumerate(answer.outputs[0].logprobs):
            found = read_log_z(told[size].logprob, told[size + 1].logprob)
            assert found == pytest.approx(float(expected[place]), abs=1e-4)
            differing += abs(found) > 0.01
    assert differing > 20, "the policies hardly differ, so that this shows nothing"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"helpfull": 1.0}, "unknown objective 'helpfull'; the objectives are helpful, harmless, 2"),
        ({"helpful": 0.4}, "sum to 0.4, not 1"),
        ("helpful", "is not objective=weight; write helpful=0.7,harmless=0.3"),
        ("helpful=0.5,helpful=0.5", "has two weights"),
        ([1.0], "a list needs a finite number for each of helpful, harmless, 2"),
    ],
)
def test_wrong_weights_are_refused_before_the_engine_has_them(given: Any, message: str) -> None:
    from vllm import SamplingParams

    from mpo_ray.vllm_plugin.request_weights import RequestWeights, expect

    expect(NAMES)
    with pytest.raises(ValueError, match=message):
        RequestWeights.validate_params(SamplingParams(extra_args={"mixture_weights": given}))


def test_a_damaged_artefact_is_refused_at_start(tmp_path: Path, open_llm: Callable[..., Any]) -> None:
    artefact = write_mixture(tmp_path, "llama", "aaa")
    file = artefact / "policies" / "harmless" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.unlink()
    file.write_bytes(data)
    with pytest.raises(Exception, match=r"adapter_model\.safetensors: the file is damaged or was altered"):
        open_llm(artefact)


def test_a_policy_that_lacks_a_tensor_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    write_mixture(tmp_path, "llama", "fff")
    policy = tmp_path / "policy-harmless"
    tensors = load_file(policy / "model.safetensors")
    del tensors["model.layers.1.post_attention_layernorm.weight"]
    save_file(tensors, policy / "model.safetensors", metadata={"format": "pt"})
    given = {name: tmp_path / f"policy-{name}" for name in NAMES}
    again = tmp_path / "again"
    with pytest.raises(ModelError, match=r"policy-harmless: 1 weights .*'model\.layers\.1\.post_attention"):
        write_artefact(
            again, objectives=given, reference=tmp_path / "reference", copy_reference=True, weights=WEIGHTS, fit={}
        )
    assert not again.exists()


def test_an_artefact_that_was_written_from_half_a_policy_is_refused_at_start(
    tmp_path: Path, open_llm: Callable[..., Any]
) -> None:
    """As earlier versions could write one: its digests are those of its files."""
    artefact = write_mixture(tmp_path, "llama", "fff")
    policy = policy_path(artefact, "harmless")
    tensors = load_file(policy / "model.safetensors")
    del tensors["model.layers.1.post_attention_layernorm.weight"]
    (policy / "model.safetensors").unlink()  # it may be the same file as the one that was given
    save_file(tensors, policy / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((artefact / "config.json").read_text())
    config["policy_digests"]["harmless"] = directory_digest(policy)
    config["policy_files"]["harmless"]["model.safetensors"] = file_digest(str(policy / "model.safetensors"))
    (artefact / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match=r"harmless: there are no weights for 'model\.layers\.1\.post_attention"):
        open_llm(artefact)


def drop_sizes(artefact: Path) -> None:
    """Make it one that was written before `text_config` was known."""
    path = artefact / "config.json"
    config = json.loads(path.read_text())
    del config["text_config"]
    path.unlink()
    path.write_text(json.dumps(config))


def test_an_artefact_that_does_not_say_its_sizes_takes_its_references(
    tmp_path: Path, open_llm: Callable[..., Any]
) -> None:
    artefact = write_mixture(tmp_path, "llama", "aaa")
    drop_sizes(artefact)
    answer = open_llm(artefact).generate([{"prompt_token_ids": [1, 7]}], use_tqdm=False)
    assert answer[0].outputs[0].token_ids


def test_an_artefact_with_no_sizes_and_no_reference_has_to_be_written_again(
    tmp_path: Path, open_llm: Callable[..., Any]
) -> None:
    artefact = write_mixture(tmp_path, "llama", "fff")
    drop_sizes(artefact)
    shutil.rmtree(artefact / "reference")
    with pytest.raises(Exception, match=r"config\.json has no text_config, .* Write the artefact again with its"):
        open_llm(artefact)


def test_a_missing_adapter_is_refused_at_start(tmp_path: Path, open_llm: Callable[..., Any]) -> None:
    artefact = write_mixture(tmp_path, "llama", "aaa")
    shutil.rmtree(artefact / "policies" / "harmless")
    with pytest.raises(Exception, match=r"policies/harmless: this policy of the mixture is missing"):
        open_llm(artefact)


def test_a_family_that_vllm_does_not_have_is_refused_by_name(tmp_path: Path, open_llm: Callable[..., Any]) -> None:
    artefact = write_mixture(tmp_path, "codegen", "fff")
    with pytest.raises(Exception, match=r"helpful is a CodeGenForCausalLM, which vLLM has no model for\. Decode this"):
        open_llm(artefact)


def test_a_family_with_a_state_that_is_no_key_value_cache_is_refused_by_name(
    tmp_path: Path, open_llm: Callable[..., Any]
) -> None:
    artefact = write_mixture(tmp_path, "mamba", "fff")
    with pytest.raises(Exception, match=r"helpful: a MambaForCausalLM keeps a state that is no key-value cache, of wh"):
        open_llm(artefact)


def test_policies_that_cannot_fit_into_memory_are_refused_with_what_to_do(
    tmp_path: Path, open_llm: Callable[..., Any]
) -> None:
    artefact = write_mixture(tmp_path, "llama", "aaa", max_position_embeddings=10**9)
    with pytest.raises(Exception, match=r"1 models with 0\.00 GiB of weights and need 1430\.51 GiB for one sequence"):
        open_llm(artefact)
