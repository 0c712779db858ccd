"""What `vllm serve` has beside OpenAI's API: token ids in and out, and what operators and routers ask for."""

from __future__ import annotations

import json
import threading

import httpx
import openai
import pytest

from harness import KEY, MODEL, Forebay, Worker, data_lines, engine_config, eventually, free_port, get, status_of, user

GENERATE = "/inference/v1/generate"


@pytest.fixture(scope="module")
def worker(start_for_module) -> Worker:
    return start_for_module(Worker, "--served-model-name", MODEL)


def post(url: str, path: str, body: dict, **options) -> httpx.Response:
    return httpx.post(f"{url}{path}", json=body, timeout=60, trust_env=False, **options)


def test_rendered_prompts_generate_the_same(worker):
    """render, then generate by ids, then detokenize: the answer that chat gives."""
    call = {"model": MODEL, "messages": user("Name a river."), "temperature": 0, "max_tokens": 12}
    chat = post(worker.url, "/v1/chat/completions", call).json()
    rendered = post(worker.url, "/v1/chat/completions/render", call).json()
    assert len(rendered["token_ids"]) == chat["usage"]["prompt_tokens"]
    assert rendered["sampling_params"]["max_tokens"] == 12

    reply = post(worker.url, GENERATE, rendered).json()
    assert reply["usage"]["completion_tokens"] == chat["usage"]["completion_tokens"]
    choice = reply["choices"][0]
    assert choice["finish_reason"] == chat["choices"][0]["finish_reason"]
    ids = choice["token_ids"]
    assert len(ids) == reply["usage"]["completion_tokens"]
    text = post(worker.url, "/detokenize", {"model": MODEL, "tokens": ids}).json()["prompt"]
    assert text.removesuffix("<|im_end|>") == chat["choices"][0]["message"]["content"]

    with httpx.stream("POST", f"{worker.url}{GENERATE}", json={**rendered, "stream": True}, timeout=60) as stream:
        frames = data_lines(stream.iter_lines())
    assert frames[-1] == "[DONE]"
    choices = [json.loads(frame)["choices"][0] for frame in frames[:-1]]
    assert sum((c["token_ids"] for c in choices), []) == ids
    assert choices[-1]["finish_reason"] == choice["finish_reason"]


def test_conversations_are_counted_as_they_are_rendered(worker):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    begun = [*user("Name a river."), {"role": "assistant", "content": "The"}]
    for change in (
        {},
        {"add_generation_prompt": False},
        {"messages": begun, "add_generation_prompt": False, "continue_final_message": True},
        {"add_special_tokens": True},
        {"tools": [tool]},
        {"chat_template_kwargs": {"anything": 1}},
    ):
        call = {"model": MODEL, "messages": user("Name a river."), **change}
        rendered = post(worker.url, "/v1/chat/completions/render", call).json()["token_ids"]
        assert post(worker.url, "/tokenize", call).json()["tokens"] == rendered, change
    both = {"messages": begun, "add_generation_prompt": True, "continue_final_message": True}
    refused = post(worker.url, "/tokenize", both)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "continue_final_message")


def test_completions_are_rendered_as_a_list(worker):
    rendered = post(worker.url, "/v1/completions/render", {"model": MODEL, "prompt": ["one", "two"], "seed": 3}).json()
    assert [one["sampling_params"]["seed"] for one in rendered] == [3, 3]
    for one, prompt in zip(rendered, ["one", "two"], strict=True):
        tokens = post(worker.url, "/tokenize", {"model": MODEL, "prompt": prompt}).json()["tokens"]
        assert one["token_ids"] == tokens


def test_mistakes_are_told_where_they_stand(worker):
    def refused(status: int = 400, **change) -> dict:
        body = {"model": MODEL, "token_ids": [1, 2], "sampling_params": {"max_tokens": 2}, **change}
        response = post(worker.url, GENERATE, body)
        assert response.status_code == status, response.text
        return response.json()["error"]

    assert refused(token_ids=[])["param"] == "token_ids"
    assert refused(token_ids=[10_000_000])["param"] == "token_ids"
    assert refused(sampling_params={"temperature": -1})["param"] == "sampling_params.temperature"
    assert "kv_transfer_params" in refused(501, kv_transfer_params={"do_remote_decode": True})["message"]


