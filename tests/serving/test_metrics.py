"""What the endpoint measures: the names in the documents are the names it shows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mpo_ray.decoding.protocol import Diagnostics, Statistics
from mpo_ray.serving.metrics import PREFIX, QUANTITIES, EndpointMetrics, Prometheus
from mpo_ray.serving.observer import Observer

DOCS = Path(__file__).parents[2] / "docs"
HALF = Diagnostics("smc", {"helpful": 1.0}, log_z=-3.0, log_z_hat=-2.0, effective_sample_size=5.0, particles=8)


@pytest.fixture
def shown() -> Prometheus:
    """After one completion that finished, one that was aborted, and one request that was refused."""
    shown = Prometheus()
    observer: Observer = EndpointMetrics(shown)
    observer.request_admitted("a", 7, at=10.0)
    observer.request_admitted("b", 5, at=10.0)
    observer.first_token("a", at=10.4)
    observer.tokens("a", 1, at=10.4)
    observer.tokens("a", 4, at=11.2)
    observer.finished("a", "stop", HALF, at=11.2)
    observer.aborted("b", "disconnected", at=12.0)
    observer.rejected("overloaded", at=12.0)
    shown.hear("one", Statistics(2, 3, kv_blocks=8, kv_blocks_used=4, admitted=6, queue_seconds=1.5))
    shown.hear("two", Statistics(0, 0, kv_blocks=8, kv_blocks_used=0))
    return shown


def samples(shown: Prometheus) -> dict[str, float]:
    lines = shown.page()[0].decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def test_what_was_heard_is_what_the_page_shows(shown: Prometheus) -> None:
    page = samples(shown)
    expected = {
        "prompt_tokens_total": 12,
        "generated_tokens_total": 5,
        'finished_total{reason="stop"}': 1,
        'aborted_total{reason="disconnected"}': 1,
        'rejected_total{reason="overloaded"}': 1,
        "time_to_first_token_seconds_sum": 0.4,
        "time_per_output_token_seconds_sum": 0.2,
        "completion_seconds_sum": 1.2,
        "completion_seconds_count": 1,
        "minus_log_z_nats_sum": 3,
        "effective_sample_size_sum": 5,
        'running{replica="one"}': 2,
        'waiting{replica="one"}': 3,
        'kv_blocks{replica="two"}': 8,
        'kv_blocks_used{replica="one"}': 4,
        'admitted_total{replica="one"}': 6,
        'queue_seconds_total{replica="one"}': 1.5,
    }
    assert {name: page[PREFIX + name] for name in expected} == pytest.approx(expected)


def test_every_name_in_the_dashboard_is_on_the_page_and_every_quantity_is_in_the_dashboard(shown: Prometheus) -> None:
    drawn = set(re.findall(rf"{PREFIX}\w+", (DOCS / "grafana.json").read_text(encoding="utf-8")))
    assert drawn <= {name.partition("{")[0] for name in samples(shown)}
    for quantity in QUANTITIES:
        assert any(name.startswith(PREFIX + quantity.name) for name in drawn), quantity.name
    panels = json.loads((DOCS / "grafana.json").read_text(encoding="utf-8"))["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_the_operators_page_lists_every_quantity_and_no_other() -> None:
    listed = re.findall(rf"^\| `{PREFIX}(\w+)`", (DOCS / "operating.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert listed == [quantity.name for quantity in QUANTITIES]
