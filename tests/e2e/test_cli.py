"""The command line: help, checks that point at the mistake, start-up errors that name the key, models, load."""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path

import pytest
import yaml

from harness import ALIAS, KEY, MODEL, engine_config, forebay, free_port, model_file

GOOD = """\
admin:
  listen: 127.0.0.1:9901
edge:
  listen: 127.0.0.1:8443
gateway:
  consumers:
    - name: team-a
      keys: [env:TEAM_A_KEY]
      limits: {requests-per-minute: 500, tokens-per-minute: 200000}
  audit: {dir: audit}
proxy:
  models:
    - name: gpt-4o
      deployments:
        - {fleet: smollm2-135m-instruct}
        - {provider: openai, model: gpt-4o, api-key: env:OPENAI_API_KEY}
router:
  fleets:
    - model: smollm2-135m-instruct
      replicas: [engine, "http://127.0.0.1:8001"]
engine:
  model: smollm2-135m-instruct
  max-model-len: 4096
"""
SECRETS = {"TEAM_A_KEY": "sk-a", "OPENAI_API_KEY": "sk-o"}
LAYERS = ["edge", "gateway", "proxy", "router", "engine"]


@pytest.fixture
def check(tmp_path):
    def run(text: str, *flags: str, env: dict[str, str] | None = None):
        file = tmp_path / "forebay.yaml"
        file.write_text(text)
        return forebay("check", "forebay.yaml", *flags, env=SECRETS if env is None else env, cwd=tmp_path)

    return run


def test_help_lists_the_commands():
    out = forebay("--help")
    assert out.returncode == 0
    for command in ("serve", "worker", "check", "model", "bench"):
        assert re.search(rf"^  {command}\b", out.stdout, re.MULTILINE), command
    assert "vLLM" in forebay("worker", "--help").stdout
    assert forebay("no-such-command").returncode == 2
    assert re.match(r"forebay \d+\.\d+", forebay("--version").stdout)


# check


def test_check_explains_every_layer(check, tmp_path):
    out = check(GOOD)
    assert out.returncode == 0, out.stderr
    for layer in LAYERS:
        assert re.search(rf"^\s+{layer}\s+runs", out.stdout, re.MULTILINE), layer
    assert out.stdout.count("without it:") == 5
    assert "gpt-4o" in out.stdout
    # A check changes nothing.
    assert [file.name for file in tmp_path.iterdir()] == ["forebay.yaml"]


def test_check_json(check):
    out = check(GOOD, "--json")
    assert out.returncode == 0
    report = json.loads(out.stdout)
    assert (report["ok"], report["findings"]) == (True, [])
    assert [layer["section"] for layer in report["layers"]] == LAYERS
    assert all(layer["runs"] and layer["does"] and layer["without_it"] for layer in report["layers"])


def test_check_of_a_layer_that_is_not_there(check):
    out = check("edge: {listen: 127.0.0.1:8080}\nengine: {model: smollm2-135m-instruct}\n", "--json")
    report = json.loads(out.stdout)
    assert [layer["runs"] for layer in report["layers"]] == [True, False, False, False, True]


def test_check_points_at_an_unknown_key(check):
    broken = GOOD.replace("requests-per-minute", "request-per-minute")
    out = check(broken)
    assert out.returncode == 1
    assert "forebay.yaml:9:16" in out.stderr
    assert "request-per-minute" in out.stderr
    assert "did you mean `requests-per-minute`?" in out.stderr
    (finding,) = json.loads(check(broken, "--json").stdout)["findings"]
    assert (finding["severity"], finding["line"], finding["column"]) == ("error", 9, 16)
    assert finding["path"].startswith("gateway.consumers[0].limits")


def test_check_names_a_missing_secret(check):
    out = check(GOOD, env={"TEAM_A_KEY": "sk-a"})
    assert out.returncode == 1
    assert "`OPENAI_API_KEY` is not set" in out.stderr
    assert "forebay.yaml:16" in out.stderr


def test_check_warns_of_a_plain_secret(check):
    out = check(GOOD.replace("env:TEAM_A_KEY", "sk-in-plain-text"))
    assert out.returncode == 0
    assert "warning" in out.stderr
    assert "sk-in-plain-text" not in out.stderr + out.stdout


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("listen: 127.0.0.1:8443", "listen: 127.0.0.1:99999", "forebay.yaml:4"),
        ("max-model-len: 4096", "max-model-len: many", "forebay.yaml:23"),
        ("fleet: smollm2-135m-instruct}", "fleet: nobody}", "nobody"),
        ("requests-per-minute: 500", "requests-per-minute: 0", "forebay.yaml:9"),
        ("replicas: [engine,", "replicas: [engin,", "forebay.yaml:20"),
        ("  max-model-len: 4096", "  max-model-len: 4096\n  max-model-len: 1", "max-model-len"),
        ("engine:\n", "engine: [\n", "forebay.yaml:2"),
        ("model: smollm2-135m-instruct\n  max", "model: /no/such/model.gguf\n  max", "/no/such/model.gguf"),
        ("provider: openai,", "provider: bedrock,", "bedrock"),
    ],
    ids=lambda value: value.split(":")[0].strip() if isinstance(value, str) else None,
)
def test_check_finds_mistakes(check, old, new, words):
    assert old in GOOD
    out = check(GOOD.replace(old, new))
    assert out.returncode == 1, out.stdout
    assert words in out.stderr
    assert "panicked" not in out.stderr