def test_errors_are_vllms(worker):
    """As vLLM 0.32 answers; behind `forebay serve` they are OpenAI's."""
    chat = {"model": MODEL, "messages": user("hi"), "max_tokens": 1}
    tokens = get(f"{worker.url}/v1/models").json()["data"][0]["max_model_len"]

    def refused(change: dict, path: str = "/v1/chat/completions") -> tuple:
        response = post(worker.url, path, {**chat, **change})
        error = response.json()["error"]
        assert error["code"] == response.status_code and error["message"]
        return response.status_code, error["type"], error["param"]

    assert refused({"temperature": -1}) == (400, "BadRequestError", "temperature")
    for stream in (False, True):
        long = {"messages": user("hello " * tokens), "stream": stream}
        assert refused(long) == (400, "BadRequestError", "input_tokens")
    assert refused({"model": "other"}) == (404, "NotFoundError", "model")
    assert refused({}, "/v1/nothing") == (404, "Not Found", None)
    assert refused({"use_beam_search": True}) == (501, "NotImplementedError", "use_beam_search")
    # Their SDKs see what they expect, and don't ask again for what is not there.
    with openai.OpenAI(base_url=f"{worker.url}/v1", api_key="none", max_retries=5) as sdk:
        with pytest.raises(openai.InternalServerError) as error:
            sdk.chat.completions.create(**chat, extra_body={"use_beam_search": True})
        assert error.value.response.headers["x-should-retry"] == "false"
        with pytest.raises(openai.BadRequestError) as error:
            sdk.chat.completions.create(**{**chat, "messages": user("hello " * tokens)})
        assert f"maximum context length is {tokens} tokens" in error.value.message
        assert "exceeds this limit even without any output tokens" in error.value.message


def test_a_broken_stream_ends_as_vllms_does(start):
    """With an error and `[DONE]`; in OpenAI's form without."""

    def last_frames(errors: str) -> list[str]:
        engine = engine_config(**{"request-timeout": "1s"})
        server = start({"edge": {"errors": errors}, "engine": engine})
        with server.http() as http, http.stream("POST", "/v1/chat/completions", json=ENDLESS) as stream:
            return data_lines(stream.iter_lines())[-2:]

    error, done = last_frames("vllm")
    assert done == "[DONE]"
    assert json.loads(error)["error"]["code"] == 504 and "request-timeout" in json.loads(error)["error"]["message"]
    delta, error = last_frames("openai")
    assert json.loads(delta)["choices"] and json.loads(error)["error"]["code"] == "timeout"


def test_tokens_pass_all_five_layers(server):
    """Through gateway, proxy and router, metered like any generation."""
    body = {"model": MODEL, "token_ids": [1, 2, 3], "sampling_params": {"max_tokens": 4, "ignore_eos": True}}
    with server.http(KEY) as http:
        # A consumer's numbers are there from its first request on.
        assert http.post(GENERATE, json=body).status_code == 200
        server.wait_idle()
        before = server.metrics()
        reply = http.post(GENERATE, json=body)
        assert reply.status_code == 200, reply.text
        assert len(reply.json()["choices"][0]["token_ids"]) == 4
        assert http.post("/v1/completions/render", json={"model": MODEL, "prompt": "x"}).status_code == 200
    server.wait_idle()
    after = server.metrics()

    def added(kind: str) -> float:
        name = "forebay_gateway_tokens_total"
        return after.value(name, consumer="team-a", kind=kind) - before.value(name, consumer="team-a", kind=kind)

    assert (added("prompt"), added("completion")) == (3, 4)


ENDLESS = {"model": MODEL, "messages": user("Tell me a story."), "max_tokens": 1900, "ignore_eos": True, "stream": True}


def reasons(frames: list[str]) -> list[str]:
    choices = [json.loads(frame)["choices"] for frame in frames if frame != "[DONE]"]
    return [one["finish_reason"] for choice in choices for one in choice if one["finish_reason"]]


