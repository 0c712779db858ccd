"""`gateway.cache-salt: consumer`: nobody finds cached what another consumer has asked."""

from __future__ import annotations

import json
import random

import pytest

from harness import KEYS, MODEL, Forebay, Worker, engine_config, eventually, free_port, get, user

A, A_TOO, B = (KEYS[name] for name in ("KEY_TEAM_A", "KEY_AUDITED", "KEY_TEAM_B"))
SECRET = {"SALT_SECRET": "0123456789abcdef0123456789abcdef"}


def gateway(**settings):
    return {
        "consumers": [
            {"name": "a", "keys": ["env:KEY_TEAM_A", "env:KEY_AUDITED"]},
            {"name": "b", "keys": ["env:KEY_TEAM_B"]},
        ],
        **settings,
    }


def cached(server: Forebay, key: str, prompt: str, **body) -> int:
    with server.sdk(key) as sdk:
        reply = sdk.chat.completions.create(model=MODEL, messages=user(prompt), max_tokens=1, extra_body=body)
    return reply.usage.prompt_tokens_details.cached_tokens


def prompt_of(fresh: str) -> str:
    return f"Session {fresh}. " + "The quick brown fox jumps over the lazy dog. " * 20


@pytest.mark.parametrize("scope", ["consumer", "none"])
def test_consumers_share_no_prefix_with_the_engine_of_the_process(start, fresh, scope):
    server = start({"gateway": gateway(**{"cache-salt": scope}), "engine": engine_config()}, env=KEYS)
    prompt, shared = prompt_of(fresh), scope == "none"
    assert cached(server, A, prompt) == 0
    assert (cached(server, B, prompt) > 100) == shared
    # The same consumer, by either key.
    assert cached(server, A, prompt) > 100 and cached(server, A_TOO, prompt) > 100
    # A salt of the request's own is one more wall, and not a way through the other.
    assert cached(server, A, prompt, cache_salt="mine") == 0
    assert cached(server, A, prompt, cache_salt="mine") > 100
    assert (cached(server, B, prompt, cache_salt="mine") > 100) == shared


@pytest.fixture
def workers(start) -> list[tuple[Worker, dict[str, str]]]:
    """Two that tell what they have cached, and where they do."""
    workers = []
    for _ in range(2):
        ports = {"endpoint": free_port(), "replay-endpoint": free_port()}
        listen = {name.replace("-", "_"): f"tcp://*:{port}" for name, port in ports.items()}
        kv_events = {"enable_kv_cache_events": True, **listen}
        flags = ["--served-model-name", MODEL, "--threads", "1", "--kv-events-config", json.dumps(kv_events)]
        worker = start(Worker, *flags)
        source = {name: f"tcp://127.0.0.1:{port}" for name, port in ports.items()}
        workers.append((worker, {"replica": worker.url, **source}))
    return workers


def test_it_holds_over_http_and_the_router_finds_the_blocks(start, workers):
    sources = [source for _, source in workers]
    fleet = {"model": MODEL, "replicas": [worker.url for worker, _ in workers], "kv-events": {"sources": sources}}

    def router(**settings) -> Forebay:
        settings = gateway(**{"cache-salt": "consumer", **settings})
        server = start({"gateway": settings, "router": {"fleets": [fleet]}}, env={**KEYS, **SECRET})

        def knows_all() -> bool:
            replicas = get(f"{server.admin_url}/api/fleets").json()["fleets"][0]["replicas"]
            known = [(replica["kv_events"]["in_sync"], replica["kv_events"]["next_batch"]) for replica in replicas]
            sent = [worker.metrics().value("forebay_engine_kv_event_batches_total") for worker, _ in workers]
            return known == [(True, batches) for batches in sent]

        eventually("both caches known", knows_all)
        return server

    # Of ids, so that a router without the model's tokenizer has the blocks that the workers tell of.
    prompt = [random.randrange(1000, 40_000) for _ in range(201)]

    def cached_by(server: Forebay, key: str, **options) -> int:
        with server.sdk(key) as sdk:
            reply = sdk.completions.create(model=MODEL, prompt=prompt, max_tokens=1, **options)
            usage = list(reply)[-1].usage if "stream" in options else reply.usage
        return usage.prompt_tokens_details.cached_tokens

    one = router(**{"cache-salt-secret": "env:SALT_SECRET"})
    assert [cached_by(one, key) for key in (A, B, A, A_TOO, B)] == [0, 0, 192, 192, 192]
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    assert cached_by(one, A, **streamed) == 192
    assert cached_by(one, B, extra_body={"cache_salt": "mine"}) == 0

    # Another gateway with the same secret learns from the workers where A's prompt is.
    two = router(**{"cache-salt-secret": "env:SALT_SECRET"})
    assert cached_by(two, A) == 192
    assert two.metrics().value("forebay_router_prefix_matched_tokens_total") == 192
    # Without a secret the salts are its own.
    assert cached_by(router(), A) == 0
