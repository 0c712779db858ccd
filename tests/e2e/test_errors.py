"""Refusals: each has the status and the body that OpenAI's clients expect, and names what it is about."""

from __future__ import annotations

import json

import openai
import pytest

from harness import KEY, MODEL, user

CHAT = "/v1/chat/completions"


def error_of(response) -> dict:
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert response.headers["x-request-id"]
    return body["error"]


def test_unknown_model(client):
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="gpt-99", messages=user("hi"))
    assert error.value.code == "model_not_found"
    assert "gpt-99" in error.value.message


def test_prompt_longer_than_the_context(client):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model=MODEL, messages=user("hello " * 3000))
    assert error.value.code == "context_length_exceeded"
    assert error.value.param == "messages"
    assert "2048" in error.value.message


def test_prompt_and_answer_longer_than_the_context(client):
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model=MODEL, prompt="hi", max_tokens=2048)
    assert error.value.code == "context_length_exceeded"


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_before_the_first_token_has_a_status(server, stream):
    """Also of a stream: the head is not sent before the engine has taken the request."""
    body = {"model": MODEL, "messages": user("hello " * 3000), "stream": stream}
    with server.http(KEY) as http:
        response = http.post(CHAT, json=body)
    assert response.status_code == 400
    assert error_of(response)["code"] == "context_length_exceeded"


GOOD = {"model": MODEL, "messages": user("hi"), "max_tokens": 1}


def without(key: str) -> dict:
    return {name: value for name, value in GOOD.items() if name != key}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (GOOD | {"temperature": "hot"}, "temperature"),
        (GOOD | {"temperature": 3}, "temperature"),
        (GOOD | {"top_p": 0}, "top_p"),
        (GOOD | {"max_tokens": 0}, "max_tokens"),
        (GOOD | {"max_tokens": 1.5}, "max_tokens"),
        (GOOD | {"n": 0}, "n"),
        (GOOD | {"n": 129}, "n"),
        (GOOD | {"stop": [1]}, "stop"),
        (GOOD | {"stream": "yes"}, "stream"),
        (GOOD | {"logprobs": True, "top_logprobs": 1001}, "top_logprobs"),
        (GOOD | {"top_logprobs": 2}, "top_logprobs"),
        (GOOD | {"presence_penalty": 9}, "presence_penalty"),
        (GOOD | {"logit_bias": {"5": 101}}, "logit_bias"),
        (GOOD | {"model": 7}, "model"),
        (GOOD | {"messages": "hi"}, "messages"),
        (GOOD | {"messages": []}, "messages"),
        (GOOD | {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (GOOD | {"messages": [{"content": "hi"}]}, "messages[0].role"),
        (without("model"), "model"),
        (without("messages"), "messages"),
        # Not there, and said so: ignoring them would answer a different question.
        (GOOD | {"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (GOOD | {"tool_choice": "required"}, "tool_choice"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_bad_field_is_named(server, fields, param):
    with server.http(KEY) as http:
        response = http.post(CHAT, json=fields)
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert error["type"] == "invalid_request_error"
    # A list may name the entry.
    assert error["param"].startswith(param), error
    assert param in error["message"], error


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"text"', b"\xff\xfe", b'{"model": NaN}', b"[" * 100_000],
    ids=lambda body: repr(body[:12]),
)
def test_bad_json(server, body):
    with server.http(KEY) as http:
        response = http.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


def test_bad_json_says_where(server):
    with server.http(KEY) as http:
        response = http.post(
            CHAT, content=b'{"model": "m",\n  "messages": [}', headers={"content-type": "application/json"}
        )
    assert "line 2 column 16" in error_of(response)["message"]


def test_wrong_method(server):
    with server.http(KEY) as http:
        for method, path, allow in [("GET", CHAT, "POST"), ("POST", "/v1/models", "GET"), ("DELETE", "/health", "GET")]:
            response = http.request(method, path)
            assert response.status_code == 405, path
            assert allow in response.headers["allow"], path
            assert error_of(response)["code"] == "method_not_supported", path


@pytest.mark.parametrize(
    "path", ["/", "/v1", "/v1/chat", "/v1/moderations", "/v1/chat/completions/x", "/metrics", "/api/requests"]
)
def test_unknown_path(server, path):
    with server.http(KEY) as http:
        response = http.post(path, json=GOOD)
    assert response.status_code == 404
    assert error_of(response)["code"] == "unknown_url"


def test_wrong_content_type(server):
    with server.http(KEY) as http:
        response = http.post(CHAT, content=json.dumps(GOOD), headers={"content-type": "text/csv"})
    assert response.status_code == 415
    assert error_of(response)["code"] == "unsupported_media_type"


def test_body_over_the_limit_names_it(server):
    size = 11 * 1024 * 1024
    with server.http(KEY) as http:
        response = http.post(CHAT, json={"model": MODEL, "messages": user("x" * size)})
        assert response.status_code == 413
        error = error_of(response)
        assert error["code"] == "request_too_large"
        assert "edge.limits.max-body" in error["message"]
        # Also where the length is not announced.
        chunks = (b"x" * 65536 for _ in range(size // 65536))
        chunked = http.post(CHAT, content=chunks, headers={"content-type": "application/json"})
        assert chunked.status_code == 413


def test_head_over_the_limit(server):
    with server.http(KEY) as http:
        response = http.get("/v1/models", headers={"x-long": "x" * 40_000})
    assert response.status_code == 431


def test_a_refused_request_leaves_the_connection_usable(server):
    with server.http(KEY) as http:
        for _ in range(3):
            assert http.post(CHAT, json=without("messages")).status_code == 400
            assert http.post(CHAT, json=GOOD).status_code == 200
