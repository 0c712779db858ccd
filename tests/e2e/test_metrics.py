"""What a worker says on /metrics, against what an installed vLLM says there, and against what was asked of it."""

from __future__ import annotations

import json
from pathlib import Path

import openai
import pytest

from harness import MODEL, Metrics, Worker, eventually, get, status_of, user

FIXTURE = Path(__file__).parents[2] / "crates/forebay-engine/tests/fixtures/vllm-metrics.json"
FLAGS = ("--show-hidden-metrics-for-version", "0.31")
# Nothing of the kind is here: crates/forebay-engine/src/metrics/tests.rs has the reasons.
NOT_HERE = ("external_prefix_cache", "mm_cache", "estimated_")


@pytest.fixture(scope="module")
def worker(start_for_module) -> Worker:
    return start_for_module(Worker, "--served-model-name", MODEL, "--threads", "1", "--max-model-len", "4096", *FLAGS)


def scrape(worker: Worker) -> Metrics:
    return Metrics(get(f"{worker.url}/metrics").text)


def test_every_metric_of_vllm_is_there_with_its_labels_and_buckets(worker):
    metrics = scrape(worker)
    types = dict(line.split()[2:4] for line in metrics.text.splitlines() if line.startswith("# TYPE "))
    for name, family in json.loads(FIXTURE.read_text())["metrics"].items():
        if any(part in name for part in NOT_HERE):
            assert name not in types
            continue
        assert types.get(name) == family["type"], name
        own = f"{name}_bucket" if "le" in family else name
        series = [labels for have, labels, _ in metrics.series if have == own]
        if name != "vllm:cache_config_info":
            assert {label for labels in series for label in labels} - {"le"} == set(family["labels"]), name
        if "le" in family:
            bounds = family["le"]["4096"] if isinstance(family["le"], dict) else family["le"]
            assert [labels["le"] for labels in series] == bounds, name
    (cache,) = [labels for name, labels, _ in metrics.series if name == "vllm:cache_config_info"]
    assert cache["num_cpu_blocks"] == "None" and int(cache["num_gpu_blocks"]) * 16 == int(cache["kv_cache_size_tokens"])


def test_requests_are_counted_by_handler_and_by_token(worker):
    def since(before: Metrics, name: str, **labels: str) -> float:
        now = scrape(worker)
        earlier = before.value(name, **labels) if name in before.names() else 0.0
        return now.value(name, **labels) - earlier if name in now.names() else 0.0

    before = scrape(worker)
    with openai.OpenAI(base_url=f"{worker.url}/v1", api_key="x", max_retries=0) as sdk:
        reply = sdk.chat.completions.create(model=MODEL, messages=user("Say hi."), max_tokens=6, n=2, temperature=0)
        sdk.models.retrieve(MODEL)
    assert status_of(f"{worker.url}/v1/nowhere/at/all") == 404
    usage = reply.usage
    eventually(
        "all tokens counted",
        lambda: since(before, "vllm:generation_tokens_total") == usage.completion_tokens,
    )
    assert since(before, "vllm:prompt_tokens_total") == 2 * usage.prompt_tokens
    assert since(before, "vllm:request_params_n_sum") == 2
    assert since(before, "vllm:request_params_n_count") == 1
    assert since(before, "vllm:request_success_total") == 2
    for handler, method, status in [
        ("/v1/chat/completions", "POST", "2xx"),
        ("/v1/models/{model}", "GET", "2xx"),
        ("none", "GET", "4xx"),
    ]:
        labels = {"handler": handler, "method": method}
        eventually(handler, lambda: since(before, "http_requests_total", status=status, **labels) == 1)
        assert since(before, "http_request_duration_seconds_count", **labels) == 1
        assert since(before, "http_response_size_bytes_count", handler=handler) == 1
    # Scrapes are not counted, as in vLLM.
    assert not any("/metrics" in labels.get("handler", "") for _, labels, _ in scrape(worker).series)


def test_a_worker_says_that_its_model_is_loaded(worker):
    metrics = scrape(worker)
    assert metrics.value("forebay_engine_loaded", model_name=MODEL) == 1
    assert metrics.value("forebay_engine_alive", model_name=MODEL) == 1
    assert metrics.value("forebay_engine_loads_total", model_name=MODEL, outcome="ok") == 1
    assert metrics.value("forebay_engine_loads_total", outcome="failed") == 0
    assert metrics.value("forebay_engine_load_seconds", model_name=MODEL) > 0


def test_former_names_are_there_on_request(worker, server):
    metrics = scrape(worker)
    for name, former in [
        ("vllm:inter_token_latency_seconds_count", "vllm:time_per_output_token_seconds_count"),
        ("vllm:prefix_cache_queries_total", "vllm:gpu_prefix_cache_queries_total"),
    ]:
        assert metrics.value(former) == metrics.value(name)
        assert former not in server.metrics().names()
