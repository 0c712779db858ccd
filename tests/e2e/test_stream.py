"""Streaming: the same text as without, in frames that leave as they are made, and what happens when a client goes."""

from __future__ import annotations

import asyncio
import json
import threading

import httpx
import pytest

from harness import KEY, KEYS, MODEL, Forebay, data_lines, eventually, user

STORY = "Tell me a short story about a lighthouse."
LONG = {"max_tokens": 1500, "extra_body": {"ignore_eos": True}}


def ask(client, text: str = STORY, **options):
    options = {"model": MODEL, "temperature": 0, "max_tokens": 24, **options}
    return client.chat.completions.create(messages=user(text), **options)


def contents(chunks, index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)


def raw_stream(server: Forebay, path: str = "/v1/chat/completions", **fields) -> tuple[httpx.Response, list[str]]:
    body = {"model": MODEL, "temperature": 0, "max_tokens": 8, "stream": True, **fields}
    with server.http(KEY) as http, http.stream("POST", path, json=body) as response:
        return response, data_lines(response.iter_lines())


def test_deltas_add_up_to_the_plain_answer(client):
    plain = ask(client)
    chunks = list(ask(client, stream=True))
    assert contents(chunks) == plain.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(choice.delta.role is None for chunk in chunks[1:] for choice in chunk.choices)
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert reasons == [plain.choices[0].finish_reason]
    assert chunks[-1].choices[0].finish_reason
    for field in ("id", "created", "model"):
        assert len({getattr(chunk, field) for chunk in chunks}) == 1, field
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len(chunks) > 15, "a frame per token, not per answer"


def test_frames_are_what_openai_documents(server):
    response, data = raw_stream(server, messages=user(STORY))
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert "content-length" not in response.headers
    assert data[-1] == "[DONE]"
    frames = [json.loads(frame) for frame in data[:-1]]
    assert all("usage" not in frame for frame in frames), "nobody asked for usage"
    assert all(frame["choices"] for frame in frames)


def test_usage_comes_last_where_it_was_asked_for(server):
    options = {"include_usage": True}
    _, data = raw_stream(server, messages=user(STORY), stream_options=options)
    assert data[-1] == "[DONE]"
    *frames, last = [json.loads(frame) for frame in data[:-1]]
    assert all(frame["usage"] is None and frame["choices"] for frame in frames)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 8
    assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + 8
    assert last["id"] == frames[0]["id"]


def test_usage_equals_that_of_the_plain_answer(client):
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    usage, plain = chunks[-1].usage, ask(client).usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (plain.prompt_tokens, plain.completion_tokens)


