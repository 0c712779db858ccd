"""Records the KV events of a running vLLM for a few prompts, as ../fixtures/vllm-events.json.

    VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model DIR --served-model-name m --port 8101 \\
        --dtype bfloat16 --max-model-len 256 --block-size 32 --num-gpu-blocks-override 12 --max-num-seqs 1 \\
        --enable-prefix-caching --prefix-caching-hash-algo sha256_cbor --enable-prompt-tokens-details \\
        --kv-events-config '{"enable_kv_cache_events": true, "publisher": "zmq", "endpoint": "tcp://*:5557",
                             "replay_endpoint": "tcp://*:5558", "topic": "kv"}'
    python record_vllm_events.py 8101 5557 5558 > ../fixtures/vllm-events.json

With so few blocks, prompts evict each other's. PYTHONHASHSEED is not set: then vLLM's hashes are the same everywhere.
"""

import json
import sys
import urllib.request

import vllm
import zmq

PORT, EVENTS, REPLAY = map(int, sys.argv[1:4])
BLOCK = 32
END = (2**64 - 1).to_bytes(8, "big")


def ids(first: int, count: int) -> list[int]:
    return [1000 + (first * 997 + n * 7) % 40_000 for n in range(count)]


def post(path: str, body: dict) -> dict:
    url = f"http://127.0.0.1:{PORT}{path}"
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read() or b"{}")


def complete(prompt: list[int], salt: str | None = None) -> int:
    body = {"model": "m", "prompt": prompt, "max_tokens": 1, "temperature": 0}
    usage = post("/v1/completions", body | ({"cache_salt": salt} if salt else {}))["usage"]
    return (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


context = zmq.Context()
live = context.socket(zmq.SUB)
live.connect(f"tcp://127.0.0.1:{EVENTS}")
live.subscribe(b"")
# Whoever asks for something new until an event arrives is subscribed.
for n in range(100):
    complete(ids(1000 + n, BLOCK))
    if live.poll(300):
        break
else:
    sys.exit("no events")
post("/reset_prefix_cache", {})
while live.poll(1000):
    live.recv_multipart()


def frames() -> list[dict]:
    found = []
    while live.poll(1000):
        topic, seq, payload = live.recv_multipart()
        found.append({"topic": topic.decode(), "seq": int.from_bytes(seq, "big"), "payload": payload.hex()})
    return found


steps = []
PROMPTS = [
    (1, 70, None),
    (1, 110, None),
    (1, 70, "tenant-7"),
    (1, 70, "tenant-7"),
    (2, 200, None),
    (1, 110, None),
    (3, 250, None),
    (2, 200, None),
    (1, 70, "tenant-7"),
    None,
    (2, 200, None),
    (2, 200, None),
]
for prompt in PROMPTS:
    if prompt is None:
        post("/reset_prefix_cache", {})
        steps.append({"reset": True, "frames": frames()})
        continue
    first, count, salt = prompt
    cached = complete(ids(first, count), salt)
    steps.append({"prompt": ids(first, count), "salt": salt, "cached_tokens": cached, "frames": frames()})

# What is replayed is what came.
dealer = context.socket(zmq.DEALER)
dealer.connect(f"tcp://127.0.0.1:{REPLAY}")
start = steps[0]["frames"][0]["seq"]
dealer.send_multipart([b"", start.to_bytes(8, "big")])
replayed = []
while dealer.poll(5000):
    message = dealer.recv_multipart()
    if message[-2] == END:
        break
    replayed.append((int.from_bytes(message[-2], "big"), message[-1].hex()))
assert replayed == [(frame["seq"], frame["payload"]) for step in steps for frame in step["frames"]], "the replay differs"

lines = ",\n".join(json.dumps(step) for step in steps)
print(f'{{"vllm": "{vllm.__version__}", "block_size": {BLOCK}, "steps": [\n{lines}\n]}}')
