"""The front door: TLS, HTTP/2, ordinary services, ids and traces, health."""

from __future__ import annotations

import hashlib
import http.client
import json
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from harness import KEY, MODEL, Forebay, data_lines, engine_config, eventually, free_port, user
from service import Service

CHAT = "/v1/chat/completions"


def chat_body(**fields) -> dict:
    return {"model": MODEL, "messages": user("Count to five."), "temperature": 0, "max_tokens": 12, **fields}


def curl(*args: str) -> tuple[str, str]:
    """The body, and curl's words on protocol and status: `HTTP-VERSION STATUS`."""
    command = ["curl", "--silent", "--show-error", "--noproxy", "*", "--max-time", "60"]
    out = subprocess.run(
        [*command, "--write-out", "\n%{http_version} %{http_code}", *args], capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    body, _, words = out.stdout.rpartition("\n")
    return body, words


# TLS and HTTP/2


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("tls")
    cert, key = directory / "cert.pem", directory / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
        + ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
        + ["-keyout", str(key), "-out", str(cert)],
        check=True,
        capture_output=True,
    )
    return cert, key


@pytest.fixture(scope="module")
def tls_server(certificate, start_for_module) -> Forebay:
    cert, key = certificate
    return start_for_module({"edge": {"tls": {"cert": str(cert), "key": f"file:{key}"}}, "engine": engine_config()})


def test_http2_over_tls(tls_server, certificate):
    args = ["--http2", "--cacert", str(certificate[0]), "--json", json.dumps(chat_body())]
    body, words = curl(*args, f"{tls_server.url}{CHAT}")
    assert words == "2 200"
    assert json.loads(body)["choices"][0]["message"]["content"]


def test_streaming_over_http2(tls_server, certificate):
    args = ["--http2", "--no-buffer", "--cacert", str(certificate[0]), f"{tls_server.url}{CHAT}"]
    plain, _ = curl(*args, "--json", json.dumps(chat_body()))
    body, words = curl(*args, "--json", json.dumps(chat_body(stream=True)))
    assert words == "2 200"
    *frames, done = data_lines(body.splitlines())
    assert done == "[DONE]"
    text = "".join(json.loads(frame)["choices"][0]["delta"].get("content") or "" for frame in frames)
    assert text == json.loads(plain)["choices"][0]["message"]["content"]


def test_frames_leave_one_by_one_over_http2(tls_server, certificate):
    """The first frame is read while the engine still computes; then curl goes, and the engine stops."""
    body = json.dumps(chat_body(stream=True, max_tokens=1500, ignore_eos=True))
    args = ["curl", "-sS", "--no-buffer", "--noproxy", "*", "--http2", "--cacert", str(certificate[0])]
    child = subprocess.Popen([*args, "--json", body, f"{tls_server.url}{CHAT}"], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline().startswith("data: {")
        assert tls_server.metrics().value("vllm:num_requests_running") == 1
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    tls_server.wait_idle()


def test_http11_over_tls(tls_server, certificate):
    body, words = curl("--http1.1", "--cacert", str(certificate[0]), f"{tls_server.url}/health")
    assert words == "1.1 200"


def test_openai_sdk_over_tls(tls_server, certificate):
    context = ssl.create_default_context(cafile=certificate[0])
    transport = openai.DefaultHttpxClient(verify=context, trust_env=False)
    with tls_server.sdk(http_client=transport) as sdk:
        assert sdk.chat.completions.create(**chat_body()).choices


def handshake(server: Forebay, cert: Path, version: ssl.TLSVersion, alpn: list[str]) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=cert)
    # The client's own policy would refuse old versions before the server can.
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(alpn)
    raw = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    return context.wrap_socket(raw, server_hostname="localhost")


@pytest.mark.parametrize(
    ("version", "name"), [(ssl.TLSVersion.TLSv1_2, "TLSv1.2"), (ssl.TLSVersion.TLSv1_3, "TLSv1.3")]
)
def test_tls_versions_and_alpn(tls_server, certificate, version, name):
    for offered, chosen in [(["h2", "http/1.1"], "h2"), (["http/1.1"], "http/1.1")]:
        with handshake(tls_server, certificate[0], version, offered) as tls:
            assert (tls.version(), tls.selected_alpn_protocol()) == (name, chosen)


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated")
def test_old_tls_is_refused_by_the_server(tls_server, certificate):
    with pytest.raises(ssl.SSLError) as error:
        handshake(tls_server, certificate[0], ssl.TLSVersion.TLSv1_1, ["http/1.1"])
    # An alert came back: it was the server that ended it.
    assert "_ALERT_" in (error.value.reason or ""), error.value


