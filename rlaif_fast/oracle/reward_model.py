"""Ranks by a scalar reward model: a sequence classifier with one output over question and response."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from rlaif_fast.data.schema import lettered
from rlaif_fast.errors import UsageError, first_line, needed_by
from rlaif_fast.oracle.base import Ranking, RankRequest, unranked
from rlaif_fast.oracle.fusion import ranks_from_scores
from rlaif_fast.oracle.identity import model_digest
from rlaif_fast.oracle.option_types import check_least
from rlaif_fast.oracle.positions import learned_positions
from rlaif_fast.oracle.untrusted import show_responses

MAX_TOKENS = 2048  # of an input, by default


class RewardModelOracle:
    """Ranks by `AutoModelForSequenceClassification` with one label; it reads only text, no frames.

    With a chat template the question is the user's turn and the response the assistant's; without one they
    are a text pair.

    Args:
        model: A folder or a hub name.
        device: "auto", "cpu", "cuda", ...
        batch_size: Responses in one forward pass.
        max_tokens: Longest input; a longer one loses its middle. Responses that differ only there are not judged.
            None is 2048, or the size of the model's position table if that is less.
        max_response_chars: Length a response is cut to, in the middle; longer if two would otherwise look the same.
        tie: Scores closer than this tie.
    """

    name = "reward_model"
    gives_scores = True

    def __init__(
        self,
        *,
        model: str,
        device: str = "auto",
        batch_size: int = 32,
        max_tokens: int | None = None,
        max_response_chars: int = 2000,
        tie: float = 1e-4,
    ) -> None:
        given = {} if max_tokens is None else {"max_tokens": max_tokens}
        check_least(1, batch_size=batch_size, max_response_chars=max_response_chars, **given)
        check_least(0, tie=tie)
        with needed_by("the reward_model oracle", "train"):
            from transformers import AutoModelForSequenceClassification, AutoTokenizer

            from rlaif_fast.policy.loading import resolve_device
            from rlaif_fast.policy.weights import load_whole

        place = resolve_device(device)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
            found = load_whole(AutoModelForSequenceClassification, model, f"oracle option 'model': {model!r}")
            self._model: Any = found.eval().to(place)
        except (OSError, ValueError) as error:
            raise UsageError(
                f"oracle option 'model': cannot load a reward model from {model!r}: {first_line(error)}"
            ) from None
        if self._model.config.num_labels != 1:
            raise UsageError(
                f"oracle option 'model': expected one output, {model!r} has {self._model.config.num_labels}"
            )
        most = learned_positions(self._model)
        if most is not None and max_tokens is not None and max_tokens > most:
            raise UsageError(
                f"oracle option 'max_tokens' must be at most {most}, the positions of {model!r}, got {max_tokens}"
            )
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        if self._model.config.pad_token_id is None:
            self._model.config.pad_token_id = self._tokenizer.pad_token_id
        self.model_name = model
        self.batch_size = batch_size
        self.max_tokens = max_tokens or min(MAX_TOKENS, most or MAX_TOKENS)
        self.max_response_chars = max_response_chars
        self.tie = tie

    @cached_property
    def _weights(self) -> str:
        return model_digest(self.model_name, getattr(self._model.config, "_commit_hash", None))

    @property
    def identity(self) -> str:
        """What a cached verdict depends on besides the request."""
        return (
            f"reward_model/3 model={self.model_name} weights={self._weights} max_tokens={self.max_tokens} "
            f"max_chars={self.max_response_chars} tie={self.tie}"
        )

    def rank(self, requests: Sequence[RankRequest]) -> list[Ranking]:
        """Rank every request; the result is in the order of the requests."""
        start = time.perf_counter()
        scored = self._score_all(requests)
        seconds = (time.perf_counter() - start) / max(1, len(requests))
        rankings = []
        for request, scores in zip(requests, scored):
            if any(score is not None and math.isnan(score) for score in scores):
                told = {"verdicts": scores, "seconds": seconds}
                rankings.append(unranked(request, "the reward model gave NaN", **told))
            else:
                ranks = ranks_from_scores(scores, self.tie)
                verdicts = tuple(None if score is None else round(score, 6) for score in scores)
                rankings.append(Ranking(ranks, scores=scores, verdicts=verdicts, seconds=seconds))
        return rankings

    @torch.inference_mode()
    def _score_all(self, requests: Sequence[RankRequest]) -> list[tuple[float | None, ...]]:
        inputs: list[list[int]] = []
        places = []
        for request in requests:
            texts, own = show_responses(request.responses, self.max_response_chars)
            places.append([len(inputs) + place for place in own])
            inputs += [self._encode(request, text) for text in texts]
        values = [0.0] * len(inputs)
        by_length = sorted(range(len(inputs)), key=lambda i: len(inputs[i]))
        for start in range(0, len(inputs), self.batch_size):
            part = by_length[start : start + self.batch_size]
            batch = self._tokenizer.pad({"input_ids": [inputs[i] for i in part]}, return_tensors="pt")
            logits = self._model(**batch.to(self._model.device)).logits[:, 0].float().tolist()
            for i, value in zip(part, logits):
                values[i] = value
        scored = []
        for own in places:
            cut = Counter(tuple(inputs[i]) for i in set(own) if len(inputs[i]) == self.max_tokens)
            # Distinct responses with equal input were cut where they differ: no verdict is better than a tie.
            scored.append(tuple(values[i] if cut[tuple(inputs[i])] < 2 else None for i in own))
        return scored

    def _encode(self, request: RankRequest, text: str) -> list[int]:
        question = "\n".join((request.question, *lettered(request.options)))
        if self._tokenizer.chat_template is None:
            return self._cut(self._tokenizer(question, text)["input_ids"])
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
        chat = self._tokenizer.apply_chat_template(messages, tokenize=False)
        return self._cut(self._tokenizer(chat, add_special_tokens=False)["input_ids"])

    def _cut(self, ids: list[int]) -> list[int]:
        """At most `max_tokens` ids: if there are more, the middle is dropped, so that the conclusion is read."""
        head = self.max_tokens // 3
        return ids if len(ids) <= self.max_tokens else ids[:head] + ids[len(ids) - (self.max_tokens - head) :]
