"""KV events over ZMQ, against the libraries that vLLM uses: libzmq and msgspec.

The structures are copied from vLLM 0.33's `vllm/distributed/kv_events.py`, so that what decodes here decodes there.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import msgspec
import pytest
import zmq

from harness import MODEL, Forebay, engine_config, eventually, free_port, get

BLOCK = 16
END = b"\xff" * 8
ExternalBlockHash = bytes | int


class EventBatch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    ts: float
    events: list[Any]
    data_parallel_rank: int | None = None


class KVCacheEvent(msgspec.Struct, omit_defaults=True, gc=False, tag=True):
    pass


class BlockStored(KVCacheEvent):
    block_hashes: list[ExternalBlockHash]
    parent_block_hash: ExternalBlockHash | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[Any, ...] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None


class BlockRemoved(KVCacheEvent):
    block_hashes: list[ExternalBlockHash]
    medium: str | None
    group_idx: int | None = None


class AllBlocksCleared(KVCacheEvent):
    pass


class KVEventBatch(EventBatch):
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]


class OldBlockStored(msgspec.Struct, array_like=True, omit_defaults=True, gc=False, tag="BlockStored"):
    """Before vLLM 0.26."""

    block_hashes: list[ExternalBlockHash]
    parent_block_hash: ExternalBlockHash | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None


@pytest.fixture
def context() -> Iterator[zmq.Context]:
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


# Our engine, their subscriber


def cbor(value: Any) -> bytes:
    """Canonical CBOR of what vLLM hashes."""

    def head(major: int, n: int) -> bytes:
        if n < 24:
            return bytes([major << 5 | n])
        for code, form in ((24, ">B"), (25, ">H"), (26, ">I"), (27, ">Q")):
            if n < 1 << 8 * struct.calcsize(form):
                return bytes([major << 5 | code]) + struct.pack(form, n)
        raise ValueError(n)

    match value:
        case None:
            return b"\xf6"
        case int():
            return head(0, value)
        case bytes():
            return head(2, len(value)) + value
        case str():
            return head(3, len(value.encode())) + value.encode()
        case list() | tuple():
            return head(4, len(value)) + b"".join(map(cbor, value))
    raise TypeError(value)


def chain(token_ids: list[int], salt: str | None = None) -> list[int]:
    """The names that vLLM with `sha256_cbor` gives to the blocks of a prompt."""
    parent = hashlib.sha256(cbor("vllm-none-hash")).digest()
    names = []
    for at in range(0, len(token_ids) // BLOCK * BLOCK, BLOCK):
        extra = [("cache_salt", salt)] if salt and at == 0 else None
        parent = hashlib.sha256(cbor((parent, token_ids[at : at + BLOCK], extra))).digest()
        names.append(int.from_bytes(parent[-8:], "big"))
    return names


class Subscriber:
    """Follows one publisher as vLLM's example subscriber does, and keeps what is cached there."""

    def __init__(self, context: zmq.Context, port: int, topic: bytes = b""):
        self.context = context
        self.socket = context.socket(zmq.SUB)
        self.socket.connect(f"tcp://127.0.0.1:{port}")
        self.socket.subscribe(topic)
        self.decoder = msgspec.msgpack.Decoder(type=KVEventBatch)
        self.seqs: list[int] = []
        self.topics: set[bytes] = set()
        self.events: list[KVCacheEvent] = []
        # By name, with the block before it and its tokens.
        self.cached: dict[ExternalBlockHash, tuple[ExternalBlockHash | None, list[int]]] = {}
        self.most = 0

    def poll(self) -> None:
        while self.socket.poll(50):
            topic, seq, payload = self.socket.recv_multipart()
            self.topics.add(topic)
            self.take(int.from_bytes(seq, "big"), payload)

    def take(self, seq: int, payload: bytes) -> None:
        if seq < len(self.seqs):
            return
        self.seqs.append(seq)
        batch = self.decoder.decode(payload)
        assert abs(batch.ts - time.time()) < 600 and batch.data_parallel_rank == 0
        for event in batch.events:
            self.apply(event)

    def catch_up(self, port: int) -> int:
        """Asks for all that was published before, and returns how many batches that were."""
        socket = self.context.socket(zmq.DEALER)
        socket.connect(f"tcp://127.0.0.1:{port}")
        socket.send_multipart([b"", len(self.seqs).to_bytes(8, "big")])
        for count in range(100_000):
            assert socket.poll(10_000)
            empty, topic, seq, payload = socket.recv_multipart()
            assert empty == b""
            if seq == END:
                assert topic == payload == b""
                socket.close(linger=0)
                return count
            assert int.from_bytes(seq, "big") == count
            self.take(count, payload)
        raise AssertionError("an endless replay")

    def apply(self, event: KVCacheEvent) -> None:
        self.events.append(event)
        match event:
            case BlockStored():
                assert event.medium == "GPU" and event.lora_id is None and event.block_size == BLOCK
                assert len(event.token_ids) == BLOCK * len(event.block_hashes)
                parent = event.parent_block_hash
                assert parent is None or parent in self.cached, "stored after a block that is not there"
                for n, name in enumerate(event.block_hashes):
                    self.cached[name] = (parent, event.token_ids[n * BLOCK : (n + 1) * BLOCK])
                    parent = name
            case BlockRemoved():
                for name in event.block_hashes:
                    del self.cached[name]
            case AllBlocksCleared():
                self.cached.clear()
        self.most = max(self.most, len(self.cached))

    def prompt_of(self, name: ExternalBlockHash | None) -> list[int]:
        """All tokens up to the end of a block."""
        if name is None:
            return []
        parent, tokens = self.cached[name]
        return self.prompt_of(parent) + tokens


