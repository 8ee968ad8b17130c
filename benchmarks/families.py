"""What the product does with each family of models: python -m benchmarks.families [FAMILY …] [--write docs/models.md]

A tiny random model of every family is trained (two DPO steps, LoRA and all weights), mixed, and decoded in every way
that the product has. Each log-probability is compared with the product of what plain transformers and PEFT say.
`--write` puts the table into the document.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from torch import Tensor

from benchmarks.family_models import write_reference
from mpo_ray.cluster.trainable import load_trainable
from mpo_ray.config_training import PolicyTraining
from mpo_ray.decoding.engine import MixtureEngine
from mpo_ray.decoding.open_engine import open_engine, runner_of
from mpo_ray.decoding.protocol import Delta, GenerationRequest, Sampling
from mpo_ray.decoding.sequence_runner import SequenceRunner
from mpo_ray.policies.artefact import write_artefact
from mpo_ray.policies.completion_model import CompletionModel
from mpo_ray.policies.ensemble import Ensemble
from mpo_ray.policies.families import FAMILIES
from mpo_ray.policies.loading import ModelError, load_tokenizer
from mpo_ray.policies.mixture import MixtureForCausalLM, mixture_of
from mpo_ray.records import REFERENCE
from mpo_ray.run_file import load_config
from mpo_ray.stages.check_model import check_reference
from mpo_ray.training.local_engine import LocalEngine
from mpo_ray.training.preference import Pair, preference_loss

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
#: Between these the table stands in a document.
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"
NAMES = ("helpful", "brief")
#: λ of the requests that are decoded side by side.
WEIGHTS = ((0.7, 0.3), (0.25, 0.75), (1.0, 0.0))
PROMPT_LENGTHS = (5, 19, 40)
NUM_NEW = 4
#: How far a loss may be from log 2, and log-probabilities from the explicit product, nats; in float32 but for one.
TOLERANCES = {"first loss": 1e-4, "first loss, bf16": 5e-2, "engine": 1e-4, "generate": 1e-4, "sampler": 1e-4}


#: What is compared, in the order of the table.
CELLS = ("first loss", "first loss, bf16", "engine", "generate", "sampler")
NAMES_OF_ALL = [family.name for family in FAMILIES]


@dataclass
class Row:
    """What was found for one family: the largest difference of each cell, in nats, or why `check` refuses it."""

    family: str
    differences: dict[str, float] = field(default_factory=dict)
    by_own_cache: bool = False
    refused: str | None = None

    def add(self, cell: str, difference: float) -> None:
        # the other way round, a NaN would be lost
        self.differences[cell] = max(difference, self.differences.get(cell, 0.0))

    @property
    def wrong(self) -> list[str]:
        """What is off by more than its tolerance, or was not reached, or is not as the list of families says."""
        if self.refused is not None:
            return []
        off = [cell for cell in CELLS if not self.differences.get(cell, math.nan) <= TOLERANCES[cell]]
        listed = [family.in_blocks for family in FAMILIES if family.name == self.family]
        return [*off, "decoded otherwise than families.py says"] if self.by_own_cache in listed else off

    def as_line(self) -> str:
        if self.refused is not None:
            return f"| {self.family} | refused by `check`: {self.refused} |" + " |" * len(CELLS)
        how = "equal, by transformers' own decoding" if self.by_own_cache else "equal"
        verdict = f"**wrong**: {', '.join(self.wrong)}" if self.wrong else how
        cells = [f"{self.differences.get(cell, math.nan):.0e}" for cell in CELLS]
        return f"| {self.family} | {verdict} | {' | '.join(cells)} |"


def texts(seed: int, lengths: Sequence[int]) -> list[list[int]]:
    """Random token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(6, 40, (length,), generator=generator).tolist() for length in lengths]


