"""From start to drain: readiness, what a request leaves behind, and stopping without dropping anybody."""

from __future__ import annotations

import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from harness import ALIAS, KEY, MODEL, Forebay, engine_config, eventually, get, status_of, user

CHAT = "/v1/chat/completions"


def test_admin_paths(server):
    assert get(f"{server.admin_url}/ready").json() == {"status": "ready"}
    assert get(f"{server.admin_url}/health").json() == {"status": "ok"}
    assert get(f"{server.admin_url}/version").json()["version"]
    assert status_of(f"{server.admin_url}/nothing") == 404
    assert httpx.post(f"{server.admin_url}/metrics").status_code == 405


@pytest.mark.parametrize("path", ["/metrics", "/ready", "/api/requests", "/api/fleets"])
def test_the_edge_does_not_show_what_is_the_admins(server, path):
    with server.http(KEY) as http:
        assert http.get(path).status_code == 404


def test_every_layer_has_metrics(server, client):
    client.chat.completions.create(model=ALIAS, messages=user("hi"), max_tokens=2)
    server.wait_idle()
    metrics = server.metrics()
    for family, labels in [
        ("forebay_edge_requests_total", {"code": "2xx"}),
        ("forebay_edge_first_byte_seconds_count", {}),
        ("forebay_edge_received_bytes_total", {}),
        ("forebay_gateway_requests_total", {"consumer": "team-a"}),
        ("forebay_gateway_tokens_total", {"consumer": "team-a"}),
        ("forebay_proxy_requests_total", {"model": ALIAS, "outcome": "ok"}),
        ("forebay_router_decisions_total", {"model": MODEL}),
        ("forebay_router_prompt_tokens_total", {"model": MODEL}),
        ("vllm:prompt_tokens_total", {"model_name": MODEL}),
        ("vllm:generation_tokens_total", {"model_name": MODEL}),
        ("vllm:time_to_first_token_seconds_count", {"model_name": MODEL}),
        ("vllm:e2e_request_latency_seconds_count", {"model_name": MODEL}),
        ("vllm:cache_config_info", {"engine": "0"}),
    ]:
        assert metrics.value(family, **labels) > 0, (family, labels)
    for family in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
        assert metrics.value(family, model_name=MODEL) == 0
    # Nothing a client sends becomes a label: that would be a memory leak at a stranger's hand.
    with server.http(KEY) as http:
        http.post(CHAT, json={"model": "made-up-model-7", "messages": user("hi")})
        http.get("/made-up-path-7")
    assert "made-up" not in server.metrics().text


def test_counters_count_exactly(server, client):
    server.wait_idle()
    before = server.metrics()
    usage = client.chat.completions.create(model=MODEL, messages=user("Count."), max_tokens=9).usage
    server.wait_idle()
    after = server.metrics()

    def added(name: str, **labels: str) -> float:
        return after.value(name, **labels) - before.value(name, **labels)

    assert added("vllm:generation_tokens_total") == usage.completion_tokens
    cached = usage.prompt_tokens_details.cached_tokens
    # vLLM counts whole prompts, and what of them was cached beside it.
    assert added("vllm:prompt_tokens_total") == usage.prompt_tokens
    assert added("vllm:prompt_tokens_cached_total") == cached
    for kind, tokens in [("prompt", usage.prompt_tokens), ("completion", usage.completion_tokens)]:
        assert added("forebay_gateway_tokens_total", consumer="team-a", kind=kind) == tokens, kind
    assert added("forebay_gateway_cached_tokens_total", consumer="team-a") == cached
    assert added("forebay_gateway_requests_total", consumer="team-a") == 1
    assert added("vllm:request_success_total") == 1


