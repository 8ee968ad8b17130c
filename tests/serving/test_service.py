"""A real Serve instance, asked by the `openai` client: design 5.5 and the job's seventh line."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import time
from collections.abc import Iterator
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import openai
import pytest
import ray
import yaml
from ray import serve as ray_serve

from mpo_ray.cluster.preflight import PlacementError
from mpo_ray.config import ConfigError
from mpo_ray.config_serving import Serve
from mpo_ray.policies.loading import ModelError
from mpo_ray.serving.page_files import PAGE_PATHS
from mpo_ray.serving.service import BuildArguments, build, check_open, key_digests, serve_endpoint
from mpo_ray.vllm_plugin.ray_llm import build as build_ray_llm
from tests.serving.live import NAME, PROMPT, WEIGHTS, write_tiny
from tests.serving.served import generated

KEY = "a-key-for-tests"


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def config() -> Serve:
    return Serve(
        port=0, max_replicas=1, target_ongoing_requests=2, max_queued_requests=2, max_tokens=50, api_key_env="TINY_KEY"
    )


@pytest.fixture(scope="module")
def url(ray_cluster: None, artefact: Path, config: Serve) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINY_KEY", KEY)
        address = serve_endpoint(str(artefact), config, NAME, blocking=False)
    yield address
    ray_serve.shutdown()


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as one:
        yield one


def test_models_are_the_mixture_and_each_policy(client: openai.OpenAI) -> None:
    policies = [f"{NAME}/{policy}" for policy in (*WEIGHTS, "reference")]
    assert [model.id for model in client.models.list()] == [NAME, *policies]
    assert client.models.retrieve(f"{NAME}/helpful").id == f"{NAME}/helpful"


def test_the_page_is_served_without_a_key(url: str) -> None:
    for path in PAGE_PATHS:
        assert httpx.get(f"{url}{path}").status_code == 200
    assert httpx.get(f"{url}/v1/models").status_code == 401


def test_greedy_completion_is_the_artefacts_own_generate(client: openai.OpenAI, artefact: Path) -> None:
    answer = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=12, temperature=0)
    assert answer.choices[0].text == generated(artefact, PROMPT)
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert answer.usage.prompt_tokens == 4
    assert answer.usage.total_tokens == 4 + answer.usage.completion_tokens


def test_chat_goes_through_the_chat_template(client: openai.OpenAI, artefact: Path) -> None:
    messages = [{"role": "user", "content": "was it good"}]
    answer = client.chat.completions.create(model=NAME, messages=messages, max_completion_tokens=12, temperature=0)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == generated(artefact, "<s> user was it good assistant")


def test_a_stream_is_the_same_text_in_pieces(client: openai.OpenAI, artefact: Path) -> None:
    """Chat and plain; with include_usage the last chunk counts the tokens."""
    pieces = list(client.completions.create(model=NAME, prompt=PROMPT, max_tokens=12, temperature=0, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == generated(artefact, PROMPT)
    assert len(pieces) > 3
    assert pieces[-1].choices[0].finish_reason in ("length", "stop")
    chunks = list(
        client.chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": "was it good"}],
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == generated(artefact, "<s> user was it good assistant")
    assert chunks[-1].usage.completion_tokens > 0


def test_weights_per_request_change_the_answer(client: openai.OpenAI, artefact: Path) -> None:
    """By the body, by the model id, and a single policy: each is the artefact's own text with those weights."""

    def ask(model: str = NAME, **extra: object) -> str:
        made = client.completions.create(model=model, prompt=PROMPT, max_tokens=12, temperature=0, extra_body=extra)
        return made.choices[0].text

    shifted, helpful = {"helpful": 0.1, "harmless": 0.9}, {"helpful": 1.0}
    assert ask(mixture={"weights": shifted, "mode": "token"}) == generated(artefact, PROMPT, shifted)
    assert ask(f"{NAME}@helpful=0.1,harmless=0.9") == generated(artefact, PROMPT, shifted)
    assert ask(f"{NAME}/helpful") == generated(artefact, PROMPT, helpful)
    assert len({ask(), ask(mixture={"weights": shifted}), ask(f"{NAME}/helpful")}) == 3


def test_choices_differ_and_a_seed_repeats_them(client: openai.OpenAI) -> None:
    def ask() -> list[str]:
        made = client.completions.create(model=NAME, prompt=[PROMPT, "I liked"], n=3, seed=7, max_tokens=10)
        assert [choice.index for choice in made.choices] == list(range(6))
        return [choice.text for choice in made.choices]

    first = ask()
    assert first == ask()
    assert len(set(first)) > 3


