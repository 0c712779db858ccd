"""Log-probabilities of prompts and token ids in and out, with the real SDK and the shapes that evaluation tools read."""

from __future__ import annotations

import math

import openai
import pytest

from harness import MODEL, token_ids, user

# Longer than what is scored in one step, and than a block.
TEXT = "The capital of France is Paris, and the capital of Italy is Rome. " * 12


def complete(sdk, prompt, **options):
    extra = {key: options.pop(key) for key in list(options) if key not in OPENAI}
    return sdk.completions.create(model=MODEL, prompt=prompt, **{"temperature": 0, **options}, extra_body=extra)


OPENAI = {"max_tokens", "echo", "logprobs", "n", "stream", "temperature", "seed", "stop"}


def test_a_prompt_is_scored_and_nothing_is_generated(alone, sdk):
    ids = token_ids(alone, TEXT)
    reply = complete(sdk, TEXT, echo=True, logprobs=2, max_tokens=0)
    (choice,) = reply.choices
    assert (choice.text, choice.finish_reason) == (TEXT, "length")
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(ids), 0)
    logprobs = choice.logprobs
    assert "".join(logprobs.tokens) == TEXT
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(ids)
    assert (logprobs.token_logprobs[0], logprobs.top_logprobs[0]) == (None, None)
    for token, logprob, top in list(zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs))[1:]:
        assert logprob <= 0 and top[token] == logprob
        assert len(top) in (2, 3) and sum(map(math.exp, top.values())) < 1 + 1e-3
    for token, offset in zip(logprobs.tokens, logprobs.text_offset):
        assert TEXT[offset : offset + len(token)] == token
    # A text that repeats itself is less and less of a surprise.
    half = len(ids) // 2
    assert sum(logprobs.token_logprobs[half:]) > 4 * sum(logprobs.token_logprobs[1:half])


def test_a_text_scores_as_when_it_was_generated(sdk):
    prompt = "Rivers of Europe: the Rhine,"
    said = complete(sdk, prompt, logprobs=1, max_tokens=12, return_token_ids=True).choices[0]
    assert said.finish_reason == "length"
    scored = complete(sdk, prompt + said.text, echo=True, logprobs=1, max_tokens=0, return_token_ids=True).choices[0]
    assert scored.prompt_token_ids == said.prompt_token_ids + said.token_ids
    assert scored.token_ids == []
    assert scored.logprobs.token_logprobs[-12:] == pytest.approx(said.logprobs.token_logprobs, abs=1e-4)
    again = complete(sdk, scored.prompt_token_ids, echo=True, logprobs=1, max_tokens=1).choices[0]
    assert again.logprobs.token_logprobs[:-1] == scored.logprobs.token_logprobs
    # Greedy took the most likely each time.
    for token, top in list(zip(scored.logprobs.tokens, scored.logprobs.top_logprobs))[-12:]:
        assert max(top, key=top.get) == token


def test_prompt_logprobs_are_by_id_with_ranks(alone, sdk):
    ids = token_ids(alone, "Paris is the capital of France")
    for prompt in ("Paris is the capital of France", ids):
        (choice,) = complete(sdk, prompt, prompt_logprobs=3, max_tokens=1).choices
        assert len(choice.prompt_logprobs) == len(ids) and choice.prompt_logprobs[0] is None
        for id, entry in list(zip(ids, choice.prompt_logprobs))[1:]:
            assert list(entry)[0] == str(id)
            assert set(entry[str(id)]) == {"logprob", "rank", "decoded_token"}
            others = [value["rank"] for key, value in entry.items() if key != str(id)]
            assert others == [rank for rank in (1, 2, 3) if rank != entry[str(id)]["rank"]]
    echoed = complete(sdk, ids, echo=True, logprobs=0, max_tokens=0).choices[0].logprobs.token_logprobs
    own = [entry[str(id)]["logprob"] for id, entry in zip(ids[1:], choice.prompt_logprobs[1:])]
    assert own == pytest.approx(echoed[1:], abs=1e-5)


def test_a_chat_tells_of_its_prompt_beside_the_choices(alone, sdk):
    reply = sdk.chat.completions.create(
        model=MODEL,
        messages=user("Hi"),
        max_tokens=4,
        n=2,
        extra_body={"prompt_logprobs": 0, "return_token_ids": True},
    )
    with alone.http() as http:
        ids = http.post("/tokenize", json={"model": MODEL, "messages": user("Hi")}).json()["tokens"]
    assert reply.prompt_token_ids == ids
    assert [list(entry or {}) for entry in reply.prompt_logprobs] == [[], *([str(id)] for id in ids[1:])]
    assert sum(len(choice.token_ids) for choice in reply.choices) == reply.usage.completion_tokens