def test_load_is_told(worker):
    assert get(f"{worker.url}/load").json() == {"server_load": 0}
    with httpx.stream("POST", f"{worker.url}/v1/chat/completions", json=ENDLESS, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        assert get(f"{worker.url}/load").json() == {"server_load": 1}
        assert get(f"{worker.admin_url}/load").json() == {"server_load": 1}
    eventually("nothing runs", lambda: get(f"{worker.url}/load").json() == {"server_load": 0})
    body = {"model": MODEL, "prompt": "x", "max_tokens": 1}
    told = post(worker.url, "/v1/completions", body, headers={"endpoint-load-metrics-format": "JSON"})
    report = json.loads(told.headers["endpoint-load-metrics"].removeprefix("JSON "))
    assert report["named_metrics"]["num_requests_waiting"] == 0.0
    assert 0 <= report["named_metrics"]["kv_cache_usage_perc"] <= 1
    text = post(worker.url, "/v1/completions", body, headers={"endpoint-load-metrics-format": "TEXT"})
    assert text.headers["endpoint-load-metrics"].startswith("TEXT named_metrics.kv_cache_usage_perc=")


def test_ids_of_the_body(worker):
    body = {"model": MODEL, "token_ids": [1, 2, 3], "request_id": "mine", "stream": True}
    body["sampling_params"] = {"max_tokens": 1900, "ignore_eos": True}
    with httpx.stream("POST", f"{worker.url}{GENERATE}", json=body, timeout=60) as stream:
        lines = stream.iter_lines()
        frames = data_lines([next(lines)])
        reply_id = json.loads(frames[0])["request_id"]
        assert reply_id == "generate-tokens-mine"
        assert post(worker.url, "/abort_requests", {"request_ids": reply_id}).status_code == 200
        frames += data_lines(lines)
    assert reasons(frames) == ["abort"]
    call = {"model": MODEL, "messages": user("hi"), "request_id": "mine"}
    assert post(worker.url, "/v1/chat/completions/render", call).json()["request_id"] == "chatcmpl-mine"


@pytest.mark.parametrize("where", ["url", "admin_url"])
def test_a_request_is_aborted_by_its_id(worker, where):
    request_id = f"abort-me-{where}"
    headers = {"x-request-id": request_id}
    url = f"{worker.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=ENDLESS, headers=headers, timeout=60) as stream:
        lines = stream.iter_lines()
        frames = data_lines([next(lines)])
        reply_id = json.loads(frames[0])["id"]
        assert reply_id == f"chatcmpl-{request_id}"
        aborted = post(getattr(worker, where), "/abort_requests", {"request_ids": ["nobody", reply_id]})
        assert aborted.status_code == 200
        frames += data_lines(lines)
    assert frames[-1] == "[DONE]"
    assert reasons(frames) == ["abort"]
    assert post(worker.url, "/abort_requests", {}).status_code == 400


def test_pause_and_resume(worker):
    def paused() -> bool:
        return get(f"{worker.url}/is_paused").json()["is_paused"]

    assert not paused()
    assert httpx.post(f"{worker.url}/pause", params={"mode": "abort"}, timeout=60).json() == {"status": "paused"}
    assert paused()
    answers: list[httpx.Response] = []
    ask = threading.Thread(
        target=lambda: answers.append(
            post(worker.url, "/v1/completions", {"model": MODEL, "prompt": "x", "max_tokens": 2})
        )
    )
    ask.start()
    eventually("it waits", lambda: worker.metrics().value("vllm:num_requests_waiting") == 1)
    assert httpx.post(f"{worker.url}/resume", timeout=60).json() == {"status": "resumed"}
    ask.join(60)
    assert answers[0].status_code == 200
    assert not paused()
    assert httpx.post(f"{worker.url}/pause", params={"mode": "sleep"}).status_code == 400
    # A page in somebody's browser can't do it.
    assert httpx.post(f"{worker.url}/pause", headers={"origin": "http://evil.example"}).status_code == 403


def test_where_kv_events_are_published(start, worker):
    assert get(f"{worker.url}/kv_event_sources").json() == {}
    port = free_port()
    where = {"endpoint": f"tcp://*:{port}", "topic": "t"}
    silent = start(Worker, "--kv-events-config", json.dumps(where))
    assert get(f"{silent.url}/kv_event_sources").json() == {}
    assert "publishes nothing" in silent.log()
    publisher = start(Worker, "--kv-events-config", json.dumps({"enable_kv_cache_events": True, **where}))
    sources = get(f"{publisher.url}/kv_event_sources").json()
    assert sources["0"]["endpoint"].endswith(f":{port}") and sources["0"]["topic"] == "t"


def test_adapters_are_honestly_missing(worker):
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        response = post(worker.url, path, {"lora_name": "a", "lora_path": "/a"})
        assert response.status_code == 404
        assert "merge the adapter" in response.json()["error"]["message"]


def test_a_public_edge_has_none_of_it(server):
    with server.http(KEY) as http:
        for method, path in [("GET", "/load"), ("POST", "/pause"), ("POST", "/abort_requests"), ("GET", "/is_paused")]:
            assert http.request(method, path, json={"request_ids": []}).status_code == 404, path
    assert get(f"{server.admin_url}/is_paused").json() == {"is_paused": False}
    # What changes anything must not come from a page in a browser.
    assert httpx.post(f"{server.admin_url}/pause").status_code == 415


def test_keys_of_a_worker(start, tmp_path):
    secret = tmp_path / "key"
    secret.write_text("sk-from-file\n")
    worker = start(Worker, "--served-model-name", MODEL, "--api-key", "sk-plain", f"file:{secret}", "--host", "127.0.0.1")
    for key in ("sk-plain", "sk-from-file"):
        with openai.OpenAI(base_url=f"{worker.url}/v1", api_key=key, max_retries=0) as sdk:
            assert sdk.models.list().data[0].id == MODEL
    refused = httpx.get(f"{worker.url}/v1/models", headers={"authorization": "Bearer sk-wrong"})
    assert (refused.status_code, refused.json()) == (401, {"error": "Unauthorized"})
    assert httpx.post(f"{worker.url}/pause").status_code == 401
    assert get(f"{worker.url}/health").status_code == 200
    assert "sk-plain" not in worker.log()


def test_root_path_and_origins(start):
    origin = "http://app.example"
    worker = start(Worker, "--root-path", "/llm", "--allowed-origins", json.dumps([origin]))
    for base in ("", "/llm"):
        response = httpx.get(f"{worker.url}{base}/v1/models", headers={"origin": origin})
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == origin


def test_defaults_of_a_worker(start, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    flags = ["--chat-template", str(template), "--max-logprobs", "2", "--seed", "7", "--num-gpu-blocks-override", "9"]

    def outcome() -> tuple[str, list[str]]:
        worker = start(Worker, "--served-model-name", MODEL, *flags)
        assert worker.metrics().value("vllm:cache_config_info", num_gpu_blocks="9") == 1
        chat = {"model": MODEL, "messages": user("hi"), "max_tokens": 6, "logprobs": True}
        refused = post(worker.url, "/v1/chat/completions", {**chat, "top_logprobs": 3})
        assert refused.status_code == 400 and "max" in refused.json()["error"]["message"]
        ids = post(worker.url, "/v1/chat/completions/render", chat).json()["token_ids"]
        prompt = post(worker.url, "/detokenize", {"model": MODEL, "tokens": ids}).json()["prompt"]
        answers = [post(worker.url, "/v1/chat/completions", {**chat, "temperature": 1.5}).json() for _ in range(3)]
        return prompt, [answer["choices"][0]["message"]["content"] for answer in answers]

    prompt, answers = outcome()
    assert prompt == "<user>hi"
    assert len(set(answers)) > 1, "each request has a seed of its own"
    # The same questions in the same order, the same answers.
    assert outcome() == (prompt, answers)


def test_a_worker_drains(start):
    """SIGTERM: the port closes, the stream that runs comes to its end, and the process with it."""
    worker = start(Worker, "--served-model-name", MODEL)
    body = {"model": MODEL, "messages": user("Tell me a story."), "max_tokens": 400, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{worker.url}/v1/chat/completions", json=body, timeout=60, trust_env=False) as stream:
        lines = stream.iter_lines()
        first = next(lines)
        worker.terminate()
        eventually("new connections are refused", lambda: status_of(f"{worker.url}/health") is None)
        frames = data_lines([first, *lines])
    assert frames[-1] == "[DONE]"
    assert json.loads(frames[-2])["choices"][0]["finish_reason"] == "length"
    assert worker.wait() == 0


def test_a_drain_that_takes_too_long_aborts(start):
    server: Forebay = start({"edge": {"drain-timeout": "200ms"}, "engine": engine_config()})
    with server.http() as http, http.stream("POST", "/v1/chat/completions", json=ENDLESS) as stream:
        lines = stream.iter_lines()
        next(lines)
        server.terminate()
        frames = data_lines(lines)
    assert frames[-1] == "[DONE]"
    assert reasons(frames) == ["abort"]
    assert server.wait(20) == 0
