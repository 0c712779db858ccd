"""A model from a Hugging Face directory: it is served like any other, and what is wrong with a directory is said at the start.

The model is random and small, its tokenizer a real one of 684 tokens. What the directory's numbers should give is tested
against transformers in `crates/forebay-engine/tests/hf_reference.rs`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import openai
import pytest

import tiny_model
from harness import Worker, forebay, free_port, get
from tiny_model import write_json


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny-1.5"
    tiny_model.make(directory)
    return directory


def test_a_directory_is_served_like_a_file(directory, tmp_path):
    worker = Worker(tmp_path, model=directory)
    try:
        name = worker.model()
        assert name == "tiny-1.5"
        with openai.OpenAI(base_url=f"{worker.url}/v1", api_key="none", max_retries=0, timeout=60) as sdk:
            ask = dict(model=name, temperature=0, max_tokens=8, extra_body={"ignore_eos": True})
            chat = sdk.chat.completions.create(messages=[{"role": "user", "content": "Hi there"}], **ask)
            assert chat.usage.completion_tokens == 8
            again = sdk.chat.completions.create(messages=[{"role": "user", "content": "Hi there"}], **ask)
            assert again.choices[0].message.content == chat.choices[0].message.content
            one = sdk.completions.create(prompt="Hi", logprobs=2, **ask)
            assert len(one.choices[0].logprobs.tokens) == 8
        card = get(f"{worker.url}/v1/models").json()["data"][0]
        assert card["max_model_len"] == 512
    finally:
        worker.close()
    assert worker.trouble() is None


def test_the_models_own_defaults_count_where_a_request_is_silent(directory, tmp_path):
    """Seen by the limit on tokens and by greedy output, which does not change from one request to the next."""
    model = tmp_path / "model"
    shutil.copytree(directory, model)
    write_json(model / "generation_config.json", {"eos_token_id": [2], "temperature": 0.0, "max_new_tokens": 5})
    worker = Worker(tmp_path / "worker", model=model)
    try:
        with openai.OpenAI(base_url=f"{worker.url}/v1", api_key="none", max_retries=0, timeout=60) as sdk:

            def say(**options):
                options = {"max_tokens": 9, "extra_body": {"ignore_eos": True}, **options}
                return sdk.completions.create(model=worker.model(), prompt="Hi there", **options)

            first = say()
            assert first.usage.completion_tokens == 5
            assert all(say().choices[0].text == first.choices[0].text for _ in range(4))
            assert say(temperature=0).choices[0].text == first.choices[0].text
            assert len({say(temperature=2, seed=seed).choices[0].text for seed in range(4)}) > 1
    finally:
        worker.close()
    out = forebay("worker", "--model", str(model), "--port", str(free_port()), "--override-generation-config", '{"top_p": 0}')
    assert out.returncode == 1 and "`top-p` is 0; above 0, up to 1 expected" in out.stderr, out.stderr


class Hub:
    """Speaks as much of the hub's API as a pull needs. Shards are large files: by a redirect, with their SHA-256."""

    REPO, COMMIT, TOKEN = "org/tiny", "5eed" * 10, "hf_e2e_0f1e2d"

    def __init__(self, directory: Path):
        hub = self
        self.directory = directory
        self.asked: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.asked.append(self.path)
                hub.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path, resolved = request.path, f"/{self.REPO}/resolve/{self.COMMIT}/"
        if path.startswith("/storage/"):
            self.send(request, 200, self.read(path.removeprefix("/storage/")))
        elif request.headers["authorization"] != f"Bearer {self.TOKEN}":
            self.send(request, 401)
        elif path == f"/api/models/{self.REPO}?blobs=true":
            files = [self.file(file.name) for file in sorted(self.directory.iterdir())]
            self.send(request, 200, json.dumps({"sha": self.COMMIT, "siblings": files}).encode())
        elif path.startswith(resolved) and path.endswith(".safetensors"):
            name = path.removeprefix(resolved)
            self.send(request, 302, location=f"{self.url}/storage/{name}")
        elif path.startswith(resolved):
            self.send(request, 200, self.read(path.removeprefix(resolved)))
        else:
            self.send(request, 404)

    def read(self, name: str) -> bytes:
        return (self.directory / name).read_bytes()

    def file(self, name: str) -> dict:
        content = self.read(name)
        lfs = {"lfs": {"sha256": hashlib.sha256(content).hexdigest()}} if name.endswith(".safetensors") else {}
        return {"rfilename": name, "size": len(content), **lfs}

    def send(self, request: BaseHTTPRequestHandler, status: int, body: bytes = b"", **headers: str) -> None:
        request.send_response(status)
        for name, value in {"content-length": str(len(body)), **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body)