def complete(server: Forebay, prompt: list[int], **options: Any) -> httpx.Response:
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 1, "temperature": 0, **options}
    with server.http() as http:
        response = http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response


def ids(first: int, count: int) -> list[int]:
    return [1000 + (first * 997 + n * 7) % 40_000 for n in range(count)]


def publishing(start, more: dict[str, Any] | None = None, **engine: Any) -> tuple[Forebay, int, int]:
    """An engine that publishes, with its two ports."""
    events, replay = free_port(), free_port()
    kv_events = {"endpoint": f"tcp://*:{events}", "replay-endpoint": f"tcp://*:{replay}", "topic": f"kv@here@{MODEL}"}
    kv_events |= more or {}
    return start({"engine": engine_config(**{"kv-events": kv_events, **engine})}), events, replay


def listening(server: Forebay, subscriber: Subscriber, replay: int) -> None:
    """A subscription has no answer: asks for different things until some event arrives."""
    for n in range(100):
        complete(server, ids(10_000 + n, BLOCK * 2))
        if subscriber.socket.poll(50):
            break
    subscriber.catch_up(replay)
    subscriber.poll()
    assert subscriber.topics, "nothing came"
    # What was stored before is not of interest.
    subscriber.events.clear()
    subscriber.most = 0


def test_what_is_stored_reads_as_vllms(start, context):
    server, port, replay = publishing(start)
    subscriber = Subscriber(context, port, b"kv@")
    listening(server, subscriber, replay)
    prompt = ids(1, BLOCK * 4 + 5)
    complete(server, prompt)
    names = chain(prompt)
    eventually("all blocks", lambda: subscriber.poll() or set(names) <= subscriber.cached.keys())
    assert subscriber.prompt_of(names[-1]) == prompt[: BLOCK * 4]
    # A longer prompt adds only what follows.
    before = len(subscriber.events)
    longer = prompt[: BLOCK * 4] + ids(2, BLOCK * 2 + 1)
    complete(server, longer)
    names = chain(longer)
    eventually("the end", lambda: subscriber.poll() or names[-1] in subscriber.cached)
    added = [event for event in subscriber.events[before:] if isinstance(event, BlockStored)]
    assert [name for event in added for name in event.block_hashes] == names[4:]
    assert added[0].parent_block_hash == names[3]
    assert subscriber.prompt_of(names[-1]) == longer[: BLOCK * 6]
    # A salt makes other blocks of the same tokens.
    before = len(subscriber.events)
    complete(server, prompt, cache_salt="tenant-7")
    salted = chain(prompt, "tenant-7")
    eventually("the salted ones", lambda: subscriber.poll() or salted[-1] in subscriber.cached)
    first = subscriber.events[before]
    assert first.parent_block_hash is None
    assert first.extra_keys == [("tenant-7",)] + [None] * (len(first.block_hashes) - 1)

    assert subscriber.seqs == list(range(len(subscriber.seqs)))
    assert subscriber.topics == {f"kv@here@{MODEL}".encode()}
    metrics = server.metrics()
    assert metrics.value("forebay_engine_kv_event_batches_total") == len(subscriber.seqs)
    assert metrics.value("forebay_engine_kv_event_batches_dropped_total") == 0
    assert metrics.value("forebay_engine_kv_event_subscribers") == 1

    # The whole life again, for one who comes late.
    late = Subscriber(context, port, b"never")
    assert late.catch_up(replay) == len(subscriber.seqs)
    assert late.cached == subscriber.cached
    # And with the other kind of socket that a client may have.
    socket = context.socket(zmq.REQ)
    socket.connect(f"tcp://127.0.0.1:{replay}")
    socket.send((0).to_bytes(8, "big"))
    assert socket.poll(10_000)
    topic, seq, payload = socket.recv_multipart()
    assert (topic, seq) == (f"kv@here@{MODEL}".encode(), bytes(8)) and late.decoder.decode(payload)


