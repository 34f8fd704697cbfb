"""The system turn that the configuration asks for: it is in the prompt as it was written, or it is refused."""

from __future__ import annotations

import family_checkpoints
import pytest
from test_families_packed import make_clip
from test_families_processor import PlayedProcessor

from rlaif_fast.data import Example
from rlaif_fast.errors import UsageError
from rlaif_fast.prompts.encoder import PromptEncoder
from rlaif_fast.prompts.processor import ProcessorEncoder
from rlaif_fast.trainer.preflight import check_model
from rlaif_fast.video import PatchSpec

SPEC = PatchSpec(4)
EVERY = "for message in messages"
TEXTS = "{{ part['text'] }}"
REFUSES = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
)


def tokenizer_of(change=lambda template: template):
    tokenizer = family_checkpoints.make_tokenizer("qwen2_vl")
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>"])
    tokenizer.chat_template = change(tokenizer.chat_template)
    return tokenizer


def by_table(tokenizer, system_prompt):
    return PromptEncoder(tokenizer, "qwen2_vl", SPEC, SPEC.budget(64, 1024), system_prompt=system_prompt)


def by_processor(tokenizer, system_prompt):
    config = family_checkpoints.make_config("qwen2_vl", tokenizer)
    processor = PlayedProcessor(tokenizer, config)
    return ProcessorEncoder(processor, "someones_vl", SPEC.budget(64, 1024), system_prompt=system_prompt)


@pytest.mark.parametrize("make", [by_table, by_processor])
def test_the_marks_of_reasoning_stay_in_it(make) -> None:
    tokenizer = tokenizer_of()
    prompt = make(tokenizer, "what <think> is </think> red").encode(
        Example("1", "where"), [make_clip("a", 4)]
    )
    said = tokenizer("what <think> is </think> red", add_special_tokens=False)["input_ids"]
    ids = prompt.input_ids.tolist()
    assert any(ids[i : i + len(said)] == said for i in range(len(ids)))


@pytest.mark.parametrize("make", [by_table, by_processor])
def test_an_empty_one_takes_the_place_of_the_template_s(make) -> None:
    own = "{% if messages[0]['role'] != 'system' %}what is red{% endif %}"
    tokenizer = tokenizer_of(lambda template: own + template)
    said, empty = (
        tokenizer.decode(make(tokenizer, prompt).encode(Example("1", "where"), [make_clip("a", 4)]).input_ids)
        for prompt in (None, "")
    )
    assert said.split()[:3] == ["what", "is", "red"]
    assert empty.split()[::2][:2] == ["<|im_start|>", "<|im_end|>"]


@pytest.mark.parametrize("make", [by_table, by_processor])
@pytest.mark.parametrize("mark", ["<|im_end|>", "<tool_call>", "<|video_pad|>"])
def test_another_mark_in_it_is_refused(make, mark) -> None:
    with pytest.raises(UsageError, match="system_prompt: expected plain text, got the mark ") as refusal:
        make(tokenizer_of(), f"what {mark} is")
    assert mark in str(refusal.value)


@pytest.mark.parametrize("make", [by_table, by_processor])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t.replace(EVERY, EVERY + " if message['role'] != 'system'"),
            "row 3: the chat template of this model leaves out the text of the system turn",
        ),
        (
            lambda t: t.replace(TEXTS, ""),
            "row 3: the chat template of this model leaves out the text of the system",
        ),
        (lambda t: REFUSES + t, "row 3: the chat template of this model refuses the prompt: System role not"),
    ],
)
def test_a_template_without_it_is_refused(make, change, words) -> None:
    encoder = make(tokenizer_of(change), "be brief")
    with pytest.raises(UsageError, match=words):
        encoder.encode(Example("1", "where", source="row 3"), [make_clip("a", 4)])


def test_blanks_that_a_template_strips_are_no_fault() -> None:
    tokenizer = tokenizer_of(lambda t: t.replace(TEXTS, "{{ part['text'] | trim }}"))
    assert len(by_table(tokenizer, " be  brief \n").encode(Example("1", " where "), ()).input_ids)


def test_it_is_refused_before_any_weight_is_read(tmp_path) -> None:
    family_checkpoints.write_checkpoint("qwen2_vl", tmp_path)
    check_model(str(tmp_path), system_prompt="be brief")
    template = tmp_path / "chat_template.jinja"
    template.write_text(REFUSES + template.read_text())
    check_model(str(tmp_path))
    with pytest.raises(UsageError, match="System role not supported"):
        check_model(str(tmp_path), system_prompt="be brief")
