"""More than one process: fallback, replicas over HTTP, prefix-aware placement, and replicas that die."""

from __future__ import annotations

import json
import socket
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from harness import (
    MODEL,
    Forebay,
    Worker,
    data_lines,
    engine_config,
    eventually,
    forebay,
    free_port,
    get,
    model_file,
    status_of,
    user,
)

ALIAS = "house-model"
CAPITAL = "What is the capital of France? Answer in one word."


def ask(sdk: openai.OpenAI, text: str, model: str = MODEL, **options):
    options = {"temperature": 0, "max_tokens": 8, **options}
    return sdk.chat.completions.with_raw_response.create(model=model, messages=user(text), **options)


def long_prompt(topic: str) -> str:
    return f"Document {topic} {uuid.uuid4().hex}. " + f"All about {topic} and its history. " * 40


@pytest.fixture(scope="module")
def workers(start_for_module) -> list[Worker]:
    return [start_for_module(Worker, "--served-model-name", MODEL, "--threads", "1") for _ in range(2)]


@pytest.fixture(scope="module")
def router(start_for_module, workers) -> Forebay:
    """A process that computes nothing itself."""
    fleet = {"model": MODEL, "replicas": [worker.url for worker in workers]}
    return start_for_module({"router": {"fleets": [fleet], "health": {"interval": "200ms"}}})


def test_a_worker_is_a_drop_in_for_vllm(workers):
    worker = workers[0]
    assert worker.model() == MODEL
    with openai.OpenAI(base_url=f"{worker.url}/v1", api_key="x", max_retries=0) as sdk:
        assert ask(sdk, "hi").parse().choices
    assert get(f"{worker.url}/health").status_code == 200
    assert get(f"{worker.url}/version").json()["version"]


def test_worker_has_metrics_where_vllm_has_them(workers):
    """vLLM's are on the port of its API; scrapers and routers look there."""
    assert "vllm:num_requests_running" in get(f"{workers[0].url}/metrics").text


def test_replicas_answer_through_the_router(router):
    with router.sdk() as sdk:
        raw = ask(sdk, CAPITAL)
        assert "Paris" in raw.parse().choices[0].message.content
        assert raw.headers["x-forebay-replica"] in ("replica-1", "replica-2")
        chunks = list(ask(sdk, CAPITAL, stream=True).parse())
        text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
        assert text == raw.parse().choices[0].message.content
        assert all(chunk.usage is None for chunk in chunks), "usage is counted inside, and was not asked for"
        assert all(chunk.choices for chunk in chunks)
    with router.http() as http:
        tokens = http.post("/tokenize", json={"model": MODEL, "prompt": "hi there"}).json()["tokens"]
        assert http.post("/detokenize", json={"model": MODEL, "tokens": tokens}).json()["prompt"] == "hi there"


