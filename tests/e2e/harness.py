"""Starts the real program with a configuration, waits for it by asking it, and keeps its log.

Nothing here sleeps for a fixed time: everything polls with a deadline, and says at the deadline what it saw last.
"""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import httpx
import openai
import yaml

T = TypeVar("T")

# What the engine calls the test model.
MODEL = "smollm2"
# Distinctive, so that the search for leaked secrets can find them anywhere.
KEY = "sk-e2e-team-a-5f0c1d7e9b3a"
OTHER_KEY = "sk-e2e-team-b-77aa19e2c4d8"
KEYS = {
    "KEY_TEAM_A": KEY,
    "KEY_TEAM_B": OTHER_KEY,
    "KEY_TWO_PER_MINUTE": "sk-e2e-two-per-minute",
    "KEY_FEW_TOKENS": "sk-e2e-few-tokens",
    "KEY_RATIO": "sk-e2e-ratio",
    "KEY_ABORTS": "sk-e2e-aborts",
    "KEY_AUDITED": "sk-e2e-audited",
}
# What clients may ask for, beside the fleet's own name.
ALIAS = "gpt-4o"
# Loading takes about a second; a busy machine may take longer.
START_SECONDS = 60.0
# For things that happen "at once": one engine step, one scheduler turn.
SOON_SECONDS = 15.0
STOP_SECONDS = 40.0


def binary() -> str:
    return os.environ["FOREBAY_BIN"]


def model_file() -> Path:
    return Path(os.environ["FOREBAY_TEST_MODEL"])


def eventually(what: str, probe: Callable[[], T], seconds: float = SOON_SECONDS) -> T:
    """Polls until `probe` gives something true, and returns it."""
    deadline = time.monotonic() + seconds
    while True:
        seen = probe()
        if seen:
            return seen
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:.0f} s: {what} (last seen: {seen!r})")
        time.sleep(0.02)


_given_ports: set[int] = set()


def free_port() -> int:
    """A port that nothing listens on, below the range from which the system takes ports for outgoing connections."""
    while True:
        port = random.randrange(20_000, 32_000)
        if port in _given_ports:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _given_ports.add(port)
        return port


class Metrics:
    """A scrape in Prometheus' text format."""

    _LINE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$")
    _LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')

    def __init__(self, text: str):
        self.text = text
        self.series: list[tuple[str, dict[str, str], float]] = []
        for line in text.splitlines():
            if match := self._LINE.match(line):
                name, labels, value = match.groups()
                self.series.append((name, dict(self._LABEL.findall(labels or "")), float(value)))

    def names(self) -> set[str]:
        return {name for name, _, _ in self.series}

    def value(self, name: str, **labels: str) -> float:
        """The sum over all series with these labels; a family that is not there at all is a mistake."""
        assert name in self.names(), f"no metric {name}"
        return sum(v for n, have, v in self.series if n == name and labels.items() <= have.items())


class Process:
    """A child process with its output in a file."""

    def __init__(self, args: list[str], log: Path, env: dict[str, str] | None = None, cwd: Path | None = None):
        self.args = args
        self.log_path = log
        environment = {**os.environ, "RUST_BACKTRACE": "1", **(env or {})}
        # Answers from this machine must not come through somebody's proxy.
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
            environment.pop(name, None)
        with log.open("wb") as out:
            self.child = subprocess.Popen(
                args, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=cwd
            )
        # Set where a test ends the process itself.
        self.end_expected = False

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def is_running(self) -> bool:
        return self.child.poll() is None

    def wait(self, seconds: float = STOP_SECONDS) -> int:
        try:
            return self.child.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.args[:2]} did not end within {seconds:.0f} s\n{self.log()}") from None

    def terminate(self) -> None:
        self.end_expected = True
        self.child.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.end_expected = True
        self.child.kill()
        self.child.wait()

    def close(self) -> None:
        """Ends it, whatever it is doing."""
        if self.is_running():
            self.kill()

    def trouble(self) -> str | None:
        """What went wrong with the process itself, apart from any answer."""
        if not self.end_expected and not self.is_running():
            return f"the process ended with status {self.child.returncode}"
        if "panicked at" in self.log():
            return "a thread panicked"
        return None


