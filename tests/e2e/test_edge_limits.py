"""What one client may take up of the front door, and how its port is closed."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from harness import MODEL, Forebay, engine_config, eventually, forebay, model_file, status_of, user

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def strict(start_for_module) -> Forebay:
    limits = {"max-connections": 8, "body-timeout": "500ms", "write-timeout": "1s", "max-headers": 20}
    return start_for_module({"edge": {"limits": limits}, "engine": engine_config()})


def connect(server: Forebay, receive_buffer: int | None = None) -> socket.socket:
    connection = socket.socket()
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(20)
    connection.connect(("127.0.0.1", server.port))
    return connection


def read_all(connection: socket.socket) -> bytes:
    answer = b""
    while part := connection.recv(65536):
        answer += part
    return answer


def error_of(answer: bytes) -> tuple[int, dict]:
    """Status and error of a raw answer that is an error as every other."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"\r\nx-request-id: " in head and b"\r\ncontent-type: application/json" in head, answer
    return int(head.split()[1]), json.loads(body)["error"]


def refused(server: Forebay, reason: str) -> float:
    return sum(
        value
        for name, labels, value in server.metrics().series
        if name == "forebay_edge_refused_total" and labels["reason"] == reason
    )


def test_a_body_that_does_not_come_is_a_408(strict):
    with connect(strict) as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\n{{".encode())
        status, error = error_of(read_all(connection))
    assert status == 408
    assert "edge.limits.body-timeout" in error["message"]


@pytest.mark.parametrize(
    ("lines", "status", "says"),
    [
        ("x: " + "y" * 40_000 + "\r\n", 431, "edge.limits.max-header-bytes"),
        ("x: y\r\n" * 21, 431, "edge.limits.max-headers"),
        ("content-length: abc\r\n", 400, "content-length"),
    ],
    ids=["long", "many", "length"],
)
def test_a_head_that_is_refused_gets_an_answer_like_any_other(strict, lines, status, says):
    with connect(strict) as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nhost: a\r\nx-request-id: head-1\r\n{lines}\r\n".encode())
        answer = read_all(connection)
    assert b"\r\nx-request-id: head-1\r\n" in answer, answer
    found, error = error_of(answer)
    assert found == status
    assert says in error["message"]
    eventually("an access log line", lambda: "head-1" in strict.log())


def test_one_connection_too_many_is_closed_at_once(strict):
    """Idle ones are enough to fill the house; the admin's port is another one."""
    eventually("no connections", lambda: strict.metrics().value("forebay_edge_connections") == 0)
    before = refused(strict, "max-connections")
    with ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(connect(strict))
        eventually("a full house", lambda: strict.metrics().value("forebay_edge_connections") == 8)
        with connect(strict) as extra:
            assert extra.recv(1) == b""
        assert refused(strict, "max-connections") == before + 1
    # And when they have gone there is room.
    eventually("room", lambda: status_of(f"{strict.url}/health") == 200)


def test_a_reader_that_stops_holds_nothing_for_long(strict):
    before = refused(strict, "write-timeout")
    body = json.dumps(
        {
            "model": MODEL,
            "messages": user("Tell me everything."),
            "stream": True,
            "n": 4,
            "max_tokens": 400,
            "logprobs": True,
            "top_logprobs": 20,
            "ignore_eos": True,
        }
    )
    head = f"POST {CHAT} HTTP/1.1\r\nhost: a\r\nx-request-id: stopped-1\r\ncontent-length: {len(body)}\r\n\r\n"
    with connect(strict, receive_buffer=4096) as connection:
        connection.sendall((head + body).encode())
        eventually("given up", lambda: refused(strict, "write-timeout") == before + 1, 60)
        # While the client still holds its end.
        record = strict.record("stopped-1")
    assert any("write-timeout" in span["why"] for span in record["spans"]), record
    assert strict.metrics().value("forebay_edge_streams_in_flight") == 0
    assert strict.metrics().value("forebay_edge_requests_in_flight") == 0
    strict.wait_idle()


def test_a_stop_is_announced_before_the_port_closes(start):
    server: Forebay = start({"edge": {"drain-delay": "2s"}, "engine": engine_config()})
    with server.http() as http:
        server.terminate()
        eventually("not ready", lambda: status_of(f"{server.admin_url}/ready") == 503)
        assert http.get("/health").status_code == 503
    # Who has not heard of it yet comes with a new connection, and is served.
    body = {"model": MODEL, "messages": user("hi"), "max_tokens": 4}
    with server.http() as http:
        assert http.post(CHAT, json=body).status_code == 200
    assert server.wait() == 0


# Mistakes that `check` finds


@pytest.fixture(scope="module")
def two_pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("pairs")
    for name in ("a", "b"):
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
            + ["-subj", "/CN=localhost", "-keyout", str(directory / f"{name}.key")]
            + ["-out", str(directory / f"{name}.pem")],
            check=True,
            capture_output=True,
        )
    yield directory


@pytest.mark.parametrize(
    ("edge", "says"),
    [
        ("{tls: {cert: a.pem, key: 'file:a.key'}}", None),
        ("{tls: {cert: a.pem, key: 'file:b.key'}}", "`file:b.key` does not belong to the first certificate in `a.pem`"),
        ("{tls: {cert: a.key, key: 'file:a.key'}}", "`a.key` holds no PEM certificate"),
        ("{tls: {cert: a.pem, key: 'file:a.pem'}}", "`file:a.pem` of `edge.tls.key` is not a PEM private key"),
        ("{listen: ['127.0.0.1:81', '127.0.0.1:81']}", "127.0.0.1:81 is already in the list"),
    ],
    ids=["good", "mismatch", "no-cert", "no-key", "twice"],
)
def test_check_finds_what_serve_would(two_pairs, edge, says):
    file = two_pairs / "forebay.yaml"
    file.write_text(f"edge: {edge}\nengine: {{model: {model_file()}}}\n")
    done = forebay("check", str(file), cwd=two_pairs)
    said = " ".join((done.stdout + done.stderr).split())
    assert (done.returncode == 0) == (says is None), said
    if says:
        assert says in said, said
        # The same words from the program that would run.
        served = forebay("serve", "--config", str(file), cwd=two_pairs)
        assert served.returncode != 0 and says in " ".join(served.stderr.split()), served.stderr
