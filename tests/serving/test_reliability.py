"""What must hold while things go wrong, on a real Serve instance: one application, disturbed in several ways."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import httpx
import pytest
from ray import serve as ray_serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from mpo_ray.config_serving import Serve
from mpo_ray.serving.ports import free_port
from tests.serving.live import NAME, PROMPT, WEIGHTS, events_of
from tests.serving.served import Load, generated, write_mixture

CONFIG = Serve(
    port=0,
    min_replicas=2,
    max_replicas=2,
    target_ongoing_requests=4,
    max_queued_requests=60,
    max_num_seqs=16,
    max_tokens=600,
    cpus_per_replica=0.5,
    health_check_period_s=1,
    request_timeout_s=60,
)
GREEDY = {"model": NAME, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("disturbed")
    return write_mixture(root, seed=1, context=1024), write_mixture(root, seed=11, context=1024)


@pytest.fixture(scope="module")
def url(ray_cluster: None, artefacts: tuple[Path, Path]) -> Iterator[str]:
    port = free_port()
    ray_serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    deploy(artefacts[0], WEIGHTS)
    yield f"http://127.0.0.1:{port}"
    ray_serve.shutdown()


def deploy(artefact: Path, weights: dict[str, float]) -> None:
    """What `serve deploy` does with a config file; returns when the application runs as it says."""
    root = Path(__file__).parents[2]
    application = {
        "name": NAME,
        "route_prefix": "/",
        "import_path": "serve_apps.mixture:build",
        "runtime_env": {"env_vars": {"PYTHONPATH": str(root)}},
        "args": {"artefact": str(artefact), "name": NAME, "serve": CONFIG.model_dump(mode="json")},
        "deployments": [{"name": "MixtureReplica", "user_config": {"weights": weights}}],
    }
    schema = ServeDeploySchema.model_validate({"applications": [application]})
    _get_global_client().deploy_apps(schema, _blocking=False)
    end = time.monotonic() + 400
    while ray_serve.status().applications[NAME].status != "RUNNING":
        assert time.monotonic() < end, ray_serve.status().applications[NAME]
        time.sleep(0.1)


def replicas() -> dict[str, int]:
    """Process ids of the replicas that decode and run, by their names."""
    deployed = _get_global_client().get_serve_details()["applications"][NAME]["deployments"]["MixtureReplica"]
    return {one["replica_id"]: one["pid"] for one in deployed["replicas"] if one["state"] == "RUNNING"}


def texts_of(load: Load) -> Counter[str]:
    assert {status for status, _ in load.answers} == {200}, [one for one in load.answers if one[0] != 200][:3]
    for _, body in load.answers:
        assert len({choice["text"] for choice in body["choices"]}) == 1, "one answer of two artefacts"
    return Counter(body["choices"][0]["text"] for _, body in load.answers)


def test_after_200_cancelled_requests_one_is_answered_promptly_and_no_row_is_in_use(url: str) -> None:
    async def cancel_many() -> None:
        body = {**GREEDY, "max_tokens": 50, "n": 2, "temperature": 1, "stream": True}
        async with httpx.AsyncClient(timeout=30) as client:
            for _ in range(4):  # as many at a time as run and wait, so that none is refused
                calls = [asyncio.create_task(client.post(f"{url}/v1/completions", json=body)) for _ in range(50)]
                await asyncio.sleep(0.3)
                for call in calls:
                    call.cancel()
                await asyncio.gather(*calls, return_exceptions=True)

    asyncio.run(cancel_many())
    began = time.monotonic()
    assert httpx.post(f"{url}/v1/completions", json=GREEDY, timeout=30).status_code == 200
    assert time.monotonic() - began < 10
    handle = ray_serve.get_deployment_handle("MixtureReplica", NAME)
    found: dict[str, int] = {}
    end = time.monotonic() + 20
    while (len(found) < 2 or any(found.values())) and time.monotonic() < end:
        name, statistics = handle.statistics.remote().result()
        found[name] = statistics.kv_blocks_used + statistics.running + statistics.waiting
    assert list(found.values()) == [0, 0]


def test_a_killed_replica_fails_only_what_it_had_begun(url: str) -> None:
    """SIGKILL of one of two: what had a token ends with an error, 503 or a last event; all else is answered."""
    before = replicas()
    load = Load(url, 8, GREEDY)
    long = {**GREEDY, "n": 4, "max_tokens": 600, "ignore_eos": True}  # eight of them take all lanes of both
    answers: list[httpx.Response] = []

    async def kill(victim: str) -> None:
        os.kill(before[victim], signal.SIGKILL)
        enough = len(load.answers) + 60
        while len(load.answers) < enough:
            await asyncio.sleep(0.1)

    async def disturb() -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            bodies = ({**long, "stream": index % 2 == 0} for index in range(8))
            calls = [asyncio.create_task(client.post(f"{url}/v1/completions", json=body)) for body in bodies]
            full: list[str] = []
            while not full:
                assert not any(call.done() for call in calls)
                page = (await client.get(f"{url}/metrics")).text
                full = re.findall(r'(?m)^mpo_ray_running{replica="(\w+)"} 16\.0$', page)
            await load.during(lambda: kill(full[0]))
            answers.extend(await asyncio.gather(*calls))

    asyncio.run(disturb())
    end = time.monotonic() + 40
    while len(replicas()) < 2 and time.monotonic() < end:
        time.sleep(0.3)
    assert len(replicas().keys() - before.keys()) == 1
    assert {status for status, _ in load.answers} == {200}
    streams, plain = answers[::2], answers[1::2]
    assert {answer.status_code for answer in streams} == {200}
    assert {answer.status_code for answer in plain} <= {200, 503}
    errors = [answer.text for answer in plain if answer.status_code == 503]
    errors += [last for answer in streams if (last := events_of(answer.text)[-1]) != "[DONE]"]
    assert len(errors) == 4, "the four that had the lanes"
    for error in errors:
        assert json.loads(error)["error"].keys() == {"message", "type", "param", "code"}
        assert "Actor" not in error


def test_a_hot_swap_of_weights_under_load_fails_nothing_and_is_seen_in_every_later_answer(
    url: str, artefacts: tuple[Path, Path]
) -> None:
    """The replicas stay; every answer is that of the old weights or of the new ones."""
    shifted = {"helpful": 0.1, "harmless": 0.9}
    before = replicas()

    async def swap() -> None:
        await asyncio.to_thread(deploy, artefacts[0], shifted)
        await asyncio.sleep(2)

    load = Load(url, 6, {**GREEDY, "n": 2})
    asyncio.run(load.during(swap))
    old, new = generated(artefacts[0], PROMPT, WEIGHTS), generated(artefacts[0], PROMPT, shifted)
    assert old != new
    assert texts_of(load).keys() == {old, new}
    assert load.answers[-1][1]["choices"][0]["text"] == new
    assert replicas() == before


def test_a_rolling_update_under_load_fails_nothing_and_mixes_nothing(url: str, artefacts: tuple[Path, Path]) -> None:
    """Another artefact takes the place of the first: every answer is wholly of the one or of the other."""
    before = replicas()

    async def roll() -> None:
        await asyncio.to_thread(deploy, artefacts[1], WEIGHTS)
        await asyncio.sleep(2)

    load = Load(url, 6, {**GREEDY, "n": 2})
    asyncio.run(load.during(roll))
    new = generated(artefacts[1], PROMPT, WEIGHTS)
    texts = texts_of(load)
    assert texts.keys() <= {generated(artefacts[0], PROMPT, {"helpful": 0.1, "harmless": 0.9}), new}
    assert len(texts) == 2
    assert httpx.post(f"{url}/v1/completions", json=GREEDY, timeout=60).json()["choices"][0]["text"] == new
    assert not before.keys() & replicas().keys()


def test_a_full_queue_is_refused_with_429_in_json(url: str) -> None:
    """Of 150 at once more come than run and wait: the refused are told so, in JSON; the others are answered."""

    async def flood() -> list[tuple[httpx.Response, float]]:
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=500)) as client:

            async def ask() -> tuple[httpx.Response, float]:
                began = time.monotonic()
                answer = await client.post(f"{url}/v1/completions", json={**GREEDY, "max_tokens": 40})
                return answer, time.monotonic() - began

            return await asyncio.gather(*(ask() for _ in range(150)))

    answers = asyncio.run(flood())
    assert {answer.status_code for answer, _ in answers} == {200, 429}
    refused = [(answer, seconds) for answer, seconds in answers if answer.status_code == 429]
    assert all(answer.json()["error"]["code"] == "overloaded" for answer, _ in refused)
    assert all("retry-after" in answer.headers for answer, _ in refused)
    print(f"refused after {1e3 * median(seconds for _, seconds in refused):.0f} ms")