def test_what_is_evicted_is_removed(start, context):
    # 30 layers of 3 heads of 64, keys and values in 2 bytes: 360 KiB for a block, so 22 blocks.
    server, port, replay = publishing(start, **{"kv-cache-memory": "8MiB", "max-model-len": 256})
    blocks = 8 * 1024 // 360
    subscriber = Subscriber(context, port)
    listening(server, subscriber, replay)
    prompts = [ids(100 + n, BLOCK * 9 + 3) for n in range(8)]
    for prompt in prompts:
        complete(server, prompt)
        subscriber.poll()
    last = chain(prompts[7])
    eventually("the last prompt", lambda: subscriber.poll() or last[-1] in subscriber.cached)
    removed = {name for event in subscriber.events if isinstance(event, BlockRemoved) for name in event.block_hashes}
    assert set(chain(prompts[0])) <= removed
    assert not set(last) & removed
    assert subscriber.most <= blocks
    for prompt in prompts:
        cached = [name in subscriber.cached for name in chain(prompt)]
        assert cached == sorted(cached, reverse=True), "an end without its start can't be hit"


# Their publisher, our router


class Replica:
    """A server that says yes to everything, with a publisher of KV events beside it."""

    def __init__(self, context: zmq.Context, old: bool = False):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def answer(self, body: dict) -> None:
                data = json.dumps(body).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                self.answer({})

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                choice = {"index": 0, "text": "yes", "finish_reason": "length", "logprobs": None}
                usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
                self.answer({"id": "1", "object": "text_completion", "created": 1, "model": "m", "choices": [choice], "usage": usage})

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.old = old
        self.seq = 0
        # As vLLM's PUB, but one that tells when somebody has subscribed.
        self.events = context.socket(zmq.XPUB)
        self.port = self.events.bind_to_random_port("tcp://127.0.0.1")
        self.replay = context.socket(zmq.ROUTER)
        self.replay_port = self.replay.bind_to_random_port("tcp://127.0.0.1")
        self.kept: list[tuple[int, bytes]] = []
        self.encoder = msgspec.msgpack.Encoder()

    def source(self) -> dict[str, str]:
        endpoints = {"endpoint": f"tcp://127.0.0.1:{self.port}", "replay-endpoint": f"tcp://127.0.0.1:{self.replay_port}"}
        return {"replica": self.url, **endpoints}

    def publish(self, *events: Any, heard: bool = True) -> None:
        payload = self.encoder.encode(KVEventBatch(ts=time.time(), events=list(events), data_parallel_rank=0))
        self.kept.append((self.seq, payload))
        if heard:
            self.events.send_multipart([b"", self.seq.to_bytes(8, "big"), payload])
        self.seq += 1

    def wait_subscribed(self) -> None:
        assert self.events.poll(10_000), "nobody subscribes"
        assert self.events.recv() == b"\x01"

    def serve_replay(self) -> int:
        """vLLM's `_service_replay`, in both of its forms. A request for a snapshot it takes for a number."""
        assert self.replay.poll(10_000), "nobody asks for a replay"
        client, empty, start = self.replay.recv_multipart()
        assert empty == b"" and len(start) == 8
        topic = [] if self.old else [b""]
        for seq, payload in self.kept:
            if seq >= int.from_bytes(start, "big"):
                self.replay.send_multipart([client, b"", *topic, seq.to_bytes(8, "big"), payload])
        self.replay.send_multipart([client, b"", *topic, END, b""])
        return int.from_bytes(start, "big")

    def stored(self, token_ids: list[int]) -> tuple[Any, list[ExternalBlockHash]]:
        """Under names that mean nothing: half of them bytes, as vLLM can be told to write them."""
        count = len(token_ids) // BLOCK
        names = [os.urandom(32) if self.old else int.from_bytes(os.urandom(8), "big") for _ in range(count)]
        if self.old:
            return OldBlockStored(names, None, token_ids, BLOCK, None, "GPU"), names
        return BlockStored(names, None, token_ids, BLOCK, None, "GPU", None), names


