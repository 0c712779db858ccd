"""Several models in one process: each with its own KV cache, loaded and unloaded while the others serve."""

from __future__ import annotations

import httpx
import openai
import pytest

from harness import Forebay, engine_config, eventually, forebay, get, model_file, user

FIRST, SECOND = "first", "second"


def engines(**second):
    return [
        engine_config(**{"served-model-name": FIRST}),
        engine_config(**{"served-model-name": SECOND, "kv-cache-memory": "64MiB", **second}),
    ]


def change(server: Forebay, what: str, model: str, **options) -> httpx.Response:
    options = {"json": {"model": model}, **options}
    return httpx.post(f"{server.admin_url}/api/models/{what}", timeout=60, trust_env=False, **options)


def states(server: Forebay) -> dict[str, str]:
    return {model["model"]: model["state"] for model in get(f"{server.admin_url}/api/models").json()["models"]}


def say(sdk: openai.OpenAI, model: str, **options):
    options = {"max_tokens": 8, "temperature": 0, **options}
    return sdk.chat.completions.create(model=model, messages=user("What is the capital of France? Answer in one word."), **options)


def test_two_models_answer_each_under_its_own_name(start):
    server = start({"engine": engines()})
    with server.sdk() as sdk:
        assert {model.id for model in sdk.models.list().data} == {FIRST, SECOND}
        for model in (FIRST, SECOND):
            reply = say(sdk, model)
            assert reply.model == model and "Paris" in reply.choices[0].message.content
    metrics = server.metrics()
    for model in (FIRST, SECOND):
        assert metrics.value("vllm:generation_tokens_total", model_name=model) > 0
    blocks = {
        labels["model_name"] if "model_name" in labels else labels["engine"]: labels["num_gpu_blocks"]
        for name, labels, _ in metrics.series
        if name == "vllm:cache_config_info"
    }
    assert len(set(blocks.values())) == len(blocks), "each has a KV cache of its own size"


def test_a_model_is_loaded_and_unloaded_by_the_admin_api(start):
    server = start({"engine": engines(preload=False)})
    assert states(server) == {FIRST: "loaded", SECOND: "unloaded"}
    with server.sdk() as sdk:
        with pytest.raises(openai.APIStatusError) as refused:
            say(sdk, SECOND)
        assert refused.value.status_code == 503 and "not loaded" in str(refused.value)

        loaded = change(server, "load", SECOND)
        assert loaded.status_code == 200, loaded.text
        assert loaded.json()["state"] == "loaded" and loaded.json()["max_model_len"] == 2048
        assert "Paris" in say(sdk, SECOND).choices[0].message.content

        assert change(server, "unload", SECOND).json()["state"] == "unloaded"
        with pytest.raises(openai.APIStatusError):
            say(sdk, SECOND)
        assert "Paris" in say(sdk, FIRST).choices[0].message.content
        assert change(server, "load", SECOND).status_code == 200
        assert say(sdk, SECOND).usage.prompt_tokens_details.cached_tokens == 0, "a new cache is empty"


def test_an_unload_lets_streams_finish(start):
    server = start({"engine": engines()})
    with server.sdk() as sdk:
        options = {"max_tokens": 120, "stream": True, "extra_body": {"ignore_eos": True}}
        stream = say(sdk, SECOND, **options)
        first = next(chunk for chunk in stream if chunk.choices[0].delta.content)
        assert first.choices
        answer = change(server, "unload", SECOND)
        assert answer.status_code == 200 and answer.json()["state"] == "unloaded"
        reasons = [choice.finish_reason for chunk in stream for choice in chunk.choices]
        assert reasons[-1] == "length"


def test_a_model_that_is_away_is_answered_by_the_next_deployment(start):
    chain = [{"fleet": SECOND}, {"fleet": FIRST}]
    server = start({"engine": engines(preload=False), "proxy": {"models": [{"name": "m", "deployments": chain}]}})
    with server.sdk() as sdk:
        raw = sdk.chat.completions.with_raw_response.create(model="m", messages=user("hi"), max_tokens=4)
        assert raw.headers["x-forebay-deployment"] == f"fleet/{FIRST}"


def test_wrong_asks_are_told_so(start):
    server = start({"engine": engines(preload=False)})
    unknown = change(server, "load", "third")
    assert unknown.status_code == 404 and set(unknown.json()["models"]) == {FIRST, SECOND}
    assert change(server, "load", SECOND, json=None, content=b"{}").status_code == 415
    for body in (b"", b"[]", b"{\"model\": 7}", b"{" + b" " * 40_000):
        answer = change(server, "load", SECOND, json=None, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400, body[:20]
    assert httpx.get(f"{server.admin_url}/api/models/load", trust_env=False).status_code == 405
    assert states(server)[SECOND] == "unloaded"


def test_a_model_that_can_not_be_loaded_says_why(start, tmp_path):
    file = tmp_path / "broken.gguf"
    file.symlink_to(model_file())
    server = start({"engine": engines(model=str(file), preload=False)})
    file.unlink()
    file.write_bytes(b"GGUF" + bytes(16))
    answer = change(server, "load", SECOND)
    assert answer.status_code == 422 and "broken.gguf" in answer.json()["error"]
    assert states(server) == {FIRST: "loaded", SECOND: "failed"}


def test_unloading_gives_the_memory_back(start):
    server = start({"engine": engines()})

    def resident() -> int:
        with open(f"/proc/{server.child.pid}/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmRSS:")) * 1024

    with server.sdk() as sdk:
        say(sdk, SECOND)
    before = resident()
    change(server, "unload", SECOND)
    # The packed weights are some 100 MB; the allocator may keep a little.
    eventually("less memory", lambda: resident() < before - 60_000_000)


def test_two_engines_of_one_name_are_refused(tmp_path):
    file = tmp_path / "f.yaml"
    file.write_text("edge: {}\nengine:\n- {}\n- {block-size: 7}\n")
    check = forebay("check", str(file))
    assert check.returncode == 1
    assert "two engines serve" in check.stderr and "7 is not a multiple of 16" in check.stderr
