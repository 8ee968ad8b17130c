"""The command answers at once: the package and every verb's help load nothing that only the work needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mpo_ray.cli import STAGE_VERBS

#: What takes seconds to import, and what takes a tenth of one. Help needs neither.
HEAVY = ("torch", "ray", "transformers", "deepspeed", "peft", "datasets")
NOTABLE = ("numpy", "scipy", "pandas", "pyarrow", "pydantic", "fsspec", "yaml", "rich")
VERBS = ("run", "check", "mix", "generate", "families", "serve", *STAGE_VERBS)


def loaded_after(statement: str) -> set[str]:
    """Which of those modules a new process has loaded once the statement has come to its end."""
    code = f"""
import sys
try:
    {statement}
except SystemExit as end:
    assert not end.code
print("loaded", *({set(HEAVY + NOTABLE)} & sys.modules.keys()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_the_package_loads_nothing_heavy() -> None:
    assert loaded_after("import mpo_ray") == set()


def test_the_list_of_families_loads_nothing_heavy() -> None:
    assert not loaded_after("from mpo_ray.cli import main; main(['families'])") & {*HEAVY}


@pytest.mark.parametrize("arguments", [["--help"], *([verb, "--help"] for verb in VERBS)], ids=" ".join)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    assert loaded_after(f"from mpo_ray.cli import main; main({arguments})") == set()
