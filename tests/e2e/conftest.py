"""Fixtures: one server with all five layers for the cheap tests, and a factory for special ones.

A process that dies or panics fails the test in which it did, and every failure shows the logs.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

import harness
from harness import ALIAS, KEY, KEYS, MODEL, Forebay, Process

_alive: list[Process] = []


def pytest_configure() -> None:
    missing = [name for name in ("FOREBAY_BIN", "FOREBAY_TEST_MODEL") if name not in os.environ]
    if missing:
        pytest.exit(f"{' and '.join(missing)} must be set; `cargo xtask test --e2e-only` does it", returncode=4)


def full_stack(audit: Path) -> dict[str, Any]:
    """All five layers. Every test that uses up a quota has a consumer of its own."""
    return {
        "gateway": {
            "consumers": [
                {"name": "team-a", "keys": ["env:KEY_TEAM_A"]},
                {"name": "team-b", "keys": ["env:KEY_TEAM_B"], "models": [ALIAS]},
                {
                    "name": "two-per-minute",
                    "keys": ["env:KEY_TWO_PER_MINUTE"],
                    "limits": {"requests-per-minute": 2},
                },
                {"name": "few-tokens", "keys": ["env:KEY_FEW_TOKENS"], "limits": {"tokens-per-minute": 120}},
                {
                    "name": "ratio",
                    "keys": ["env:KEY_RATIO"],
                    "limits": {"requests-per-minute": 500, "tokens-per-minute": 200_000},
                },
                {"name": "aborts", "keys": ["env:KEY_ABORTS"], "limits": {"tokens-per-minute": 10_000}},
                {"name": "audited", "keys": ["env:KEY_AUDITED"]},
            ],
            "audit": {"dir": str(audit)},
        },
        "proxy": {
            "models": [
                {"name": MODEL, "deployments": [{"fleet": MODEL}]},
                {"name": ALIAS, "deployments": [{"fleet": MODEL}]},
            ]
        },
        "router": {"fleets": [{"model": MODEL, "replicas": ["engine"]}]},
        "engine": harness.engine_config(**{"kv-cache-memory": "256MiB"}),
    }


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forebay]:
    """All five layers in one process."""
    directory = tmp_path_factory.mktemp("server")
    audit = directory / "audit"
    audit.mkdir()
    # With every word of our own in the log: one of the tests looks for secrets there.
    process = Forebay(full_stack(audit), directory, env={**KEYS, "RUST_LOG": "info,forebay=trace"})
    _alive.append(process)
    yield process
    close([process])


@pytest.fixture(scope="session")
def client(server: Forebay) -> Iterator[openai.OpenAI]:
    with server.sdk(KEY) as sdk:
        yield sdk


@pytest.fixture
def audit_dir(server: Forebay) -> Path:
    return Path(server.config["gateway"]["audit"]["dir"])


def close(processes: list[Process]) -> None:
    troubles = [f"{trouble}\n{process.log()[-8000:]}" for process in processes if (trouble := process.trouble())]
    for process in processes:
        _alive.remove(process)
        process.close()
    if troubles:
        pytest.fail("\n".join(troubles), pytrace=False)


def start_factory(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    mine: list[Process] = []

    def start(kind: type[Process] | dict[str, Any], *args: Any, **options: Any) -> Process:
        directory = tmp_path / f"process-{len(mine)}"
        process = (
            Forebay(kind, directory, *args, **options) if isinstance(kind, dict) else kind(directory, *args, **options)
        )
        mine.append(process)
        _alive.append(process)
        return process

    yield start
    close(mine)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """`start(config, env=…)` or `start(Worker, *flags)`: a process that is ready, ended after the test."""
    yield from start_factory(tmp_path)


@pytest.fixture(scope="module")
def start_for_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    yield from start_factory(tmp_path_factory.mktemp("module"))


@pytest.fixture(scope="module")
def alone(start_for_module: Callable[..., Any]) -> Forebay:
    """Edge and engine only, for all tests of a module."""
    return start_for_module({"engine": harness.engine_config()})


@pytest.fixture(scope="module")
def sdk(alone: Forebay) -> Iterator[openai.OpenAI]:
    with alone.sdk() as sdk:
        yield sdk


@pytest.fixture
def small_stack() -> dict[str, Any]:
    """Edge and engine only."""
    return {"engine": harness.engine_config()}


@pytest.fixture
def fresh() -> str:
    """Text that no prompt before had."""
    return uuid.uuid4().hex


@pytest.fixture(autouse=True)
def processes_survive() -> Iterator[None]:
    yield
    for process in _alive:
        if trouble := process.trouble():
            pytest.fail(f"{trouble}\n{process.log()[-8000:]}", pytrace=False)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    outcome = yield
    report = outcome.get_result()
    if report.failed:
        for process in _alive:
            report.sections.append((f"log of {' '.join(process.args[1:3])}", process.log()[-6000:]))
