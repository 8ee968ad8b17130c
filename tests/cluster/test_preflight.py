"""What is looked for before anything is paid for, on nodes that are there."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from mpo_ray.cluster.preflight import _probe, check_storage_everywhere
from mpo_ray.run import Run
from mpo_ray.storage import RunError

pytestmark = pytest.mark.usefixtures("ray_cluster")


def test_storage_that_every_node_shares_is_left_as_it_was(tmp_path: Path) -> None:
    run = Run(str(tmp_path), "mine")
    check_storage_everywhere(run)
    assert list(run.local.iterdir()) == []


def test_storage_that_only_the_driver_sees_is_refused_with_the_node() -> None:
    """The memory of a process is no other process's."""
    with pytest.raises(
        RunError, match=r"node 1\S+ \(\w{8}\) cannot use the storage memory://far/mine: the driver's file is"
    ):
        check_storage_everywhere(Run("memory://far", "mine"))


def test_storage_whose_package_a_node_lacks_is_refused_with_its_name() -> None:
    """What a pickled file system of such a package is there: a name that cannot be imported."""
    problem = _probe()(b"cno_such_kind\nFileSystem\n.", "bucket/mine", "token")
    assert problem == "ModuleNotFoundError: No module named 'no_such_kind'"


def test_the_probe_of_a_node_imports_nothing_of_this_package(tmp_path: Path) -> None:
    """In a process that has seen nothing yet; it takes seconds to import."""
    run = Run(str(tmp_path), "mine")
    run.write_text("check/driver", "token")
    (tmp_path / "probe").write_bytes(ray.cloudpickle.dumps((_probe(), pickle.dumps(run.filesystem))))
    program = (
        "import pickle, sys\n"
        "probe, filesystem = pickle.load(open(sys.argv[1], 'rb'))\n"
        "print(probe(filesystem, sys.argv[2], 'token'), 'mpo_ray' in sys.modules)"
    )
    given = [sys.executable, "-c", program, str(tmp_path / "probe"), run.path("check")]
    assert subprocess.run(given, capture_output=True, text=True, check=True).stdout.split() == ["None", "False"]
    assert run.read_text("check/node") == "token"