def test_check_of_a_file_that_is_not_there(tmp_path):
    out = forebay("check", str(tmp_path / "none.yaml"))
    assert out.returncode == 1
    assert "none.yaml" in out.stderr


# Start-up errors


def serve_fails(tmp_path: Path, config: dict, env: dict[str, str] | None = None) -> str:
    """What a server says that can't start."""
    config = {"admin": {"listen": f"127.0.0.1:{free_port()}"}, **config}
    file = tmp_path / "forebay.yaml"
    file.write_text(yaml.safe_dump(config))
    out = forebay("serve", "--config", str(file), env=env, cwd=tmp_path, seconds=60)
    assert out.returncode not in (0, 101), out.stderr
    assert "panicked" not in out.stderr
    return out.stderr


def test_a_port_that_is_taken(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_port()))
        taken.listen()
        address = "127.0.0.1:%d" % taken.getsockname()[1]
        said = serve_fails(tmp_path, {"edge": {"listen": address}, "engine": engine_config()})
        assert f"{address} is already in use" in said
        assert "edge.listen" in said
        said = serve_fails(
            tmp_path,
            {"admin": {"listen": address}, "edge": {"listen": f"127.0.0.1:{free_port()}"}, "engine": engine_config()},
        )
        assert f"{address} is already in use" in said
        assert "admin.listen" in said


def test_an_audit_directory_that_can_not_be_written(tmp_path):
    """A file stands where the directory should be: that also stops root."""
    (tmp_path / "audit").write_text("")
    gateway = {"consumers": [{"name": "c", "keys": ["env:C_KEY"]}], "audit": {"dir": str(tmp_path / "audit")}}
    edge = {"listen": f"127.0.0.1:{free_port()}"}
    said = serve_fails(tmp_path, {"edge": edge, "gateway": gateway, "engine": engine_config()}, env={"C_KEY": "sk-c"})
    assert str(tmp_path / "audit") in said
    assert "gateway.audit.dir" in said or re.search(r"forebay\.yaml:\d+", said)


def test_a_model_file_that_is_not_there(tmp_path):
    edge = {"listen": f"127.0.0.1:{free_port()}"}
    missing = str(tmp_path / "none.gguf")
    assert missing in serve_fails(tmp_path, {"edge": edge, "engine": engine_config(model=missing)})
    out = forebay("worker", "--model", missing, "--port", str(free_port()))
    assert out.returncode == 1
    assert missing in out.stderr


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all" * 100])
def test_a_model_file_that_is_none(tmp_path, content):
    model = tmp_path / "broken.gguf"
    model.write_bytes(content)
    edge = {"listen": f"127.0.0.1:{free_port()}"}
    assert str(model) in serve_fails(tmp_path, {"edge": edge, "engine": engine_config(model=str(model))})


def test_a_model_file_that_is_cut(tmp_path):
    """A download that broke off."""
    model = tmp_path / "cut.gguf"
    with model_file().open("rb") as whole:
        model.write_bytes(whole.read(40_000_000))
    edge = {"listen": f"127.0.0.1:{free_port()}"}
    assert str(model) in serve_fails(tmp_path, {"edge": edge, "engine": engine_config(model=str(model))})


def test_a_context_longer_than_the_model_knows(tmp_path):
    edge = {"listen": f"127.0.0.1:{free_port()}"}
    said = serve_fails(tmp_path, {"edge": edge, "engine": engine_config(**{"max-model-len": 10_000_000})})
    assert "engine.max-model-len" in said


# Models


def test_model_list(tmp_path):
    env = {"FOREBAY_CACHE_DIR": str(tmp_path / "cache")}
    out = forebay("model", "list", "--json", env=env)
    assert out.returncode == 0, out.stderr
    listed = json.loads(out.stdout)
    assert listed["cached"] == []
    assert "smollm2-135m-instruct" in [model["name"] for model in listed["known"]]
    text = forebay("model", "list", env=env)
    assert text.returncode == 0
    assert "smollm2-135m-instruct" in text.stdout


def test_model_pull_of_a_path_is_that_path():
    out = forebay("model", "pull", str(model_file()), "--print-path")
    assert out.returncode == 0, out.stderr
    assert os.path.realpath(out.stdout.strip()) == os.path.realpath(model_file())


# Load


def test_bench_reports_what_vllm_bench_reports(server):
    args = ["bench", server.url, "--model", ALIAS, "--requests", "6", "--concurrency", "2"]
    args += ["--prompt-tokens", "32", "--output-tokens", "8", "--api-key-env", "BENCH_KEY", "--json"]
    out = forebay(*args, env={"BENCH_KEY": KEY})
    assert out.returncode == 0, out.stderr
    report = json.loads(out.stdout)
    assert (report["completed"], report["failed"]) == (6, 0)
    assert report["total_output_tokens"] <= 48
    for name in ("duration", "request_throughput", "output_throughput"):
        assert report[name] > 0, name
    for what in ("ttft", "tpot", "itl", "e2el"):
        assert 0 < report[f"mean_{what}_ms"]
        assert 0 < report[f"median_{what}_ms"] <= report[f"p99_{what}_ms"]
    assert KEY not in out.stdout + out.stderr


def test_bench_of_nobody(tmp_path):
    out = forebay("bench", f"http://127.0.0.1:{free_port()}", "--model", MODEL, "--requests", "1", "--json")
    assert out.returncode == 1
    assert "panicked" not in out.stderr