def test_a_repository_of_the_hub_is_pulled_and_served(directory, tmp_path, monkeypatch):
    hub = Hub(directory)
    monkeypatch.setenv("FOREBAY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    out = forebay("model", "pull", "hf:org/tiny")
    assert out.returncode == 1 and "401" in out.stderr and "HF_TOKEN" in out.stderr, out.stderr
    monkeypatch.setenv("HF_TOKEN", hub.TOKEN)
    out = forebay("model", "pull", "hf:org/tiny", "--print-path")
    assert out.returncode == 0 and hub.TOKEN not in out.stderr, out.stderr
    pulled = Path(out.stdout.strip())
    for file in directory.iterdir():
        assert (pulled / file.name).read_bytes() == file.read_bytes(), file.name
    assert "hf:org/tiny" in forebay("model", "list").stdout
    # From the cache, without the hub.
    hub.server.shutdown()
    hub.server.server_close()
    worker = Worker(tmp_path / "worker", model="hf:org/tiny")
    try:
        assert worker.model() == "org/tiny"
        with openai.OpenAI(base_url=f"{worker.url}/v1", api_key="none", max_retries=0, timeout=60) as sdk:
            reply = sdk.completions.create(model="org/tiny", prompt="Hi", max_tokens=4, extra_body={"ignore_eos": True})
            assert reply.usage.completion_tokens == 4
    finally:
        worker.close()
    assert worker.trouble() is None


def test_check_reads_the_directory(directory, tmp_path):
    file = tmp_path / "forebay.yaml"
    file.write_text(f"edge: {{}}\nengine:\n  model: {directory}\n  max-model-len: 1024\n")
    out = forebay("check", str(file))
    assert out.returncode == 1
    assert "`engine.max-model-len` is 1024, but the model was trained for 512 tokens" in out.stderr


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def without(path: Path, key: str) -> None:
    write_json(path, {k: v for k, v in json.loads(path.read_text()).items() if k != key})


def change(path: Path, **changes: object) -> None:
    write_json(path, {**json.loads(path.read_text()), **changes})


FIRST = "model-00001-of-00002.safetensors"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: (d / "config.json").unlink(), "is a directory without `config.json`"),
        (lambda d: (d / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda d: without(d / "config.json", "hidden_size"), "the model file has no `hidden_size`"),
        (
            lambda d: change(d / "config.json", architectures=["MambaForCausalLM"]),
            "architecture `MambaForCausalLM` is not supported; supported: LlamaForCausalLM",
        ),
        (lambda d: (d / "model.safetensors.index.json").unlink(), "no `model.safetensors` and no `model.safetensors.index.json`"),
        (lambda d: (d / FIRST).unlink(), FIRST),
        (lambda d: cut(d / FIRST), f"{FIRST} is no safetensors file that can be used"),
        (lambda d: (d / FIRST).write_bytes(b"\xff" * 64), "the limit is 100000000; this is no safetensors file"),
        (lambda d: change(d / "config.json", intermediate_size=95), "`model.layers.0.mlp.gate_proj.weight` has the shape [64, 96]"),
        (lambda d: change(d / "config.json", num_hidden_layers=1), "`model.layers.1."),
        (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json is not there"),
        (lambda d: (d / "tokenizer.json").write_text("[]"), "tokenizer"),
    ],
)
def test_what_is_wrong_with_a_directory_is_said(directory, tmp_path, damage, words):
    broken = tmp_path / "broken"
    shutil.copytree(directory, broken)
    damage(broken)
    out = forebay("worker", "--model", str(broken), "--port", str(free_port()), "--kv-cache-memory-bytes", "16MiB")
    assert out.returncode not in (0, 101), out.stderr
    assert "panicked" not in out.stderr
    assert words in out.stderr, out.stderr