def test_a_wrong_or_missing_key_is_refused(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="another", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError, match="API key"):
            stranger.models.list()
        with pytest.raises(openai.AuthenticationError, match="API key"):
            stranger.completions.create(model=NAME, prompt=PROMPT)


def test_errors_reach_the_client_in_openais_form(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'other' does not exist; there are tiny, tiny/helpful"):
        client.completions.create(model="other", prompt=PROMPT)
    with pytest.raises(openai.BadRequestError, match="it has 71 tokens, and at most 63") as caught:
        client.completions.create(model=NAME, prompt="the " * 70)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match=r"sum to 0\.5, not 1"):
        client.completions.create(model=NAME, prompt=PROMPT, extra_body={"mixture": {"weights": {"helpful": 0.5}}})


def test_health_needs_no_key(url: str) -> None:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port)
    connection.request("GET", "/health")
    assert json.loads(connection.getresponse().read()) == {"status": "ok"}
    connection.close()


def test_a_config_file_deploys_and_its_user_config_swaps_the_weights_in_place(url: str, artefact: Path) -> None:
    """What `serve deploy` does with serve_apps/mixture.yaml: then only the weights change, no process does."""
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    root = Path(__file__).parents[2]
    content = yaml.safe_load((root / "serve_apps" / "mixture.yaml").read_text(encoding="utf-8"))
    (application,) = content["applications"]
    application |= {
        "name": "from_file",
        "route_prefix": "/from_file",
        "runtime_env": {"env_vars": {"PYTHONPATH": str(root)}},
        "args": {**application["args"], "artefact": str(artefact), "name": NAME},
    }
    connected = _get_global_client()

    def deploy(weights: dict[str, float]) -> set[int]:
        """Processes of the decoding replicas, once the application runs with these weights."""
        application["deployments"] = [{"name": "MixtureReplica", "user_config": {"weights": weights}}]
        connected.deploy_apps(ServeDeploySchema.model_validate({"applications": [application]}), _blocking=False)
        end = time.monotonic() + 300  # Ray's own wait ends after 60 s, which a busy machine needs
        while ray_serve.status().applications["from_file"].status != "RUNNING":
            assert time.monotonic() < end, ray_serve.status().applications["from_file"]
            time.sleep(0.2)
        deployed = connected.get_serve_details()["applications"]["from_file"]["deployments"]["MixtureReplica"]
        return {replica["pid"] for replica in deployed["replicas"]}

    def greedy() -> str:
        made = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=12, temperature=0)
        return made.choices[0].text

    shifted = {"helpful": 0.1, "harmless": 0.9}
    with openai.OpenAI(base_url=f"{url}/from_file/v1", api_key="none", max_retries=0) as client:
        first = deploy(WEIGHTS)
        assert greedy() == generated(artefact, PROMPT)
        assert deploy(shifted) == first
        end = time.monotonic() + 30
        while greedy() != generated(artefact, PROMPT, shifted) and time.monotonic() < end:
            time.sleep(0.2)
        assert greedy() == generated(artefact, PROMPT, shifted)
    ray_serve.delete("from_file")


def test_a_disconnected_client_is_not_decoded_for(client: openai.OpenAI, url: str) -> None:
    """Closing a stream ends its 128 completions, which run or wait, long before their 50 tokens."""

    def left() -> int:
        _, now = replica.statistics.remote().result()
        return int(now.running + now.waiting)

    replica = ray_serve.get_deployment_handle("MixtureReplica", NAME)
    prompts = [[1, 7, 9]] * 4
    stream = client.completions.create(
        model=NAME, prompt=prompts, n=32, max_tokens=50, stream=True, extra_headers={"Connection": "close"}
    )
    next(stream)
    assert left() > 64
    stream.close()
    end = time.monotonic() + 3
    while left() and time.monotonic() < end:
        time.sleep(0.05)
    assert left() == 0


def test_what_it_measures_is_on_rays_own_page(client: openai.OpenAI) -> None:
    """Of the ingress and of the engine, each from its own process."""
    client.completions.create(model=NAME, prompt=PROMPT, max_tokens=12)
    (node,) = ray.nodes()
    page = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = {
        f"ray_mpo_ray_{name}" for name in ("generated_tokens_total", "finished_total", "kv_blocks", "admitted_total")
    }
    end = time.monotonic() + 40  # each process reports every 10 s
    while wanted - (shown := set(re.findall(r"(?m)^(\w+)\{.*\} [1-9]", httpx.get(page).text))):
        assert time.monotonic() < end, wanted - shown
        time.sleep(0.5)


