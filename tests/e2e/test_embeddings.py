"""`/v1/embeddings` by the OpenAI SDK, with all-MiniLM-L6-v2 beside a chat model in one process."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import harness
from harness import KEYS, MODEL, Forebay, Worker, eventually, forebay

EMBEDDER = "all-minilm-l6-v2"
ALIAS = "text-embedding-3-small"
KEY, FEW = KEYS["KEY_TEAM_A"], KEYS["KEY_FEW_TOKENS"]
# Vectors of Hugging Face transformers.
REFERENCE = Path(__file__).parents[2] / "crates/forebay-engine/tests/fixtures/minilm-l6-v2.json"


@pytest.fixture(scope="module")
def reference() -> list[dict[str, Any]]:
    return json.loads(REFERENCE.read_text())


@pytest.fixture(scope="module")
def directory() -> str:
    """Fetched once, then from the cache."""
    pulled = forebay("model", "pull", EMBEDDER, "--print-path", seconds=600)
    assert pulled.returncode == 0, pulled.stderr
    return pulled.stdout.strip()


@pytest.fixture(scope="module")
def stack(
    start_for_module: Callable[..., Forebay], directory: str, tmp_path_factory: pytest.TempPathFactory
) -> Forebay:
    """Both models behind all layers."""
    limits = {"tokens-per-minute": 40}
    config = {
        "gateway": {
            "consumers": [
                {"name": "team-a", "keys": ["env:KEY_TEAM_A"]},
                {"name": "few-tokens", "keys": ["env:KEY_FEW_TOKENS"], "limits": limits},
            ],
            "audit": {"dir": str(tmp_path_factory.mktemp("audit"))},
        },
        "proxy": {
            "models": [
                {"name": MODEL, "deployments": [{"fleet": MODEL}]},
                {"name": EMBEDDER, "deployments": [{"fleet": EMBEDDER}]},
                {"name": ALIAS, "deployments": [{"fleet": EMBEDDER}]},
            ]
        },
        "engine": [harness.engine_config(), {"model": directory, "served-model-name": EMBEDDER}],
    }
    return start_for_module(config, env=KEYS)


@pytest.fixture(scope="module")
def client(stack: Forebay) -> openai.OpenAI:
    return stack.sdk(KEY)


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def test_vectors_are_those_of_transformers(client: openai.OpenAI, reference: list[dict[str, Any]]):
    texts = [case["text"] for case in reference]
    # The SDK asks for base64 unless told otherwise.
    packed = client.embeddings.create(model=EMBEDDER, input=texts)
    plain = client.embeddings.create(model=EMBEDDER, input=texts, encoding_format="float")
    by_ids = client.embeddings.create(model=EMBEDDER, input=[case["ids"] for case in reference])
    tokens = sum(len(case["ids"]) for case in reference)
    for answer in (packed, plain, by_ids):
        assert answer.object == "list" and answer.model == EMBEDDER
        assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (tokens, tokens)
        assert [item.index for item in answer.data] == list(range(len(texts)))
        for item, case in zip(answer.data, reference, strict=True):
            assert len(item.embedding) == 384
            assert cosine(item.embedding, case["vector"]) > 0.99999
            assert max(abs(a - b) for a, b in zip(item.embedding, case["vector"], strict=True)) < 1e-5


def test_one_text_alone_has_the_same_vector(client: openai.OpenAI, reference: list[dict[str, Any]]):
    texts = [case["text"] for case in reference]
    together = client.embeddings.create(model=ALIAS, input=texts)
    assert together.model == ALIAS
    for text, case, item in zip(texts, reference, together.data, strict=True):
        for alone in (text, case["ids"]):
            answer = client.embeddings.create(model=ALIAS, input=alone)
            assert answer.data[0].embedding == item.embedding


def test_what_means_the_same_is_close(client: openai.OpenAI):
    texts = [
        "How do I reset my password?",
        "I forgot my login credentials and need new ones.",
        "The recipe needs two eggs and some flour.",
    ]
    a, b, c = (item.embedding for item in client.embeddings.create(model=EMBEDDER, input=texts).data)
    assert cosine(a, b) > cosine(a, c) + 0.3


def test_many_texts(client: openai.OpenAI):
    texts = [f"Sentence number {n}, " + "about rivers " * (n % 20) for n in range(300)]
    answer = client.embeddings.create(model=EMBEDDER, input=texts)
    assert len(answer.data) == 300
    some = client.embeddings.create(model=EMBEDDER, input=texts[137])
    assert answer.data[137].embedding == some.data[0].embedding


def test_both_models_answer_side_by_side(stack: Forebay, client: openai.OpenAI):
    assert {model.id for model in client.models.list()} == {MODEL, EMBEDDER, ALIAS}
    chat = client.chat.completions.create(model=MODEL, messages=harness.user("Say hi."), max_tokens=4)
    assert chat.choices[0].message.content
    metrics = stack.metrics()
    assert metrics.value("vllm:prompt_tokens_total", model_name=EMBEDDER) > 0
    assert metrics.value("vllm:generation_tokens_total", model_name=EMBEDDER) == 0
    assert metrics.value("vllm:request_success_total", model_name=EMBEDDER, finished_reason="stop") > 0


def test_the_other_kind_of_call_is_refused(client: openai.OpenAI):
    with pytest.raises(openai.BadRequestError, match="The model does not support Chat Completions API"):
        client.chat.completions.create(model=EMBEDDER, messages=harness.user("Hi"))
    with pytest.raises(openai.BadRequestError, match="The model does not support Completions API"):
        client.completions.create(model=EMBEDDER, prompt="Hi")
    with pytest.raises(openai.BadRequestError, match="The model does not support Embeddings API"):
        client.embeddings.create(model=MODEL, input="Hi")
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.embeddings.create(model="nobody", input="Hi")


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"input": "river " * 300}, "input", "maximum context length is 256 tokens. However, you requested 302 tokens"),
        ({"input": "river " * 30_000}, "input", "maximum context length is 256 tokens"),
        ({"input": []}, "input", "at least one input"),
        ({"input": ["a"] * 2049}, "input", "maximum length 2048"),
        ({"input": [[101, 99_999, 102]]}, "input", "token id 99999 is out of the vocabulary"),
        ({"input": {"text": "a"}}, "input", "expected one of a string"),
        ({}, "input", "Missing required parameter"),
        ({"input": "a", "dimensions": 128}, "dimensions", "does not support matryoshka representation"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "'float' and 'base64'"),
        ({"input": "a", "truncate_prompt_tokens": 257}, "truncate_prompt_tokens", "greater than max_model_len (256)"),
    ],
)
def test_wrong_calls_name_the_field(stack: Forebay, fields: dict[str, Any], param: str, message: str):
    with stack.http(KEY) as http:
        answer = http.post("/v1/embeddings", json={"model": EMBEDDER, **fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert message in error["message"]


def test_a_long_text_is_cut_where_asked(client: openai.OpenAI):
    cut = client.embeddings.create(
        model=EMBEDDER, input="river " * 300, extra_body={"truncate_prompt_tokens": -1}
    )
    fits = client.embeddings.create(model=EMBEDDER, input="river " * 254)
    assert cut.usage.prompt_tokens == 256
    assert cut.data[0].embedding == fits.data[0].embedding


def test_it_counts_against_the_quota_and_is_audited(stack: Forebay):
    with stack.http(FEW) as http:
        first = http.post("/v1/embeddings", json={"model": EMBEDDER, "input": "river " * 28})
        assert (first.status_code, first.json()["usage"]["prompt_tokens"]) == (200, 30)
        assert first.headers["x-ratelimit-remaining-tokens"] == "10"
        second = http.post("/v1/embeddings", json={"model": EMBEDDER, "input": "river " * 28})
        assert (second.status_code, second.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert httpx.post(f"{stack.url}/v1/embeddings", json={}, trust_env=False).status_code == 401

    def record() -> dict[str, Any] | None:
        files = Path(stack.config["gateway"]["audit"]["dir"]).iterdir()
        lines = [json.loads(line) for file in files if file.is_file() for line in file.read_text().splitlines()]
        mine = [line for line in lines if line.get("consumer") == "few-tokens" and line.get("outcome") == "ok"]
        return mine[0] if mine else None

    seen = eventually("an audit record", record)
    assert (seen["path"], seen["model"], seen["status"]) == ("/v1/embeddings", EMBEDDER, 200)
    assert (seen["prompt_tokens"], seen["completion_tokens"]) == (30, 0)


def test_a_worker_by_name_and_a_fleet_over_http(start: Callable[..., Any], reference: list[dict[str, Any]]):
    worker = start(Worker, model=EMBEDDER)
    assert worker.model() == EMBEDDER
    assert "/v1/embeddings -H" in worker.log() and "/v1/chat" not in worker.log()
    router = {"fleets": [{"model": EMBEDDER, "replicas": [worker.url]}]}
    provider = {"provider": "openai-compatible", "model": EMBEDDER, "base-url": f"{worker.url}/v1"}
    proxy = {
        "models": [
            {"name": "by-fleet", "deployments": [{"fleet": EMBEDDER}]},
            {"name": "by-provider", "deployments": [provider]},
        ]
    }
    front = start({"router": router, "proxy": proxy})
    case = reference[0]
    for name in ("by-fleet", "by-provider"):
        answer = front.sdk().embeddings.create(model=name, input=case["text"])
        assert answer.model == name
        assert answer.usage.prompt_tokens == len(case["ids"])
        assert cosine(answer.data[0].embedding, case["vector"]) > 0.99999
    body = {"model": EMBEDDER, "input": case["text"], "request_id": "mine"}
    reply = httpx.post(f"{worker.url}/v1/embeddings", json=body, trust_env=False).json()
    assert reply["id"] == "embd-mine"
    tokens = httpx.post(f"{worker.url}/tokenize", json={"prompt": case["text"]}, trust_env=False).json()
    assert (tokens["tokens"], tokens["max_model_len"]) == (case["ids"], 256)
