"""What vLLM's replies have beyond OpenAI's, from a worker and through a router before it."""

from __future__ import annotations

import openai
import pytest

from harness import MODEL, Forebay, Worker, user


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