def first_losses(model: str, out: Path, training: PolicyTraining, pairs: Sequence[Pair], *, seed: int) -> list[float]:
    """Train two steps and save the policy as a worker does; returns the losses."""
    causal_lm = load_trainable(model, training, seed=seed)
    engine = LocalEngine(CompletionModel(causal_lm), learning_rate=2e-2, total_steps=2, accumulation=1)

    losses = []
    engine.model.train()
    for _ in range(2):
        found = preference_loss(
            engine.model, pairs, loss="dpo", beta=training.beta, length_normalized=False, pad_id=0, device="cpu"
        )
        loss = found.losses.mean()
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    causal_lm.save_pretrained(out)
    load_tokenizer(model).save_pretrained(out)
    return losses


def pairs_of(model: str, *, precision: str = "fp32") -> list[Pair]:
    prompts, chosen, rejected = (
        texts(seed, lengths) for seed, lengths in ((1, (3, 9, 14, 30)), (2, (4, 7, 2, 9)), (3, (6, 3, 5, 8)))
    )
    reference = Ensemble(model, {}, precision=precision)
    log_ref = [
        reference.logprobs([REFERENCE], list(zip(prompts, side, strict=True)), batch_size=2, pad_id=0)[REFERENCE]
        for side in (chosen, rejected)
    ]
    return [Pair(*values) for values in zip(prompts, chosen, rejected, *log_ref, strict=True)]


class Product:
    """Σ_k λ_k log π_k, normalised, by plain transformers and PEFT: one text at a time, without a cache."""

    def __init__(self, reference: str, policies: Sequence[Path], *, adapters: bool) -> None:
        load = transformers.AutoModelForCausalLM.from_pretrained
        self._models = [
            (PeftModel.from_pretrained(load(reference), path) if adapters else load(path)).eval() for path in policies
        ]

    @torch.no_grad()
    def logprobs(self, ids: Sequence[int], weights: Sequence[float]) -> Tensor:
        """After every token, (T, V)."""
        mixed = sum(
            weight * model(input_ids=torch.tensor([list(ids)])).logits[0].double().log_softmax(-1)
            for model, weight in zip(self._models, weights, strict=True)
            if weight
        )
        assert isinstance(mixed, Tensor)
        return mixed.log_softmax(-1)


def engine_difference(engine: MixtureEngine, product: Product, seed: int) -> float:
    """Requests with λ of their own, side by side: every log-probability of prompt and answer against the product's.

    Returns the largest difference. seed: of the prompts
    """
    prompts = texts(seed, PROMPT_LENGTHS)
    sampling = Sampling(NUM_NEW, seed=0, num_logprobs=40, prompt_logprobs=True, ignore_eos=True)
    requests = [
        GenerationRequest(str(n), tuple(prompt), sampling, weights=dict(zip(NAMES, weights, strict=True)))
        for n, (prompt, weights) in enumerate(zip(prompts, WEIGHTS, strict=True))
    ]
    told: dict[str, list[Delta]] = {request.id: [] for request in requests}
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        for name, item in engine.step():
            if not isinstance(item, Delta):
                raise item
            told[name].append(item)
    most = 0.0
    for request, weights in zip(requests, WEIGHTS, strict=True):
        deltas = told[request.id]
        drawn = [token for delta in deltas for token in delta.tokens]
        expected = product.logprobs([*request.prompt_ids, *drawn], weights)
        prompt = next(delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs)
        found = [*[one for one in prompt if one is not None], *[one for delta in deltas for one in delta.logprobs]]
        assert len(found) == len(request.prompt_ids) + len(drawn) - 1
        for place, one in enumerate(found):
            most = max(most, *(abs(value - float(expected[place, token])) for token, value in one.top))
    return most


