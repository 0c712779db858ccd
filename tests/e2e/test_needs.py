"""What the engine lacks goes to a provider that has it, word for word; what nobody has is refused and named."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from harness import ALIAS, MODEL, Forebay, engine_config, eventually, free_port, status_of, user

CHAT = "/v1/chat/completions"
CUSTOM = {"type": "custom", "custom": {"name": "f"}}
PICTURE = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]
NEEDS = [
    ({"response_format": {"type": "structural_tag"}}, "response_format"),
    ({"tools": [CUSTOM]}, "tools[0].type"),
    ({"messages": [{"role": "user", "content": PICTURE}]}, "messages[0].content[1]"),
    ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}}, "audio"),
]


class Provider:
    """Answers every chat, and keeps the bodies."""

    def __init__(self) -> None:
        self.port = free_port()
        self.bodies: list[dict] = []
        bodies = self.bodies

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_POST(self) -> None:
                bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
                message = {"role": "assistant", "content": "from the provider"}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                usage = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
                answer = {"id": "c", "object": "chat.completion", "created": 1, "model": "big"}
                data = json.dumps({**answer, "choices": [choice], "usage": usage}).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture(scope="module")
def provider() -> Iterator[Provider]:
    provider = Provider()
    yield provider
    provider.server.shutdown()


@pytest.fixture(scope="module")
def server(start_for_module, provider) -> Forebay:
    """`MODEL` is the engine alone; `ALIAS` may go on to the provider."""
    url = f"http://127.0.0.1:{provider.port}/v1"
    big = {"provider": "openai-compatible", "model": "big", "base-url": url, "api-key": "env:BIG_KEY"}
    config = {
        "proxy": {
            "models": [
                {"name": MODEL, "deployments": [{"fleet": MODEL}]},
                {"name": ALIAS, "deployments": [{"fleet": MODEL}, big]},
            ]
        },
        "engine": engine_config(),
    }
    server = start_for_module(config, env={"BIG_KEY": "sk-big"})
    eventually("a ready server", lambda: status_of(f"{server.url}/health") == 200)
    return server


@pytest.mark.parametrize(("fields", "param"), NEEDS, ids=lambda value: value if isinstance(value, str) else "")
def test_what_the_engine_lacks_is_refused(server, fields, param):
    with server.http() as http:
        response = http.post(CHAT, json={"model": MODEL, "messages": user("hi"), "max_tokens": 1, **fields})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("not_supported", param)
    assert f"'{param}' is not supported here" in error["message"]


@pytest.mark.parametrize(("fields", "param"), NEEDS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_provider_gets_it_as_it_came(server, provider, fields, param):
    body = {"model": ALIAS, "messages": user("hi"), "max_tokens": 1, **fields}
    with server.http() as http:
        response = http.post(CHAT, json=body)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["message"]["content"] == "from the provider"
    assert provider.bodies[-1] == {**body, "model": "big"}


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/tokenize"])
def test_what_can_not_fit_is_refused_by_its_size(server, path):
    text = " " * 10_000_000
    body = {"messages": user(text)} if path == CHAT else {"prompt": text}
    with server.http() as http:
        response = http.post(path, json={"model": MODEL, **body})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "resulted in 10000000 bytes" in error["message"]


def test_what_fits_a_provider_only_goes_there(server, provider):
    text = " " * 1_000_000
    with server.http() as http:
        response = http.post(CHAT, json={"model": ALIAS, "messages": user(text)})
    assert response.status_code == 200, response.text
    assert provider.bodies[-1]["messages"] == user(text)


def test_a_compressed_body_is_refused(server):
    with server.http() as http:
        headers = {"content-type": "application/json", "content-encoding": "gzip"}
        response = http.post(CHAT, content=b"\x1f\x8b", headers=headers)
    assert response.status_code == 415
    assert response.headers["accept-encoding"] == "identity"
    assert "content-encoding 'gzip'" in response.json()["error"]["message"]
