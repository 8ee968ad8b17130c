"""Whether thousands of half-sent requests keep a normal one out of a running endpoint.

    mpo-ray serve RUN
    python benchmarks/half_sent.py http://127.0.0.1:8000 [--number 4000] [--key KEY]

For loopback. Three kinds of request stop in the middle: in the head, in a body that fits HAProxy's buffer of 16 KiB,
and in a larger one, which reaches the ingress. While `number` of one kind are open, and until all have been given up,
a completion of one token is asked for again and again. Each kind ends within two minutes.
"""

from __future__ import annotations

import argparse
import selectors
import socket
import time
from contextlib import ExitStack
from statistics import median
from urllib.parse import urlsplit

import httpx

HEAD = "POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
KINDS = {
    "in the head": HEAD,
    "in a small body": f'{HEAD}Content-Length: 1000\r\n\r\n{{"model": "',
    "in a large body": f"{HEAD}Content-Length: 100000\r\n\r\n" + " " * 20_000,
}
LONGEST = 120.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--number", type=int, default=4000)
    parser.add_argument("--key", default="none")
    given = parser.parse_args()
    with httpx.Client(base_url=given.url, headers={"Authorization": f"Bearer {given.key}"}, timeout=60) as client:
        model = client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        print("| requests stop | open | completions | of them 200 | slowest, s | median, s | given up after, s |")
        print("|---|---|---|---|---|---|---|")
        for kind, content in KINDS.items():
            print(f"| {kind} | {measure(client, model, content.encode(), given.url, given.number)} |", flush=True)


def measure(client: httpx.Client, model: str, content: bytes, url: str, number: int) -> str:
    """The row of a kind."""
    address = urlsplit(url)
    with ExitStack() as stack, selectors.DefaultSelector() as selector:
        began = time.monotonic()
        for _ in range(number):
            one = stack.enter_context(socket.create_connection((address.hostname, address.port or 80), timeout=30))
            one.sendall(content)
            selector.register(one, selectors.EVENT_READ)
        statuses, seconds = [], []
        while selector.get_map() and time.monotonic() - began < LONGEST:
            asked = time.monotonic()
            answer = client.post("/v1/completions", json={"model": model, "prompt": [1], "max_tokens": 1})
            statuses.append(answer.status_code)
            seconds.append(time.monotonic() - asked)
            for key, _ in selector.select(timeout=0.2):  # an answer, or the end of the connection
                selector.unregister(key.fileobj)
        left = f"{len(selector.get_map())} never" if selector.get_map() else f"{time.monotonic() - began:.0f}"
    return f"{number} | {len(statuses)} | {statuses.count(200)} | {max(seconds):.2f} | {median(seconds):.3f} | {left}"


if __name__ == "__main__":
    main()