@pytest.fixture
def replicas(context) -> Iterator[list[Replica]]:
    replicas = [Replica(context), Replica(context, old=True)]
    yield replicas
    for replica in replicas:
        replica.http.shutdown()


def routing(replicas: list[Replica], **kv_events: Any) -> dict:
    sources = [replica.source() for replica in replicas]
    fleet = {"model": MODEL, "replicas": [r.url for r in replicas], "kv-events": {"sources": sources, **kv_events}}
    return {"router": {"fleets": [fleet]}}


def test_placement_follows_a_python_publisher(start, replicas):
    first, second = replicas
    prompts = [ids(n, BLOCK * 4) for n in range(4)]
    # What one of them has cached before there is a router.
    event, _ = second.stored(prompts[0])
    second.publish(event, heard=False)
    router = start(routing(replicas), ready=False)
    for replica in replicas:
        replica.wait_subscribed()
        assert replica.serve_replay() == int.from_bytes(b"snapshot", "big")
        assert replica.serve_replay() == 0

    def goes_to(prompt: list[int]) -> str:
        return complete(router, prompt).headers["x-forebay-replica"]

    def batches(replica: Replica) -> float:
        return router.metrics().value("forebay_router_kv_event_batches_total", replica=replica.url)

    eventually("the replay", lambda: batches(second) == 1)
    eventually("ready", lambda: httpx.get(f"{router.admin_url}/ready").status_code == 200)
    assert {goes_to(prompts[0] + [n]) for n in range(5)} == {"replica-2"}

    event, names = first.stored(prompts[1])
    first.publish(event)
    event, _ = second.stored(prompts[2])
    second.publish(event)
    eventually("both", lambda: batches(first) == 1 and batches(second) == 2)
    assert [goes_to(prompts[1]), goes_to(prompts[2])] * 3 == ["replica-1", "replica-2"] * 3

    # It moves: removed here, stored there, on top of a block that is known.
    first.publish(*[BlockRemoved([name], "GPU") for name in reversed(names)])
    event, names = second.stored(prompts[1][: BLOCK * 2])
    second.publish(event)
    rest = OldBlockStored([b"x" * 32, b"y" * 32], names[-1], prompts[1][BLOCK * 2 :], BLOCK, None, "GPU")
    second.publish(rest)
    eventually("moved", lambda: batches(first) == 2 and batches(second) == 4)
    assert {goes_to(prompts[1] + [n]) for n in range(5)} == {"replica-2"}

    # One that was lost on the way is asked for.
    event, _ = first.stored(prompts[3])
    first.publish(event, heard=False)
    first.publish(AllBlocksCleared(), first.stored(prompts[3])[0])
    assert first.serve_replay() == 2
    eventually("the gap is filled", lambda: batches(first) == 4)
    assert {goes_to(prompts[3] + [n]) for n in range(5)} == {"replica-1"}
    metrics = router.metrics()
    assert metrics.value("forebay_router_kv_event_resyncs_total", replica=first.url, why="gap", by="replay") == 1
    assert metrics.value("forebay_router_kv_event_batches_lost_total", replica=first.url) == 1
    assert metrics.value("forebay_router_kv_events_ignored_total") == 0

    # Who no longer publishes is known no longer.
    second.events.close(linger=0)
    gone = lambda: router.metrics().value("forebay_router_kv_events_connected", replica=second.url) == 0
    eventually("noticed", gone)


