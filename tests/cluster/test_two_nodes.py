"""Two workers on two nodes train one policy, and a cluster that cannot hold a config says so."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.tiny_run import ROOT, environment

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two_nodes(cheap_workers: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A policy trained on a cluster of its own, in a process of its own: Ray allows one cluster for each."""
    storage = tmp_path_factory.mktemp("two_nodes")
    done = subprocess.run(
        [sys.executable, "-m", "tests.cluster.two_nodes", str(storage)],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=ROOT,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return storage / "two", json.loads(done.stdout.splitlines()[-1])


def test_two_workers_on_two_nodes_train_a_policy(two_nodes: tuple[Path, dict]) -> None:
    run, seen = two_nodes
    assert seen["nodes"] == 2
    record = json.loads((run / "policies" / "concise" / "training.json").read_text())
    assert record["heldout"]["loss"] < 0.6931
    assert (run / "policies" / "concise" / "adapter_model.safetensors").is_file()
    [checkpoint] = list(run.glob("training/concise-*/checkpoint_*"))
    assert {path.name for path in checkpoint.glob("digests-*")} == {"digests-0.json", "digests-1.json"}


def test_full_weights_trained_in_shards_by_ipo_load_with_plain_transformers(two_nodes: tuple[Path, dict]) -> None:
    """ZeRO 3 over two nodes: the exported model is whole, is not the reference, and prefers what it was taught."""
    policy = two_nodes[0] / "policies" / "detailed"
    model = AutoModelForCausalLM.from_pretrained(policy)
    reference = AutoModelForCausalLM.from_pretrained(two_nodes[0] / "embedded" / "model")
    names = [name for name, _ in reference.named_parameters()]
    assert [name for name, _ in model.named_parameters()] == names
    assert all((model.get_parameter(n) != reference.get_parameter(n)).any() for n in names)
    assert json.loads((policy / "training.json").read_text())["heldout"]["margin"] > 0


def test_a_damaged_checkpoint_stops_training_with_its_name_and_the_remedy(two_nodes: tuple[Path, dict]) -> None:
    message = two_nodes[1]["damaged"]
    assert "mp_rank_00_model_states.pt (100 bytes) is not what was written" in message
    assert f"Delete {two_nodes[0]}/training/concise-" in message
    log = message.partition("(all of it: ")[2].rstrip(")")
    assert "Traceback" in Path(log).read_text()


def test_more_workers_than_the_cluster_can_have_are_refused(two_nodes: tuple[Path, dict]) -> None:
    assert two_nodes[1]["too_many"] == (
        "policies.workers: 4 × 1 CPU need 4 CPU, but the cluster can have 2. Lower the number, or add nodes."
    )


def test_a_worker_larger_than_every_node_is_refused(two_nodes: tuple[Path, dict]) -> None:
    assert (
        "policies.workers: each needs 2 CPU, but no node has that; the most that one has is 1 CPU"
        in (two_nodes[1]["too_large"])
    )


def test_a_gpu_where_there_is_none_is_refused(two_nodes: tuple[Path, dict]) -> None:
    assert "scoring: each needs 1 CPU and 1 GPU, but no node has that" in two_nodes[1]["no_gpu"]
