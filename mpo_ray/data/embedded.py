"""The embedded world: a tiny review language whose three objectives conflict, made by the project itself.

A review is a few clauses. Some name an aspect of a place at length ("the food was clean"), some briefly ("clean food"),
some only chatter or gush. Long reviews are detailed but not concise, gushing is positive but neither; brief clauses
with kind words serve all three. The rewards are known, so that policies and weights can be judged by them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

ADJECTIVES = ("old", "new", "small", "large", "quiet", "busy")
PLACES = ("hotel", "cafe", "museum", "theatre", "garden", "market", "library", "station", "school", "beach")
TOWNS = ("oslo", "lima", "cairo", "kyoto", "quito", "delhi", "paris", "accra", "hanoi", "turin", "perth", "dakar")
ASPECTS = ("staff", "price", "light", "music", "food", "view", "size", "parking", "garden", "design")
KIND = ("lovely", "great", "clean", "friendly", "superb")
PLAIN = ("plain", "usual", "average", "normal", "plain")
HARSH = ("awful", "dirty", "rude", "poor", "boring")
CHATTER = (
    "to be honest i am not sure",
    "we went there on a monday",
    "all things considered it is a place",
    "i had read about it before",
)
GUSH = ("i really really love it so much", "what a lovely lovely great day we had")
GRIPE = ("i would not go there again", "what a poor boring day we had")

#: Tokens in the longest prompt and review together, and a few to spare.
CONTEXT = 128

#: Differences of a reward are multiplied by this before they become a preference probability (Bradley–Terry).
LABEL_SCALES = {"positive": 0.38, "concise": 0.6, "detailed": 0.75}


def positive(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Kind words minus harsh words."""
    return [float(sum((word in KIND) - (word in HARSH) for word in _words(r))) for r in responses]


def concise(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Minus the number of words, in fives."""
    return [-len(_words(response)) / 5 for response in responses]


def detailed(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """How many different aspects of the place are named."""
    return [float(len(set(_words(response)) & set(ASPECTS))) for response in responses]


REWARDS = {"positive": positive, "concise": concise, "detailed": detailed}


def vocabulary() -> list[str]:
    """Every word of the language, each once, in a fixed order."""
    clauses = " ".join((*CHATTER, *GUSH, *GRIPE, "review the in was and , ."))
    return list(dict.fromkeys([*ADJECTIVES, *PLACES, *TOWNS, *ASPECTS, *KIND, *PLAIN, *HARSH, *clauses.split()]))


def prompts() -> list[str]:
    """Every prompt of the language."""
    return [f"review the {a} {place} in {town}" for a in ADJECTIVES for place in PLACES for town in TOWNS]


def response(rng: np.random.Generator) -> str:
    """Draw a review of one to six clauses, every number as likely as another."""
    return " , ".join(_clause(rng) for _ in range(int(rng.integers(1, 7)))) + " ."


def write_world(directory: Path, *, num_texts: int, num_pairs: int, num_prompts: int, seed: int) -> None:
    """Write `corpus.jsonl` (SFT), `pairs.jsonl` (with a label per objective) and `prompts.jsonl` (evaluation).

    Labels are drawn with probability σ(scale · reward difference), 1 if `a` is preferred and 0 if `b`; equal rewards
    are a tie, 0.5. The evaluation's prompts occur in neither of the other files.
    """
    rng = np.random.default_rng([seed, 0xE3BED])
    every = prompts()
    rng.shuffle(every)
    unseen, seen = every[:num_prompts], every[num_prompts:]
    if not seen:
        raise ValueError(f"embedded.num_prompts is {num_prompts}; the language has {len(every)} prompts, leave some.")
    _write_lines(directory / "prompts.jsonl", ({"prompt": _message("user", prompt)} for prompt in unseen))
    _write_lines(
        directory / "corpus.jsonl",
        ({"prompt": _message("user", str(rng.choice(seen))), "response": response(rng)} for _ in range(num_texts)),
    )
    _write_lines(directory / "pairs.jsonl", (_pair(str(rng.choice(seen)), rng) for _ in range(num_pairs)))


def _pair(prompt: str, rng: np.random.Generator) -> dict[str, object]:
    a = b = response(rng)
    while b == a:
        b = response(rng)
    labels = {}
    for name, reward in REWARDS.items():
        first, second = reward([prompt] * 2, [a, b])
        preferred = rng.random() < 1 / (1 + math.exp(-LABEL_SCALES[name] * (first - second)))
        labels[name] = 0.5 if first == second else float(preferred)
    return {"prompt": _message("user", prompt), "a": a, "b": b, **labels}


def _clause(rng: np.random.Generator) -> str:
    kind = rng.random()
    words = (KIND, PLAIN, HARSH)[int(rng.choice(3, p=(0.3, 0.4, 0.3)))]
    word, aspect = str(rng.choice(words)), str(rng.choice(ASPECTS))
    if kind < 0.3:
        return f"the {aspect} was {word}"
    if kind < 0.55:
        return f"{word} {aspect}"
    return str(rng.choice((CHATTER, GUSH, GRIPE)[int(rng.choice(3, p=(0.5, 0.25, 0.25)))]))


def _message(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text)


def _write_lines(path: Path, rows: Iterator[dict[str, object]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