def test_overload_is_refused_with_429_in_json(url: str) -> None:
    """max_ongoing 4 on one replica and 2 waiting: of 40 at once some are refused, and all that are not are answered."""
    import asyncio

    async def flood() -> list[object]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as many:
            calls = [many.completions.create(model=NAME, prompt=PROMPT, max_tokens=50, n=8) for _ in range(40)]
            return await asyncio.gather(*calls, return_exceptions=True)

    results = asyncio.run(flood())
    refused = [one for one in results if isinstance(one, openai.RateLimitError)]
    answered = [one for one in results if not isinstance(one, Exception)]
    assert refused, [type(one).__name__ + str(one)[:80] for one in results]
    assert answered
    assert len(refused) + len(answered) == len(results), [one for one in results if one not in answered]
    assert "too many requests are waiting" in str(refused[0])


def test_the_serve_config_file_listens_on_loopback_and_its_arguments_are_known() -> None:
    path = Path(__file__).parents[2] / "serve_apps" / "mixture.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert content["http_options"]["host"] == "127.0.0.1"
    assert BuildArguments.model_validate(content["applications"][0]["args"]).serve.max_replicas == 4


def test_builder_arguments_are_checked(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"serve\.max_replica: Extra inputs"):
        build({"artefact": str(artefact), "name": "x", "serve": {"max_replica": 3}})
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ConfigError, match="NO_SUCH_KEY holds no key"):
        build({"artefact": str(artefact), "name": "x", "serve": {"api_key_env": "NO_SUCH_KEY"}})


def test_several_keys_come_from_one_variable_and_none_is_kept_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONE", "alpha")
    monkeypatch.setenv("SEVERAL", "beta, gamma\ndelta alpha")
    found = key_digests(Serve(api_key_env="ONE", api_keys_env="SEVERAL"))
    assert found == tuple(sha256(key).hexdigest() for key in (b"alpha", b"beta", b"gamma", b"delta"))
    monkeypatch.setenv("SEVERAL", " , ")
    with pytest.raises(ConfigError, match=r"serve\.api_keys_env: the environment variable SEVERAL holds no key"):
        key_digests(Serve(api_keys_env="SEVERAL"))


def test_an_open_host_without_a_key_is_refused_unless_it_is_wanted(artefact: Path) -> None:
    with pytest.raises(ConfigError, match=r"serve\.host: 0\.0\.0\.0 can be reached from other machines"):
        serve_endpoint(str(artefact), Serve(host="0.0.0.0"), "open", blocking=False)
    for safe in (
        Serve(host="::1"),
        Serve(host="localhost"),
        Serve(host="0.0.0.0", allow_open=True),
        Serve(host="0.0.0.0", api_keys_env="ANY"),
    ):
        check_open(safe)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here; make test-vllm serves with it")
def test_an_engine_that_is_not_installed_is_refused(artefact: Path) -> None:
    with pytest.raises(ConfigError, match=r"serve\.engine: vllm is not installed here\. Install it beside"):
        serve_endpoint(str(artefact), Serve(engine="vllm"), "absent", blocking=False)
    with pytest.raises(ConfigError, match=r"ray\.serve\.llm needs vLLM .* or serve serve_apps/mixture\.yaml"):
        build_ray_llm({"artefact": str(artefact), "name": NAME})


def test_replicas_that_no_node_can_hold_are_refused_before_any_starts(ray_cluster: None, artefact: Path) -> None:
    with pytest.raises(PlacementError, match=r"serve\.min_replicas: each needs 1 CPU and 3 GPU, but no node has that"):
        serve_endpoint(str(artefact), Serve(port=0, gpus_per_replica=3), "large", blocking=False)


@pytest.mark.parametrize(("fit", "said"), [('{"decoded": {"particles": 8}}', True), ('{"decoded": null}', False)])
def test_weights_that_were_fitted_for_another_decoding_are_said_to_be(
    ray_cluster: None, artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fit: str, said: bool
) -> None:
    """Before anything is started, so a placement that fails shows it."""
    shutil.copytree(artefact, tmp_path / "mixture")
    (tmp_path / "mixture" / "fit.json").write_text(fit)
    with pytest.raises(PlacementError):
        serve_endpoint(str(tmp_path / "mixture"), Serve(port=0, gpus_per_replica=3), "fitted", blocking=False)
    warned = capsys.readouterr().err
    assert ("warning: these weights were fitted for exact sampling with 8 particles" in warned) is said


def test_a_damaged_artefact_is_refused_before_any_replica_starts(artefact: Path, tmp_path: Path) -> None:
    copy = tmp_path / "mixture"
    shutil.copytree(artefact, copy)
    weights = copy / "policies" / "harmless" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"harmless/adapter_model\.safetensors: the file is damaged"):
        serve_endpoint(str(copy), Serve(port=0), "damaged", blocking=False)
