"""How a token is drawn, the same for every sampler.

Each draw is the inverse of the cumulative distribution at a uniform number that belongs to (row, step) of the rollout.
The numbers are made before the first step, so what a row draws does not depend on how many rows there are, when the
others end, or how the rollout is cut to fit memory: samplers that compute the same logits give the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rlaif_fast.errors import RlaifFastError
from rlaif_fast.loss.options import check_divisor
from rlaif_fast.policy.features import MediaFeatures
from rlaif_fast.policy.policy import Policy
from rlaif_fast.policy.prompt import EncodedPrompt
from rlaif_fast.policy.vocabulary import texts_of
from rlaif_fast.rollout.base import Rollout, SamplingParams
from rlaif_fast.rollout.reasoning import ReasoningBudget

SCORED_LOGITS = 1 << 25  # held at once: 128 MiB in float32


def check_params(params: SamplingParams, num_generations: int, prompts: Sequence[EncodedPrompt]) -> None:
    """Raise ValueError where a setting is out of range or there is nothing to respond to."""
    if not len(prompts):
        raise ValueError("prompts: expected at least 1, got none")
    if num_generations < 1:
        raise ValueError(f"num_generations: expected at least 1, got {num_generations}")
    if params.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, got {params.max_new_tokens}")
    if params.temperature != 0:  # not greedy
        check_divisor("temperature", params.temperature)
    if not 0 < params.top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1], got {params.top_p}")
    if params.top_k < 0:
        raise ValueError(f"top_k: expected 0 (all) or more, got {params.top_k}")
    if not 0 <= params.min_new_tokens <= params.max_new_tokens:
        raise ValueError(
            f"min_new_tokens: expected 0 to {params.max_new_tokens}, got {params.min_new_tokens}"
        )


def uniforms(rows: int, params: SamplingParams) -> Tensor:
    """(rows, max_new_tokens) float64 in [0, 1): the draw of each response at each step."""
    generator = None
    if params.seed is not None:
        generator = torch.Generator().manual_seed(params.seed)
    return torch.rand(rows, params.max_new_tokens, generator=generator, dtype=torch.float64)


class TokenSampler:
    """Draws the next tokens of some responses from their logits.

    Args:
        policy: The policy.
        params: How to draw.
        responses: B of the rollout; needed only for `max_reasoning_tokens`, which follows each response.
    """

    def __init__(self, policy: Policy, params: SamplingParams, responses: int = 0) -> None:
        self.params = params
        self._budget: ReasoningBudget | None = None
        if params.max_reasoning_tokens is not None and responses:
            self._budget = ReasoningBudget(
                policy, params.max_reasoning_tokens, responses, params.max_new_tokens
            )
        self._eos = torch.tensor(policy.eos_token_ids, device=policy.device)

    def __call__(
        self,
        logits: Tensor,  # (A, V) float32
        rows: Tensor | None,  # (B,) the row of each response in `logits`; None where they are the same
        uniform: Tensor,  # (B,) float64
        step: int,
        live: Tensor | None = None,  # (B,) which of the rollout's responses they are; None for all of them
    ) -> tuple[Tensor, Tensor]:
        """Return tokens (B,) and their float32 log-probabilities before top-k, top-p and min_new_tokens."""
        logps, kept = self.distributions(logits, early=step < self.params.min_new_tokens)
        if self.params.temperature == 0:
            tokens = kept.argmax(-1)
            tokens = tokens if rows is None else tokens[rows]
        else:
            mass = kept.softmax(-1).cumsum(-1, dtype=torch.float64)  # (A, V)
            mass = mass if rows is None else mass[rows]
            total = mass[:, -1:]
            # The first token whose cumulated mass exceeds the draw; it has mass itself. Rounding must not
            # reach the total.
            target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
            tokens = torch.searchsorted(mass, target, right=True)[:, 0]
            tokens = tokens.clamp(max=mass.shape[-1] - 1)  # NaN has no such token; `make_rollout` raises
        if self._budget is not None:
            tokens = self._budget(tokens, live, step)
        logps = logps.gather(-1, tokens[:, None])[:, 0] if rows is None else logps[rows, tokens]
        return tokens, logps

    @property
    def forced(self) -> Tensor | None:
        """(B, max_new_tokens) bool, the tokens that were not drawn; None where all were."""
        return None if self._budget is None else self._budget.forced

    def distributions(self, logits: Tensor, *, early: bool) -> tuple[Tensor, Tensor]:
        """Log-probabilities (A, V) of the policy, and those left to draw from, which need not add up to 1.

        Args:
            logits: (A, V) float32.
            early: Whether the responses have fewer than `min_new_tokens` tokens, so that none may end.
        """
        params = self.params
        logps = (logits / params.temperature if params.temperature not in (0.0, 1.0) else logits).log_softmax(
            -1
        )
        kept = logps.index_fill(-1, self._eos, float("-inf")) if early else logps
        if params.temperature > 0:
            kept = _nucleus(kept, params.top_k, params.top_p)
        return logps, kept


def score(
    policy: Policy,
    prompts: Sequence[EncodedPrompt],
    token_ids: Tensor,  # (B, T)
    mask: Tensor,  # (B, T) bool
    params: SamplingParams,
    features: MediaFeatures | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities that a sampler like ours would give responses drawn elsewhere.

    Args:
        policy: Whose probabilities they are.
        prompts: N prompts.
        token_ids: The responses, those of a prompt adjacent.
        mask: True on their tokens.
        params: How they were drawn.
        features: From `Policy.encode_media` of the prompts; None to encode here.

    Returns:
        Float32 (M,), response after response: the log-probabilities of `Rollout.logps`; and those of the distribution
        drawn from, after top-k, top-p and min_new_tokens, -inf on a token that was cut.
    """
    sampler = TokenSampler(policy, params)
    hidden = policy.response_hidden(prompts, token_ids, mask.sum(1), features=features)
    tokens = token_ids.to(hidden.device)[mask]
    steps = torch.arange(mask.shape[1], device=hidden.device).expand(mask.shape)[mask]
    is_early = steps < params.min_new_tokens
    before, drawn = (torch.empty(len(hidden), device=hidden.device) for _ in range(2))
    at_once = max(1, SCORED_LOGITS // policy.head_weight.shape[0])
    for early in (True, False):
        for rows in (is_early == early).nonzero()[:, 0].split(at_once):
            logps, kept = sampler.distributions(policy.logits(hidden[rows]), early=early)
            chosen = tokens[rows, None]
            before[rows] = logps.gather(-1, chosen)[:, 0]
            drawn[rows] = (kept.gather(-1, chosen) - kept.logsumexp(-1, keepdim=True))[:, 0]
    return before, drawn


def _nucleus(logps: Tensor, top_k: int, top_p: float) -> Tensor:
    if 0 < top_k < logps.shape[-1]:
        least = logps.topk(top_k).values[:, -1:]
        logps = logps.masked_fill(logps < least, float("-inf"))
    if top_p < 1:
        ordered, order = logps.sort(-1, descending=True)
        mass = ordered.softmax(-1)
        dropped = mass.cumsum(-1) - mass >= top_p  # the token that crosses the mark stays
        logps = logps.masked_fill(dropped.scatter(-1, order, dropped), float("-inf"))
    return logps


class Drawn:
    """What B responses have drawn so far, in main memory.

    Attributes:
        token_ids: (B, max_new_tokens) int64.
        logps: (B, max_new_tokens) float32.
        lengths: (B,) tokens drawn.
        finished: (B,) bool, whether the last of them ends the response.
    """

    def __init__(self, policy: Policy, responses: int, max_new_tokens: int) -> None:
        self.token_ids = np.zeros((responses, max_new_tokens), dtype=np.int64)
        self.logps = np.zeros((responses, max_new_tokens), dtype=np.float32)
        self.lengths = np.zeros(responses, dtype=np.int64)
        self.finished = np.zeros(responses, dtype=bool)
        self._eos_token_ids = np.asarray(policy.eos_token_ids)

    def record(self, rows: np.ndarray, step: int, tokens: np.ndarray, logps: np.ndarray) -> np.ndarray:
        """Record what `rows` drew at a step; returns which of them ended."""
        self.token_ids[rows, step] = tokens
        self.logps[rows, step] = logps
        self.lengths[rows] = step + 1
        ended = (tokens[:, None] == self._eos_token_ids).any(1)
        self.finished[rows[ended]] = True
        return ended

    def rollout(
        self,
        policy: Policy,
        prompts: Sequence[EncodedPrompt],
        num_generations: int,
        forced: Tensor | None = None,
    ) -> Rollout:
        """Return the rollout; see `make_rollout`."""
        ids, logps, lengths, finished = self.token_ids, self.logps, self.lengths, self.finished
        return make_rollout(policy, prompts, num_generations, ids, logps, lengths, finished, forced)


def make_rollout(
    policy: Policy,
    prompts: Sequence[EncodedPrompt],
    num_generations: int,
    token_ids: np.ndarray,  # (B, T)
    logps: np.ndarray,  # (B, T)
    lengths: np.ndarray,  # (B,)
    finished: np.ndarray,  # (B,)
    forced: Tensor | None = None,  # (B, T)
) -> Rollout:
    """Return the rollout, cut to the longest response, padded and decoded (equal responses once).

    Raises:
        RlaifFastError: A log-probability is NaN.
    """
    if np.isnan(logps).any():
        raise RlaifFastError(
            "the policy's logits are not finite: its weights are damaged; start from an earlier checkpoint with a "
            "lower learning rate, or with dtype float32"
        )
    width = int(lengths.max(initial=1))
    mask = np.arange(width) < lengths[:, None]
    ids = np.where(mask, token_ids[:, :width], policy.pad_token_id)
    sequences = [tuple(row[:length]) for row, length in zip(ids.tolist(), lengths.tolist())]
    distinct = list(dict.fromkeys(sequences))
    decoded = dict(zip(distinct, texts_of(policy.tokenizer, distinct)))
    return Rollout(
        prompts=tuple(prompts),
        num_generations=num_generations,
        token_ids=torch.from_numpy(ids).to(policy.device),
        mask=torch.from_numpy(mask).to(policy.device),
        logps=torch.from_numpy(np.where(mask, logps[:, :width], 0.0).astype(np.float32)).to(policy.device),
        texts=tuple(decoded[sequence] for sequence in sequences),
        finished=torch.from_numpy(finished).to(policy.device),
        forced=None if forced is None else forced[:, :width] & torch.from_numpy(mask).to(policy.device),
    )
