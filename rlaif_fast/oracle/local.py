"""A Video-LLM in this process as the judge: it sees the frames, and may be the policy's own base model.

Nothing is sampled, so there is nothing to parse and no reply to imitate:

- `listwise` greedily generates a permutation of the labels, constrained to the remaining labels, in one prefill
  and one step per label; the orders of a group share the frames' keys and values;
- `pointwise` asks "is this answer correct?" and ranks by the probability of yes against no;
- `likelihood` ranks by the mean log-probability of the answer itself after the plain question, as a model
  trained on the task would say it (no rules, no reference: those would be copied).
"""

from __future__ import annotations

import math
import string
import time
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from rlaif_fast.data.schema import Example
from rlaif_fast.errors import UsageError, needed_by
from rlaif_fast.oracle.fusion import ranks_from_scores
from rlaif_fast.oracle.identity import model_digest
from rlaif_fast.oracle.judge import Judge, JudgeOptions, Outcome, Showing
from rlaif_fast.oracle.option_types import check_least, check_unread
from rlaif_fast.oracle.protocols import RULES, answers_block, question_block
from rlaif_fast.oracle.untrusted import seeded_generator

if TYPE_CHECKING:
    from rlaif_fast.policy.policy import Policy
    from rlaif_fast.policy.prompt import EncodedPrompt
    from rlaif_fast.prompts.encoder import PromptEncoder
    from rlaif_fast.rollout.labels import Label
    from rlaif_fast.rollout.plain import PlainSampler
    from rlaif_fast.rollout.shared_prefix import SharedPrefixSampler

LOCAL_PROTOCOLS = ("listwise", "pointwise", "likelihood")

_LISTWISE = (
    RULES + "Reply with the ids and nothing else, from the best answer to the worst, separated by spaces."
)
_POINTWISE = RULES + "Is the answer correct? Reply with one word, Yes or No."
_YES, _NO = ("Yes", "yes"), ("No", "no")
_LABELS = (*string.ascii_uppercase, *string.digits, *string.ascii_lowercase)
_REPLIES = 3  # version of how replies are spelled and read
_SCORE_TIE = 1e-5  # smaller differences may come from float32 or from another packing of the batch


