"""Who is calling: keys, models, quotas, the audit log, and secrets that stay secret."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path

import httpx
import openai
import pytest

from harness import ALIAS, KEY, KEYS, MODEL, OTHER_KEY, Forebay, engine_config, eventually, get, user

CHAT = "/v1/chat/completions"


def ask(sdk: openai.OpenAI, text: str = "hi", **options):
    return sdk.chat.completions.create(**{"model": MODEL, "messages": user(text), "max_tokens": 2, **options})


# Keys


def test_a_wrong_key_is_refused(server):
    wrong = "sk-wrong-c0ffee1234567890"
    with server.sdk(wrong) as sdk, pytest.raises(openai.AuthenticationError) as error:
        ask(sdk)
    assert error.value.status_code == 401
    assert error.value.code == "invalid_api_key"
    assert wrong not in error.value.message
    assert wrong not in str(error.value.body)
    assert error.value.response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer"},
        {"authorization": "Basic dXNlcjpwdw=="},
        {"authorization": KEY},
        {"x-api-key": ""},
    ],
    ids=lambda headers: "-".join(headers.values())[:8] or "none",
)
@pytest.mark.parametrize("path", [CHAT, "/v1/models", "/tokenize"])
def test_no_key_no_answer(server, headers, path):
    method = "GET" if path == "/v1/models" else "POST"
    with server.http() as http:
        body = None if method == "GET" else {"model": MODEL, "messages": user("hi"), "prompt": "hi"}
        response = http.request(method, path, json=body, headers=headers)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("header", ["x-api-key", "api-key"])
def test_other_places_of_a_key(server, header):
    with server.http() as http:
        assert http.get("/v1/models", headers={header: KEY}).status_code == 200


def test_two_keys_are_none(server):
    with server.http() as http:
        for second in (KEY, "sk-other"):
            headers = [("authorization", f"Bearer {KEY}"), ("authorization", f"Bearer {second}")]
            response = http.get("/v1/models", headers=headers)
            assert response.status_code == 400
            assert "'authorization' is there more than once" in response.json()["error"]["message"]


def test_health_needs_no_key(server):
    with server.http() as http:
        assert http.get("/health").status_code == 200
        assert http.get("/version").status_code == 200


def test_a_model_that_is_not_ours_is_denied(server):
    with server.sdk(OTHER_KEY) as sdk:
        assert ask(sdk, model=ALIAS).choices
        with pytest.raises(openai.PermissionDeniedError) as error:
            ask(sdk, model=MODEL)
        assert error.value.status_code == 403
        assert [model.id for model in sdk.models.list()] == [ALIAS]


# Quotas


def test_requests_per_minute(server):
    with server.sdk(KEYS["KEY_TWO_PER_MINUTE"]) as sdk:
        remaining = []
        for _ in range(2):
            raw = sdk.chat.completions.with_raw_response.create(model=MODEL, messages=user("hi"), max_tokens=1)
            assert raw.headers["x-ratelimit-limit-requests"] == "2"
            remaining.append(raw.headers["x-ratelimit-remaining-requests"])
        assert remaining == ["1", "0"]
        with pytest.raises(openai.RateLimitError) as error:
            ask(sdk)
    response = error.value.response
    assert error.value.status_code == 429
    assert error.value.code == "rate_limit_exceeded"
    assert error.value.type == "requests"
    assert "2" in error.value.message
    assert response.headers["x-ratelimit-limit-requests"] == "2"
    assert response.headers["x-ratelimit-remaining-requests"] == "0"
    assert re.fullmatch(r"(\d+h)?(\d+m)?(\d+(\.\d+)?s)?(\d+ms)?", response.headers["x-ratelimit-reset-requests"])
    # Two a minute come back one in 30 seconds.
    assert 0 < int(response.headers["retry-after"]) <= 30


def test_tokens_per_minute(server):
    with server.sdk(KEYS["KEY_FEW_TOKENS"]) as sdk:
        first = sdk.chat.completions.with_raw_response.create(model=MODEL, messages=user("hi"), max_tokens=40)
        prompt = first.parse().usage.prompt_tokens
        assert first.headers["x-ratelimit-limit-tokens"] == "120"
        # The most that one request may ask for: it fits a full minute, but not what the first one left of it.
        with pytest.raises(openai.RateLimitError) as error:
            ask(sdk, max_tokens=120 - prompt)
        assert error.value.code == "rate_limit_exceeded"
        assert error.value.type == "tokens"
        headers = error.value.response.headers
        assert headers["x-ratelimit-limit-tokens"] == "120"
        assert 0 <= int(headers["x-ratelimit-remaining-tokens"]) < 120
        assert 0 < int(headers["retry-after"]) <= 60
        # What can never fit is not worth a retry.
        with pytest.raises(openai.RateLimitError) as error:
            ask(sdk, max_tokens=500)
        assert "retry-after" not in error.value.response.headers
        assert error.value.response.headers["x-should-retry"] == "false"
        # A refusal costs nothing: a small request still fits.
        assert ask(sdk, max_tokens=1).choices


def test_tokens_are_settled_with_what_was_used(server):
    with server.sdk(KEYS["KEY_RATIO"]) as sdk:
        for stream in (False, True):
            raw = sdk.chat.completions.with_raw_response.create(
                model=MODEL, messages=user("hi"), max_tokens=1000, stop=["\n", ".", "!", "?", ","], stream=stream
            )
            assert raw.headers["x-ratelimit-limit-tokens"] == "200000"
            # While it runs, all of it is held.
            assert int(raw.headers["x-ratelimit-remaining-tokens"]) <= 199_000 + 700
            for _ in raw.parse() if stream else ():
                pass

        def settled() -> bool:
            raw = sdk.chat.completions.with_raw_response.create(model=MODEL, messages=user("hi"), max_tokens=1)
            return int(raw.headers["x-ratelimit-remaining-tokens"]) > 199_300

        eventually("unused tokens given back", settled)


# Audit


def audit_records(directory: Path) -> list[dict]:
    files = sorted(directory.glob("audit-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def audit_record(directory: Path, request_id: str) -> dict:
    """The one record of a request; it is written when the reply has ended."""

    def found() -> list[dict]:
        return [record for record in audit_records(directory) if record["request_id"] == request_id]

    (record,) = eventually(f"an audit record of {request_id}", found)
    return record


def test_audit_has_exact_tokens(server, audit_dir):
    with server.sdk(KEYS["KEY_AUDITED"]) as sdk:
        plain = sdk.chat.completions.with_raw_response.create(model=ALIAS, messages=user("hi"), max_tokens=5)
        streamed = sdk.chat.completions.with_raw_response.create(
            model=ALIAS, messages=user("hi"), max_tokens=5, stream=True, stream_options={"include_usage": True}
        )
        usages = [plain.parse().usage, list(streamed.parse())[-1].usage]
    for raw, usage in zip((plain, streamed), usages):
        record = audit_record(audit_dir, raw.headers["x-request-id"])
        assert record["consumer"] == "audited"
        assert record["model"] == ALIAS
        assert record["path"] == CHAT
        assert record["prompt_tokens"] == usage.prompt_tokens
        assert record["completion_tokens"] == usage.completion_tokens == 5
        assert record["estimated"] is False
        assert record["cut"] is False
        assert record["duration_ms"] > 0
        assert len(record["trace_id"]) == 32
    today = datetime.now(UTC).strftime("%Y%m%d")
    assert (audit_dir / f"audit-{today}.jsonl").exists() or datetime.now(UTC).strftime("%H%M") == "0000"


def test_audit_has_exact_tokens_without_asking_for_usage(server, audit_dir):
    with server.sdk(KEYS["KEY_AUDITED"]) as sdk:
        raw = sdk.chat.completions.with_raw_response.create(
            model=MODEL, messages=user("hi"), max_tokens=7, stream=True, extra_body={"ignore_eos": True}
        )
        assert len(list(raw.parse())) > 3
    assert audit_record(audit_dir, raw.headers["x-request-id"])["completion_tokens"] == 7


def test_audit_knows_cut_streams(server, audit_dir):
    with server.sdk(KEYS["KEY_AUDITED"]) as sdk:
        raw = sdk.chat.completions.with_raw_response.create(
            model=MODEL, messages=user("hi"), max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
        )
        stream = raw.parse()
        for _, _ in zip(range(6), stream):
            pass
        stream.close()
    record = audit_record(audit_dir, raw.headers["x-request-id"])
    assert record["cut"] is True
    assert 4 <= record["completion_tokens"] < 1000
    assert record["prompt_tokens"] > 0


def test_audit_has_refusals(server, audit_dir):
    with server.http() as http:
        refused = [
            http.post(CHAT, json={"model": MODEL, "messages": user("hi")}, headers={"authorization": "Bearer nope"}),
            http.post(CHAT, json={"model": MODEL}, headers={"authorization": f"Bearer {KEYS['KEY_AUDITED']}"}),
        ]
    for response, status in zip(refused, (401, 400)):
        record = audit_record(audit_dir, response.headers["x-request-id"])
        assert record["status"] == response.status_code == status
        assert record["completion_tokens"] == 0


def test_secrets_and_prompts_stay_inside(server, audit_dir, fresh):
    """A key, a wrong key, a prompt and an answer are in no log, audit record, metric, trace or error."""
    prompt, wrong = f"canary-{fresh}", f"sk-wrong-{fresh}"
    with server.http() as http:
        for headers in ({"authorization": f"Bearer {KEY}"}, {"x-api-key": wrong}, {"authorization": f"Bearer {wrong}"}):
            for body in (
                {"model": MODEL, "prompt": prompt, "max_tokens": 2, "echo": True},
                {"model": MODEL, "prompt": prompt, "max_tokens": 2, "temperature": f"{prompt}"},
                {"model": MODEL, "messages": user(prompt * 400)},
            ):
                path = CHAT if "messages" in body else "/v1/completions"
                last = http.post(path, json=body, headers=headers)
        # A key in the wrong place.
        http.get(f"/v1/models?api_key={KEY}")
    record = server.record(last.headers["x-request-id"])
    audit_record(audit_dir, last.headers["x-request-id"])
    places = {
        "log": server.log(),
        "metrics": server.metrics().text,
        "requests": get(f"{server.admin_url}/api/requests?n=256").text,
        "record": json.dumps(record),
        "fleets": get(f"{server.admin_url}/api/fleets").text,
        "audit": "".join(file.read_text() for file in audit_dir.iterdir()),
    }
    assert "forebay" in places["metrics"] and record["request_id"] in places["audit"]
    for place, text in places.items():
        for secret in [prompt, wrong, *KEYS.values()]:
            assert secret not in text, f"{secret} is in the {place}"


def test_without_a_gateway_everybody_may(start, small_stack):
    server: Forebay = start(small_stack)
    with server.sdk("whatever") as sdk:
        reply = sdk.chat.completions.with_raw_response.create(model=MODEL, messages=user("hi"), max_tokens=1)
    assert reply.parse().choices
    assert "x-ratelimit-limit-requests" not in reply.headers


def test_keys_from_files(start, tmp_path):
    """A key file with the line break that editors leave."""
    key_file = tmp_path / "key"
    key_file.write_text("sk-from-a-file\n")
    server: Forebay = start(
        {
            "gateway": {"consumers": [{"name": "f", "keys": [f"file:{key_file}"]}]},
            "engine": engine_config(),
        }
    )
    assert httpx.get(f"{server.url}/v1/models", headers={"authorization": "Bearer sk-from-a-file"}).status_code == 200
    assert httpx.get(f"{server.url}/v1/models", headers={"authorization": "Bearer sk-other"}).status_code == 401
