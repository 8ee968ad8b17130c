"""What each stage of a run will take, by the run file, the model's sizes and the lengths of the run's tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mpo_ray.config import RunConfig
from mpo_ray.config_training import Lora, Training
from mpo_ray.data.lengths import Spread
from mpo_ray.evaluation.candidates import Candidate, grid_candidates, named_candidates
from mpo_ray.evaluation.rewards import IMPLICIT
from mpo_ray.stages import estimate
from mpo_ray.stages.estimate import ID_BYTES, TEXT_BYTES, Need, Shape, Speeds
from mpo_ray.training.order import num_steps

#: Tokens of a forward pass on a CPU (`policies.ensemble`).
MOST_TOKENS_ON_CPU = 1024


@dataclass(frozen=True, slots=True)
class Table:
    """Rows to learn from and held-out ones, and their lengths in tokens. reply: of pairs, of both replies.

    whole: of a prompt with its longer reply
    """

    train: int
    heldout: int
    prompt: Spread
    reply: Spread
    whole: Spread


@dataclass(frozen=True, slots=True)
class Tables:
    """pairs: by objective; texts: None where no reference is trained; fit, evaluation: numbers of prompts."""

    pairs: Mapping[str, Table]
    texts: Table | None
    fit: int
    evaluation: int

    @property
    def prompt(self) -> float:
        """Mean tokens of a prompt, over the objectives."""
        return sum(table.prompt.mean for table in self.pairs.values()) / len(self.pairs)

    @property
    def reply(self) -> float:
        return sum(table.reply.mean for table in self.pairs.values()) / len(self.pairs)

    @property
    def longest_reply(self) -> int:
        return max(table.reply.longest for table in self.pairs.values())

    @property
    def long_prompt(self) -> int:
        return max(table.prompt.high for table in self.pairs.values())


@dataclass(frozen=True, slots=True)
class Estimator:
    """side_by_side: of a training (its place in the run file) → how many of its jobs the cluster holds at once"""

    config: RunConfig
    shape: Shape
    tables: Tables
    speeds: Speeds | None
    side_by_side: Mapping[str, int]

    def needs(self) -> list[Need]:
        """The stages that hold models, in their order."""
        found = []
        if self.config.reference.sft is not None and self.tables.texts is not None:
            found.append(self._reference(self.config.reference.sft, self.tables.texts))
        found += [self._pairs(), self._policies(), self._samples(), self._scores()]
        if self.config.fit.method == "decoded" and len(self.config.objectives) > 1:
            found.append(self._fit())
        if self.config.mopo is not None:
            found.append(self._mopo())
        return [*found, self._evaluation()]

    # ---- trainings ---------------------------------------------------------------------------------------------

    def _reference(self, training: Training, texts: Table) -> Need:
        tokens = texts.prompt.mean + texts.reply.mean
        longest = _longest(texts, rows=1)
        return self._training("reference", "reference.sft", training, None, 1, [texts], 1, tokens, longest)

    def _policies(self) -> Need:
        settings, tables = self.config.policies, list(self.tables.pairs.values())
        tokens = max(2 * (table.prompt.mean + table.reply.mean) for table in tables)
        longest = max(_longest(table, rows=2) for table in tables)
        return self._training("policies", "policies", settings, settings.lora, len(tables), tables, 2, tokens, longest)

    def _mopo(self) -> Need:
        mopo = self.config.mopo
        assert mopo is not None
        rows = self.config.samples.samples_per_prompt * (1 if mopo.candidates == "reference" else self._proposals)
        heldout = round(mopo.heldout_share * self.tables.fit)
        like = next(iter(self.tables.pairs.values()))
        pool = Table(self.tables.fit - heldout, heldout, like.prompt, like.reply, like.whole)
        tokens = rows * (self.tables.prompt + self._answer)
        jobs, training = len(mopo.problems), mopo.training
        longest = _longest(pool, rows=rows)
        return self._training("mopo", "mopo.training", training, training.lora, jobs, [pool], rows, tokens, longest)

    def _training(
        self,
        stage: str,
        place: str,
        training: Training,
        lora: Lora | None,
        jobs: int,
        tables: list[Table],
        rows: int,
        tokens: float,
        longest: tuple[int, int],
    ) -> Need:
        """tokens: mean of one example; longest: tokens of a long example's rows, and those of its replies"""
        shape, workers = self.shape, training.workers.num_workers
        trained = shape.parameters if lora is None else shape.adapter
        total = shape.parameters + (0 if lora is None else shape.adapter)
        precision, micro = training.precision, training.micro_batch_size
        zero = training.zero_stage
        memory = {"process": estimate.TRAINING_PROCESS} | estimate.training_state(
            total, trained, precision=precision, zero_stage=zero, num_workers=workers
        )
        kept = estimate.kept_activations(
            shape, micro * longest[0], precision=precision, checkpointing=training.gradient_checkpointing
        )
        memory["activations"] = round(estimate.BACKWARD * kept) + estimate.logits(
            shape, micro * longest[1], copies=estimate.LOGITS_TRAINED
        )
        at_a_time = min(jobs, self.side_by_side[place])
        seconds = None
        if self.speeds is not None:
            most = max(tables, key=lambda table: table.train)
            steps = num_steps(most.train, batch_size=training.batch_size, epochs=training.epochs)
            times = 1 + (steps - 1) // training.checkpoint_every
            seconds = estimate.training_seconds(
                jobs,
                at_a_time,
                train_tokens=steps * training.batch_size * tokens,
                heldout_tokens=times * most.heldout * tokens,
                num_workers=workers,
                step=self._step(lora is not None),
                forward=self.speeds.forward,
            )
        saved = trained * estimate.BYTES[precision]
        disk = jobs * (
            saved + estimate.CHECKPOINTS * estimate.checkpoint(trained, precision=precision, zero_stage=zero)
        )
        settings = {"activations": f"lower {place}.micro_batch_size" if micro > 1 else "lower data.max_prompt_tokens"}
        settings["weights"] = f"set {place}.zero_stage: 3 and more {place}.workers"
        if precision == "fp32":
            settings["weights"] = f"set {place}.precision: bf16"
        settings["optimiser"] = f"set {place}.zero_stage: 2 and more {place}.workers.num_workers, or train a LoRA"
        if at_a_time > 1:
            settings["processes"] = f"raise {place}.workers.cpus_per_worker, so that fewer run side by side"
        on_gpu = training.workers.gpus_per_worker > 0
        return Need(stage, seconds, memory, at_a_time * workers, disk, settings, on_gpu)

    def _step(self, adapts: bool) -> float:
        """Seconds per token of a training; of the other kind where this one was not timed."""
        assert self.speeds is not None
        own, other = (self.speeds.adapt, self.speeds.train) if adapts else (self.speeds.train, self.speeds.adapt)
        return own or other

    # ---- actors ------------------------------------------------------------------------------------------------

    @property
    def _proposals(self) -> int:
        num = len(self.config.objectives)
        return {"reference": 1, "policies": num, "all": num + 1}[self.config.samples.proposals]

    @property
    def _answer(self) -> float:
        """Tokens of an answer that is drawn: as many as the data's replies have, up to the limit."""
        return min(self.tables.reply, self.config.samples.max_new_tokens)

    @property
    def _drawn(self) -> int:
        return self.tables.fit * self.config.samples.samples_per_prompt * self._proposals

    def _pairs(self) -> Need:
        tables = self.tables.pairs.values()
        tokens = sum(2 * (t.train + t.heldout) * (t.prompt.mean + t.reply.mean) for t in tables)
        return self._actors("pairs", forward=tokens, disk=int(tokens) * ID_BYTES, policies=0)

    def _samples(self) -> Need:
        settings = self.config.samples
        decoded = self._drawn * self._answer
        prompts = self.tables.fit * self._proposals * self.tables.prompt
        disk = self._table_bytes(self._drawn)
        policies = 0 if settings.proposals == "reference" else len(self.config.objectives)
        return self._actors(
            "samples",
            forward=2 * prompts + decoded,
            decoded=decoded,
            steps=self._proposals * self._steps(self.tables.fit, settings.samples_per_prompt, settings.max_new_tokens),
            disk=disk,
            policies=policies,
            rows=self._sequences(settings.samples_per_prompt),
            new=settings.max_new_tokens,
        )

    def _scores(self) -> Need:
        num = len(self.config.objectives)
        forward = num * (self.tables.fit * self._proposals * self.tables.prompt + self._drawn * self._answer)
        return self._actors("scores", forward=forward, disk=self._table_bytes(self._drawn), policies=num)

    def _fit(self) -> Need:
        settings, num = self.config.fit.decoded, len(self.config.objectives)
        prompts = min(settings.num_prompts, self.tables.fit)
        particles = self.config.decoding.particles
        answers = settings.steps * prompts * settings.completions_per_prompt
        forward = num * settings.steps * prompts * self.tables.prompt
        if settings.gain == "implicit" or self._implicit:
            forward += (num + 1) * answers * self._answer
        each = settings.completions_per_prompt
        rows = num * self._sequences(each, particles)
        return self._actors(
            "fit",
            forward=forward,
            decoded=answers * self._answer * num * particles,
            steps=settings.steps * self._steps(prompts, each, self.config.samples.max_new_tokens, particles),
            further=estimate.FIT_S,
            disk=self._table_bytes(answers),
            policies=num,
            rows=rows,
            new=self.config.samples.max_new_tokens,
        )

    def _evaluation(self) -> Need:
        settings = self.config.evaluation
        answer = min(self.tables.reply, settings.max_new_tokens)
        forward = decoded = 0.0
        num_answers, most_rows, num_models, steps, each = 0, 1, 0, 0, settings.completions_per_prompt
        for candidate, prompts in self._candidates():
            rows, answers = candidate.rows_per_token, prompts * each
            decoded += rows * answers * answer
            forward += rows * prompts * self.tables.prompt
            if candidate.kind != "reference":  # its KL: the candidate's and the reference's distributions
                forward += estimate.KL_PASSES * (rows + 1) * (prompts * self.tables.prompt + answers * answer)
            num_answers += answers
            steps += self._steps(prompts, each, settings.max_new_tokens, candidate.particles)
            most_rows = max(most_rows, rows // candidate.particles * self._sequences(each, candidate.particles))
            num_models += candidate.kind in ("soup", "model")
        return self._actors(
            "evaluation",
            forward=forward,
            decoded=decoded,
            steps=steps,
            further=estimate.EVALUATION_S,
            disk=self._table_bytes(num_answers),
            policies=len(self.config.objectives),
            copies=1 + (num_models > 0),  # the ensemble, and a soup or another model
            rows=most_rows,
            new=settings.max_new_tokens,
        )

    def _candidates(self) -> list[tuple[Candidate, int]]:
        """Everybody who answers, once each, with the number of prompts. λ stands for a fit that is yet to come."""
        config, names = self.config, list(self.config.objectives)
        total = len(names) * (len(names) + 1) / 2
        fit = {"weights": {name: (place + 1) / total for place, name in enumerate(names)}}
        particles = config.decoding.particles
        named = named_candidates(names, fit, config.evaluation, config.evaluation.models, particles=particles)
        grid = grid_candidates(len(names), config.evaluation, particles=particles)
        found = {candidate.distribution: self.tables.evaluation for candidate in named.values()}
        for candidate in grid.values():
            found.setdefault(candidate.distribution, min(config.evaluation.grid_prompts, self.tables.evaluation))
        for name in () if config.mopo is None else config.mopo.problems:
            found[Candidate("model", path=name)] = self.tables.evaluation
        return list(found.items())

    @property
    def _implicit(self) -> bool:
        return any(objective.reward == IMPLICIT for objective in self.config.objectives.values())

    def _sequences(self, each: int, particles: int = 1) -> int:
        """Sequences that are decoded at a time, of a part with `each` answers to a prompt."""
        scoring = self.config.scoring
        return min(scoring.prompts_per_part * each * particles, max(scoring.batch_size, particles))

    def _steps(self, prompts: int, each: int, limit: int, particles: int = 1) -> int:
        """Steps that decode `each` answers to all of these prompts: part by part, to the end of its longest answer."""
        size = self.config.scoring.prompts_per_part
        turns = estimate.rounds(min(prompts, size) * each * particles, self._sequences(each, particles))
        longest, mean = min(self.tables.longest_reply, limit), min(self.tables.reply, limit)
        return estimate.rounds(prompts, size) * round(longest + (turns - 1) * mean)

    def _table_bytes(self, answers: int) -> int:
        return int(answers * (self.tables.prompt + self._answer)) * TEXT_BYTES

    def _actors(
        self,
        stage: str,
        *,
        forward: float,
        disk: int,
        policies: int,
        decoded: float = 0.0,
        steps: int = 0,
        further: float = 0.0,
        copies: int = 1,
        rows: int = 0,
        new: int = 0,
    ) -> Need:
        """forward, decoded: tokens; steps: of all decoded parts; further: seconds of other work

        policies: how many are loaded; copies: of the reference; rows: that are decoded at a time; new: tokens of the
        longest answer at most
        """
        shape, scoring = self.shape, self.config.scoring
        width, whole = estimate.BYTES[scoring.precision], self.config.policies.lora is None
        batch = scoring.batch_size * (self.tables.long_prompt + round(self.tables.reply))
        if scoring.gpus_per_actor == 0:
            batch = min(batch, MOST_TOKENS_ON_CPU)
        memory = {
            "process": estimate.ACTOR_PROCESS,
            "weights": shape.parameters * width * (copies + policies * whole),
            "adapters": policies * shape.adapter * width * copies,
            "activations": estimate.passing_activations(shape, batch, precision=scoring.precision)
            + estimate.logits(shape, batch, copies=estimate.LOGITS_READ),
            "cache": estimate.cache(shape, rows, self.tables.long_prompt + new, precision=scoring.precision)
            + estimate.logits(shape, rows, copies=estimate.LOGITS_DRAWN),
        }
        seconds = None
        if self.speeds is not None:
            seconds = further + estimate.actor_seconds(
                forward_tokens=forward,
                decoded_tokens=decoded,
                decoded_steps=steps,
                num_actors=scoring.num_actors,
                speeds=self.speeds,
            )
        settings = {"activations": "lower scoring.batch_size", "cache": "lower scoring.batch_size"}
        if scoring.precision == "fp32":
            settings["weights"] = "set scoring.precision: bf16"
        if scoring.num_actors > 1:
            settings["processes"] = "lower scoring.num_actors"
        return Need(stage, seconds, memory, scoring.num_actors, disk, settings, scoring.gpus_per_actor > 0)


def _longest(table: Table, *, rows: int) -> tuple[int, int]:
    """Tokens of a long example of so many rows, and those of its replies: 95 % of the rows are no longer."""
    return rows * table.whole.high, rows * min(table.reply.high, table.whole.high)
