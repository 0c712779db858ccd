"""Flags of `vllm serve` that change what a worker answers."""

from __future__ import annotations

import json

import httpx
import openai
import pytest

from harness import START_SECONDS, Worker, data_lines, eventually, forebay, get, model_file, status_of


def post(worker: Worker, path: str, body: dict, status: int = 200) -> dict:
    response = httpx.post(f"{worker.url}{path}", json=body, timeout=60, trust_env=False)
    assert response.status_code == status, response.text
    return response.json()


def test_names_lengths_and_sampling_defaults(start, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"max_new_tokens": 3, "eos_token_id": 2}))
    names = ["first", "second", "third"]
    worker = start(
        Worker, "--served-model-name", *names, "--max-model-len", "1.5k", "--generation-config", str(tmp_path)
    )
    cards = get(f"{worker.url}/v1/models").json()["data"]
    assert [(card["id"], card["root"], card["max_model_len"]) for card in cards] == [(n, "first", 1500) for n in names]
    assert get(f"{worker.url}/v1/models/third").json()["id"] == "third"
    for name in names:
        body = {"model": name, "prompt": "x", "max_tokens": 9, "ignore_eos": True}
        reply = post(worker, "/v1/completions", body)
        assert (reply["model"], reply["usage"]["completion_tokens"]) == ("first", 3)
        assert post(worker, "/tokenize", {"model": name, "prompt": "x"})["max_model_len"] == 1500
    assert "`f` does not exist" in post(worker, "/v1/completions", {**body, "model": "f"}, 404)["error"]["message"]
    assert worker.metrics().value("vllm:request_success_total", model_name="first") == 3
    assert 'model_name="second"' not in worker.metrics().text


def test_usage_and_ids_of_tokens_where_nobody_asks(start):
    worker = start(Worker, "--enable-force-include-usage", "--return-tokens-as-token-ids", "--max-model-len", "auto")
    body = {"model": worker.model(), "prompt": "x", "max_tokens": 3, "ignore_eos": True, "logprobs": 1}

    def stream(**change) -> list[dict]:
        with httpx.stream("POST", f"{worker.url}/v1/completions", json={**body, "stream": True, **change}) as reply:
            lines = data_lines(reply.iter_lines())
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]

    frames = stream()
    assert frames[-1]["choices"] == [] and frames[-1]["usage"]["completion_tokens"] == 3
    assert all(frame["usage"]["prompt_tokens"] == 1 for frame in frames)
    tokens = [token for frame in frames[:-1] for c in frame["choices"] for token in (c["logprobs"] or {}).get("tokens", [])]
    assert len(tokens) == 3 and all(token.startswith("token_id:") for token in tokens)
    # A request that says no is heard; usage is not its choice.
    frames = stream(return_tokens_as_token_ids=False, stream_options={"include_usage": False})
    assert frames[-1]["usage"]["completion_tokens"] == 3
    assert not any("token_id:" in json.dumps(frame) for frame in frames)


def test_tokenizer_info(start, tmp_path):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    off = start(Worker)
    assert httpx.get(f"{off.url}/tokenizer_info").status_code == 404
    on = start(Worker, "--enable-tokenizer-info-endpoint", "--chat-template", template, "--max_model_len", "1K")
    info = get(f"{on.url}/tokenizer_info").json()
    assert info["tokenizer_class"] and info["eos_token"] == "<|im_end|>"
    assert (info["chat_template"], info["model_max_length"]) == (template, 1024)
    ids = info["added_tokens_decoder"]
    assert ids[next(i for i, token in ids.items() if token == "<|im_start|>")] == "<|im_start|>"
    assert httpx.post(f"{on.url}/tokenizer_info").status_code == 405
    # A router passes it on.
    front = start({"router": {"fleets": [{"model": "m", "replicas": [on.url]}]}})
    assert get(f"{front.url}/tokenizer_info").json() == info


class SocketWorker(Worker):
    """One that listens on no port."""

    def wait_ready(self) -> None:
        def probe() -> bool:
            assert self.is_running(), self.log()
            return status_of(f"{self.admin_url}/ready") == 200

        eventually("a ready worker", probe, START_SECONDS)


def test_a_unix_socket(start, tmp_path):
    path = tmp_path / "s"

    def refused() -> str:
        ended = forebay("worker", "--model", str(model_file()), "--uds", str(path))
        assert ended.returncode != 0
        return ended.stderr

    worker = start(SocketWorker, "--uds", str(path))
    assert f"curl --unix-socket {path} http://localhost/v1/chat/completions" in worker.log()
    assert status_of(f"{worker.url}/health") is None
    with (
        httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as http,
        openai.OpenAI(base_url="http://localhost/v1", api_key="none", http_client=http, max_retries=0) as sdk,
    ):
        model = sdk.models.list().data[0].id
        reply = sdk.completions.create(model=model, prompt="x", max_tokens=3, stream=True, extra_body={"ignore_eos": True})
        assert sum(bool(chunk.choices) for chunk in reply) >= 3
    assert f"another program listens on the socket {path}" in refused()
    worker.terminate()
    assert worker.wait() == 0
    assert not path.exists()
    # What a killed server leaves behind is in nobody's way; other files are.
    start(SocketWorker, "--uds", str(path)).kill()
    assert path.is_socket()
    start(SocketWorker, "--uds", str(path)).terminate()
    eventually("the end of the socket", lambda: not path.exists())
    path.write_text("notes")
    said = refused()
    assert "no socket" in said and "`--uds`" in said
    assert path.read_text() == "notes"


@pytest.mark.parametrize(
    ("flags", "expect"),
    [
        (["--max-model-len", "1.5K"], "Did you mean to use 1.5k instead?"),
        (["--max-model-len", "-2"], "--max-model-len"),
        (["--max-num-batched-tokens", "many"], "expected a number like"),
        (["--generation-config", "/no/such/file"], "`--generation-config vllm` leaves them out"),
        (["--uds", "/tmp/" + "x" * 120], "`--uds`: the path has 125 bytes"),
        (["--served-model-name", "a", "a"], "`--served-model-name`: `a` stands here twice"),
    ],
)
def test_mistakes_are_told(flags, expect):
    refused = forebay("worker", "--model", str(model_file()), *flags)
    assert refused.returncode != 0 and expect in refused.stderr, refused.stderr
    assert "model loaded" not in refused.stderr, "told before the long part of the start"
