"""The mathematics stands alone: it can be used where nothing but numpy and torch is installed."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import mpo_ray.maths

ABSENT = ("ray", "deepspeed", "transformers", "peft", "datasets", "pydantic", "fsspec")

#: Stands in the place of the import system's path finder, so that the packages look as if they were not installed:
#: `import` raises ModuleNotFoundError and `importlib.util.find_spec` returns None.
PROGRAM = """
import importlib, importlib.util, sys
from importlib.machinery import PathFinder

absent = set(sys.argv[1].split(","))

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in absent else super().find_spec(name, path, target)

sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
for name in absent:
    assert importlib.util.find_spec(name) is None, name + " can still be found"
for name in sys.argv[2].split(","):
    importlib.import_module(name)
"""


def run_without(absent: str, modules: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, absent, modules], capture_output=True, text=True, check=False, timeout=120
    )


def test_every_module_of_maths_imports_where_ray_deepspeed_and_transformers_are_absent() -> None:
    """maths: numpy, scipy and torch only (design 4)."""
    modules = [f"mpo_ray.maths.{module.name}" for module in pkgutil.iter_modules(mpo_ray.maths.__path__)]
    assert len(modules) >= 6
    done = run_without(",".join(ABSENT), ",".join(modules))
    assert done.returncode == 0, done.stderr


def test_a_module_that_needs_an_absent_package_would_be_found_out() -> None:
    """The check above fails for what is not independent: config needs pydantic."""
    done = run_without("pydantic,transformers", "mpo_ray.config")
    assert done.returncode != 0
    assert "No module named 'pydantic'" in done.stderr