def test_plain_http_on_a_tls_port_is_no_answer(tls_server):
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{tls_server.port}/health", trust_env=False, timeout=20)
    assert tls_server.metrics().value("forebay_edge_connections") >= 0


def test_http2_without_tls(server):
    headers = ["-H", f"authorization: Bearer {KEY}"]
    args = ["--http2-prior-knowledge", *headers, "--json", json.dumps(chat_body(stream=True))]
    body, words = curl(*args, f"{server.url}{CHAT}")
    assert words == "2 200"
    assert data_lines(body.splitlines())[-1] == "[DONE]"


# Ids, traces, health


def test_request_ids_are_echoed_or_made(server):
    with server.http(KEY) as http:
        given = http.get("/v1/models", headers={"x-request-id": "my-id-123"})
        assert given.headers["x-request-id"] == "my-id-123"
        made = [http.get("/v1/models").headers["x-request-id"] for _ in range(2)]
        assert len(set(made)) == 2
        assert all(len(request_id) == 32 for request_id in made)
        # Also on errors, and an id that could harm a log is replaced.
        assert http.get("/v1/nothing", headers={"x-request-id": "e-1"}).headers["x-request-id"] == "e-1"
        assert len(http.get("/v1/models", headers={"x-request-id": "x" * 129}).headers["x-request-id"]) == 32
        stream = http.post(CHAT, json=chat_body(stream=True), headers={"x-request-id": "s-1"})
        assert stream.headers["x-request-id"] == "s-1"


def test_the_sdk_shows_the_request_id(client):
    reply = client.chat.completions.create(**chat_body(), extra_headers={"x-request-id": "sdk-1"})
    assert reply._request_id == "sdk-1"


def test_a_trace_is_continued(server):
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    with server.http(KEY) as http:
        headers = {"traceparent": f"00-{trace}-00f067aa0ba902b7-01", "x-request-id": "traced-1"}
        assert http.get("/v1/models", headers=headers).status_code == 200
    assert server.record("traced-1")["trace_id"] == trace


def test_health_and_version(server):
    with server.http() as http:
        health = http.get("/health")
        assert (health.status_code, health.json()["status"]) == (200, "ok")
        assert http.get("/version").json()["version"]
        assert http.head("/health").status_code == 200


