"""What an ingress has to know of an artefact."""

from __future__ import annotations

from pathlib import Path

from mpo_ray.serving.interface import interface_of
from tests.policies.material import make_material, write


def test_an_artefact_without_the_reference_has_another_interface(tmp_path: Path) -> None:
    """While it replaces one that has it, an ingress that offers the reference calls no replica that lacks it."""
    root = make_material(tmp_path)
    paths = {kind: write(root, root / f"artefact-{kind}", kind) for kind in ("lora", "mixed", "full")}
    found = {kind: interface_of(str(path)) for kind, path in paths.items()}
    assert {kind: one.has_reference for kind, one in found.items()} == {"lora": True, "mixed": True, "full": False}
    vllm = interface_of(str(paths["lora"]), engine="vllm")
    assert (vllm.has_reference, vllm.exact_methods) == (False, ("rejection",))
    assert vllm.digest != found["lora"].digest
    assert found["lora"].digest == found["mixed"].digest != found["full"].digest
