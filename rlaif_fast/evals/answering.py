"""How a policy answers: generated greedily, or as its most likely option."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from rlaif_fast.data.schema import option_letters
from rlaif_fast.policy.forward_rows import reply_logps
from rlaif_fast.policy.policy import Policy
from rlaif_fast.prompts.encoder import Prompt, PromptEncoder
from rlaif_fast.rollout.base import Sampler, SamplingParams

Answering = Literal["generate", "letter", "likelihood"]


def answer(
    policy: Policy,
    encoder: PromptEncoder,
    sampler: Sampler,
    prompts: Sequence[Prompt],
    how: Answering,
    max_new_tokens: int,
    max_reasoning_tokens: int | None = None,
) -> list[str]:
    """One answer to each prompt; a question without options is always answered by generation.

    Args:
        policy: The policy.
        encoder: Encodes answers.
        sampler: Generates answers.
        prompts: The prompts.
        how: "generate"; "letter", the letter of highest probability; "likelihood", the letter of the option whose
            text has the highest mean log-probability per token.
        max_new_tokens: Most tokens of a generated answer.
        max_reasoning_tokens: See `SamplingParams`.
    """
    answers = [""] * len(prompts)
    chosen = [i for i, prompt in enumerate(prompts) if how != "generate" and prompt.example.options]
    written = sorted(set(range(len(prompts))) - set(chosen))
    if written:
        params = SamplingParams(
            max_new_tokens=max_new_tokens, temperature=0.0, max_reasoning_tokens=max_reasoning_tokens
        )
        for i, text in zip(written, sampler.sample([prompts[i] for i in written], 1, params).texts):
            answers[i] = text
    if chosen:
        asked = [prompts[i] for i in chosen]
        letters = [option_letters(len(p.example.options)) for p in asked]
        candidates = letters if how == "letter" else [list(p.example.options) for p in asked]
        for i, labels, place in zip(chosen, letters, likeliest(policy, encoder, asked, candidates)):
            answers[i] = labels[place]
    return answers


def likeliest(
    policy: Policy, encoder: PromptEncoder, prompts: Sequence[Prompt], candidates: Sequence[Sequence[str]]
) -> list[int]:
    """For each prompt, the index of the text with the highest mean log-probability per token; the first on a tie.

    If the prompt ends inside the reasoning, the closing tokens precede every text and are not counted.

    Args:
        policy: The policy.
        encoder: Encodes the texts.
        prompts: N prompts.
        candidates: Texts to choose from, for each prompt.
    """
    end = -1  # the end token is not part of a text
    replies = [[encoder.encode_answer(text)[:end] for text in texts] for texts in candidates]
    closing = encoder.closing
    places = []
    for group, found in zip(replies, reply_logps(policy, prompts, replies)):
        before = [len(closing) if reply[: len(closing)] == closing else 0 for reply in group]
        means = torch.stack([logps[skipped:].mean() for logps, skipped in zip(found, before)])
        places.append(int(means.argmax()))
    return places
