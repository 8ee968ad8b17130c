"""The data stage on chat data: what it writes is what the actors read, and bad rows stop it before anything is paid."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mpo_ray.cluster.score import PairReference
from mpo_ray.config import RunConfig, Scoring
from mpo_ray.data.files import DataError
from mpo_ray.data.rendering import Rendering
from mpo_ray.run import Run
from mpo_ray.stages.data import LONGEST_PROMPTS, prepare_data
from mpo_ray.stages.stage import Context
from tests.data.templates import CALL, PLAIN_TEMPLATE, THINKING_TEMPLATE, TOOL, TOOL_TEMPLATE, chat_tokenizer
from tests.data.test_chat_cases import NO_SYSTEM
from tests.tiny import tiny_llama

USER = {"role": "user", "content": "hi", "mood": "glad"}
CALLING = {"role": "assistant", "content": "I look.", "tool_calls": [CALL]}


def context(root: Path, template: str, rows: list[Any], **data: Any) -> Context:
    """A run on these rows, and a tiny model with the template."""
    tiny_llama(root / "model", chat_tokenizer(template), seed=0, max_position_embeddings=2048)
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(root / "pairs.jsonl")}
    values = {
        "name": "run",
        "storage": str(root),
        "reference": {"model": str(root / "model")},
        "objectives": {"helpful": {"preferences": source}, "kind": {"preferences": source}},
        "data": {"max_prompt_tokens": 1024, "heldout_share": 0.0, **data},
        "evaluation": {"prompts": source},
    }
    config = RunConfig.model_validate(copy.deepcopy(values))
    return Context(config, Run(str(root), "run"), Console(file=io.StringIO(), width=200))


def said(context: Context) -> str:
    assert isinstance(context.console.file, io.StringIO)
    return context.console.file.getvalue()


def test_tools_and_calls_reach_the_actors_and_what_is_not_read_is_told(tmp_path: Path) -> None:
    rows = [{"prompt": [USER], "tools": [TOOL], "chosen": [CALLING], "rejected": "No."}]
    run = context(tmp_path, TOOL_TEMPLATE, rows)
    prepare_data(run)
    assert "objective 'helpful': the chat template does not read 'mood' (messages that have it: 1)" in said(run)
    (part,) = [part for part in run.run.parts("comparisons/helpful") if "train" in part]
    reference = PairReference(str(tmp_path / "model"), Scoring(batch_size=2).model_dump(), run.config.data.rendering)
    scored = reference(run.run.read_table(part), {})
    rendering = Rendering(chat_tokenizer(TOOL_TEMPLATE))
    shown = {name: rendering.tokenizer.decode(scored[f"{name}_ids"][0].as_py()) for name in ("prompt", "chosen")}
    assert shown["prompt"].startswith(f"<|im_start|>system\nTools: [{json.dumps(TOOL)}]")
    assert shown["chosen"] == f"I look.<call>{json.dumps(CALL['function'])}</call><|im_end|>"
    assert "tools" in run.run.read_table("prompts/fit")["prompt"][0].as_py()


def test_a_row_that_the_template_refuses_stops_it_unless_some_may_be_bad(tmp_path: Path) -> None:
    good = {"prompt": [{"role": "user", "content": "hi"}], "chosen": "yes", "rejected": "no"}
    bad = {**good, "prompt": [{"role": "system", "content": "be brief"}, *good["prompt"]]}
    for allow in (0.0, 0.5):
        root = tmp_path / str(allow)
        root.mkdir()
        run = context(root, NO_SYSTEM + PLAIN_TEMPLATE, [good, bad], allow_bad_rows=allow)
        if allow:
            counts = prepare_data(run)["helpful"]
            assert counts["refused"] == {"the chat template refuses these messages": 1}
        else:
            with pytest.raises(DataError, match=r"pairs.jsonl:2: the chat template refuses.*System role not supported"):
                prepare_data(run)


def test_chat_template_kwargs_decide_what_stands_before_a_reply(tmp_path: Path) -> None:
    """They are part of what the files of a run are made from, and one that the template does not read is refused."""
    rows = [{"prompt": [{"role": "user", "content": "hi"}], "chosen": "yes", "rejected": "no"}]
    inputs = []
    for number, values in enumerate(({}, {"enable_thinking": False}, {"enable_thinkin": False})):
        root = tmp_path / str(number)
        root.mkdir()
        run = context(root, THINKING_TEMPLATE, rows, chat_template_kwargs=values)
        if number == 2:
            with pytest.raises(ValueError, match="chat_template_kwargs: 'enable_thinkin'"):
                prepare_data(run)
            continue
        prepare_data(run)
        inputs.append(run.reference_inputs())
        reference = PairReference(str(root / "model"), Scoring().model_dump(), run.config.data.rendering)
        (part,) = [part for part in run.run.parts("comparisons/helpful") if "train" in part]
        scored = reference(run.run.read_table(part), {})
        decode = Rendering(chat_tokenizer(THINKING_TEMPLATE)).tokenizer.decode
        prompt, chosen = (decode(scored[f"{name}_ids"][0].as_py()) for name in ("prompt", "chosen"))
        assert prompt.endswith("</think>\n\n") == bool(values)
        assert chosen == ("yes<|im_end|>" if values else "<think>\n\n</think>\n\nyes<|im_end|>")
    assert inputs[0] != inputs[1]


def test_a_model_to_compare_whose_context_is_too_short_is_refused_with_the_data(tmp_path: Path) -> None:
    """By the prompts that the evaluation uses: others may be as long as they are."""
    rows = [{"prompt": [USER], "chosen": "Yes.", "rejected": "No."}]
    rows += [{"prompt": [{**USER, "content": "long " * 100}], "chosen": "Yes.", "rejected": "No."}]
    run = context(tmp_path, TOOL_TEMPLATE, rows)
    chosen = run.config.evaluation.model_copy(update={"num_prompts": 1})
    run.config = run.config.model_copy(update={"evaluation": chosen})
    for seed in range(20):  # until it is the short one that is chosen
        run.config = run.config.model_copy(update={"seed": seed})
        prepare_data(run)
        if run.run.read_json(LONGEST_PROMPTS)["evaluation"] < 100:
            break
    evaluation = run.config.evaluation.model_copy(update={"max_new_tokens": 60})
    for length, fits in ((32, False), (200, True)):
        theirs = tiny_llama(
            tmp_path / str(length), chat_tokenizer(TOOL_TEMPLATE), seed=1, max_position_embeddings=length
        )
        changed = evaluation.model_copy(update={"models": {"theirs": str(theirs)}})
        run.config = run.config.model_copy(update={"evaluation": changed})
        if fits:
            assert prepare_data(run)
        else:
            with pytest.raises(ValueError, match=r"evaluation\.models\.theirs: .* has a context of 32 tokens.* 60 new"):
                prepare_data(run)
