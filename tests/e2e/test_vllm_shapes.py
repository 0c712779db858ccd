"""What vLLM's requests may leave out and its replies have beyond OpenAI's, at a worker and at a router before it."""

from __future__ import annotations

import httpx
import openai
import pytest

from harness import KEY, MODEL, OTHER_KEY, Forebay, Worker, user


@pytest.fixture(scope="module")
def worker(start_for_module) -> Worker:
    return start_for_module(Worker, "--served-model-name", MODEL, "second-name")


@pytest.fixture(scope="module")
def router(start_for_module, worker) -> Forebay:
    return start_for_module({"router": {"fleets": [{"model": MODEL, "replicas": [worker.url]}]}})


@pytest.fixture(params=["worker", "router"])
def sdk(request, worker, router):
    url = (worker if request.param == "worker" else router).url
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as sdk:
        yield sdk


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_what_stopped_a_choice_is_told(sdk, api):
    call = {"model": MODEL, "temperature": 0, "max_tokens": 12}
    create = sdk.completions.create
    if api == "chat":
        create = sdk.chat.completions.create
        call |= {"messages": user("Count from one to ten in words.")}
    else:
        call |= {"prompt": "One, two, three, four,"}

    def stop_reason(**change) -> str | int | None:
        """Of a body, and of a stream: the same in the last frame, before it none in a chat and null in a completion."""
        choice = create(**call, extra_body=change).choices[0]
        *before, last = [chunk.choices[0] for chunk in create(**call, extra_body=change, stream=True)]
        assert last.model_extra["stop_reason"] == choice.model_extra["stop_reason"]
        assert last.finish_reason == choice.finish_reason == ("stop" if change else "length")
        assert all(("stop_reason" in choice.model_extra) == (api == "completions") for choice in before)
        assert not any(choice.model_extra.get("stop_reason") for choice in before)
        return choice.model_extra["stop_reason"]

    whole = create(**call, extra_body={"return_token_ids": True}).choices[0]
    text = whole.message.content if api == "chat" else whole.text
    token = whole.model_extra["token_ids"][5]
    assert stop_reason() is None
    assert stop_reason(stop=["no such text", text[3:9]]) == text[3:9]
    assert stop_reason(stop_token_ids=[token]) == token


def test_the_end_of_text_is_no_stop_reason(sdk):
    question = user("Answer with one word: what colour is the sky on a clear day?")
    reply = sdk.chat.completions.create(model=MODEL, messages=question, temperature=0, max_tokens=400)
    assert reply.choices[0].finish_reason == "stop"
    assert reply.choices[0].model_extra["stop_reason"] is None


ASKS = {
    "/v1/chat/completions": {"messages": user("hi"), "max_tokens": 2},
    "/v1/completions": {"prompt": "hi", "max_tokens": 2},
    "/v1/completions/render": {"prompt": ["hi"], "max_tokens": 2},
    "/inference/v1/generate": {"token_ids": [1, 2], "sampling_params": {"max_tokens": 2}},
    "/tokenize": {"prompt": "hi"},
}


@pytest.mark.parametrize("path", ASKS)
def test_a_request_need_not_name_the_only_model(worker, router, path):
    for url in (worker.url, router.url):
        for none in ({}, {"model": None}, {"model": ""}):
            response = httpx.post(f"{url}{path}", json={**ASKS[path], **none}, timeout=60, trust_env=False)
            assert response.status_code == 200, response.text
            reply = response.json()
            named = reply[0] if isinstance(reply, list) else reply
            assert named.get("model", MODEL) == MODEL, reply
            assert "model" in named or path == "/tokenize"


def test_a_stream_names_the_only_model(sdk):
    with sdk.chat.completions.with_streaming_response.create(
        model=openai.omit, messages=user("hi"), max_tokens=2, stream=True
    ) as response:
        frames = [line for line in response.iter_lines() if '"choices"' in line]
    assert frames and all(f'"model":"{MODEL}"' in frame for frame in frames)


@pytest.mark.parametrize("key", [KEY, OTHER_KEY], ids=["all-models", "one-model"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/inference/v1/generate"])
def test_of_several_models_one_is_to_be_named(server, key, path):
    """Also who may use just one: what it means must not change when it may use more."""
    with server.http(key) as http:
        response = http.post(path, json=ASKS[path])
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["message"], error["param"]) == ("Missing required parameter: 'model'.", "model")
