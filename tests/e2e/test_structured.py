"""Structured output: what the real model says, held to a JSON schema, an expression, a choice or a grammar."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import openai
import pydantic
import pytest

from harness import MODEL, user

ASK = user("Tell me about a person who lives in Paris. Answer in JSON.")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "minimum": 1, "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


# vLLM's example.
SQL = """
    root ::= select_statement

    select_statement ::= "SELECT " column " from " table " where " condition

    column ::= "col_1 " | "col_2 "

    table ::= "table_1 " | "table_2 "

    condition ::= column "= " number

    number ::= "1 " | "2 "
"""


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=20)
    job: Literal["painter", "baker"]
    ages: list[int] = pydantic.Field(max_length=3)


def say(sdk, messages=ASK, **options):
    options = {"max_tokens": 120, "temperature": 0, **options}
    return sdk.chat.completions.create(model=MODEL, messages=messages, **options)


def as_schema(schema) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def fits(text: str) -> bool:
    value = json.loads(text)
    return set(value) == {"name", "age"} and len(value["name"]) <= 20 and 1 <= value["age"] <= 120


def test_a_json_schema_holds(sdk):
    for seed in range(4):
        reply = say(sdk, response_format=as_schema(SCHEMA), temperature=1, seed=seed)
        assert reply.choices[0].finish_reason == "stop"
        assert fits(reply.choices[0].message.content), reply.choices[0].message.content


def test_the_sdk_parses_a_model_of_pydantic(sdk):
    reply = sdk.chat.completions.parse(
        model=MODEL, messages=ASK, response_format=Person, max_tokens=150, temperature=0
    )
    assert isinstance(reply.choices[0].message.parsed, Person)
    with sdk.chat.completions.stream(
        model=MODEL, messages=ASK, response_format=Person, max_tokens=150, temperature=0
    ) as stream:
        streamed = stream.get_final_completion().choices[0].message.parsed
    assert streamed == reply.choices[0].message.parsed


def test_json_mode_gives_an_object(sdk):
    text = say(sdk, response_format={"type": "json_object"}, max_tokens=300).choices[0]
    if text.finish_reason == "stop":
        assert isinstance(json.loads(text.message.content), dict)
    else:
        assert text.finish_reason == "length" and text.message.content.startswith("{")


@pytest.mark.parametrize(
    "constraint, matches",
    [
        ({"regex": r"[A-Z][a-z]{2,8}, [0-9]{4}"}, lambda text: re.fullmatch(r"[A-Z][a-z]{2,8}, [0-9]{4}", text)),
        ({"choice": ["positive", "negative"]}, lambda text: text in ("positive", "negative")),
        ({"json": SCHEMA}, fits),
        ({"json": json.dumps(SCHEMA)}, fits),
        ({"grammar": 'start: "SELECT " COLUMN " FROM t"\nCOLUMN: /[a-z]{1,6}/'},
         lambda text: re.fullmatch(r"SELECT [a-z]{1,6} FROM t", text)),
        ({"grammar": SQL},
         lambda text: re.fullmatch(r"SELECT col_[12]  from table_[12]  where col_[12] = [12] ", text)),
    ],
)
def test_the_constraints_of_vllm(sdk, constraint, matches):
    chat = say(sdk, extra_body={"structured_outputs": constraint}).choices[0]
    assert chat.finish_reason == "stop" and matches(chat.message.content), chat.message.content
    completion = sdk.completions.create(
        model=MODEL, prompt="It is", max_tokens=120, temperature=0, extra_body={"structured_outputs": constraint}
    ).choices[0]
    assert completion.finish_reason == "stop" and matches(completion.text), completion.text


def test_a_stream_is_what_is_not_streamed(sdk):
    options = {"response_format": as_schema(SCHEMA), "temperature": 0.8, "seed": 11}
    whole = say(sdk, **options).choices[0].message.content
    chunks = list(say(sdk, stream=True, **options))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole


def test_the_same_alone_and_among_others(sdk):
    def one(n: int) -> str:
        options = [
            {"response_format": as_schema(SCHEMA)},
            {"extra_body": {"structured_outputs": {"regex": "[a-z ]{30}"}}},
            {},
        ][n % 3]
        return say(sdk, temperature=0.7, seed=n, max_tokens=60, **options).choices[0].message.content

    alone = [one(n) for n in range(6)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(one, range(6))) == alone


@pytest.mark.parametrize(
    "options, param",
    [
        ({"response_format": as_schema({"type": "nonsense"})}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"extra_body": {"structured_outputs": {"regex": "("}}}, "structured_outputs"),
        ({"extra_body": {"structured_outputs": {"grammar": "root ::= x"}}}, "structured_outputs"),
        ({"extra_body": {"structured_outputs": {"choice": []}}}, "structured_outputs.choice"),
        ({"extra_body": {"structured_outputs": {"regex": "a", "choice": ["b"]}}}, "structured_outputs"),
        ({"extra_body": {"guided_json": {}}}, "guided_json"),
    ],
)
def test_what_can_not_be_done_is_refused_by_name(sdk, options, param):
    with pytest.raises(openai.BadRequestError) as refused:
        say(sdk, **options)
    assert refused.value.param == param


def test_bad_words_and_allowed_ids(alone, sdk):
    question = user("What is the capital of France? Answer in one word.")
    assert "Paris" in say(sdk, question, max_tokens=8).choices[0].message.content
    text = say(sdk, question, max_tokens=24, extra_body={"bad_words": ["Paris"]}).choices[0].message.content
    assert text and "Paris" not in text
    with alone.http() as http:
        prompt = {"model": MODEL, "prompt": " yes no", "add_special_tokens": False}
        ids = http.post("/tokenize", json=prompt).json()["tokens"]
        words = {http.post("/detokenize", json={"model": MODEL, "tokens": [i]}).json()["prompt"] for i in ids}
    text = say(sdk, question, max_tokens=6, extra_body={"allowed_token_ids": ids}).choices[0].message.content
    for word in words:
        text = text.replace(word, "")
    assert text == ""
    with pytest.raises(openai.BadRequestError) as refused:
        say(sdk, extra_body={"allowed_token_ids": [10**6]})
    assert refused.value.param == "allowed_token_ids"
