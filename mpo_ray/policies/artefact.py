"""The mixture artefact on disk: writing it from trained policies, and checking it before it is loaded (design 5.3).

config.json  generation_config.json  fit.json  tokenizer and chat template
policies/<objective>/                LoRA adapter or full weights
reference/                           where it was copied
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Container, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from transformers import AutoConfig, GenerationConfig

from mpo_ray.data.chat_template import with_defaults
from mpo_ray.data.end_tokens import ends_of, model_ends
from mpo_ray.data.limits import longest_text
from mpo_ray.data.rendering import Rendering
from mpo_ray.policies.given import KEPT, Tell, check_together, keep, look_at
from mpo_ray.policies.loading import ModelError, is_adapter, load_tokenizer, pad_within
from mpo_ray.policies.mixture_config import MixtureConfig
from mpo_ray.policies.precision import AUTO, PRECISIONS, own_precision
from mpo_ray.policies.vocabulary import vocabulary_digest
from mpo_ray.policies.weight_files import check_weight_files
from mpo_ray.records import REFERENCE, check_weights
from mpo_ray.run import directory_digest, file_digest

POLICIES = "policies"
_LOG = logging.getLogger(__name__)


def write_artefact(
    directory: Path,
    *,
    objectives: Mapping[str, str | Path],
    reference: str | Path,
    copy_reference: bool,
    weights: Mapping[str, float],
    fit: Mapping[str, Any],
    precision: str = AUTO,
    copy_policies: bool = True,
    template_values: Mapping[str, Any] | None = None,
    text: Literal["rendered", "plain"] = "rendered",
    tell: Tell = _LOG.warning,
) -> MixtureConfig:
    """Write the artefact of the policies in `objectives` (directory or hub id by name, in order) into `directory`.

    An adapter that cannot be stacked is merged into the reference, and kept with full weights. Files are hard links
    where the file system allows it, copies elsewhere. Without `copy_reference` the artefact names the reference: a hub
    id as it is, a directory by its absolute path. Without `copy_policies` it has symbolic links to them, and lasts as
    long as they stay where they are. Its end tokens are the chat template's and all that transformers would use for
    the reference or a policy.
    template_values: become defaults of the chat template, so that whoever uses the artefact's tokenizer has them
    precision: in which the artefact is opened by default, and policies are kept that have to be merged; auto is that of
        the models' files
    text: what prompts are that are texts; see `Rendering`
    tell: is given lines that a user should read
    Raises ModelError where policies do not fit together, before anything is written, ValueError where the weights are
    not on the simplex.
    """
    names = list(objectives)
    weights = check_weights(weights, names, where="the mixture's weights")
    reference = str(reference)
    is_local = Path(reference).is_dir()
    if copy_reference and not is_local:
        raise ModelError(f"{reference}: only a reference on this machine can be copied; pass copy_reference=False.")
    if is_local:
        check_weight_files(Path(reference))
    found = {name: look_at(given, reference) for name, given in objectives.items()}
    if precision == AUTO:
        adapted = any(is_adapter(policy.path) for policy in found.values())
        precision = own_precision(reference if adapted else found[names[0]].path)
    tokenizers = [load_tokenizer(reference), *(p.tokenizer for p in found.values() if p.tokenizer is not None)]
    tokenizer = check_together(found, tokenizers[0], tell)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".merged-", dir=directory.parent) as scratch:
        kept = {
            name: keep(policy, name, reference, Path(scratch) / name, precision=precision, tell=tell)
            for name, policy in found.items()
        }
        (directory / POLICIES).mkdir(parents=True, exist_ok=True)
        for name, policy in kept.items():
            if policy.parent == Path(scratch):
                policy.rename(directory / POLICIES / name)
            elif copy_policies:
                _copy(policy, directory / POLICIES / name, KEPT)
            else:
                (directory / POLICIES / name).symlink_to(policy.resolve())
    if copy_reference:
        _copy(Path(reference), directory / REFERENCE)
    if fit:
        (directory / "fit.json").write_text(json.dumps(fit, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    pad_within(tokenizer, found[names[0]].vocab_size)
    models = [reference, *(str(directory / POLICIES / name) for name in names)]
    ends = {*ends_of(*tokenizers), *(end for model in models for end in model_ends(model))}
    rendering = Rendering(tokenizer, template_values=template_values, model_ends=ends)
    _generation_config(rendering).save_pretrained(directory)
    tokenizer.chat_template = with_defaults(tokenizer.chat_template, rendering.template_values)
    tokenizer.save_pretrained(directory)
    base = AutoConfig.from_pretrained(reference, trust_remote_code=False).get_text_config()
    base.vocab_size = found[names[0]].vocab_size
    base.name_or_path = ""  # where it was read is nobody's business
    config = MixtureConfig(
        objectives=names,
        weights=weights,
        reference=REFERENCE if copy_reference else str(Path(reference).absolute()) if is_local else reference,
        reference_digest=directory_digest(reference) if is_local else None,
        policy_digests={name: directory_digest(directory / POLICIES / name) for name in names},
        policy_files={name: _file_digests(directory / POLICIES / name) for name in names},
        vocabulary_digest=vocabulary_digest(tokenizer),
        vocab_size=base.vocab_size,
        max_position_embeddings=longest_text(base),
        text=text,
        text_config=base,
        architectures=["MixtureForCausalLM"],
        dtype=str(PRECISIONS[precision]).removeprefix("torch."),
    )
    config.save_pretrained(directory)
    return config


def policy_path(directory: Path, objective: str) -> Path:
    return directory / POLICIES / objective


def reference_path(directory: Path, config: MixtureConfig) -> str:
    """Where the artefact's reference lies: inside it, at a path, or a hub id."""
    return str(directory / REFERENCE) if config.reference == REFERENCE else str(config.reference)