def test_load_goes_to_both_replicas(router):
    with router.sdk() as sdk, ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda n: ask(sdk, long_prompt(f"topic {n}"), max_tokens=16), range(8)))
    assert {raw.headers["x-forebay-replica"] for raw in replies} == {"replica-1", "replica-2"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_prefix_sticks_to_its_replica(router, stream):
    with router.sdk() as sdk:
        for topic in ("rivers", "bridges", "harbours"):
            prompt = long_prompt(topic)
            options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
            replicas, cached = [], []
            for question in ("When?", "Where?", "Who?", "Why?"):
                raw = ask(sdk, prompt + question, max_tokens=2, **options)
                reply = list(raw.parse())[-1] if stream else raw.parse()
                replicas.append(raw.headers["x-forebay-replica"])
                cached.append(reply.usage.prompt_tokens_details.cached_tokens)
            assert len(set(replicas)) == 1, replicas
            assert cached[0] < 64 and min(cached[1:]) > 200, cached


def test_one_id_and_one_trace_over_processes(router, workers):
    headers = {
        "x-request-id": "over-processes-1",
        "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    }
    with router.sdk() as sdk:
        raw = ask(sdk, "hi", extra_headers=headers)
    worker = workers[int(raw.headers["x-forebay-replica"].removeprefix("replica-")) - 1]
    here = router.record("over-processes-1")
    url = f"{worker.admin_url}/api/requests/over-processes-1"
    eventually("the worker's record", lambda: status_of(url) == 200)
    there = get(url).json()
    assert here["trace_id"] == there["trace_id"] == "4bf92f3577b34da6a3ce929d0e0e4736"
    assert {span["layer"] for span in here["spans"]} == {"edge", "gateway", "proxy", "router"}
    assert "engine" in {span["layer"] for span in there["spans"]}


def test_fleets_are_shown(router):
    fleets = get(f"{router.admin_url}/api/fleets").json()["fleets"]
    assert [fleet["model"] for fleet in fleets] == [MODEL]
    assert [replica["up"] for replica in fleets[0]["replicas"]] == [True, True]


def two_workers(start, *flags: str, **settings) -> tuple[Forebay, list[Worker]]:
    workers = [start(Worker, "--served-model-name", MODEL, "--threads", "1", *flags) for _ in range(2)]
    fleet = {"model": MODEL, "replicas": [worker.url for worker in workers]}
    return start({"router": {"fleets": [fleet], **settings}}), workers


def test_a_dead_replica_loses_nothing(start):
    """Between two probes the router still believes that the dead one is up."""
    router, workers = two_workers(start, health={"interval": "1h"})
    with router.sdk() as sdk:
        text = long_prompt("capitals")
        first = ask(sdk, text)
        alone = first.parse().choices[0].message.content
        # The one that has the prompt cached: the next request goes there first.
        dead = ["replica-1", "replica-2"].index(first.headers["x-forebay-replica"])
        workers[dead].kill()
        for _ in range(4):
            raw = ask(sdk, text)
            assert raw.parse().choices[0].message.content == alone
            assert raw.headers["x-forebay-replica"] == f"replica-{2 - dead}"
        up = [replica["up"] for replica in get(f"{router.admin_url}/api/fleets").json()["fleets"][0]["replicas"]]
        assert up == [dead != 0, dead != 1]
        workers[1 - dead].kill()
        with pytest.raises(openai.InternalServerError) as error:
            ask(sdk, "hi")
        assert error.value.status_code in (502, 503)
        assert "127.0.0.1" not in error.value.message


def test_a_replica_that_dies_takes_only_what_it_had_begun(start):
    """One request runs on each replica and others wait. What waited on the dead one is answered by the other."""
    router, workers = two_workers(start, "--max-num-seqs", "1", health={"interval": "1h"})
    streams = 8
    begun = [threading.Event() for _ in range(streams)]
    finished = [False] * streams
    replicas = [""] * streams

    def read(n: int) -> None:
        body = {"model": MODEL, "messages": user(f"Story {n}."), "max_tokens": 120, "stream": True, "ignore_eos": True}
        with router.http() as http, http.stream("POST", "/v1/chat/completions", json=body) as response:
            replicas[n] = response.headers.get("x-forebay-replica", "")
            for line in response.iter_lines():
                if '"content":"' in line and '"content":""' not in line:
                    begun[n].set()
                finished[n] |= line == "data: [DONE]"

    def running_everywhere() -> bool:
        return all(worker.metrics().value("vllm:num_requests_running") == 1 for worker in workers)

    with ThreadPoolExecutor(streams) as pool:
        tasks = [pool.submit(read, n) for n in range(streams)]
        eventually("a request runs on each replica", running_everywhere)
        had_begun = {n for n in range(streams) if begun[n].is_set()}
        workers[0].kill()
        for task in tasks:
            task.exception(60)
    lost = {n for n in range(streams) if not finished[n]}
    # One ran there; another one may have been started between the look and the kill.
    assert len(lost) <= 2, (lost, replicas)
    assert all(begun[n].is_set() for n in lost), f"lost without having begun: {lost - had_begun}"
    assert {replicas[n] for n in range(streams) if n not in lost} >= {"replica-2"}


def test_a_stream_that_breaks_says_so(start):
    """Not a truncated answer that looks whole."""
    worker = start(Worker, "--served-model-name", MODEL)
    router = start({"router": {"fleets": [{"model": MODEL, "replicas": [worker.url]}]}})
    with router.sdk() as sdk:
        stream = ask(sdk, "Tell me a story.", max_tokens=800, stream=True, extra_body={"ignore_eos": True}).parse()
        next(chunk for chunk in stream if chunk.choices[0].delta.content)
        worker.kill()
        with pytest.raises(openai.APIError) as error:
            for _ in stream:
                pass
    assert error.value.code == "upstream_failed"


def test_a_killed_replica_comes_back(start):
    workers = [start(Worker, "--served-model-name", MODEL)]
    settings = {"health": {"interval": "100ms", "unhealthy-after": 1}}
    fleet = {"model": MODEL, "replicas": [workers[0].url, f"http://127.0.0.1:{free_port()}"]}
    router = start({"router": {"fleets": [fleet], **settings}})

    def up() -> list[bool]:
        return [replica["up"] for replica in get(f"{router.admin_url}/api/fleets").json()["fleets"][0]["replicas"]]

    eventually("the second, which was never there, is down", lambda: up() == [True, False])
    workers[0].kill()
    eventually("the first is down", lambda: up() == [False, False])
    assert httpx.get(f"{router.admin_url}/ready").status_code == 503
    assert httpx.get(f"{router.url}/health").status_code == 503


# Fallback


@pytest.fixture(scope="module")
def second(start_for_module) -> Forebay:
    """The provider: another Forebay, with a key."""
    gateway = {"consumers": [{"name": "us", "keys": ["env:SECOND_KEY"]}]}
    config = {"gateway": gateway, "engine": engine_config()}
    return start_for_module(config, env={"SECOND_KEY": "sk-second"})


def with_fallback(fleet_url: str, second: Forebay, **proxy) -> dict:
    provider = {
        "provider": "openai-compatible",
        "model": MODEL,
        "base-url": f"{second.url}/v1",
        "api-key": "env:SECOND_KEY",
    }
    return {
        "proxy": {"models": [{"name": ALIAS, "deployments": [{"fleet": "local"}, provider]}], **proxy},
        "router": {
            "fleets": [{"model": "local", "replicas": [fleet_url], "served-name": MODEL}],
            "health": {"interval": "100ms"},
        },
    }


@pytest.mark.parametrize("stream", [False, True])
def test_the_next_deployment_answers_where_the_first_is_dead(start, second, stream):
    dead = f"http://127.0.0.1:{free_port()}"
    server = start(with_fallback(dead, second), env={"SECOND_KEY": "sk-second"})
    eventually("the edge listens", lambda: listens(server))
    with server.sdk() as sdk:
        raw = ask(sdk, CAPITAL, model=ALIAS, stream=stream)
        if stream:
            text = "".join(choice.delta.content or "" for chunk in raw.parse() for choice in chunk.choices)
        else:
            text = raw.parse().choices[0].message.content
    assert "Paris" in text
    assert raw.headers["x-forebay-deployment"] == f"openai-compatible/{MODEL}"
    assert int(raw.headers["x-forebay-attempts"]) == 2
    assert server.metrics().value("forebay_proxy_fallbacks_total", model=ALIAS) == 1
    assert "sk-second" not in server.log()


def listens(server: Forebay) -> bool:
    try:
        return httpx.get(f"{server.url}/version").status_code == 200
    except httpx.TransportError:
        return False


def test_the_first_deployment_is_used_again_when_it_is_back(start, second, workers):
    """Cooldown ends and probes succeed: traffic returns without a restart."""
    # A port that is free now, and the worker's later.
    port = free_port()
    config = with_fallback(f"http://127.0.0.1:{port}", second, cooldown={"failures": 2, "time": "300ms"})
    server = start(config, env={"SECOND_KEY": "sk-second"})
    eventually("the edge listens", lambda: listens(server))
    with server.sdk() as sdk:

        def deployment() -> str:
            return ask(sdk, "hi", model=ALIAS, max_tokens=1).headers["x-forebay-deployment"]

        assert [deployment() for _ in range(3)] == [f"openai-compatible/{MODEL}"] * 3
        start(Worker, "--served-model-name", MODEL, port=port)
        eventually("the first answers again", lambda: deployment() != f"openai-compatible/{MODEL}")


def test_a_clients_mistake_does_not_fall_back(start, second, workers):
    server = start(with_fallback(workers[0].url, second), env={"SECOND_KEY": "sk-second"})
    with server.sdk() as sdk, pytest.raises(openai.BadRequestError):
        ask(sdk, "hi", model=ALIAS, extra_body={"temperature": -5})
    assert server.metrics().value("forebay_proxy_fallbacks_total") == 0


def test_a_provider_refusing_our_key_is_not_the_clients_mistake(start, second):
    dead = f"http://127.0.0.1:{free_port()}"
    server = start(with_fallback(dead, second), env={"SECOND_KEY": "sk-not-the-right-one"})
    eventually("the edge listens", lambda: listens(server))
    with server.sdk() as sdk, pytest.raises(openai.InternalServerError) as error:
        ask(sdk, "hi", model=ALIAS)
    assert error.value.status_code == 502
    assert "sk-not-the-right-one" not in str(error.value.body) + server.log()


def test_usage_of_a_provider_is_exact_also_where_nobody_asked(start, second, tmp_path):
    """Accounting asks for usage; the client, who did not, must not see it."""
    config = with_fallback(f"http://127.0.0.1:{free_port()}", second)
    config["gateway"] = {
        "consumers": [{"name": "c", "keys": ["env:C_KEY"]}],
        "audit": {"dir": str(tmp_path / "audit")},
    }
    server = start(config, env={"SECOND_KEY": "sk-second", "C_KEY": "sk-c"})
    eventually("the edge listens", lambda: listens(server))
    body = {"model": ALIAS, "messages": user("hi"), "max_tokens": 6, "stream": True, "ignore_eos": True}
    with server.http("sk-c") as http:
        response = http.post("/v1/chat/completions", json=body)
    frames = [json.loads(data) for data in data_lines(response.text.splitlines()) if data != "[DONE]"]
    assert all(frame["choices"] and not frame.get("usage") for frame in frames)

    def records() -> list[dict]:
        lines = [line for file in (tmp_path / "audit").glob("*.jsonl") for line in file.read_text().splitlines()]
        return [json.loads(line) for line in lines]

    (record,) = eventually("an audit record", records)
    assert (record["completion_tokens"], record["estimated"], record["cut"]) == (6, False, False)


# One name, and exact counts, whoever answers


def audited(config: dict, tmp_path) -> dict:
    gateway = {"consumers": [{"name": "c", "keys": ["env:C_KEY"]}], "audit": {"dir": str(tmp_path / "audit")}}
    return {**config, "gateway": gateway}


def audit_records(tmp_path) -> list[dict]:
    lines = [line for file in (tmp_path / "audit").glob("*.jsonl") for line in file.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def frames_of(text: str) -> list[dict]:
    return [json.loads(data) for data in data_lines(text.splitlines()) if data != "[DONE]"]


@pytest.mark.parametrize("answers", ["replica", "provider"])
def test_a_reply_says_the_name_that_was_asked_for(start, second, workers, answers):
    fleet_url = workers[0].url if answers == "replica" else f"http://127.0.0.1:{free_port()}"
    server = start(with_fallback(fleet_url, second), env={"SECOND_KEY": "sk-second"})
    eventually("the edge listens", lambda: listens(server))
    body = {"model": ALIAS, "messages": user("hi"), "max_tokens": 4, "temperature": 0}
    with server.http() as http:
        whole = http.post("/v1/chat/completions", json=body)
        assert whole.headers["x-forebay-deployment"].startswith("fleet/" if answers == "replica" else "openai-")
        plain = http.post("/v1/chat/completions", json={**body, "stream": True}).text
        options = {"stream": True, "stream_options": {"include_usage": True}}
        with_usage = http.post("/v1/chat/completions", json={**body, **options}).text
    for text in (whole.text, plain, with_usage):
        assert f'"{MODEL}"' not in text
    assert whole.json()["model"] == ALIAS
    assert whole.json()["usage"]["completion_tokens"] == 4
    assert {frame["model"] for frame in frames_of(plain) + frames_of(with_usage)} == {ALIAS}
    assert not any("usage" in frame for frame in frames_of(plain))
    *before, last = frames_of(with_usage)
    assert all(frame["usage"] is None and frame["choices"] for frame in before)
    assert last["choices"] == [] and last["usage"] == whole.json()["usage"] | {
        "prompt_tokens_details": last["usage"]["prompt_tokens_details"]
    }


def test_usage_as_it_goes_is_there_for_who_asks(router):
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"model": MODEL, "messages": user("hi"), "max_tokens": 4, "stream": True, "stream_options": options}
    with router.http() as http:
        frames = frames_of(http.post("/v1/chat/completions", json={**body, "ignore_eos": True}).text)
    counts = [frame["usage"]["completion_tokens"] for frame in frames]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == 4
    assert len({frame["usage"]["prompt_tokens"] for frame in frames}) == 1


def test_a_stream_that_is_cut_over_a_replica_is_counted_exactly(start, workers, tmp_path):
    """The client leaves: what it has got is charged, with the replica's own count of the prompt."""
    fleet = {"model": MODEL, "replicas": [workers[0].url]}
    server = start(audited({"router": {"fleets": [fleet]}}, tmp_path), env={"C_KEY": "sk-c"})
    body = {"model": MODEL, "messages": user(CAPITAL), "max_tokens": 400, "ignore_eos": True}
    with server.http("sk-c") as http:
        prompt = http.post("/v1/chat/completions", json={**body, "max_tokens": 1}).json()["usage"]["prompt_tokens"]
        seen = 0
        with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
            for line in response.iter_lines():
                seen += '"content":"' in line and '"content":""' not in line
                if seen == 5:
                    break
    eventually("both are in the audit", lambda: len(audit_records(tmp_path)) == 2)
    record = next(record for record in audit_records(tmp_path) if record["cut"])
    assert (record["prompt_tokens"], record["estimated"]) == (prompt, False)
    assert record["completion_tokens"] >= 5


def test_a_worker_takes_the_command_line_of_vllm(start):
    port = free_port()
    events = json.dumps({"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": f"tcp://*:{port}"})
    flags = ["--max_model_len=512", "--dtype", "bfloat16", "--enforce-eager", "-O3", "-tp", "1"]
    worker = start(Worker, *flags, "--served_model_name", "m", "--kv-events-config", events)
    card = get(f"{worker.url}/v1/models").json()["data"][0]
    assert (card["id"], card["max_model_len"]) == ("m", 512)
    assert "--dtype has no effect" in worker.log() and "-O has no effect" in worker.log()
    with socket.create_connection(("127.0.0.1", port), timeout=5) as greeting:
        assert greeting.recv(1) == b"\xff", "a ZeroMQ socket greets"


@pytest.mark.parametrize(
    "flags, says",
    [
        (["-dp", "2"], "-dp is not supported"),
        (["--enable-lora"], "--enable-lora is not supported"),
        (["--root-path", "llm"], "a path begins with"),
        (["--max-modle-len", "5"], "--max-model-len"),
        (["--kv-events-config", "{"], "--kv-events-config"),
    ],
)
def test_what_a_worker_can_not_do_is_said_before_anything_is_loaded(flags, says):
    done = forebay("worker", str(model_file()), *flags)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr and "sk-not-shown" not in done.stderr