# Our engine, our router


def fleet_of(engines: list[tuple[Forebay, int, int]]) -> dict:
    sources = [
        {"replica": engine.url, "endpoint": f"tcp://127.0.0.1:{events}", "replay-endpoint": f"tcp://127.0.0.1:{replay}"}
        for engine, events, replay in engines
    ]
    fleet = {"model": MODEL, "replicas": [engine.url for engine, _, _ in engines], "kv-events": {"sources": sources}}
    return {"router": {"fleets": [fleet]}}


def knowledge(router: Forebay) -> list[dict]:
    """What the router says about what it knows of each replica's cache."""
    return [replica["kv_events"] for replica in get(f"{router.admin_url}/api/fleets").json()["fleets"][0]["replicas"]]


def knows_all(router: Forebay, engines: list[tuple[Forebay, int, int]]) -> bool:
    sent = [engine.metrics().value("forebay_engine_kv_event_batches_total") for engine, _, _ in engines]
    return [(known["in_sync"], known["next_batch"]) for known in knowledge(router)] == [(True, n) for n in sent]


def test_a_router_finds_what_it_never_sent(start):
    """Our engine's events in our router: a prompt that came to a replica on another way."""
    engines = [publishing(start) for _ in range(2)]
    prompts = [ids(n, BLOCK * 8 + 1) for n in range(4)]
    complete(engines[0][0], prompts[0])
    complete(engines[1][0], prompts[1])
    router = start(fleet_of(engines))
    eventually("the history", lambda: knows_all(router, engines))
    # Both directions, and live.
    complete(engines[0][0], prompts[2])
    complete(engines[1][0], prompts[3])
    eventually("what is new", lambda: knows_all(router, engines))
    went = [complete(router, prompt).headers["x-forebay-replica"] for prompt in prompts]
    assert went == ["replica-1", "replica-2"] * 2
    metrics = router.metrics()
    matched = metrics.value("forebay_router_prefix_matched_tokens_total")
    assert matched == metrics.value("forebay_router_prefix_cached_tokens_total") == 4 * BLOCK * 8


def test_a_late_router_knows_all_and_a_new_worker_nothing(start):
    """No batch is kept for replay: the snapshot alone tells."""
    kv_events = {"buffer-steps": 0, "heartbeat-interval": "100ms"}
    engines = [publishing(start, kv_events) for _ in range(2)]
    prompt, other = ids(1, BLOCK * 8 + 1), ids(2, BLOCK * 8 + 1)
    complete(engines[1][0], prompt)
    complete(engines[1][0], other)
    router = start(fleet_of(engines))
    eventually("both caches", lambda: knows_all(router, engines))
    assert [known["cached_blocks"] for known in knowledge(router)] == [0, 16]

    def placed(prompt: list[int]) -> tuple[str, str]:
        response = complete(router, prompt)
        spans = router.record(response.headers["x-request-id"])["spans"]
        why = next(span["why"] for span in spans if (span["layer"], span["what"]) == ("router", "place"))
        return response.headers["x-forebay-replica"], why

    replica, why = placed(prompt)
    assert replica == "replica-2" and f"prefix: {BLOCK * 8} of" in why, why
    resyncs = "forebay_router_kv_event_resyncs_total"
    assert router.metrics().value(resyncs, replica=engines[1][0].url, why="joined", by="snapshot") == 1

    # Another process at the same addresses, with an empty cache.
    epochs = [known["epoch"] for known in knowledge(router)]
    engine, events, replay = engines[1]
    engine.kill()
    engines[1] = (start(engine.config), events, replay)
    eventually("the new cache", lambda: knows_all(router, engines) and knowledge(router)[1]["epoch"] != epochs[1])
    known = knowledge(router)
    assert (known[0]["epoch"], known[1]["cached_blocks"]) == (epochs[0], 0)
    eventually("up again", lambda: all(r["up"] for r in get(f"{router.admin_url}/api/fleets").json()["fleets"][0]["replicas"]))
    _, why = placed(other)
    assert "prefix" not in why and ": 0 of" in why, why