def has_reference(directory: Path, config: MixtureConfig) -> bool:
    """Whether the reference is loaded with the policies, as the base of some adapter."""
    return any(is_adapter(policy_path(directory, name)) for name in config.objectives)


def check_artefact(directory: Path, config: MixtureConfig) -> None:
    """Refuse an artefact whose policies, reference or tokenizer are not those it was written with."""
    if not config.objectives:
        raise ModelError(f"{directory}: config.json names no objectives; write the artefact again.")
    for name in config.objectives:
        _check_content(policy_path(directory, name), config.policy_digests.get(name), config.policy_files.get(name, {}))
    reference = Path(reference_path(directory, config))
    if config.reference_digest is not None and has_reference(directory, config):
        if not reference.is_dir():
            raise ModelError(
                f"{directory}: its LoRA policies adapt the reference model {reference}, which is not there. Put it "
                "back, or write the artefact again with its reference copied."
            )
        if directory_digest(reference) != config.reference_digest:
            raise ModelError(
                f"{reference}: the reference model is not the one that the policies of {directory} were trained from: "
                "its files have changed. Put the old ones back, or train the policies again."
            )
    if vocabulary_digest(load_tokenizer(str(directory))) != config.vocabulary_digest:
        raise ModelError(
            f"{directory}: the tokenizer is not the one that the policies share; write the artefact again."
        )


def _check_content(path: Path, expected: str | None, files: Mapping[str, str]) -> None:
    if not path.is_dir():
        raise ModelError(f"{path}: this policy of the mixture is missing; copy the artefact whole.")
    if directory_digest(path) == expected:
        return
    found = _file_digests(path)
    wrong = next((name for name in sorted({*files, *found}) if found.get(name) != files.get(name)), "config.json")
    state = "is missing" if wrong not in found else "was added" if wrong not in files else "is damaged or was altered"
    raise ModelError(
        f"{path / wrong}: the file {state} since the mixture was written (its content digest differs). Copy it again "
        "from the run, or write the artefact again."
    )


def _file_digests(path: Path) -> dict[str, str]:
    return {str(f.relative_to(path)): file_digest(str(f)) for f in sorted(path.rglob("*")) if f.is_file()}


def _copy(source: Path, target: Path, kinds: Container[str] | None = None) -> None:
    """All of a directory, or the files at its top that have one of these endings."""
    root = source.resolve()
    for directory, _, files in os.walk(root, followlinks=True):
        place = target / Path(directory).relative_to(root)
        if kinds is not None and place != target:
            break
        place.mkdir(parents=True, exist_ok=True)
        for name in files:
            if kinds is None or Path(name).suffix in kinds:
                _link(Path(directory, name).resolve(), place / name)


def _link(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it where the file system cannot, or where a new file would get other permissions."""
    usual = target.parent.stat().st_mode & 0o666  # as the umask left them to the directory
    try:
        if source.stat().st_mode & 0o777 != usual:
            raise PermissionError
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _generation_config(rendering: Rendering) -> GenerationConfig:
    """Sampling is the mixture itself: temperature 1 and nothing cut off."""
    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        bos_token_id=rendering.tokenizer.bos_token_id,
        eos_token_id=list(rendering.ends),
        pad_token_id=rendering.tokenizer.pad_token_id,
    )
