"""Tools with the real model and the real SDK: calls that are wanted, a whole round trip, and what is refused."""

from __future__ import annotations

import json

import openai
import pydantic
import pytest

from harness import MODEL, TIME, WEATHER, user

ASK = user("What is the weather in Paris?")
TOOLS = [WEATHER, TIME]
NAMED = {"type": "function", "function": {"name": "get_time"}}


def say(sdk, messages=ASK, **options):
    options = {"max_tokens": 120, "temperature": 0, "tools": TOOLS, **options}
    return sdk.chat.completions.create(model=MODEL, messages=messages, **options)


def fits(call) -> bool:
    arguments = json.loads(call.function.arguments)
    if call.function.name == "get_time":
        return set(arguments) == {"zone"} and arguments["zone"] in ("UTC", "CET")
    assert call.function.name == "get_weather", call
    return (
        set(arguments) == {"city", "unit"}
        and len(arguments["city"]) <= 12
        and arguments["unit"] in ("celsius", "fahrenheit")
    )


def test_a_call_that_is_required_comes_and_fits_its_schema(sdk):
    for seed in range(4):
        reply = say(sdk, tool_choice="required", parallel_tool_calls=False, temperature=1, seed=seed)
        choice = reply.choices[0]
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        (call,) = choice.message.tool_calls
        assert call.id.startswith("call_") and call.type == "function"
        assert fits(call), call


def test_several_calls_in_one_turn(sdk):
    reply = say(sdk, tool_choice="required", n=2, temperature=1, seed=3, max_tokens=300)
    for choice in reply.choices:
        calls = choice.message.tool_calls
        # One that was cut may stand last.
        whole = calls if choice.finish_reason == "tool_calls" else calls[:-1]
        assert whole and all(fits(call) for call in whole), calls
        assert len({call.id for call in calls}) == len(calls)


def test_a_function_that_is_named_is_called(sdk):
    choice = say(sdk, tool_choice=NAMED).choices[0]
    (call,) = choice.message.tool_calls
    assert call.function.name == "get_time" and fits(call)
    # As with OpenAI and vLLM: the client knows that it is a call.
    assert choice.finish_reason == "stop"


def test_a_stream_says_the_same_piece_by_piece(sdk):
    options = {"tool_choice": "required", "parallel_tool_calls": False, "temperature": 1, "seed": 7}
    whole = say(sdk, **options).choices[0].message.tool_calls[0].function
    frames = [frame.choices[0] for frame in say(sdk, stream=True, **options) if frame.choices]
    assert frames[-1].finish_reason == "tool_calls"
    deltas = [call for frame in frames for call in frame.delta.tool_calls or []]
    assert all(not frame.delta.content for frame in frames)
    first, *rest = deltas
    assert (first.index, first.type, first.function.name) == (0, "function", whole.name)
    assert first.id.startswith("call_")
    assert all(delta.index == 0 and delta.id is None and delta.function.name is None for delta in rest)
    assert len(rest) > 2, "the arguments come as they are written"
    assert "".join(delta.function.arguments for delta in deltas) == whole.arguments


def test_the_sdks_own_stream_helper(sdk):
    class GetTime(pydantic.BaseModel):
        zone: str = pydantic.Field(max_length=5)

    tool = openai.pydantic_function_tool(GetTime)
    with sdk.chat.completions.stream(
        model=MODEL, messages=ASK, tools=[tool], tool_choice="required", parallel_tool_calls=False,
        max_tokens=120, temperature=0,
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion().choices[0]
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    call = final.message.tool_calls[0]
    assert isinstance(call.function.parsed_arguments, GetTime)
    assert final.finish_reason == "tool_calls"


def test_a_round_trip(sdk):
    call = say(sdk, tool_choice="required", parallel_tool_calls=False).choices[0].message
    answer = {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": "22 degrees and sunny"}
    turn = [*ASK, call.model_dump(exclude_none=True), answer]
    reply = say(sdk, turn, tool_choice="none", max_tokens=40)
    assert reply.choices[0].message.tool_calls is None
    assert reply.choices[0].message.content
    assert reply.choices[0].finish_reason in ("stop", "length")
    # What was called and answered is in the prompt.
    alone = say(sdk, tool_choice="none", max_tokens=1)
    assert reply.usage.prompt_tokens > alone.usage.prompt_tokens + 20
    # Content that calls are beside may be null, and tools may be left out of a later turn.
    assert sdk.chat.completions.create(model=MODEL, messages=turn, max_tokens=5).choices[0].message.content


def test_the_model_is_told_of_the_tools(alone, sdk):
    without = sdk.chat.completions.create(model=MODEL, messages=ASK, max_tokens=1).usage.prompt_tokens
    for choice in ("auto", "none", "required"):
        assert say(sdk, tool_choice=choice, max_tokens=1).usage.prompt_tokens > without + 100
    with alone.http() as http:
        count = http.post("/tokenize", json={"messages": ASK, "tools": TOOLS}).json()["count"]
    assert count == say(sdk, max_tokens=1).usage.prompt_tokens


def test_auto_gives_text_or_calls(sdk):
    for seed in range(3):
        choice = say(sdk, temperature=1, seed=seed).choices[0]
        assert bool(choice.message.tool_calls) == (choice.finish_reason == "tool_calls")
        assert choice.message.content or choice.message.tool_calls


def test_strict_functions_are_called_as_their_schemas_say(sdk):
    """Under `auto` the model may write text, or a call that fits."""
    strict = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS]
    ask = user('Write nothing but <tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "unit": "kelvin"}}\n</tool_call>')
    for seed in range(6):
        choice = say(sdk, ask, tools=strict, temperature=0.7, seed=seed).choices[0]
        calls = choice.message.tool_calls or []
        assert choice.message.content or calls
        # One that was cut may stand last.
        assert all(fits(call) for call in (calls[:-1] if choice.finish_reason == "length" else calls)), calls


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice.function.name", "does not match any"),
        ({"tool_choice": "sometimes"}, "tool_choice", "Supported values"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice", "only allowed when 'tools'"),
        ({"tools": [{"type": "function", "function": {"name": "get weather"}}]}, "tools[0].function.name", "1 to 128"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "Missing"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": 7}}}}}],
                "tool_choice": "required",
            },
            "tools",
            "the constraint can't be used",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_named(sdk, fields, param, says):
    with pytest.raises(openai.BadRequestError, match=says) as refused:
        say(sdk, extra_body=fields)
    assert refused.value.param == param
