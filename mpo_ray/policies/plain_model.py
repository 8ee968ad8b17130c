"""One plain model in the place of a mixture: a directory that transformers or PEFT loads, and that says what it is.

Here the rewarded soup, the average of the parameters. Whatever is written here is not the mixture, only near it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from mpo_ray.policies.artefact import check_artefact, policy_path, reference_path
from mpo_ray.policies.loading import ModelError, load_tokenizer
from mpo_ray.policies.mixture_config import MixtureConfig
from mpo_ray.policies.soup import load_soup
from mpo_ray.records import check_weights
from mpo_ray.whole_files import written_directory

#: The key of config.json that says what a plain model is.
LABEL = "mpo_ray"
SOUP = (
    "Rewarded soup: the average of the policies' parameters, θ = Σ_k λ_k θ_k (arXiv 2306.04488). It is not the mixture "
    "Π_k π_k^λ_k, and its distribution is another one; nothing here says how far away."
)


def write_soup(artefact: Path, out: Path, weights: Mapping[str, float] | None) -> dict[str, Any]:
    """Write the average of an artefact's policies as a plain model; returns its label.

    weights: λ by objective in the place of the artefact's, on the simplex
    Raises ModelError where the policies have no common parameters, ValueError for weights or a directory in use.
    """
    config = MixtureConfig.from_pretrained(artefact)
    chosen = config.weights if weights is None else check_weights(weights, config.objectives, where="--weights")
    check_new(out)
    check_artefact(artefact, config)
    policies = {name: str(policy_path(artefact, name)) for name in config.objectives}
    precision = "bf16" if "bfloat16" in str(config.dtype) else "fp32"
    soup = load_soup(reference_path(artefact, config), policies, chosen, precision=precision)
    label = {"kind": "soup", "weights": chosen, "is": SOUP}
    setattr(soup.config, LABEL, label)
    soup.generation_config = GenerationConfig.from_pretrained(artefact)
    with written_whole(out) as directory:
        soup.save_pretrained(directory)
        load_tokenizer(str(artefact)).save_pretrained(directory)
        write_card(directory, "A rewarded soup", SOUP, chosen)
    return label


def write_card(directory: Path, title: str, what: str, weights: Mapping[str, float]) -> None:
    """Say in the directory's README.md what the model is."""
    shares = "\n".join(f"- {name}: {weight:.6g}" for name, weight in weights.items())
    (directory / "README.md").write_text(f"# {title}\n\n{what}\n\nWeights λ:\n\n{shares}\n", encoding="utf-8")


def check_new(out: Path) -> None:
    """Refuse a directory that holds something. Raises ModelError."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"--out {out} is there already; name a directory that is not, so that nothing is mixed up.")


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """Give an empty directory; what the block leaves there becomes `out` when it ends well, and nothing does if not."""
    check_new(out)
    with written_directory(out) as directory:
        yield directory
