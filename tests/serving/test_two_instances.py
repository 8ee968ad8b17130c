"""Two `mpo-ray serve` on one machine, from their first second to their last: neither ever answers for the other."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import httpx
import psutil
import pytest

from mpo_ray.serving.ports import free_port
from tests.serving.live import PROMPT
from tests.serving.served import write_mixture

LOOPBACK = ("127.0.0.1", "::ffff:127.0.0.1")
KEYS = {"first": "the-key-of-first", "second": "the-key-of-second"}
PRIVATE = "private words of first"


class Instance:
    """A process that serves under its own name, with its own key."""

    def __init__(self, name: str, artefact: Path, directory: Path, port: int) -> None:
        self.name, self.port, self.url = name, port, f"http://127.0.0.1:{port}"
        self.said, self.told = directory / f"{name}.said", directory / f"{name}.told"
        environment = {key: value for key, value in os.environ.items() if key != "RAY_AUTH_MODE"}
        environment |= {"KEY": KEYS[name], "RAY_BACKEND_LOG_LEVEL": "fatal"}  # as the command sets it
        config = directory / f"{name}.py"
        config.write_text(START.format(artefact=str(artefact), name=name, port=port), encoding="utf-8")
        with self.said.open("wb") as output, self.told.open("wb") as errors:
            command = [sys.executable, str(config)]
            self.process = subprocess.Popen(command, env=environment, cwd=directory, stdout=output, stderr=errors)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def child(self, *words: str) -> psutil.Process:
        """The process of this instance whose command has one of these words."""
        return next(one for one in self.children() if any(word in " ".join(one.cmdline()) for word in words))

    def listens(self) -> set[tuple[str, int]]:
        return {each for pid in [self.process.pid, *(one.pid for one in self.children())] for each in listens(pid)}

    def end(self) -> None:
        self.process.kill()
        self.process.wait()

    def lines(self) -> list[str]:
        return self.said.read_text(encoding="utf-8").splitlines()

    def has_said(self) -> bool:
        """Whether both its lines are there: the first request may be answered shortly before them."""
        return len(self.lines()) >= 2

    def answers(self) -> bool:
        try:
            headers = {"Authorization": f"Bearer {KEYS[self.name]}"}
            body = {"model": self.name, "prompt": PROMPT, "max_tokens": 2}
            return httpx.post(f"{self.url}/v1/completions", json=body, headers=headers, timeout=20).status_code == 200
        except httpx.TransportError:
            return False


#: As the command does it.
START = """
import os
from mpo_ray.serving.haproxy import haproxy_environment

os.environ.update(haproxy_environment())
from mpo_ray.config_serving import Serve
from mpo_ray.serving.service import serve_endpoint

