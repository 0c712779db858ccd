"""A model divided among ranks: the same answers as in one, and sizes that can't be are refused at the start.

SmolLM2 has 9 query heads, 3 KV heads and 30 layers; the small random model 4, 2 and 2.
"""

from __future__ import annotations

import os
from pathlib import Path

import openai
import pytest

import tiny_model
from harness import Worker, engine_config, forebay, free_port, model_file, sdk_options, user

CORES = len(os.sched_getaffinity(0))


def answers(worker: Worker) -> list[tuple[str | None, list[float]]]:
    """Two conversations at once, the second of which goes on behind the first's cached beginning."""
    with openai.OpenAI(**sdk_options(worker.url, "none", {})) as sdk:

        def ask(text: str) -> tuple[str | None, list[float]]:
            reply = sdk.chat.completions.create(
                model=worker.model(),
                messages=user(text),
                max_tokens=24,
                seed=1,
                temperature=0.7,
                logprobs=True,
            )
            (choice,) = reply.choices
            assert choice.logprobs and choice.logprobs.content
            return choice.message.content, [token.logprob for token in choice.logprobs.content]

        long = "Tell me about the rivers of France. " * 12
        return [ask("Name three rivers."), ask(long), ask(long + "And of Spain.")]


@pytest.mark.skipif(CORES < 2, reason="two ranks need two cores")
def test_a_pipeline_answers_as_one_rank_does(start):
    one = start(Worker)
    two = start(Worker, "-pp", "2")
    # Not nearly: the log probabilities are the same numbers.
    assert answers(two) == answers(one)
    assert "tensor parallel 1 x pipeline parallel 2" in two.log()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "small"
    tiny_model.make(directory)
    return directory


@pytest.mark.skipif(CORES < 2, reason="two ranks need two cores")
def test_two_tensor_parallel_ranks_answer_as_one_does(start, small):
    one = start(Worker, model=small)
    two = start(Worker, "--tensor-parallel-size", "2", model=small)
    assert answers(two) == answers(one)
    assert "tensor parallel 2 x pipeline parallel 1" in two.log()


@pytest.mark.skipif(CORES < 3, reason="three ranks need three cores")
def test_tensor_parallel_ranks_answer_as_one_does(start):
    assert answers(start(Worker, "-tp", "3")) == answers(start(Worker))


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("-tp", "2"), "Total number of attention heads (9) must be divisible by tensor parallel size (2)."),
        (("--pipeline-parallel-size=31",), "the model's 30 layers can't be divided into 31 pipeline stages"),
        (("-tp", "9", "-pp", "30"), "`--tensor-parallel-size` (9) times `--pipeline-parallel-size` (30) is more ranks than"),
        (("-tp", "0"), "`--tensor-parallel-size`: zero would let nothing run"),
        (("--device", "cuda"), "--device is not supported: there is no GPU"),
    ],
)
def test_a_size_that_can_not_be_is_refused_with_the_reason(flags, reason):
    out = forebay("worker", "--model", str(model_file()), "--port", str(free_port()), *flags)
    assert out.returncode != 0
    assert reason in out.stderr


def test_check_points_at_the_size(tmp_path):
    file = tmp_path / "forebay.yaml"
    model = engine_config()["model"]
    file.write_text(f"edge: {{listen: 127.0.0.1:8080}}\nengine:\n  model: {model}\n  tensor-parallel-size: 2\n")
    out = forebay("check", str(file))
    assert out.returncode == 1
    assert "forebay.yaml:4:" in out.stderr
    assert "Total number of attention heads (9)" in out.stderr
