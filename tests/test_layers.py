"""The layers of the design: imports point down, never in a circle, and each layer knows only what it may know.

The checker reads source files; it runs on the project, and on small wrong trees that it must find out.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
ROOTS = ("mpo_ray", "jobs", "serve_apps")

#: From the bottom. What is not named is the top: the modules beside the packages (cli …), jobs, serve_apps.
LAYERS = (
    (
        "mpo_ray.maths",
        "mpo_ray.config",
        "mpo_ray.config_training",
        "mpo_ray.config_serving",
        "mpo_ray.file_listing",
        "mpo_ray.home",
        "mpo_ray.out_of_memory",
        "mpo_ray.records",
        "mpo_ray.run",
        "mpo_ray.run_file",
        "mpo_ray.run_lock",
        "mpo_ray.storage",
        "mpo_ray.waiting",
        "mpo_ray.whole_files",
    ),
    (
        "mpo_ray.training",
        "mpo_ray.decoding",
        "mpo_ray.evaluation",
        "mpo_ray.fitting",
        "mpo_ray.data",
        "mpo_ray.policies",
        "mpo_ray.drawing",
    ),
    ("mpo_ray.cluster", "mpo_ray.serving", "mpo_ray.vllm_plugin"),
    ("mpo_ray.stages",),
)
TOP = len(LAYERS)
MACHINES = 2
ONLY_FROM_MACHINES_UP = {"ray", "deepspeed", "fastapi", "starlette", "uvicorn", "vllm"}
MATHS_MAY_IMPORT = {"numpy", "scipy", "torch", *sys.stdlib_module_names}
MOST_LINES_OF_AN_ENTRY_POINT = 40


@dataclass(frozen=True)
class Import:
    """`importer` (a module of the project) imports `target` (any module), and perhaps a name that is no module."""

    importer: str
    place: str
    target: str
    name: str | None


def read_modules(root: Path) -> dict[str, Path]:
    """Every module of the project by its dotted name; a package is its `__init__.py`."""
    modules = {}
    for top in ROOTS:
        for path in sorted((root / top).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def read_imports(root: Path, modules: dict[str, Path]) -> Iterator[Import]:
    """Every import statement, at the top of a module or inside a function."""
    for importer, path in modules.items():
        package = importer if path.name == "__init__.py" else importer.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            place = f"{path.relative_to(root)}:{node.lineno}"
            if isinstance(node, ast.Import):
                yield from (Import(importer, place, alias.name, None) for alias in node.names)
                continue
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield (
                    Import(importer, place, whole, None)
                    if whole in modules
                    else Import(importer, place, base, alias.name)
                )


def unit(module: str) -> str:
    """What a module belongs to: the named package or module of LAYERS, or else itself."""
    named = [name for layer in LAYERS for name in layer if module == name or module.startswith(name + ".")]
    return named[0] if named else module


def level(module: str) -> int:
    return next((n for n, layer in enumerate(LAYERS) if unit(module) in layer), TOP)


def find_cycle(edges: Iterable[tuple[str, str]]) -> list[str] | None:
    """Some circle of the graph as a path that ends where it begins; None if there is none."""
    below: dict[str, list[str]] = {}
    for start, end in edges:
        below.setdefault(start, []).append(end)
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str] | None:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        for end in below.get(node, []):
            if cycle := walk(end, [*path, node]):
                return cycle
        done.add(node)
        return None

    return next((cycle for node in list(below) if (cycle := walk(node, []))), None)


def find_violations(root: Path) -> list[str]:
    """Say, one sentence each, where the tree under `root` breaks the layers."""
    modules = read_modules(root)
    found = [
        f"{path.relative_to(root)}: package {name} has no layer; name it in LAYERS"
        for name, path in modules.items()
        if path.name == "__init__.py" and name.count(".") == 1 and name.startswith("mpo_ray.") and level(name) == TOP
    ]
    edges = set()
    for item in read_imports(root, modules):
        importer, target = item.importer, item.target
        top = target.partition(".")[0]
        statement = f"{item.place}: {importer} imports {target}"
        if importer == "mpo_ray":
            continue  # registers the mixture with transformers; every import of the package runs it
        if top not in ROOTS:
            if top in ONLY_FROM_MACHINES_UP and level(importer) < MACHINES:
                found.append(f"{statement}; only cluster, serving and what is above them may know {top}")
            if unit(importer) == "mpo_ray.maths" and top not in MATHS_MAY_IMPORT:
                found.append(f"{statement}; maths knows numpy, scipy and torch only")
            continue
        if target == "mpo_ray":
            if item.name is not None:
                found.append(f"{statement}.{item.name}; the package root has no names to import")
            continue
        if top != "mpo_ray" and importer.partition(".")[0] != top:
            found.append(f"{statement}; nothing imports an entry point")
        if level(target) > level(importer):
            found.append(f"{statement}, which lies above it")
        if unit(importer) == "mpo_ray.maths" and unit(target) != "mpo_ray.maths":
            found.append(f"{statement}; maths knows numpy, scipy and torch only")
        packages = [target.rsplit(".", n)[0] for n in range(1, target.count("."))]
        outside = [package for package in packages if importer != package and not importer.startswith(package + ".")]
        edges |= {(importer, end) for end in [target, *outside]}
    if cycle := find_cycle(sorted(edges)):
        found.append(f"modules import each other in a circle: {' → '.join(cycle)}")
    between = sorted({(unit(a), unit(b)) for a, b in edges if unit(a) != unit(b)})
    if cycle := find_cycle(between):
        found.append(f"packages import each other in a circle: {' → '.join(cycle)}")
    for name, path in modules.items():
        length = len(path.read_text(encoding="utf-8").splitlines())
        if not name.startswith("mpo_ray") and length > MOST_LINES_OF_AN_ENTRY_POINT:
            found.append(
                f"{path.relative_to(root)}: {length} lines; an entry point has at most {MOST_LINES_OF_AN_ENTRY_POINT}"
            )
    return found


def test_the_projects_imports_point_down_and_never_in_a_circle() -> None:
    """jobs, serve_apps, cli > stages > cluster, serving > training … policies > maths, config, records, run."""
    assert len(read_modules(PROJECT)) > 20
    assert find_violations(PROJECT) == []


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        if path.parent != root:
            (path.parent / "__init__.py").touch()
    return root


RIGHT = {
    "mpo_ray/__init__.py": "import transformers\nimport mpo_ray.policies.mixture\n",
    "mpo_ray/config.py": "import pydantic\nfrom mpo_ray.records import digest\n",
    "mpo_ray/records.py": "import json\n",
    "mpo_ray/cli.py": "def main():\n    from mpo_ray import pipeline\n",
    "mpo_ray/pipeline.py": "import ray\nfrom mpo_ray.cluster import train\n",
    "mpo_ray/maths/simplex.py": "import numpy as np\n",
    "mpo_ray/maths/partition.py": "from .simplex import uniform\nfrom . import simplex\n",
    "mpo_ray/policies/mixture.py": "import torch, transformers\nfrom mpo_ray.maths.partition import gap\n",
    "mpo_ray/decoding/engine.py": "from mpo_ray.policies.mixture import Mixture\n",
    "mpo_ray/cluster/train.py": "import ray.train\nfrom mpo_ray.decoding.engine import generate\n",
    "jobs/pipeline.py": "from mpo_ray.pipeline import run\n",
}


def test_a_tree_in_layers_is_accepted(tmp_path: Path) -> None:
    """Down, sideways to another package of the layer, and to a sibling, absolute or relative."""
    assert find_violations(write(tmp_path, RIGHT)) == []


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        ("mpo_ray/decoding/engine.py", "from mpo_ray.cluster import train\n", "which lies above it"),
        ("mpo_ray/decoding/engine.py", "def f():\n    import mpo_ray.cluster.train\n", "which lies above it"),
        ("mpo_ray/decoding/engine.py", "from ..cluster.train import fit\n", "which lies above it"),
        ("mpo_ray/cluster/train.py", "from mpo_ray import cli\n", "which lies above it"),
        ("mpo_ray/run.py", "from mpo_ray.data.tokens import x\n", "which lies above it"),
        ("mpo_ray/training/loop.py", "import ray.data\n", "may know ray"),
        ("mpo_ray/training/loop.py", "def f():\n    from deepspeed import initialize\n", "may know deepspeed"),
        ("mpo_ray/evaluation/report.py", "from fastapi import FastAPI\n", "may know fastapi"),
        ("mpo_ray/maths/pareto.py", "import pandas\n", "maths knows numpy, scipy and torch only"),
        ("mpo_ray/maths/pareto.py", "from mpo_ray.records import digest\n", "maths knows numpy, scipy and torch only"),
        ("mpo_ray/data/tokens.py", "from mpo_ray import __version__\n", "no names to import"),
        ("mpo_ray/records.py", "from mpo_ray.config import Run\n", "mpo_ray.config → mpo_ray.records"),
        (
            "mpo_ray/maths/simplex.py",
            "def f():\n    from mpo_ray.maths import partition\n",
            "modules import each other",
        ),
        ("mpo_ray/policies/other.py", "from mpo_ray.decoding.cache import K\n", "packages import each other"),
        ("mpo_ray/policies/__init__.py", "from mpo_ray.decoding.engine import x\n", "modules import each other"),
        ("mpo_ray/pipeline.py", "from jobs.pipeline import main\n", "nothing imports an entry point"),
        ("mpo_ray/somewhere/new.py", "", "has no layer"),
        ("jobs/pipeline.py", "\n" * 41, "41 lines"),
    ],
)
def test_a_tree_that_breaks_the_layers_is_found_out(tmp_path: Path, file: str, text: str, complaint: str) -> None:
    """One file of the accepted tree is changed or added, and the checker says what is wrong with it."""
    found = find_violations(write(tmp_path, {**RIGHT, file: text}))
    assert any(complaint in sentence for sentence in found), found