serve = Serve(port={port}, api_key_env="KEY", cpus_per_replica=0.1, max_tokens=40)
serve_endpoint({artefact!r}, serve, {name!r}, blocking=True)
"""


def listens(pid: int) -> set[tuple[str, int]]:
    """Where this process listens."""
    found = psutil.Process(pid).net_connections()
    return {(each.laddr.ip, each.laddr.port) for each in found if each.status == psutil.CONN_LISTEN}


def answers_without_token(port: int) -> set[str]:
    """What the servers of Ray that speak gRPC there say to a call without the token."""
    said = set()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        for method in ("/ray.serve.ASGIService/HandleRequest", "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo"):
            try:
                channel.unary_unary(method)(b"", timeout=60, wait_for_ready=True)
                said.add("an answer")
            except grpc.RpcError as error:
                said.add(error.code().name)
    return said


@contextmanager
def asked_all_the_time(instance: Instance) -> Iterator[dict[tuple[str, int], int]]:
    """Requests without the key and with a wrong one, again and again; counts what comes back."""
    stop, seen = threading.Event(), {}

    def ask() -> None:
        body = {"model": "second", "prompt": PRIVATE, "max_tokens": 2}
        with httpx.Client(base_url=instance.url, timeout=20) as client:
            while not stop.is_set():
                for path, key in (("/v1/models", None), ("/v1/completions", KEYS["second"]), ("/-/routes", None)):
                    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
                    try:
                        if path == "/v1/completions":
                            answer = client.post(path, headers=headers, json=body)
                        else:
                            answer = client.get(path, headers=headers)
                    except httpx.TransportError:
                        seen["no connection", 0] = seen.get(("no connection", 0), 0) + 1
                        continue
                    assert answer.headers["content-type"].startswith("application/json"), answer.text
                    assert "error" in answer.json(), answer.text
                    assert "second" not in answer.text
                    seen[path, answer.status_code] = seen.get((path, answer.status_code), 0) + 1
                time.sleep(0.02)

    failures: list[BaseException] = []

    def watch() -> None:
        try:
            ask()
        except AssertionError as error:
            failures.append(error)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()
    assert not failures, failures[0]


def wait_for(condition: Callable[[], bool], seconds: float, what: str, *instances: Instance) -> None:
    end = time.monotonic() + seconds
    while not condition():
        for one in instances:
            assert one.process.poll() is None, one.told.read_text(encoding="utf-8")
        assert time.monotonic() < end, what
        time.sleep(0.2)


@pytest.mark.slow
def test_two_instances_never_answer_for_each_other(tmp_path: Path) -> None:
    """While one starts, after the kill of its ingress, of HAProxy and of Ray's proxies; and they share no port.

    Also: each prints one line, all its ports are on loopback, a second on the same port is refused before it loads
    anything, and what is told to stop leaves no process.
    """
    artefact = write_mixture(tmp_path)
    instances: list[Instance] = []
    with ExitStack() as stack:

        def start(name: str) -> Instance:
            instances.append(one := Instance(name, artefact, tmp_path, free_port()))
            stack.callback(one.end)
            return one

        second = start("second")
        wait_for(second.answers, 240, "the second does not start", second)
        first = start("first")
        with asked_all_the_time(first) as seen:
            wait_for(first.answers, 240, "the first does not start", first)
        assert all(status in (0, 401, 404, 503) for _, status in seen), seen
        assert {("/v1/models", 503), ("/v1/models", 401)} <= seen.keys(), seen

        for one in instances:
            wait_for(one.has_said, 60, f"{one.name} answers, and does not say where", one)
            holds, serves = one.lines()
            assert re.fullmatch(r"A replica has .* GiB of KV cache: .* tokens of this mixture, .*\.", holds), holds
            assert serves == f"Serving {one.name} at {one.url}/v1 (the API key is in KEY). Stop with Ctrl-C."
            assert one.told.read_text(encoding="utf-8") in ("", "starting Ray\n")  # it says so where that takes long
            open_to_others = {port for address, port in one.listens() if address not in LOOPBACK}
            replicas = {each.pid for each in one.children() if "ServeReplica" in each.name()}
            assert open_to_others <= {port for pid in replicas for _, port in listens(pid)}, "Ray binds these itself"
            inner = next(each.pid for each in one.children() if each.name() == "gcs_server")
            for port in open_to_others | {port for _, port in listens(inner)}:
                assert "UNAUTHENTICATED" in (said := answers_without_token(port)), (port, said)
        assert not {port for _, port in first.listens()} & {port for _, port in second.listens()}

        (elsewhere := tmp_path / "again").mkdir()
        again = Instance("second", artefact, elsewhere, first.port)
        assert again.process.wait(240) == 1
        assert f"another program listens at port {first.port}" in again.told.read_text(encoding="utf-8")

        for words in (("ServeReplica:first:Endpoint",), ("haproxy.cfg",), ("HAProxyManager",), ("ProxyActor",)):
            victim = first.child(*words)
            with asked_all_the_time(first) as seen:
                victim.kill()
                psutil.wait_procs([victim], timeout=20)
                wait_for(first.answers, 120, f"it does not come back after {words}", first)
            assert all(status in (0, 401, 404, 502, 503) for _, status in seen), (words, seen)
            assert second.answers()
        for one, number in ((first, signal.SIGTERM), (second, signal.SIGINT)):
            children = one.children()
            one.process.send_signal(number)
            assert one.process.wait(90) == 0, one.told.read_text(encoding="utf-8")
            _, alive = psutil.wait_procs(children, timeout=30)
            assert not alive
            assert "Traceback" not in one.told.read_text(encoding="utf-8")