@torch.no_grad()
def generate_difference(artefact: Path, product: Product) -> float:
    """transformers' own `generate` on the mixture, a padded batch with λ by row."""
    mixture = MixtureForCausalLM.from_pretrained(artefact)
    prompts = texts(6, PROMPT_LENGTHS)
    width = max(PROMPT_LENGTHS)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = mixture.generate(
        ids, attention_mask=mask, mixture_weights=torch.tensor(WEIGHTS), max_new_tokens=NUM_NEW, min_new_tokens=NUM_NEW,
        do_sample=False, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    most = 0.0
    for n, (prompt, weights) in enumerate(zip(prompts, WEIGHTS, strict=True)):
        drawn = out.sequences[n, width:].tolist()
        expected = product.logprobs([*prompt, *drawn], weights)[len(prompt) - 1 : -1]
        found = torch.stack([step[n] for step in out.logits]).double().log_softmax(-1)
        most = max(most, float((found - expected).abs().max()))
    return most


def sampling_engine(mixture: MixtureForCausalLM) -> MixtureEngine:
    """As a run's sampler has it, on models that are open already."""
    runner = runner_of(mixture, max_num_seqs=len(WEIGHTS), context=64)
    return MixtureEngine(runner, dict(zip(NAMES, WEIGHTS[0], strict=True)), eos_ids=[], tokenizer=None)


def try_kind(row: Row, root: Path, model: str, *, lora: bool) -> None:
    """Train, mix and decode policies that are adapters, or that have weights of their own."""
    kind = "lora" if lora else "full"
    training = PolicyTraining() if lora else PolicyTraining(lora=None)
    pairs = pairs_of(model)
    swapped = [Pair(p.prompt_ids, p.rejected_ids, p.chosen_ids, p.log_ref_rejected, p.log_ref_chosen) for p in pairs]
    policies = {name: root / kind / name for name in NAMES}
    for seed, (name, own) in enumerate(zip(NAMES, (pairs, swapped), strict=True)):
        losses = first_losses(model, policies[name], training, own, seed=seed)
        row.add("first loss", abs(losses[0] - math.log(2)))
    if lora:
        half = training.model_copy(update={"precision": "bf16"})
        losses = first_losses(model, root / kind / "bf16", half, pairs_of(model, precision="bf16"), seed=0)
        row.add("first loss, bf16", abs(losses[0] - math.log(2)))
    artefact = root / kind / "mixture"
    weights = dict(zip(NAMES, WEIGHTS[0], strict=True))
    write_artefact(artefact, objectives=policies, reference=model, copy_reference=True, weights=weights, fit={})
    product = Product(model, list(policies.values()), adapters=lora)
    engine = open_engine(str(artefact), max_num_seqs=len(WEIGHTS), context=64, prompt_tokens=16)
    row.add("engine", engine_difference(engine, product, 5))
    row.by_own_cache |= isinstance(engine._runner, SequenceRunner)
    row.add("generate", generate_difference(artefact, product))
    ensemble = Ensemble(model, {name: str(path) for name, path in policies.items()})
    row.add("sampler", engine_difference(sampling_engine(mixture_of(ensemble)), product, 7))


def try_family(family: str, root: Path) -> Row:
    """Everything that a run does with a family, in one process; what `check` refuses is not tried."""
    row = Row(family)
    model = str(write_reference(family, root / "reference"))
    try:
        check_reference(model, load_config(CONFIG))
    except ModelError as error:
        row.refused = str(error)
        return row
    for lora in (True, False):
        try_kind(row, root, model, lora=lora)
    return row


def write_table(document: Path, rows: Sequence[Row]) -> None:
    """Replace what stands between the document's marks."""
    before, _, rest = document.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    if not after:
        raise ValueError(f"{document}: has no {BEGIN} … {END} for the table to stand between.")
    lines = [f"| family | verdict | {' | '.join(CELLS)} |", "|---" * (len(CELLS) + 2) + "|", *map(Row.as_line, rows)]
    document.write_text(before + BEGIN + "\n" + "\n".join(lines) + "\n" + END + after, encoding="utf-8")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=", ".join(NAMES_OF_ALL))
    parser.add_argument("--write", type=Path, metavar="DOCUMENT")
    given = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("mpo_ray").setLevel(logging.ERROR)
    rows = []
    for family in given.families or NAMES_OF_ALL:
        with tempfile.TemporaryDirectory() as scratch:
            row = try_family(family, Path(scratch))
        print(row.as_line(), flush=True)
        rows.append(row)
    if given.write is not None:
        write_table(given.write, rows)
    return int(any(row.wrong for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
