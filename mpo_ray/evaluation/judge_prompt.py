"""What a judge is asked: a prompt template (Jinja) filled with two responses that it must treat as data.

Responses are untrusted: they enter the template as values and are never read as a template, and they stand between
marks with a code that no response can contain.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mpo_ray.evaluation.judge_client import JudgeError
from mpo_ray.records import digest

OWN_TEMPLATE = "judge_prompt.j2"
VARIABLES = ("objective", "criterion", "prompt", "response_a", "response_b", "boundary")

#: Added to the question after an answer without a verdict.
REMINDER = (
    "\n\nAn earlier answer to this had no verdict as its last line. End with one line that is exactly `Verdict: A`, "
    "`Verdict: B` or `Verdict: tie`."
)


@dataclass(frozen=True, slots=True)
class JudgePrompt:
    """A template's source, and the name of its file for messages."""

    source: str
    where: str

    @classmethod
    def load(cls, path: str | None) -> JudgePrompt:
        """Read the template of `path`, the project's own if None, and check it. Raises JudgeError."""
        if path is None:
            prompt = cls(files(__package__).joinpath(OWN_TEMPLATE).read_text(encoding="utf-8"), OWN_TEMPLATE)
        else:
            try:
                prompt = cls(Path(path).read_text(encoding="utf-8"), path)
            except (OSError, UnicodeDecodeError) as error:
                raise JudgeError(
                    f"evaluation.judge.template: {path} cannot be read: {error}. Give the path of a UTF-8 file."
                ) from None
        prompt.check()
        return prompt

    def render(self, *, objective: str, criterion: str, prompt: str, response_a: str, response_b: str) -> str:
        """The question as one message. Raises JudgeError where the template does not render."""
        try:
            return _compiled(self.source).render(
                objective=objective,
                criterion=criterion,
                prompt=prompt,
                response_a=response_a,
                response_b=response_b,
                boundary=_boundary(prompt, response_a, response_b),
            )
        except jinja2.TemplateSyntaxError as error:
            raise JudgeError(
                f"evaluation.judge.template: {self.where}, line {error.lineno}: {error.message}. Correct the template."
            ) from None
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as error:
            raise JudgeError(
                f"evaluation.judge.template: {self.where} does not render: {error}. Its variables are "
                f"{', '.join(VARIABLES)}; nothing else is defined."
            ) from None

    def check(self) -> None:
        """Refuse a template that leaves out a text, or lets a response run into what is around it.

        The code `boundary` must stand before the first response, between the two, and after the second.
        Raises JudgeError.
        """
        texts = {name: f"the {name.replace('_', ' ')} of a check" for name in VARIABLES[1:5]}
        boundary = _boundary(texts["prompt"], texts["response_a"], texts["response_b"])
        question = self.render(objective="objective", **texts)
        for name, text in texts.items():
            if text not in question:
                raise JudgeError(
                    f"evaluation.judge.template: {self.where} does not show {{{{ {name} }}}}; a judge needs it."
                )
        first, second = sorted((texts["response_a"], texts["response_b"]), key=question.index)
        before, rest = question.split(first, 1)
        between, after = rest.split(second, 1)
        if not all(boundary in part for part in (before, between, after)):
            raise JudgeError(
                f"evaluation.judge.template: {self.where} does not mark where a response begins and ends. Responses "
                "are untrusted: put {{ boundary }} before the first, between them and after the second, and say that "
                f"what stands between the marks is data. {OWN_TEMPLATE} in the package shows how."
            )


def _boundary(*texts: str) -> str:
    """A code that none of the texts holds: a text cannot contain the digest of itself."""
    return digest(texts)[:12]


@lru_cache(maxsize=1)
def _compiled(source: str) -> jinja2.Template:
    return ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    ).from_string(source)