@pytest.mark.parametrize("stream", [False, True])
def test_one_request_has_a_waterfall_over_five_layers(server, client, stream):
    request_id = f"waterfall-{stream}"
    reply = client.chat.completions.create(
        model=ALIAS, messages=user("hi"), max_tokens=3, stream=stream, extra_headers={"x-request-id": request_id}
    )
    if stream:
        assert list(reply)
    record = server.record(request_id)
    assert (record["method"], record["path"], record["status"]) == ("POST", CHAT, 200)
    spans = record["spans"]
    assert {span["layer"] for span in spans} == {"edge", "gateway", "proxy", "router", "engine"}
    assert [span["start_us"] for span in spans] == sorted(span["start_us"] for span in spans)
    for span in spans:
        assert span["start_us"] + span["duration_us"] <= record["duration_us"] + 1000, span
    why = {
        layer: " ".join(s["why"] for s in spans if s["layer"] == layer)
        for layer in ("gateway", "proxy", "router", "engine")
    }
    assert "team-a" in why["gateway"]
    assert f"fleet/{MODEL}" in why["proxy"]
    assert "engine" in why["router"]
    assert "3 tokens" in why["engine"]
    listed = get(f"{server.admin_url}/api/requests?n=5").json()["requests"]
    assert request_id in [request["request_id"] for request in listed]


def test_a_request_that_failed_has_a_record_too(server):
    with server.http(KEY) as http:
        http.post(CHAT, json={"model": "nobody", "messages": user("hi")}, headers={"x-request-id": "failed-1"})
    assert server.record("failed-1")["status"] == 404


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_stopping_finishes_streams_and_refuses_newcomers(start, small_stack, signal_number):
    server: Forebay = start(small_stack)
    body = {
        "model": MODEL,
        "messages": user("Tell me a story."),
        "max_tokens": 400,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    lines: list[str] = []
    begun = threading.Event()

    def read() -> None:
        with server.http() as http, http.stream("POST", CHAT, json=body) as response:
            for line in response.iter_lines():
                lines.append(line)
                begun.set()

    reading = threading.Thread(target=read)
    reading.start()
    assert begun.wait(30)
    server.end_expected = True
    server.child.send_signal(signal_number)

    def refused() -> bool:
        try:
            socket.create_connection(("127.0.0.1", server.port), timeout=5).close()
        except ConnectionRefusedError:
            return True
        return False

    eventually("new connections are refused", refused)
    assert reading.is_alive(), "the stream goes on meanwhile; make it longer if this machine is that fast"
    assert status_of(f"{server.admin_url}/ready") == 503
    assert status_of(f"{server.admin_url}/health") == 200
    reading.join(60)
    data = [line for line in lines if line]
    assert data[-1] == "data: [DONE]"
    assert '"completion_tokens":400' in data[-2]
    assert server.wait() == 0


def test_stopping_an_idle_server_is_quick_and_clean(start, small_stack):
    server: Forebay = start(small_stack)
    # A kept-alive connection does not hold it up.
    with server.http() as http:
        assert http.get("/health").status_code == 200
        server.terminate()
        assert server.wait(10) == 0


def test_a_second_signal_stops_at_once(start, small_stack):
    server: Forebay = start(small_stack)
    with server.sdk() as sdk:
        stream = sdk.chat.completions.create(
            model=MODEL, messages=user("hi"), max_tokens=1900, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        server.terminate()
        eventually("draining", lambda: status_of(f"{server.admin_url}/ready") == 503)
        server.terminate()
        assert server.wait(10) == 130
        stream.close()


def test_drain_timeout_ends_the_wait(start):
    server: Forebay = start({"edge": {"drain-timeout": "300ms"}, "engine": engine_config()})
    with server.sdk() as sdk:
        stream = sdk.chat.completions.create(
            model=MODEL, messages=user("hi"), max_tokens=1900, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        server.terminate()
        assert server.wait(10) == 0
        stream.close()


def test_audit_of_the_last_requests_survives_the_stop(start, tmp_path):
    audit = tmp_path / "audit"
    gateway = {"consumers": [{"name": "c", "keys": ["env:C_KEY"]}], "audit": {"dir": str(audit)}}
    server: Forebay = start({"gateway": gateway, "engine": engine_config()}, env={"C_KEY": "sk-c"})
    with server.http("sk-c") as http:
        ids = [http.get("/v1/models").headers["x-request-id"] for _ in range(20)]
    server.terminate()
    assert server.wait() == 0
    written = "".join(file.read_text() for file in audit.glob("*.jsonl"))
    assert all(request_id in written for request_id in ids)


def test_stopping_finishes_what_waits_too(start):
    server: Forebay = start({"engine": engine_config(**{"max-num-seqs": 1})})

    def ask(n: int) -> str | None:
        with server.sdk() as sdk:
            options = {"max_tokens": 60, "extra_body": {"ignore_eos": True}}
            return (
                sdk.chat.completions.create(model=MODEL, messages=user(f"Story {n}"), **options)
                .choices[0]
                .finish_reason
            )

    with ThreadPoolExecutor(4) as pool:
        tasks = [pool.submit(ask, n) for n in range(4)]
        eventually("three wait", lambda: server.metrics().value("vllm:num_requests_waiting") == 3)
        server.terminate()
        assert [task.result(60) for task in tasks] == ["length"] * 4
    assert server.wait() == 0


def test_leaving_the_queue_takes_the_place_with_it(start):
    server: Forebay = start({"engine": engine_config(**{"max-num-seqs": 1})})
    long = {"model": MODEL, "messages": user("hi"), "max_tokens": 1900, "ignore_eos": True, "stream": True}
    with server.http() as http, http.stream("POST", CHAT, json=long) as running:
        # Kept: when the iterator goes, the connection goes.
        lines = running.iter_lines()
        next(lines)
        with pytest.raises(httpx.ReadTimeout), server.http() as other:
            other.post(CHAT, json=long, timeout=0.5)
        eventually("nobody waits", lambda: server.metrics().value("vllm:num_requests_waiting") == 0)
        assert server.metrics().value("vllm:num_requests_running") == 1
        assert server.metrics().value("vllm:request_success_total", finished_reason="abort") == 1
    server.wait_idle()


def test_a_full_cache_preempts_and_changes_no_answer(start):
    """Six requests need more KV blocks than there are: some are put back and computed again."""
    small = {"kv-cache-memory": "8MiB", "max-model-len": 256, "enable-prefix-caching": False}
    server: Forebay = start({"engine": engine_config(**small)})

    def ask(n: int, max_tokens: int = 90) -> str | None:
        with server.sdk() as sdk:
            options = {"temperature": 0, "max_tokens": max_tokens, "extra_body": {"ignore_eos": True}}
            reply = sdk.chat.completions.create(model=MODEL, messages=user(f"Tell me about the number {n}."), **options)
            return reply.choices[0].message.content

    alone = [ask(n) for n in range(6)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, range(6))) == alone
    assert server.metrics().value("vllm:num_preemptions_total") == 0, "room is kept for outputs as long as the last ones"
    for n in range(40):
        ask(n, max_tokens=1)
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, range(6))) == alone
    # Outputs were short of late, and these are not.
    assert server.metrics().value("vllm:num_preemptions_total") > 0
    server.wait_idle()
    assert server.metrics().value("vllm:kv_cache_usage_perc") == 0