def raw_exchange(server: Forebay, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(request)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    return answer


@pytest.mark.parametrize(
    "head",
    [
        b"POST /v1/models HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/models HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabc",
        b"GET /v1/models HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nhost: a\r\n bad: folded\r\n\r\n",
    ],
    ids=["both-lengths", "two-lengths", "two-hosts", "no-host", "folded"],
)
def test_heads_that_proxies_read_differently_are_refused(server, head):
    """Request smuggling begins with two programs that disagree on where a request ends."""
    answer = raw_exchange(server, head)
    assert answer.startswith(b"HTTP/1.1 400"), answer
    assert b"HTTP/1.1" not in answer[8:], "one answer, and the connection is closed"


# An ordinary service behind the same door


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    service = Service()
    yield service
    service.close()


@pytest.fixture(scope="module")
def front_door(service, start_for_module) -> Forebay:
    """No engine: a front door needs none."""
    routes = [
        {"path": "/api/v1/users/", "to": service.url},
        {"path": "/stripped/", "to": service.url, "strip-prefix": True},
        {"path": "/hasty/", "to": service.url, "timeout": "300ms"},
        {"path": "/down/", "to": f"http://127.0.0.1:{free_port()}"},
        {"path": "/", "host": "other.example", "to": service.url},
    ]
    return start_for_module({"edge": {"routes": routes, "limits": {"max-body": "64MiB"}}})


def test_a_service_answers_through_the_edge(front_door):
    with front_door.http() as http:
        answer = http.get("/api/v1/users/json?x=1&y=%20z")
        assert answer.json() == {"path": "/api/v1/users/json?x=1&y=%20z", "method": "GET"}
        assert answer.headers["x-service"] == "yes"
        assert answer.headers["x-request-id"]
        assert http.get("/stripped/json").json()["path"] == "/json"
        assert http.get("/api/v1/users/teapot").status_code == 418
        assert http.get("/elsewhere/json").status_code == 404
        assert http.get("/elsewhere/json", headers={"host": "other.example"}).status_code == 200
        # A prefix is whole segments.
        assert http.get("/api/v1/usersx/json").status_code == 404


def test_a_service_learns_who_called(front_door):
    with front_door.http() as http:
        headers = {
            "x-forwarded-for": "6.6.6.6",
            "x-request-id": "svc-1",
            "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "connection": "x-hop",
            "x-hop": "1",
            "cookie": "a=b",
        }
        seen = http.get("/api/v1/users/headers", headers=headers).json()
    # A client can't write its own address into a log.
    assert seen["x-forwarded-for"] == "127.0.0.1"
    assert seen["x-forwarded-proto"] == "http"
    assert seen["x-forwarded-host"] == front_door.address
    assert seen["x-request-id"] == "svc-1"
    assert seen["traceparent"].split("-")[1] == "4bf92f3577b34da6a3ce929d0e0e4736"
    assert seen["traceparent"].split("-")[2] != "00f067aa0ba902b7"
    assert seen["cookie"] == "a=b"
    assert "x-hop" not in seen


def test_a_service_streams_without_a_buffer(front_door, service):
    """Each line is let out only after the one before was received."""
    with front_door.http() as http, http.stream("GET", "/api/v1/users/stream") as response:
        lines = response.iter_lines()
        for n in range(5):
            service.lines.release()
            assert next(line for line in lines if line) == f"data: line {n}"
    # The client is gone, and so is the connection to the service.

    def noticed() -> bool:
        service.lines.release()
        return service.reader_left.is_set()

    eventually("the service sees that its reader left", noticed)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_upload_reaches_the_service(front_door, chunked):
    data = bytes(range(256)) * (128 * 1024)
    content = (data[at : at + 100_000] for at in range(0, len(data), 100_000)) if chunked else data
    with front_door.http() as http:
        answer = http.put("/api/v1/users/upload", content=content).json()
    assert answer["bytes"] == len(data) == 32 * 1024 * 1024
    assert answer["sha256"] == hashlib.sha256(data).hexdigest()


def test_an_upload_over_the_limit_is_refused(front_door):
    connection = http.client.HTTPConnection("127.0.0.1", front_door.port, timeout=20)
    connection.putrequest("PUT", "/api/v1/users/upload")
    connection.putheader("content-length", str(65 * 1024 * 1024))
    connection.endheaders()
    response = connection.getresponse()
    assert response.status == 413
    assert b"edge.limits.max-body" in response.read()
    connection.close()


def test_a_service_that_is_down_is_a_clean_error(front_door):
    with front_door.http() as http:
        answer = http.get("/down/json")
    assert answer.status_code == 502
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert error["code"] == "upstream_failed"
    # Addresses inside are none of the client's business.
    assert "127.0.0.1" not in answer.text


def test_a_service_that_is_late_is_a_504(front_door):
    with front_door.http() as http:
        answer = http.get("/hasty/late", headers={"x-request-id": "late-1"})
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "timeout"
    assert "127.0.0.1" not in answer.text
    # The log says which one it was.
    line = next(line for line in front_door.log().splitlines() if "late-1" in line and "did not answer" in line)
    assert "127.0.0.1:" in line, line


def test_the_service_and_the_llm_share_a_door(start, service):
    llm = [{"path": path, "to": "llm"} for path in ("/v1/", "/ai/v1/", "/whole/")]
    routes = [*llm, {"path": "/svc/", "to": service.url}]
    server: Forebay = start({"edge": {"routes": routes}, "engine": engine_config()})
    with server.http() as http:
        assert http.get("/svc/json").json()["path"] == "/svc/json"
        plain = http.post(CHAT, json=chat_body()).json()["choices"][0]["message"]
        assert http.post("/ai/v1/chat/completions", json=chat_body()).json()["choices"][0]["message"] == plain
        # A mount of the whole API, for clients whose base URL ends with or without `/v1`.
        for path in ("/whole/v1/chat/completions", "/whole/chat/completions"):
            assert http.post(path, json=chat_body()).json()["choices"][0]["message"] == plain
        assert http.get("/whole/health").status_code == 200
        assert http.get("/").status_code == 404