@pytest.mark.parametrize("chat", [True, False])
def test_streamed_ids_are_those_of_the_whole_reply(sdk, chat):
    options = {"model": MODEL, "max_tokens": 10, "temperature": 0, "extra_body": {"return_token_ids": True}}
    if chat:
        whole = sdk.chat.completions.create(messages=user("Count to five."), **options)
        chunks = list(sdk.chat.completions.create(messages=user("Count to five."), stream=True, **options))
        prompt_ids = whole.prompt_token_ids
        told = [chunk.prompt_token_ids for chunk in chunks if hasattr(chunk, "prompt_token_ids")]
    else:
        whole = sdk.completions.create(prompt="One, two,", **options)
        chunks = list(sdk.completions.create(prompt="One, two,", stream=True, **options))
        prompt_ids = whole.choices[0].prompt_token_ids
        told = [c.choices[0].prompt_token_ids for c in chunks if hasattr(c.choices[0], "prompt_token_ids")]
    assert told == [prompt_ids], "once, in the first frame"
    streamed = [id for chunk in chunks for id in getattr(chunk.choices[0], "token_ids", None) or []]
    assert streamed == whole.choices[0].token_ids


def test_a_streamed_echo_has_the_prompt_s_logprobs_first(sdk):
    options = {"echo": True, "logprobs": 1, "max_tokens": 3}
    whole = complete(sdk, "One, two,", **options).choices[0].logprobs
    chunks = [c.choices[0].logprobs for c in complete(sdk, "One, two,", stream=True, **options) if c.choices[0].logprobs]
    assert chunks[0].token_logprobs[0] is None
    for field in ("tokens", "token_logprobs", "text_offset"):
        assert [item for chunk in chunks for item in getattr(chunk, field)] == getattr(whole, field)


def test_what_lm_evaluation_harness_sends(alone, sdk):
    """Its `local-completions` model: batches of token ids, context and continuation together, one token generated."""
    contexts, continuations = ["The capital of France is", "Two and two is"], [" Paris", " four"]
    prompts = [token_ids(alone, context + more) for context, more in zip(contexts, continuations)]
    lengths = [len(token_ids(alone, context)) for context in contexts]
    reply = sdk.completions.create(
        model=MODEL, prompt=prompts, temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True
    )
    assert [choice.index for choice in reply.choices] == [0, 1]
    for choice, ids, length, expect in zip(reply.choices, prompts, lengths, continuations):
        assert len(choice.logprobs.token_logprobs) == len(ids) + 1, "the generated token has its own, whatever it is"
        assert "".join(choice.logprobs.tokens[length:-1]) == expect
        assert -20 < sum(choice.logprobs.token_logprobs[length:-1]) < 0


def test_tokens_are_named_by_id(sdk):
    said = complete(sdk, "One, two,", logprobs=2, max_tokens=2, return_tokens_as_token_ids=True, return_token_ids=True)
    (choice,) = said.choices
    assert choice.logprobs.tokens == [f"token_id:{id}" for id in choice.token_ids]
    assert all(name.startswith("token_id:") for top in choice.logprobs.top_logprobs for name in top)


def test_a_prompt_is_cut_and_a_message_goes_on(alone, sdk):
    ids = token_ids(alone, TEXT)
    for side, expect in (("left", ids[-9:]), ("right", ids[:9])):
        options = {"truncate_prompt_tokens": 9, "truncation_side": side, "return_token_ids": True}
        assert complete(sdk, TEXT, max_tokens=1, **options).choices[0].prompt_token_ids == expect
    reply = sdk.chat.completions.create(
        model=MODEL,
        messages=[*user("What is the capital of France?"), {"role": "assistant", "content": "The capital of France is"}],
        max_tokens=4,
        temperature=0,
        extra_body={"add_generation_prompt": False, "continue_final_message": True, "echo": True},
    )
    assert reply.choices[0].message.content.startswith("The capital of France is Paris")


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"truncate_prompt_tokens": 5000}, "truncate_prompt_tokens"),
        ({"logprob_token_ids": [1]}, "logprob_token_ids"),
        ({"logprobs": 1, "logprob_token_ids": [10_000_000]}, "logprob_token_ids"),
        ({"length_penalty": 2}, "length_penalty"),
        ({"use_beam_search": True}, "use_beam_search"),
    ],
)
def test_what_can_t_be_given_is_refused_by_name(sdk, options, param):
    with pytest.raises(openai.BadRequestError) as error:
        complete(sdk, "One, two,", **options)
    assert error.value.param == param