def test_a_full_queue_refuses_as_vllm_does(start):
    """One runs, one waits, the next is refused before it costs anything: its clients know these words."""
    server: Forebay = start({"engine": engine_config(**{"max-num-seqs": 1, "max-num-queued-reqs": 2})})
    long = {"model": MODEL, "messages": user("hi"), "max_tokens": 1500, "extra_body": {"ignore_eos": True}}

    def wait() -> str | None:
        with server.sdk() as other:
            return other.chat.completions.create(**{**long, "max_tokens": 2}).choices[0].finish_reason

    with server.sdk() as sdk, ThreadPoolExecutor(1) as pool, server.http() as http:
        with sdk.chat.completions.create(stream=True, **long) as running:
            next(iter(running))
            waiting = pool.submit(wait)
            eventually("one waits", lambda: server.metrics().value("vllm:num_requests_waiting") == 1)
            refused = http.post(CHAT, json={"model": MODEL, "messages": user("hi")})
        # The first has left: the one that waited has its turn.
        assert waiting.result(60) == "length"
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "slow_down"
        assert int(refused.headers["retry-after"]) > 0
        assert refused.json()["error"]["message"] == (
            "The engine is currently busy and cannot accept new requests. "
            "Please try again later or on a different instance."
        )
        assert server.metrics().value("vllm:admission_rejections_total", reason="max_num_queued_reqs") == 1