class LocalOracle(Judge):
    """Ranks with a Video-LLM in this process.

    Args:
        model: A checkpoint folder or a hub name.
        protocol: "listwise", "pointwise" or "likelihood".
        device: "auto", "cpu", "cuda", ...
        dtype: "auto", "float32", "bfloat16" or "float16".
        attn_implementation: As for the policy.
        min_pixels: Fewest pixels of a frame after resizing.
        max_pixels: Most pixels of a frame after resizing.
        shared_prefix: Compute a group's prompt only once; False for families that this package does not know.
        max_packed_tokens: Most tokens in one forward pass; keys and values of twice as many are held at once.
        batch_size: Groups whose frames are encoded together.
        **judge: The options of `JudgeOptions`.
    """

    name = "local"
    reads_metadata = False

    def __init__(
        self,
        *,
        model: str,
        protocol: str = "listwise",
        device: str = "auto",
        dtype: str = "auto",
        attn_implementation: str = "auto",
        min_pixels: int = 1024,
        max_pixels: int = 200_704,
        shared_prefix: bool = True,
        max_packed_tokens: int = 16384,
        batch_size: int = 32,
        **judge: Any,
    ) -> None:
        if protocol not in LOCAL_PROTOCOLS:
            raise UsageError(f"oracle 'local' takes protocol {', '.join(LOCAL_PROTOCOLS)}, got {protocol!r}")
        check_least(1, batch_size=batch_size)
        super().__init__(JudgeOptions(protocol=protocol, **judge))
        if protocol != "listwise" and self.options.num_orders > 1:
            raise UsageError(
                f"oracle 'local': 'orders' must be 1 with protocol={protocol!r}, which reads the same each time, got "
                f"{self.options.num_orders}"
            )
        if protocol == "likelihood" and self.options.extract:
            raise UsageError("oracle 'local': 'extract' is not read with protocol='likelihood'; leave it out")
        if protocol != "listwise":
            check_unread(f"with protocol={protocol!r}", JudgeOptions, seed=self.options.seed)
        if not self.options.use_clips:
            check_unread("with use_clips=False", LocalOracle, min_pixels=min_pixels, max_pixels=max_pixels)
        self.batch_size = batch_size
        self.model = model
        self.pixels = (min_pixels, max_pixels)
        self.policy, self.encoder = _load(
            model=model,
            dtype=dtype,
            attn_implementation=attn_implementation,
            device=device,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            shared_prefix=shared_prefix,
            max_packed_tokens=max_packed_tokens,
            # A policy in training may share the device, with a rollout's buffers.
            max_cached_tokens=2 * max_packed_tokens,
        )

    @cached_property
    def _weights(self) -> str:
        return model_digest(self.model, getattr(self.policy.model.config, "_commit_hash", None))

    @property
    def identity(self) -> str:
        """What a cached verdict depends on besides the request."""
        return (
            f"{super().identity} model={self.model} weights={self._weights} "
            f"dtype={str(self.policy.model.dtype)[6:]} pixels={self.pixels} "
            f"scores={self.gives_scores} replies={_REPLIES}"
        )

    @property
    def gives_scores(self) -> bool:
        """Whether it gives probabilities in [0, 1]; `listwise` only orders."""
        return self.options.protocol != "listwise"

    def run_all(self, showings: Sequence[Showing]) -> list[Outcome]:
        """Judge every showing, `batch_size` at a time."""
        run = self._scored if self.gives_scores else self._listwise
        outcomes: list[Outcome] = []
        for start in range(0, len(showings), self.batch_size):
            with torch.inference_mode():
                outcomes += run(showings[start : start + self.batch_size])
        return outcomes

    def _listwise(self, showings: Sequence[Showing]) -> list[Outcome]:
        from rlaif_fast.rollout.base import SamplingParams

        start = time.perf_counter()
        labels = [self._labels(showing) for showing in showings]
        prompts = []
        for showing, own in zip(showings, labels):
            block = answers_block((own[i][0], showing.texts[i]) for i in showing.order)
            prompts.append(self._encode(showing, _LISTWISE, question_block(showing.request) + block))
        features = self.policy.encode_media(prompts)
        named = [[own[i][1] for i in showing.order] for showing, own in zip(showings, labels)]
        params = SamplingParams(max_new_tokens=max(map(len, named)) - 1, temperature=0.0)
        replies = self._sampler.sample(prompts, 1, params, features, labels=named).token_ids.tolist()
        tokens = sum(len(prompt.input_ids) for prompt in prompts)
        seconds = (time.perf_counter() - start) / len(showings)
        outcomes = []
        for showing, own, reply in zip(showings, labels, replies):
            text_of = {token: text for text, (_, spellings) in enumerate(own) for token in spellings}
            done = [text_of[token] for token in reply if token in text_of]
            order = [*done, *(i for i in showing.order if i not in done)]
            ranks = tuple(order.index(i) for i in range(len(order)))
            said_text = " ".join(own[i][0] for i in order)
            outcomes.append(Outcome(ranks, (said_text,), tokens // len(showings), seconds))
        return outcomes

    def _scored(self, showings: Sequence[Showing]) -> list[Outcome]:
        start = time.perf_counter()
        pointwise = self.options.protocol == "pointwise"
        scored = self._yes_probabilities(showings) if pointwise else self._likelihoods(showings)
        seconds = (time.perf_counter() - start) / len(showings)
        outcomes = []
        for scores, tokens in scored:
            raw = tuple(f"{value:.6f}" for value in scores)
            if any(map(math.isnan, scores)):
                nobody, error = (None,) * len(scores), "the judge's model gave NaN"
                outcomes.append(Outcome(nobody, raw, tokens, seconds, error))
            else:
                ranks = ranks_from_scores(scores, _SCORE_TIE)
                outcomes.append(Outcome(ranks, raw, tokens, seconds, scores=tuple(scores)))
        return outcomes

    def _yes_probabilities(self, showings: Sequence[Showing]) -> list[tuple[list[float], int]]:
        """For each showing the probability of yes against no for each text, and the tokens read."""
        from rlaif_fast.policy.forward_rows import reply_logps

        yes, no = self._answer_tokens
        words = [[token] for token in (*yes, *no)]
        prompts = [
            self._encode(
                showing, _POINTWISE, question_block(showing.request) + answers_block([("answer", text)])
            )
            for showing in showings
            for text in showing.texts
        ]
        features = self.policy.encode_media(prompts)
        values = []
        for candidates in reply_logps(self.policy, prompts, [words] * len(prompts), features):
            logps = torch.cat(candidates)
            split = logps[: len(yes)].logsumexp(0) - logps[len(yes) :].logsumexp(0)
            values.append(split.sigmoid().item())
        results, at = [], 0
        for showing in showings:
            own = slice(at, at + len(showing.texts))
            results.append((values[own], sum(len(prompt.input_ids) for prompt in prompts[own])))
            at = own.stop
        return results

    def _likelihoods(self, showings: Sequence[Showing]) -> list[tuple[list[float], int]]:
        """For each showing the geometric mean of each text's token probabilities, and the tokens read."""
        from rlaif_fast.policy.forward_rows import reply_logps

        prompts = [self._encode(showing, None, showing.request.question) for showing in showings]
        replies = [[self._reply(text) for text in showing.texts] for showing in showings]
        features = self.policy.encode_media(prompts)
        results = []
        found = reply_logps(self.policy, prompts, replies, features)
        for prompt, own, candidates in zip(prompts, replies, found):
            tokens = len(prompt.input_ids) + sum(map(len, own))
            results.append(([float(logps.mean().exp()) for logps in candidates], tokens))
        return results

    def _reply(self, text: str) -> list[int]:
        """The tokens of a text and its end token, to follow a prompt of `_encode`."""
        reply, closing = self.encoder.encode_answer(text), self.encoder.closing
        return reply[len(closing) :] if reply[: len(closing)] == closing else reply

    def _encode(self, showing: Showing, rules: str | None, text: str) -> EncodedPrompt:
        request = showing.request
        # The rules' own block lists the options; the plain question is asked as it is of the policy.
        options = request.options if rules is None else ()
        example = Example(id=request.id, question=text, options=options, system=rules)
        return self.encoder.closed(self.encoder.encode(example, request.clips))

    def check_group_size(self, count: int) -> None:
        """Raise `UsageError` if the tokenizer lacks the tokens that the protocol needs for `count` responses."""
        if self.options.protocol == "pointwise":
            _ = self._answer_tokens
        if self.options.protocol == "listwise" and count > len(self._label_tokens):
            raise UsageError(
                f"oracle 'local': the tokenizer of {self.model!r} has {len(self._label_tokens)} letters and "
                f"digits as single tokens, too few for {count} responses; use protocol='pointwise'"
            )

    def _labels(self, showing: Showing) -> list[tuple[str, Label]]:
        """A label for each text and its tokens, assigned anew for every order."""
        count = len(showing.texts)
        self.check_group_size(count)
        labels = self._label_tokens[:count]
        seeded_generator("labels", showing.salt, *showing.texts).shuffle(labels)
        return labels

    @cached_property
    def _sampler(self) -> SharedPrefixSampler | PlainSampler:
        from rlaif_fast.rollout.plain import PlainSampler
        from rlaif_fast.rollout.shared_prefix import SharedPrefixSampler

        return (SharedPrefixSampler if self.policy.shared_prefix else PlainSampler)(self.policy)

    @cached_property
    def _label_tokens(self) -> list[tuple[str, Label]]:
        """Labels of one token both at the start of a reply and after a space; no two labels share a token."""
        found: list[tuple[str, Label]] = []
        taken = {self.encoder.tokenizer.unk_token_id}
        for label in _LABELS:
            ids = self._tokens(f"{label} {label}")
            if len(ids) == 2 and taken.isdisjoint(ids):
                found.append((label, (ids[0], ids[1])))
                taken.update(ids)
        return found

    @cached_property
    def _answer_tokens(self) -> tuple[list[int], list[int]]:
        yes, no = (
            sorted({token for word in words if (token := self._single_token(word)) is not None})
            for words in (_YES, _NO)
        )
        if not yes or not no:
            raise UsageError(
                f"oracle 'local': the tokenizer of {self.model!r} has no single token for Yes and No; use "
                "protocol='likelihood' or protocol='listwise'"
            )
        return yes, no

    def _single_token(self, word: str) -> int | None:
        ids = self._tokens(word)
        return ids[0] if len(ids) == 1 and ids[0] != self.encoder.tokenizer.unk_token_id else None

    def _tokens(self, text: str) -> list[int]:
        return self.encoder.tokenizer(text, add_special_tokens=False)["input_ids"]


def _load(**fields: Any) -> tuple[Policy, PromptEncoder]:
    """The judge and the encoder of its prompts, from the fields of `ModelOptions`."""
    with needed_by("the local oracle", "train"):
        from rlaif_fast.policy.loading import ModelOptions, load_model
        from rlaif_fast.policy.policy import Policy
        from rlaif_fast.prompts.make import make_encoder

    options = ModelOptions(**fields)
    loaded = load_model(options)
    loaded.model.requires_grad_(False).eval()
    policy = Policy(
        loaded.model,
        loaded.tokenizer,
        shared_prefix=options.shared_prefix,
        max_packed_tokens=options.max_packed_tokens,
        max_cached_tokens=options.max_cached_tokens,
    )
    pixels = loaded.patch_spec.budget(options.min_pixels, options.max_pixels)
    return policy, make_encoder(loaded, pixels)
