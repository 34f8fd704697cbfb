"""Checkpoints whose tokenizer and embedding do not quite fit: a token is allowed, left out, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import family_checkpoints
import pytest
import torch

from rlaif_fast.errors import UsageError
from rlaif_fast.policy.loading import ModelOptions, load_model
from rlaif_fast.policy.policy import Policy
from rlaif_fast.policy.vocabulary import allowed_tokens
from rlaif_fast.trainer.preflight import check_model


@pytest.fixture
def folder(tmp_path) -> Path:
    return family_checkpoints.write_checkpoint("qwen3_vl", tmp_path)


def edit(file: Path, **changes) -> None:
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def policy_of(folder: Path) -> Policy:
    loaded = load_model(ModelOptions(model=str(folder), device="cpu", dtype="float32"))
    return Policy(loaded.model, loaded.tokenizer)


def test_numbers_without_a_token_are_not_drawn_and_tokens_behind_them_are(folder) -> None:
    from transformers import AutoTokenizer

    saved = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = saved["model"]["vocab"]
    word, last = max(vocabulary.items(), key=lambda item: item[1])
    vocabulary[word] = last + 50
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids(word) == last + 50 >= len(tokenizer)
    allowed = allowed_tokens(last + 60, tokenizer, (), (tokenizer.eos_token_id,))
    assert allowed[last + 50]
    assert not allowed[last : last + 50].any() and not allowed[last + 51 :].any()
    assert int(allowed.sum()) == len(tokenizer) - len(set(tokenizer.all_special_ids)) + 1


def test_an_end_that_the_model_cannot_draw_is_refused(folder) -> None:
    ids = policy_of(folder).eos_token_ids
    edit(folder / "generation_config.json", eos_token_id=[*ids, 12345])
    with pytest.raises(UsageError, match="eos_token_id 12345 is none of the"):
        policy_of(folder)


def test_a_tokenizer_without_an_end_is_refused(folder) -> None:
    edit(folder / "tokenizer_config.json", eos_token=None)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="tokenizer without an eos_token"):
        check_model(str(folder))


def test_a_prompt_with_a_token_that_the_model_does_not_have_is_refused(folder) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|new|>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    check_model(str(folder))  # nothing writes it
    template = folder / "chat_template.jinja"
    template.write_text("<|new|>" + template.read_text())
    with pytest.raises(UsageError, match=r"a prompt holds '<\|new\|>', the token \d+, and the model has \d+"):
        check_model(str(folder))


def test_what_taught_answers_end_with_ends_a_response(tmp_path) -> None:
    """Gemma 3 whose settings know the end of a text alone."""
    folder = family_checkpoints.write_checkpoint("gemma3", tmp_path)
    policy = policy_of(folder)
    end = policy.tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert policy.model.generation_config.eos_token_id != end
    assert policy.eos_token_ids[-1] == end
    assert torch.all(policy.token_ids_allowed[list(policy.eos_token_ids)])
