"""One artefact behind `vllm serve`, `ray.serve.llm` and this package's endpoint: each says what `generate` says."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml
from ray import serve as ray_serve

from mpo_ray.config import ConfigError
from mpo_ray.config_serving import Serve
from mpo_ray.serving.ports import free_port
from mpo_ray.serving.service import serve_endpoint
from tests.serving.live import NAME, write_tiny
from tests.serving.served import generated
from tests.vllm_plugin.mixtures import ENVIRONMENT, MARKS

pytestmark = MARKS
ROOT = Path(__file__).parents[2]
PROMPT = "I liked it"
SHIFTED = {"helpful": 0.1, "harmless": 0.9}


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("served"), engine="vllm")


def greedy(client: openai.OpenAI, **extra: Any) -> str:
    made = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=12, temperature=0, extra_body=extra)
    return made.choices[0].text


def test_vllm_serve(artefact: Path) -> None:
    """The command that vLLM brings; λ by its own field for extra arguments."""
    port = free_port()
    command = [
        str(Path(sys.executable).with_name("vllm")), "serve", str(artefact), "--host", "127.0.0.1", "--port", str(port),
        "--served-model-name", NAME, "--dtype", "float32", "--enforce-eager", "--max-num-seqs", "8",
    ]  # fmt: skip
    server = subprocess.Popen(command, env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        await_health(f"http://127.0.0.1:{port}/health", server)
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            check_answers(client, artefact)
    finally:
        server.terminate()
        server.communicate(timeout=60)


def await_health(url: str, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 180
    while time.monotonic() < end:
        if server.poll() is not None:
            pytest.fail(f"vllm serve ended: {server.communicate()[0].decode()[-3000:]}")
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    pytest.fail("vllm serve was not healthy in 180 s")


def check_answers(client: openai.OpenAI, artefact: Path) -> None:
    """Plain, streamed and chat; the artefact's weights and the request's; wrong ones are refused."""
    assert greedy(client) == generated(artefact, PROMPT)
    weights = {"mixture_weights": "helpful=0.1,harmless=0.9"}
    assert greedy(client, vllm_xargs=weights) == generated(artefact, PROMPT, SHIFTED) != generated(artefact, PROMPT)
    pieces = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=12, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == generated(artefact, PROMPT)
    messages: Any = [{"role": "user", "content": "was it good"}]
    chat = client.chat.completions.create(model=NAME, messages=messages, max_tokens=12, temperature=0)
    assert (chat.choices[0].message.content or "").strip() == generated(artefact, "<s> user was it good assistant")
    with pytest.raises(openai.BadRequestError, match=r"sum to 0\.5, not 1"):
        greedy(client, vllm_xargs={"mixture_weights": "helpful=0.5"})


def test_ray_serve_llm(cluster: None, artefact: Path) -> None:
    """What `serve run serve_apps/mixture_vllm.yaml` does, with this artefact."""
    from serve_apps.mixture_vllm import build

    content = yaml.safe_load((ROOT / "serve_apps" / "mixture_vllm.yaml").read_text(encoding="utf-8"))
    arguments = content["applications"][0]["args"] | {"artefact": str(artefact), "name": NAME}
    arguments["llm"]["deployment_config"]["autoscaling_config"]["max_replicas"] = 1
    port = free_port()
    ray_serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    ray_serve.run(build(arguments), name="llm", route_prefix="/")
    try:
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            check_answers(client, artefact)
    finally:
        ray_serve.delete("llm")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"artefact": "nowhere"}, "nowhere"),
        ({"llm": {"model_loading_config": {}}}, "llm.model_loading_config: it follows from artefact and name"),
        ({"llm": {"replicas": 2}}, "replicas"),
        ({"kind": 2}, "kind: Extra inputs are not permitted"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(artefact: Path, changes: dict[str, Any], message: str) -> None:
    from serve_apps.mixture_vllm import build

    with pytest.raises((ConfigError, OSError), match=message):
        build({"artefact": str(artefact), "name": NAME, **changes})


def test_the_endpoint_with_vllm_behind_it(cluster: None, artefact: Path) -> None:
    """On a Serve instance: weights, exact mode, what vLLM cannot do, and metrics."""
    ray_serve.shutdown()
    config = Serve(port=0, engine="vllm", max_num_seqs=8, max_replicas=1, max_tokens=50, context=64)
    url = serve_endpoint(str(artefact), config, NAME, blocking=False)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == [NAME, f"{NAME}/helpful", f"{NAME}/harmless"]
        assert greedy(client) == generated(artefact, PROMPT)
        assert greedy(client, mixture={"weights": SHIFTED}) == generated(artefact, PROMPT, SHIFTED)
        made = client.completions.create(
            model=NAME, prompt=PROMPT, max_tokens=2, seed=1, extra_body={"mixture": {"mode": "exact"}}
        )
        report = made.choices[0].model_extra["mixture"]
        assert (report["mode"], report["method"]) == ("exact", "rejection")
        assert report["attempts"] >= 1
        with pytest.raises(openai.BadRequestError, match="draws exact samples by 'rejection' alone") as refused:
            greedy(client, mixture={"mode": "exact", "method": "smc"})
        assert refused.value.param == "mixture.method"
        with pytest.raises(openai.BadRequestError, match="serve with engine: mpo") as refused:
            client.completions.create(
                model=NAME, prompt=PROMPT, logprobs=1, extra_body={"mixture": {"policy_logprobs": True}}
            )
        assert refused.value.param == "mixture.policy_logprobs"
    assert "mpo_ray_generated_tokens_total" in httpx.get(f"{url}/metrics").text
