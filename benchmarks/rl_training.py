"""One policy by TRL's online RL, on all objectives at once: MaxMin-RLHF or MORLHF, the baselines that MPO spares.

Both maximise J(π) = R(π) − β KL(π‖π_ref) by RLOO, whose reward carries the log-ratio of the whole sequence, so that β
is the β of design 2.1. The LoRA, the prompts and π_ref are those of a run. With normalised rewards r̃_k:

    MORLHF       R(π) = (1/K) Σ_k E_π[r̃_k]
    MaxMin-RLHF  R(π) = min_k E_π[r̃_k]: every update maximises the r̃_k whose expectation is lowest at the time, as
                 Chakraborty et al. (2024) do. The minimum is over expectations, not within a response; the expectations
                 are a running average over batches.

r̃_k is by default the run's own reward, standardised on completions of π_ref (mean 0, standard deviation 1): it is what
the evaluation looks at, and no policy needs to be trained for it. `implicit` takes β ℓ_k of the run's policies, which
equation (1) normalises. The β of a run belongs to rewards in log-odds, the unit of DPO; a standard deviation is worth c
of them on average over the objectives, which the run's pairs tell, so β / c goes with standardised rewards: the same J,
divided by c.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from rich.console import Console
from rl_objectives import Floats, WorstObjective, log_odds_per_unit, moments, plateaued

from mpo_ray.config import RunConfig
from mpo_ray.data.prompts import select_prompts
from mpo_ray.data.rendering import Rendering
from mpo_ray.decoding.sampler import MixtureSampler, Room, sampling_recipe
from mpo_ray.evaluation.rewards import IMPLICIT, load_reward
from mpo_ray.policies.ensemble import Ensemble
from mpo_ray.policies.loading import load_model, load_tokenizer
from mpo_ray.policies.mixture import mixture_of_one
from mpo_ray.records import REFERENCE, Prompt, decode_prompt
from mpo_ray.run import Run
from mpo_ray.stages.stage import Context

MAXMIN = "MaxMin-RLHF"
MORLHF = "MORLHF"
METHODS = (MAXMIN, MORLHF)
STANDARDISED = "standardised"
#: (prompts, responses as text, responses as token ids) → (B, K) rewards in the order of the objectives.
Rewards = Callable[[Sequence[Prompt], Sequence[str], Sequence[Sequence[int]]], Floats]


# ---- rewards and prompts of a run ------------------------------------------------------------------------------


def open_context(directory: str) -> Context:
    """A run as its stages see it. Raises ValueError where there is none."""
    run = Run.at(directory)
    return Context(RunConfig.model_validate(run.read_config()), run, Console(stderr=True))


def training_prompts(run: Run, objectives: Sequence[str]) -> list[Prompt]:
    """The prompts that the run trains its policies and fits its weights on, each once."""
    parts = run.parts("prompts/fit")
    parts += [p for name in objectives for p in run.parts(f"comparisons/{name}") if "/train-" in p]
    tables = [run.read_table(part).select(["prompt_id", "prompt", "is_chat"]).to_pylist() for part in parts]
    found = {row["prompt_id"]: decode_prompt(row["prompt"], row["is_chat"]) for rows in tables for row in rows}
    return list(found.values())


def worth_of_deviation(context: Context, tokenizer: Any, deviation: Floats, num_pairs: int) -> float:
    """c: the log-odds that a standard deviation is worth by the run's training pairs; mean over objectives."""
    worths, rendering = [], Rendering(tokenizer)
    for (name, spec), sigma in zip(context.rewards().items(), deviation, strict=True):
        reward = load_reward(spec, objective=name, batch_size=context.config.scoring.batch_size)
        part = next(p for p in context.run.parts(f"comparisons/{name}") if "/train-" in p)
        rows = context.run.read_table(part).slice(0, num_pairs).to_pylist()
        prompts = [rendering.prompt_text(decode_prompt(row["prompt"], row["is_chat"])) for row in rows]
        chosen, rejected = (reward(prompts, [row[side] for row in rows]) for side in ("chosen", "rejected"))
        worths.append(sigma * log_odds_per_unit(np.subtract(chosen, rejected)))
    return float(np.mean(worths))


