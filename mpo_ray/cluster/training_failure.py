"""Why a training ended early, in a sentence that names it, and the setting that would have it need less memory."""

from __future__ import annotations

import re

from ray.exceptions import RayActorError

from mpo_ray.cluster.training_job import TrainingJob
from mpo_ray.out_of_memory import lacking_in

#: What Ray says of a worker that its memory monitor ended; the group: used memory of the node, and its limit.
MONITOR = re.compile(r"Memory on the node \(.*?\) was ([\d.]+ ?GB used / [\d.]+ ?GB limit)", re.DOTALL)
#: What a worker does before its first step, as it says it.
OPENING, STARTING, READING = "opening the model", "starting DeepSpeed", "reading the data"


def found_no_room(error: Exception) -> bool:
    """Whether the workers of a group did not start because their resources were not free in Ray Train's time."""
    return type(getattr(error, "controller_failure", None)).__name__ == "WorkerGroupStartupTimeoutError"


def memory_sentence(job: TrainingJob, lack: str, doing: str) -> str:
    """doing: what the worker was at"""
    return f"out of memory {doing}: {lack} could not be had. {remedy(job, doing)}"


def reason(job: TrainingJob, error: Exception) -> str:
    """Why Ray Train gave a training up, by the errors of its workers; the first that is the cause of the others."""
    failures = list(getattr(error, "worker_failures", {}).values()) or [error]
    texts = [str(failure) for failure in failures]
    for text in texts:
        if lacking_in(text) is not None:  # the worker has put it in words, unless it could not even do that
            last = text.strip().splitlines()[-1]
            told = re.search(r"out of memory .* could not be had\. .*", last)
            return told[0] if told else memory_sentence(job, lacking_in(text) or "memory", "in a worker")
    for text in texts:
        if monitor := MONITOR.search(text):
            return (
                f"out of memory: Ray's memory monitor ended a worker when its node had {monitor[1]}. {remedy(job, '')}"
            )
    for failure in failures:
        cause = getattr(failure, "health_check_failure", failure)
        if isinstance(cause, RayActorError) and not cause.preempted:
            return (
                "a worker ended without an error of its own. It was killed, as the kernel does by signal 9 where a "
                f"machine's memory is used up, or it crashed. If it was memory: {remedy(job, '')}"
            )
    return texts[0].strip().splitlines()[-1]


def remedy(job: TrainingJob, doing: str) -> str:
    """The settings of the run file that lower what a training needs, where they are not as low as they can be."""
    training, at = job.training, job.section
    smaller = []
    if doing not in (OPENING, STARTING, READING):
        if training.micro_batch_size > 1:
            smaller.append(f"lower {at}.micro_batch_size (now {training.micro_batch_size})")
        if not training.gradient_checkpointing:
            smaller.append(f"set {at}.gradient_checkpointing: true")
        smaller.append("lower data.max_prompt_tokens and data.max_response_tokens, with data.overlong: drop")
    if doing == READING and at == "policies":
        smaller.append("lower data.max_pairs")
    if doing in (OPENING, STARTING, ""):
        if training.precision != "bf16":
            smaller.append(f"set {at}.precision: bf16")
        if training.workers.num_workers > 1 and training.zero_stage < 3:
            smaller.append(f"set {at}.zero_stage: 3")
    smaller.append(f"raise {at}.workers.cpus_per_worker, so that fewer trainings run side by side")
    text = ", or ".join(smaller)
    return f"{text[0].upper()}{text[1:]}."
