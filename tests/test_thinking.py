"""Models whose template leaves the prompt inside the reasoning: where the answer goes, and what is scored."""

from __future__ import annotations

import dataclasses

import family_checkpoints
import pytest

from rlaif_fast.oracle.base import RankRequest
from rlaif_fast.oracle.registry import build_oracle
from rlaif_fast.prompts.encoder import PromptEncoder, ends_in_reasoning
from rlaif_fast.trainer.options import TrainConfig
from rlaif_fast.trainer.setup import for_reasoning
from rlaif_fast.video import PatchSpec

MARKS = family_checkpoints.RECIPES["qwen3_vl"][2]


def encoder_of(generation: str) -> PromptEncoder:
    tokenizer = family_checkpoints.make_tokenizer("qwen3_vl")
    tokenizer.add_tokens(["<think>", "</think>"])  # as published: one token each, and not special
    tokenizer.chat_template = family_checkpoints.chat_template(*MARKS, generation)
    spec = PatchSpec(4)
    return PromptEncoder(tokenizer, "qwen3_vl", spec, spec.budget(64, 1024))


THINKING = "<|im_start|>assistant\n<think>\n"
CLOSED = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
PLAIN = "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("generation", "answer", "taught"),
    [
        (THINKING, "red", "</think>\n\nred"),
        (THINKING, "<think>left</think>\n\nred", "left</think>\n\nred"),
        (PLAIN, "red", "red"),
        (PLAIN, "<think>left</think>\n\nred", "<think>left</think>\n\nred"),
        (CLOSED, "red", "red"),
    ],
)
def test_an_answer_goes_behind_the_reasoning(generation, answer, taught) -> None:
    encoder = encoder_of(generation)
    assert encoder.reasons == (generation == THINKING)
    expected = encoder.tokenizer(taught, add_special_tokens=False)["input_ids"]
    assert encoder.encode_answer(answer) == [*expected, encoder.tokenizer.eos_token_id]


def test_which_prompts_end_in_reasoning() -> None:
    assert ends_in_reasoning("a <think>\n")
    assert not ends_in_reasoning("a <think>\n</think>\n")
    assert not ends_in_reasoning("a")


def test_the_oracle_sees_what_stands_behind_the_reasoning() -> None:
    config, notes = for_reasoning(TrainConfig(), encoder_of(THINKING))
    assert "extract" in notes[0]
    oracle = build_oracle("reference", max_invalid_fraction=None, **config.oracle_options)
    request = RankRequest(
        id="0",
        question="what color",
        responses=("it may be blue </think> red", "red </think> blue"),
        reference="red",
    )
    assert [oracle.is_correct(request, response) for response in request.responses] == [True, False]


def test_what_is_asked_for_stays() -> None:
    own = dataclasses.replace(TrainConfig(), oracle_options={"extract": "(.)"})
    assert for_reasoning(own, encoder_of(THINKING))[0] is own
    plain = TrainConfig()
    assert for_reasoning(plain, encoder_of(PLAIN)) == (plain, ())
    other = dataclasses.replace(plain, oracle="embedding")
    config, notes = for_reasoning(other, encoder_of(THINKING))
    assert config is other
    assert "reasoning included" in notes[0]