def run_rewards(context: Context, tokenizer: Any) -> Rewards:
    """The rewards that the run's evaluation uses, in their own units."""
    specs = context.rewards()
    if IMPLICIT in specs.values():
        raise ValueError(
            "the run judges an objective by its own policy (reward: implicit); use --reward implicit here."
        )
    size = context.config.scoring.batch_size
    functions = [load_reward(spec, objective=name, batch_size=size) for name, spec in specs.items()]
    rendering = Rendering(tokenizer)

    def rewards(prompts: Sequence[Prompt], responses: Sequence[str], ids: Sequence[Sequence[int]]) -> Floats:
        texts = [rendering.prompt_text(prompt) for prompt in prompts]
        return np.stack([np.array(function(texts, list(responses))) for function in functions], axis=1)

    return rewards


def standardised(rewards: Rewards, mean: Floats, deviation: Floats) -> Rewards:
    """(r − mean) / deviation."""
    return lambda prompts, responses, ids: (rewards(prompts, responses, ids) - mean) / deviation


def implicit(context: Context, tokenizer: Any) -> Rewards:
    """r̃_k = β ℓ_k of the run's policies, nats times β: equation (1), normalised by construction."""
    config, paths = context.config, context.policies()
    policies = Ensemble(context.reference(), paths, precision=config.scoring.precision)

    def rewards(prompts: Sequence[Prompt], responses: Sequence[str], ids: Sequence[Sequence[int]]) -> Floats:
        rendering = Rendering(tokenizer)
        rows = [(rendering.prompt_ids(p), list(i)) for p, i in zip(prompts, ids, strict=True)]
        how: dict[str, Any] = {"batch_size": config.scoring.batch_size, "pad_id": tokenizer.pad_token_id}
        found = policies.logprobs([REFERENCE, *paths], rows, **how)
        columns = {name: np.array(values) for name, values in found.items()}
        return config.policies.beta * np.stack([columns[name] - columns[REFERENCE] for name in paths], axis=1)

    return rewards


def reference_rewards(
    rewards: Rewards, reference: str, tokenizer: Any, prompts: Sequence[Prompt], max_new_tokens: int, seed: int
) -> tuple[Floats, int]:
    """Rewards (N, K) of one completion of π_ref for every prompt, and how many tokens that took."""
    rendering = Rendering(tokenizer)
    sampler = MixtureSampler(mixture_of_one(REFERENCE, load_model(reference)), Room(len(prompts)))
    recipe = sampling_recipe({REFERENCE: 1.0}, max_new_tokens=max_new_tokens, temperature=1.0)
    ids = [rendering.prompt_ids(prompt) for prompt in prompts]
    drawn = sampler.draw(ids, recipe, num=1, end_ids=rendering.ends, seed=seed)
    ids = [list(completion.tokens) for (completion,) in drawn]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return rewards(prompts, texts, ids), sum(map(len, ids))


# ---- training --------------------------------------------------------------------------------------------------


class TrainingReward:
    """The reward function that TRL calls, once an update: one number per completion; it keeps the means of all K."""

    def __init__(self, method: str, rewards: Rewards) -> None:
        self.__name__ = "objectives"
        self._rewards = rewards
        self._worst = WorstObjective() if method == MAXMIN else None
        self.last: dict[str, Any] = {}

    def __call__(self, prompts: list[Any], completions: list[Any], completion_ids: list[Any], **_: Any) -> list[float]:
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        rewards = self._rewards([p if isinstance(p, str) else tuple(p) for p in prompts], texts, completion_ids)
        chosen = None if self._worst is None else self._worst(rewards)
        tokens = sum(map(len, completion_ids))
        self.last = {"rewards": rewards.mean(axis=0).tolist(), "objective": chosen, "tokens": tokens}
        values: list[float] = (rewards.mean(axis=1) if chosen is None else rewards[:, chosen]).tolist()
        return values


