"""Models whose template leaves the prompt inside the reasoning: where the answer goes, and what is scored."""

from __future__ import annotations

import copy
import dataclasses

import family_checkpoints
import numpy as np
import pytest
import torch

from rlaif_fast.data import Example
from rlaif_fast.evals.answering import likeliest
from rlaif_fast.oracle.base import RankRequest
from rlaif_fast.oracle.reference import ReferenceOracle
from rlaif_fast.oracle.registry import build_oracle
from rlaif_fast.oracle.wrappers import oracles_in
from rlaif_fast.policy.policy import Policy
from rlaif_fast.prompts.encoder import PromptEncoder, ends_in_reasoning
from rlaif_fast.trainer.options import TrainConfig
from rlaif_fast.trainer.scoring import scorer_by_name, scorer_of
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
        (THINKING, "left</think>\n\nred", "left</think>\n\nred"),  # what such a model writes itself
        (THINKING, "</think>\n\nred", "</think>\n\nred"),
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


def test_likelihoods_are_of_the_text_behind_the_reasoning() -> None:
    """What closes the reasoning is as unlikely before every option, and would favour the longer ones."""
    model, _ = family_checkpoints.make_model("qwen3_vl")
    encoder = encoder_of(THINKING)
    torch.manual_seed(0)
    model.resize_token_embeddings(len(encoder.tokenizer), mean_resizing=False)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(40)  # untrained, it finds all tokens alike
    policy = Policy(model.eval(), encoder.tokenizer)
    words = ("what", "color", "is", "the", "red", "square", "blue")
    texts = [*words, *(" ".join(words[i : i + n]) for n in (2, 3, 5) for i in range(3))]
    prompts = [encoder.encode(Example(str(i), word), ()) for i, word in enumerate(words)]
    expected = []
    with torch.no_grad():
        for prompt in prompts:
            means = []
            for text in texts:
                own = len(encoder.tokenizer(text, add_special_tokens=False)["input_ids"])
                ids = encoder.encode_answer(text)[:-1]
                logps = policy.response_logps([prompt], torch.tensor([ids]), torch.tensor([len(ids)]))
                means.append(logps[-own:].double().mean().item())
            expected.append(int(np.argmax(means)))
        assert likeliest(policy, encoder, prompts, [texts] * len(prompts)) == expected


def test_a_prompt_behind_its_reasoning_has_what_its_processor_made_of_each_token() -> None:
    encoder = encoder_of(THINKING)
    prompt = encoder.encode(Example("0", "what color"), ())
    length, more = len(prompt.input_ids), len(encoder.closing)
    made = {"token_type_ids": torch.ones(1, length), "pixels": torch.ones(2, 3)}
    closed = encoder.closed(dataclasses.replace(prompt, inputs=made))
    assert closed.input_ids.tolist() == prompt.input_ids.tolist() + encoder.closing
    assert closed.inputs["token_type_ids"].tolist() == [[1] * length + [0] * more]
    assert closed.inputs["pixels"] is made["pixels"]
    plain = encoder_of(PLAIN)
    asked = plain.encode(Example("0", "what color"), ())
    assert plain.closed(asked) is asked


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
        responses=("it may be blue </think> red", "red </think> blue", "red"),  # the last was cut off
        reference="red",
    )
    assert [oracle.is_correct(request, response) for response in request.responses] == [True, False, False]
    [ranking] = oracle.rank([request])
    assert ranking.scores is not None and ranking.scores[2] == 0.0 < ranking.scores[1]


@pytest.mark.parametrize(
    ("oracle", "options"),
    [
        ("shuffled", {"inner": "reference"}),
        (
            "corrupted",
            {
                "kind": "flips",
                "inner": {"name": "shuffled", "inner": {"name": "reference", "tolerance": 0.5}},
            },
        ),
        ("ensemble", {"members": ["reference", {"name": "callable", "function": f"{__name__}:longest"}]}),
    ],
)
def test_oracles_inside_others_see_it_too(oracle, options) -> None:
    """What was cut off in the reasoning had the reward of a right answer, and counted as one."""
    before = copy.deepcopy(options)
    config = dataclasses.replace(TrainConfig(), oracle=oracle, oracle_options=options)
    told, notes = for_reasoning(config, encoder_of(THINKING))
    assert options == before and "extract" in notes[0]
    assert ("'callable' sees responses whole" in notes[0]) is (oracle == "ensemble")
    built = build_oracle(oracle, max_invalid_fraction=None, **told.oracle_options)
    [reference] = [inner for inner in oracles_in(built) if isinstance(inner, ReferenceOracle)]
    request = RankRequest(id="0", question="?", responses=("red", "blue </think> red"), reference="red")
    assert reference.rank([request])[0].ranks == (1, 0)
    assert reference.tolerance == (0.5 if oracle == "corrupted" else 0.0)
    for scorer in (
        scorer_of(built, told.oracle_options, reasons=True),
        scorer_by_name(oracle, told.oracle_options, reasons=True),
    ):
        assert [scorer.is_correct(request, text) for text in request.responses] == [False, True]


def test_an_inner_oracle_keeps_its_extract() -> None:
    options = {"members": [{"name": "reference", "extract": "(.)"}, "embedding"]}
    own = dataclasses.replace(TrainConfig(), oracle="ensemble", oracle_options=options)
    config, notes = for_reasoning(own, encoder_of(THINKING))
    assert config is own and "'embedding' sees responses whole" in notes[0]


def longest(request):
    """An oracle function: the longer, the better."""
    return [float(len(text)) for text in request.responses]


def test_what_is_asked_for_stays() -> None:
    own = dataclasses.replace(TrainConfig(), oracle_options={"extract": "(.)"})
    assert for_reasoning(own, encoder_of(THINKING))[0] is own
    plain = TrainConfig()
    assert for_reasoning(plain, encoder_of(PLAIN)) == (plain, ())
    other = dataclasses.replace(plain, oracle="embedding")
    config, notes = for_reasoning(other, encoder_of(THINKING))
    assert config is other
    assert "reasoning included" in notes[0]
