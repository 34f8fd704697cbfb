"""Responses that consist of labels alone: the reply of a ranking judge, which then needs no parsing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlaif_fast.policy.policy import Policy
from rlaif_fast.rollout.base import SamplingParams
from rlaif_fast.rollout.generate import TokenSampler

Label = tuple[int, int]  # its token at the start of a response, and its token after another label


class LabelSampler:
    """Draws greedily among the labels that a response has not named yet, then ends it; called as `TokenSampler` is.

    Args:
        policy: The policy.
        labels: For each of B responses its labels.
    """

    forced = None  # labels are chosen by the policy

    def __init__(self, policy: Policy, labels: Sequence[Sequence[Label]]) -> None:
        tokens = [torch.tensor(row, device=policy.device) for row in labels]
        self._tokens = pad_sequence(tokens, batch_first=True)  # (B, L, 2)
        counts = torch.tensor([len(row) for row in labels], device=policy.device)
        self._left = torch.arange(self._tokens.shape[1], device=policy.device) < counts[:, None]  # (B, L)
        self._eos = policy.eos_token_ids[0]

    def __call__(
        self,
        logits: Tensor,  # (A, V) float32
        rows: Tensor | None,  # (n,) the row of each response in `logits`; None where they are the same
        uniform: Tensor,  # (n,), not read
        step: int,
        live: Tensor | None = None,  # (n,) which of the B responses they are; None for all of them
    ) -> tuple[Tensor, Tensor]:
        """Return tokens (n,) and their log-probabilities among all tokens."""
        logits = logits if rows is None else logits[rows]
        of = torch.arange(len(logits), device=logits.device) if live is None else live
        tokens, left = self._tokens[of, :, int(step > 0)], self._left[of]
        logps = logits.log_softmax(-1)
        chosen = logps.gather(1, tokens).masked_fill(~left, float("-inf")).argmax(1)
        self._left[of, chosen] = False
        drawn = torch.where(left.any(1), tokens.gather(1, chosen[:, None])[:, 0], self._eos)
        return drawn, logps.gather(1, drawn[:, None])[:, 0]


def token_sampler(
    policy: Policy,
    params: SamplingParams,
    responses: int,
    labels: Sequence[Sequence[Label]] | None,
) -> TokenSampler | LabelSampler:
    """What draws the tokens of some responses: labels, where they are given, else any."""
    return TokenSampler(policy, params, responses) if labels is None else LabelSampler(policy, labels)