def processor_seconds() -> float:
    """User and system time of this process, since it began, and of the children it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Train one policy, save it in `options.out`, and return its cost and learning curve."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback, TrainerCallback
    from trl import RLOOConfig, RLOOTrainer

    started = time.monotonic()
    context = open_context(options.run)
    config, base, objectives = context.config, context.reference(), list(context.config.objectives)
    max_new_tokens = options.max_new_tokens or config.samples.max_new_tokens
    tokenizer = load_tokenizer(base)
    tokenizer.padding_side = "left"
    prompts = training_prompts(context.run, objectives)
    tokens, worth = 0, 1.0
    if options.reward == IMPLICIT:
        rewards = implicit(context, tokenizer)
    else:
        raw = run_rewards(context, tokenizer)
        some = select_prompts(prompts, options.reference_samples, config.seed)
        of_reference, tokens = reference_rewards(raw, base, tokenizer, some, max_new_tokens, config.seed)
        mean, deviation = moments(of_reference, objectives)
        rewards = standardised(raw, mean, deviation)
        if options.beta is None:
            worth = worth_of_deviation(context, tokenizer, deviation, options.pairs)
    beta = config.policies.beta / worth if options.beta is None else options.beta
    reward = TrainingReward(options.method, rewards)
    curve: list[dict[str, Any]] = []

    class Curve(TrainerCallback):  # type: ignore[misc]
        """Keeps every update's figures; ends the training at a plateau or when the time is up."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
            if logs is None or "kl" not in logs:
                return
            nonlocal tokens
            tokens += reward.last["tokens"]
            kl = logs["kl"] * logs["completions/mean_length"]  # TRL's is per token
            means = reward.last["rewards"]
            goal = (min(means) if options.method == MAXMIN else float(np.mean(means))) - beta * kl
            curve.append(
                {
                    "step": state.global_step,
                    "rewards": dict(zip(objectives, means, strict=True)),
                    "maximised": None if reward.last["objective"] is None else objectives[reward.last["objective"]],
                    "kl": kl,
                    "goal": goal,
                    "num_tokens": logs["completions/mean_length"],
                    "generated_tokens": tokens,
                    "processor_seconds": processor_seconds(),
                    "seconds": time.monotonic() - started,
                }
            )
            shown = " ".join(f"{name} {value:+.2f}" for name, value in curve[-1]["rewards"].items())
            print(f"{options.method} {state.global_step:4d}  {shown}  KL {kl:.2f}  J {goal:+.2f}", flush=True)
            over = options.seconds is not None and curve[-1]["seconds"] > options.seconds
            control.should_training_stop |= over or plateaued([row["goal"] for row in curve], options.window)

    lora = config.policies.lora
    trainer = RLOOTrainer(
        model=load_model(base),
        reward_funcs=reward,
        args=RLOOConfig(
            output_dir=str(options.out),
            beta=beta,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            num_generations=options.group_size,
            max_completion_length=max_new_tokens,
            temperature=1.0,
            learning_rate=options.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=5,
            max_grad_norm=1.0,
            seed=config.seed,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(
            [{"prompt": p if isinstance(p, str) else [dict(m) for m in p]} for p in prompts]
        ),
        processing_class=tokenizer,
        callbacks=[Curve()],
        peft_config=None
        if lora is None
        else LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
            task_type="CAUSAL_LM",
        ),
    )
    trainer.remove_callback(PrinterCallback)  # Curve prints what matters
    trainer.train()
    trainer.save_model(str(options.out))
    return {
        "method": options.method,
        "reward": options.reward,
        "beta": beta,
        "updates": len(curve),
        "completions_per_update": options.batch_size,
        "group_size": options.group_size,
        "learning_rate": options.learning_rate,
        "prompts": len(prompts),
        "plateaued": plateaued([row["goal"] for row in curve], options.window),
        "generated_tokens": tokens,
        "processor_seconds": processor_seconds(),
        "seconds": time.monotonic() - started,
        "curve": curve,
    }


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """The options that say how to train; the same for both methods."""
    parser.add_argument("--reward", choices=(STANDARDISED, IMPLICIT), default=STANDARDISED)
    parser.add_argument(
        "--beta", type=float, help="KL strength, per unit of normalised reward; the run's, in its unit, if absent"
    )
    parser.add_argument("--steps", type=int, default=150, help="updates at most; the learning rate falls to 0 by then")
    parser.add_argument("--seconds", type=float, help="wall time at most, of each training")
    parser.add_argument("--window", type=int, default=50, help="updates over which a plateau is looked for")
    parser.add_argument("--batch-size", type=int, default=64, help="completions per update")
    parser.add_argument("--group-size", type=int, default=8, help="completions per prompt")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--max-new-tokens", type=int, help="as the run's samples if absent")
    parser.add_argument("--reference-samples", type=int, default=512, help="completions for the standardisation")
    parser.add_argument("--pairs", type=int, default=400, help="per objective, for the unit of β")
    parser.add_argument("--threads", type=int, default=1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="directory of a finished run")
    parser.add_argument("--out", type=Path, required=True, help="where the policy and training.json go")
    parser.add_argument("--method", choices=METHODS, required=True)
    add_training_options(parser)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    result = train(options)
    (options.out / "training.json").write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