def test_choices_are_streamed_side_by_side(client):
    options = {"n": 2, "temperature": 1, "seed": 5, "max_tokens": 12}
    plain = ask(client, **options)
    chunks = list(ask(client, stream=True, **options))
    for index in range(2):
        assert contents(chunks, index) == plain.choices[index].message.content
    finished = [choice.index for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert sorted(finished) == [0, 1]
    order = [choice.index for chunk in chunks for choice in chunk.choices if choice.delta.content]
    assert order != sorted(order), "the two choices are computed together"


def test_a_stop_string_is_never_seen(client):
    whole = ask(client, max_tokens=30).choices[0].message.content
    stop = whole[33:41]
    chunks = list(ask(client, stream=True, stop=stop, max_tokens=30))
    assert contents(chunks) == whole[: whole.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_logprobs_are_streamed(client):
    options = {"logprobs": True, "top_logprobs": 2, "max_tokens": 6}
    plain = ask(client, **options).choices[0].logprobs.content
    chunks = ask(client, stream=True, **options)
    with_logprobs = [c.logprobs for chunk in chunks for c in chunk.choices if c.logprobs]
    streamed = [entry for logprobs in with_logprobs for entry in logprobs.content]
    assert [entry.token for entry in streamed] == [entry.token for entry in plain]
    assert [entry.logprob for entry in streamed] == pytest.approx([entry.logprob for entry in plain], abs=1e-4)


def test_completions_stream(client):
    options = {"model": MODEL, "prompt": "One, two, three,", "temperature": 0, "max_tokens": 12}
    plain = client.completions.create(**options).choices[0]
    for echo in (False, True):
        chunks = list(client.completions.create(stream=True, echo=echo, **options))
        expected = "One, two, three," + plain.text if echo else plain.text
        assert "".join(chunk.choices[0].text for chunk in chunks) == expected
        assert chunks[-1].choices[0].finish_reason == plain.finish_reason
        assert len(chunks) > 6


def test_async_streams_do_not_mix(server, client):
    questions = [f"Write a sentence about the number {n}." for n in range(8)]

    async def stream(sdk, question: str) -> str:
        return contents([chunk async for chunk in await ask(sdk, question, stream=True)])

    async def all_streams() -> list[str]:
        async with server.async_sdk(KEY) as sdk:
            return await asyncio.gather(*(stream(sdk, question) for question in questions))

    together = asyncio.run(all_streams())
    assert together == [ask(client, question).choices[0].message.content for question in questions]


def test_the_first_token_leaves_before_the_last_is_made(server, client):
    stream = ask(client, stream=True, **LONG)
    next(chunk for chunk in stream if chunk.choices[0].delta.content)
    assert server.metrics().value("vllm:num_requests_running") == 1
    stream.close()
    server.wait_idle()


def assert_aborted(server: Forebay, before, aborted: int = 1) -> None:
    """Everything that a request held is back, and it no longer computes."""

    def freed() -> bool:
        now = server.metrics()
        return (
            now.value("vllm:num_requests_running") == 0
            and now.value("vllm:num_requests_waiting") == 0
            and now.value("vllm:kv_cache_usage_perc") == 0
        )

    eventually("KV blocks are free", freed)
    after = server.metrics()
    name = "vllm:request_success_total"
    assert after.value(name, finished_reason="abort") - before.value(name, finished_reason="abort") == aborted
    made = "vllm:generation_tokens_total"
    stands = after.value(made)
    assert stands - before.value(made) < 1000 * aborted, "it was stopped before its end"
    # A request afterwards makes exactly its own tokens: nothing else computes in the background.
    with server.sdk(KEY) as sdk:
        ask(sdk, max_tokens=3)
    server.wait_idle()
    assert server.metrics().value(made) == stands + 3


def test_closing_a_stream_stops_the_engine(server, client):
    server.wait_idle()
    before = server.metrics()
    stream = ask(client, stream=True, **LONG)
    for _, chunk in zip(range(5), stream):
        assert chunk.choices
    stream.close()
    assert_aborted(server, before)


def test_closing_a_stream_of_several_choices_stops_all(server, client):
    server.wait_idle()
    before = server.metrics()
    stream = ask(client, stream=True, n=3, temperature=1, **LONG)
    next(chunk for chunk in stream if chunk.choices[0].delta.content)
    stream.close()
    assert_aborted(server, before, aborted=3)


def test_cancelling_an_async_stream_stops_the_engine(server):
    server.wait_idle()
    before = server.metrics()

    async def cancelled() -> None:
        async with server.async_sdk(KEY) as sdk:
            begun = asyncio.Event()

            async def read() -> None:
                async for _ in await ask(sdk, stream=True, **LONG):
                    begun.set()

            reading = asyncio.create_task(read())
            await asyncio.wait_for(begun.wait(), 30)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading

    asyncio.run(cancelled())
    assert_aborted(server, before)


def test_leaving_without_streaming_stops_the_engine(server):
    """The client waits for a whole answer and goes away before there is any byte of it."""
    server.wait_idle()
    before = server.metrics()
    body = {"model": MODEL, "messages": user(STORY), "max_tokens": 1500, "ignore_eos": True}
    http = server.http(KEY)
    left = threading.Event()

    def wait() -> None:
        try:
            http.post("/v1/chat/completions", json=body)
        except (httpx.HTTPError, RuntimeError, OSError):
            left.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    eventually("a running request", lambda: server.metrics().value("vllm:num_requests_running") == 1)
    drop_connections(http)
    waiting.join(20)
    assert left.is_set()
    assert_aborted(server, before)


def drop_connections(http: httpx.Client) -> None:
    """Shuts the sockets down under a client that is waiting for an answer."""
    import socket

    for connection in http._transport._pool.connections:
        stream = connection._connection._network_stream
        stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)


def test_what_an_aborted_stream_did_not_use_is_given_back(server):
    """The hold of 1500 tokens is settled with what was really made."""
    key = KEYS["KEY_ABORTS"]
    with server.sdk(key) as sdk, server.http(key) as http:

        def remaining() -> int:
            body = {"model": MODEL, "prompt": "x", "max_tokens": 1}
            return int(http.post("/v1/completions", json=body).headers["x-ratelimit-remaining-tokens"])

        stream = ask(sdk, stream=True, **LONG)
        next(chunk for chunk in stream if chunk.choices[0].delta.content)
        during = remaining()
        stream.close()
        assert during < 10_000 - 1400
        eventually("tokens given back", lambda: remaining() > 10_000 - 1400)