class LoadStat(msgspec.Struct, array_like=True, gc=False, tag=True):
    """SGLang 0.5.23's, with the fields that came later."""

    num_running_reqs: int
    num_waiting_reqs: int
    num_tokens: int
    max_total_num_tokens: int
    attn_dp_rank: int | None = None
    num_waiting_uncached_tokens: int = 0
    num_total_tokens: int = 0
    max_running_requests: int = 0
    total_prefill_uncached_tokens: int = 0
    total_prefill_busy_us: int = 0


def test_what_is_ours_alone(start, context):
    """Heartbeats, snapshots and load reports, read with msgspec; and a subscriber that knows vLLM's protocol alone."""
    server, port, replay = publishing(start, {"buffer-steps": 1, "heartbeat-interval": "100ms"}, **{"kv-cache-memory": "8MiB", "max-model-len": 256})
    everything = context.socket(zmq.SUB)
    everything.connect(f"tcp://127.0.0.1:{port}")
    everything.subscribe(b"")
    ours = context.socket(zmq.SUB)
    ours.connect(f"tcp://127.0.0.1:{port}")
    ours.subscribe(b"forebay-heartbeat")
    ours.subscribe(b"load")
    beats, loads, epochs = [], [], set()

    def listen() -> None:
        while ours.poll(50):
            topic, seq, payload = ours.recv_multipart()
            if topic == b"load":
                loads.append(msgspec.msgpack.decode(payload, type=LoadStat))
                continue
            ts, events, rank, epoch, ms = msgspec.msgpack.decode(payload)
            assert (topic, events, rank, ms, len(epoch)) == (b"forebay-heartbeat", [], 0, 100, 16)
            # An empty batch to vLLM's own classes.
            assert msgspec.msgpack.decode(payload, type=KVEventBatch).events == []
            assert abs(ts - time.time()) < 600
            beats.append(int.from_bytes(seq, "big"))
            epochs.add(epoch)

    for n in range(100):
        complete(server, ids(10_000 + n, BLOCK * 2))
        if everything.poll(50):
            break
    for n in range(8):
        complete(server, ids(n, BLOCK * 9 + 3))
    sent = server.metrics().value("forebay_engine_kv_event_batches_total")
    eventually("a heartbeat after all of it", lambda: listen() or sent in beats)
    assert beats == sorted(beats) and len(epochs) == 1
    prompts = server.metrics().value("vllm:prompt_tokens_total")
    eventually("the last report", lambda: listen() or loads[-1].total_prefill_uncached_tokens == prompts)
    last = loads[-1]
    assert (last.num_running_reqs, last.num_waiting_reqs, last.num_tokens) == (0, 0, 0)
    assert last.max_total_num_tokens == 8 * 1024 // 360 * BLOCK and last.total_prefill_busy_us > 0

    socket = context.socket(zmq.DEALER)
    socket.connect(f"tcp://127.0.0.1:{replay}")
    socket.send_multipart([b"", b"snapshot"])
    late = Subscriber(context, port, b"never")
    for count in range(1000):
        assert socket.poll(10_000)
        empty, topic, seq, payload = socket.recv_multipart()
        assert empty == b""
        if seq == END:
            assert topic == payload == b""
            break
        assert (topic, int.from_bytes(seq, "big")) == (f"kv@here@{MODEL}".encode(), sent)
        assert msgspec.msgpack.decode(payload)[3] in epochs
        for event in late.decoder.decode(payload).events:
            late.apply(event)
    assert late.events[0] == AllBlocksCleared()
    # Blocks were evicted, so it is not all that was ever stored; of the last prompt it is all.
    assert set(chain(ids(7, BLOCK * 9 + 3))) <= late.cached.keys()
    assert 0 < len(late.cached) <= 8 * 1024 // 360
    metrics = server.metrics()
    assert metrics.value("forebay_engine_kv_event_snapshots_total") == 1
    topics = set()
    while everything.poll(50):
        topics.add(everything.recv_multipart()[0])
    assert topics == {f"kv@here@{MODEL}".encode()}
