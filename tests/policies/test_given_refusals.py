"""Adapters that no mixture can hold are refused by name before anything is written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from mpo_ray.policies.given import check_comparable, look_at
from mpo_ray.policies.loading import ModelError
from tests.policies.adapters_given import (
    adapter,
    as_peft,
    assert_mixture,
    change,
    mix,
    rewrite,
    spoil,
)
from tests.tiny import tiny_llama, tiny_tokenizer

pytestmark = [pytest.mark.filterwarnings("ignore")]  # PEFT's own, of odd adapters


def lose(key: str) -> Callable[[Path], None]:
    def damage(odd: Path) -> None:
        rewrite(odd / "adapter_model.safetensors", lambda state: {k: v for k, v in state.items() if key not in k})

    return damage


def renamed(odd: Path) -> None:
    rewrite(
        odd / "adapter_model.safetensors", lambda state: {k.replace("lora_A", "lora_Q"): v for k, v in state.items()}
    )


def emptied(odd: Path) -> None:
    save_file({}, odd / "adapter_model.safetensors")


def pickled(odd: Path) -> None:
    (odd / "adapter_model.safetensors").rename(odd / "adapter_model.bin")


def cut(odd: Path) -> None:
    content = (odd / "adapter_model.safetensors").read_bytes()
    (odd / "adapter_model.safetensors").write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("config", "damage", "complaint"),
    [
        ({}, spoil(float("nan")), r"adapter_model\.safetensors: the tensor '.*layers\.1.*v_proj.*' holds 1 values of"),
        ({}, spoil(float("inf")), r"adapter_model\.safetensors: the tensor '.*layers\.1.*v_proj.*' holds 1 values of"),
        ({"use_dora": True}, spoil(float("nan")), r"the tensor '.*layers\.1.*v_proj.*' holds 1 values of"),
        ({}, lose("layers.1.self_attn.q_proj"), r"does not fit .* tensors are missing from it .*layers\.1.*q_proj"),
        ({"use_dora": True}, lose("magnitude_vector"), r"6 tensors are missing from it .*lora_magnitude_vector"),
        ({"modules_to_save": ["lm_head"]}, lose("lm_head"), "does not fit the reference model: .*lm_head"),
        ({"bias": "all"}, lose("q_proj.base_layer.bias"), "2 tensors are missing from it .*bias"),
        ({}, renamed, "12 find no place|6 find no place"),
        ({}, emptied, "tensors are missing from it"),
        ({}, pickled, r"has no adapter_model\.safetensors but adapter_model\.bin.*can run code.*convert it"),
        ({}, cut, r"adapter_model\.safetensors: the file is damaged"),
        ({}, lambda odd: change(odd, peft_type="IA3"), "peft_type is 'IA3'; only LORA"),
        ({}, lambda odd: change(odd, gate_lora=3), r"sets gate_lora: 3, which PEFT .* does not know .*remove it"),
        ({}, lambda odd: change(odd, init_lora_weights="pissa_niter_4"), "pissa_niter_4', which changed the base's"),
        ({}, lambda odd: change(odd, init_lora_weights="loftq"), "loftq', which changed the base's weights"),
        ({"lora_bias": True}, lambda odd: None, "PEFT cannot merge this adapter .* the base layer has no bias"),
    ],
)
def test_what_no_mixture_can_hold_is_refused_before_anything_is_written(
    config: dict[str, Any], damage: Callable[[Path], None], complaint: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    odd = adapter(tmp_path / "odd", bases["untied"], **config)
    damage(odd)
    with pytest.raises(ModelError, match=complaint) as error:
        mix(tmp_path / "out" / "mixed", {"plain": bases["plain_untied"], "odd": odd}, bases["untied"])
    assert str(odd) in str(error.value)
    assert not [*(tmp_path / "out").rglob("*")]


def test_a_newer_peft_may_write_settings_that_change_nothing(bases: dict[str, Path], tmp_path: Path) -> None:
    odd = change(adapter(tmp_path / "odd", bases["untied"]), new_one=None, new_two=False, new_three={}, new_four=[])
    assert not look_at(odd, str(bases["untied"])).has_to_merge


def test_an_adapter_of_another_model_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    """Also one that has to be merged; no weights of the reference are opened to see it."""
    for name, changes in {"wider": {"hidden_size": 64}, "deeper": {"num_hidden_layers": 3}}.items():
        other = tiny_llama(tmp_path / name, tiny_tokenizer(), seed=0, **changes)
        for kind in ({}, {"use_dora": True}):
            odd = adapter(tmp_path / f"{name}{len(kind)}", other, **kind)
            with pytest.raises(ModelError, match="does not fit the reference model"):
                check_comparable("theirs", str(odd), str(bases["untied"]))
            with pytest.raises(ModelError, match="does not fit the reference model"):
                mix(tmp_path / "mixed", {"odd": odd, "plain": bases["plain_untied"]}, bases["untied"])
    assert not (tmp_path / "mixed").exists()


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_keys_with_and_without_pefts_prefix_are_one_adapter(
    prefix: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    base, plain = bases["untied"], bases["plain_untied"]
    odd = adapter(tmp_path / "odd", base)
    expected = as_peft(base, odd)
    rewrite(
        odd / "adapter_model.safetensors",
        lambda state: {prefix + key.removeprefix("base_model.model."): tensor for key, tensor in state.items()},
    )
    mix(tmp_path / "mixed", {"odd": odd, "plain": plain}, base)
    assert_mixture(tmp_path / "mixed", expected, as_peft(base, plain))


def test_a_reference_that_is_not_finite_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    base = Path(shutil.copytree(bases["untied"], tmp_path / "base"))
    spoil(float("nan"), "model.safetensors", "layers.1.mlp.up_proj")(base)
    with pytest.raises(ModelError, match=r"base/model\.safetensors: the tensor 'model\.layers\.1\.mlp\.up_proj"):
        mix(tmp_path / "mixed", {"plain": bases["plain_untied"]}, base)
    assert not (tmp_path / "mixed").exists()


@pytest.mark.parametrize(
    ("trained_from", "is_told"),
    [("owner/another-1B", True), ("elsewhere/untied", False), ("/hub/models--me--untied/snapshots/0a1", False)],
)
def test_an_adapter_that_names_another_base_is_told(
    trained_from: str, is_told: bool, bases: dict[str, Path], tmp_path: Path
) -> None:
    odd = change(adapter(tmp_path / "odd", bases["untied"]), base_model_name_or_path=trained_from)
    told = mix(tmp_path / "mixed", {"odd": odd}, bases["untied"])
    assert [f"trained from {trained_from}, and the reference is" in line for line in told] == [True] * is_told
