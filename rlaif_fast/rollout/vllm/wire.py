"""Requests to a served engine and its answers: `POST /inference/v1/generate` of vLLM 0.32, without vLLM.

Tokens and patches travel as JSON; the tensors of a medium are MessagePack in base64, in the layout of vLLM's
`MultiModalKwargsItem`. Few of MessagePack's types are needed, so the trainer's environment need not have vLLM.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rlaif_fast.policy.prompt import EncodedPrompt
from rlaif_fast.rollout.base import Answer
from rlaif_fast.rollout.vllm.requests import MediaItem, by_modality, media_items

RAW_BYTES = 3  # vLLM's extension type of a tensor's bytes


class MalformedAnswer(Exception):
    """A reply that does not fit the request; the message says briefly what came."""


def generate_body(prompt: EncodedPrompt, config: Any, options: dict[str, Any], seed: int) -> bytes:
    """The request for the answers to a prompt.

    Args:
        prompt: The prompt.
        config: Of the model.
        options: Arguments of `vllm.SamplingParams`.
        seed: Of its first answer.
    """
    body: dict[str, Any] = {
        "token_ids": prompt.input_ids.tolist(),
        "sampling_params": options | {"seed": seed},
    }
    items = media_items(prompt, config)
    if items:
        body["features"] = _features(items)
    return json.dumps(body).encode()


def read_answers(reply: Any, num_generations: int) -> list[Answer]:
    """The answers in a reply to `generate_body`.

    Raises:
        MalformedAnswer: It holds anything else.
    """
    try:
        choices = sorted(reply["choices"], key=lambda choice: choice["index"])
        answers = [_answer(choice) for choice in choices]
    except (KeyError, TypeError, ValueError) as error:
        raise MalformedAnswer(
            f"a reply without tokens and log-probabilities ({type(error).__name__}: {error})"
        ) from None
    if len(answers) != num_generations:
        raise MalformedAnswer(f"{len(answers)} responses where {num_generations} were asked for")
    return answers


def _answer(choice: dict[str, Any]) -> Answer:
    content = choice["logprobs"]["content"] or []
    token_ids = [int(token) for token in choice["token_ids"]]
    if [place["token_id"] for place in content] != token_ids:
        raise ValueError("log-probabilities of other tokens")
    return Answer(token_ids, [float(place["logprob"]) for place in content])


def _features(items: Sequence[MediaItem]) -> dict[str, Any]:
    return {
        "mm_hashes": by_modality(items, lambda item: item.key),
        "mm_placeholders": by_modality(items, lambda item: {"offset": item.offset, "length": item.length}),
        "kwargs_data": by_modality(items, lambda item: base64.b64encode(packed_item(item)).decode("ascii")),
    }


def packed_item(item: MediaItem) -> bytes:
    """The tensors of a medium as vLLM's `encode_mm_kwargs_item` packs them, before base64."""
    fields = {}
    for name, tensor in item.fields.items():
        if name.startswith("pixel_values"):
            whole = [[[0, len(item.patches), None]]]
            layout = ["flat", {"keep_on_cpu": False, "slices": whole, "dim": 0}]
            fields[name] = {"data": tensor, "field": layout}
        else:
            fields[name] = {"data": tensor[0], "field": ["batched", {"keep_on_cpu": True}]}
    return b"".join(_packed(fields))


def _packed(value: Any) -> Iterator[bytes]:
    """MessagePack of a medium's values; lists, maps and texts are short."""
    if value is None:
        yield b"\xc0"
    elif isinstance(value, bool):
        yield b"\xc3" if value else b"\xc2"
    elif isinstance(value, int):
        yield _packed_int(value)
    elif isinstance(value, str):
        text = value.encode()
        yield bytes([0xA0 | len(text)]) + text
    elif isinstance(value, Tensor):
        raw = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        yield b"\x93"
        yield from _packed(str(value.dtype).removeprefix("torch."))
        yield from _packed(list(value.shape))
        yield _raw_header(len(raw))
        yield raw
    elif isinstance(value, dict):
        yield bytes([0x80 | len(value)])
        for key, part in value.items():
            yield from _packed(key)
            yield from _packed(part)
    else:
        yield bytes([0x90 | len(value)])
        for part in value:
            yield from _packed(part)


def _packed_int(value: int) -> bytes:
    if value < 1 << 7:
        return bytes([value])
    if value < 1 << 8:
        return struct.pack(">BB", 0xCC, value)
    return struct.pack(">BH", 0xCD, value) if value < 1 << 16 else struct.pack(">BI", 0xCE, value)


def _raw_header(length: int) -> bytes:
    """The header before the bytes of a tensor; five lengths have a code of their own."""
    fixed = {1: 0xD4, 2: 0xD5, 4: 0xD6, 8: 0xD7, 16: 0xD8}
    if length in fixed:
        return bytes([fixed[length], RAW_BYTES])
    if length < 1 << 8:
        return struct.pack(">BBB", 0xC7, length, RAW_BYTES)
    if length < 1 << 16:
        return struct.pack(">BHB", 0xC8, length, RAW_BYTES)
    return struct.pack(">BIB", 0xC9, length, RAW_BYTES)