class Forebay(Process):
    """`forebay serve` with a configuration, ready to serve when the constructor returns."""

    def __init__(self, config: dict[str, Any], directory: Path, env: dict[str, str] | None = None, ready: bool = True):
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.config = with_ports(config)
        self.file = directory / "forebay.yaml"
        self.file.write_text(yaml.safe_dump(self.config, sort_keys=False))
        self.address = self.config["edge"]["listen"]
        self.port = int(self.address.rpartition(":")[2])
        scheme = "https" if "tls" in self.config["edge"] else "http"
        self.url = f"{scheme}://{self.address}"
        self.admin_url = f"http://{self.config['admin']['listen']}"
        super().__init__([binary(), "serve", "--config", str(self.file)], directory / "log.txt", env, cwd=directory)
        try:
            if ready:
                self.wait_ready()
        except BaseException:
            self.close()
            raise

    def wait_ready(self) -> None:
        def probe() -> bool:
            assert self.is_running(), f"forebay ended with status {self.child.returncode}:\n{self.log()}"
            return status_of(f"{self.admin_url}/ready") == 200

        try:
            eventually("ready", probe, START_SECONDS)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log()}") from None

    def metrics(self) -> Metrics:
        return Metrics(get(f"{self.admin_url}/metrics").text)

    def sdk(self, key: str = "none", **options: Any) -> openai.OpenAI:
        return openai.OpenAI(**sdk_options(self.url, key, options))

    def async_sdk(self, key: str = "none", **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(**sdk_options(self.url, key, options))

    def http(self, key: str | None = None, **options: Any) -> httpx.Client:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False, **options)

    def record(self, request_id: str) -> dict[str, Any]:
        """The finished request as the admin API shows it. It is written when the answer's last byte has left."""
        url = f"{self.admin_url}/api/requests/{request_id}"
        eventually(f"a record of {request_id}", lambda: status_of(url) == 200)
        return get(url).json()

    def wait_idle(self) -> None:
        """Until no request is in the engine."""
        eventually("an idle engine", lambda: self.metrics().value("vllm:num_requests_running") == 0)


class Worker(Process):
    """`forebay worker`: one engine with vLLM's API."""

    def __init__(self, directory: Path, *flags: str, port: int | None = None, model: Path | str | None = None):
        directory.mkdir(parents=True, exist_ok=True)
        self.port, admin_port = port or free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.admin_url = f"http://127.0.0.1:{admin_port}"
        args = [binary(), "worker", "--model", str(model or model_file()), "--port", str(self.port)]
        args += ["--admin-port", str(admin_port), "--kv-cache-memory-bytes", "128MiB", *flags]
        super().__init__(args, directory / "log.txt", cwd=directory)
        try:
            self.wait_ready()
        except BaseException:
            self.close()
            raise

    def wait_ready(self) -> None:
        def probe() -> bool:
            assert self.is_running(), f"the worker ended with status {self.child.returncode}:\n{self.log()}"
            return status_of(f"{self.url}/health") == 200

        try:
            eventually("a ready worker", probe, START_SECONDS)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log()}") from None

    def model(self) -> str:
        return get(f"{self.url}/v1/models").json()["data"][0]["id"]

    def metrics(self) -> Metrics:
        return Metrics(get(f"{self.admin_url}/metrics").text)


def sdk_options(url: str, key: str, options: dict[str, Any]) -> dict[str, Any]:
    # A retry would hide an error.
    return {"base_url": f"{url}/v1", "api_key": key, "max_retries": 0, "timeout": 60, **options}


def with_ports(config: dict[str, Any]) -> dict[str, Any]:
    """The same with free ports where it names none."""
    config = {"admin": {}, "edge": {}, **config}
    for section in ("admin", "edge"):
        config[section] = {"listen": f"127.0.0.1:{free_port()}", **config[section]}
    return config


def engine_config(**settings: Any) -> dict[str, Any]:
    return {
        "model": str(model_file()),
        "served-model-name": MODEL,
        "max-model-len": 2048,
        "kv-cache-memory": "128MiB",
        **settings,
    }


def get(url: str) -> httpx.Response:
    response = httpx.get(url, timeout=30, trust_env=False)
    response.raise_for_status()
    return response


def status_of(url: str) -> int | None:
    """`None` where nobody answers."""
    try:
        return httpx.get(url, timeout=5, trust_env=False).status_code
    except httpx.TransportError:
        return None


def forebay(*args: str, env: dict[str, str] | None = None, cwd: Path | None = None, seconds: float = 120):
    """Runs a command of the program to its end."""
    return subprocess.run(
        [binary(), *args],
        env={**os.environ, **(env or {})},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=seconds,
        stdin=subprocess.DEVNULL,
    )


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


# Tools, as requests have them.
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}, "unit": {"enum": ["celsius", "fahrenheit"]}},
            "required": ["city", "unit"],
        },
    },
}
TIME = {
    "type": "function",
    "function": {
        "name": "get_time",
        "parameters": {"type": "object", "properties": {"zone": {"enum": ["UTC", "CET"]}}, "required": ["zone"]},
    },
}


def token_ids(server: Forebay | Worker, text: str, key: str | None = None) -> list[int]:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    body = {"model": MODEL, "prompt": text}
    response = httpx.post(f"{server.url}/tokenize", json=body, headers=headers, timeout=30, trust_env=False)
    response.raise_for_status()
    return response.json()["tokens"]


def data_lines(lines: Iterable[str]) -> list[str]:
    """The payloads of an event stream."""
    return [line.removeprefix("data: ") for line in lines if line.startswith("data:")]
