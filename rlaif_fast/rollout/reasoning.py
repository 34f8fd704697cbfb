"""A bound on the reasoning of models whose chat template ends the prompt inside it.

A response that has not closed its reasoning within the budget gets it closed: the next tokens are those that close it
in the answers of SFT. They are part of the response, which goes on after them, but the policy did not choose them, so
the loss and the policy's score of a response leave them out (`Rollout.forced`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlaif_fast.errors import UsageError
from rlaif_fast.policy.policy import Policy
from rlaif_fast.policy.vocabulary import CLOSES

CLOSING = f"{CLOSES}\n\n"


def closing_tokens(tokenizer: Any) -> list[int]:
    """The tokens that close the reasoning.

    Raises:
        UsageError: The tokenizer spells the mark with several tokens, so that it cannot be told from text.
    """
    mark = tokenizer.convert_tokens_to_ids(CLOSES)
    tokens = tokenizer(CLOSING, add_special_tokens=False)["input_ids"]
    if mark in (None, tokenizer.unk_token_id) or tokens[0] != mark:
        raise UsageError(f"max_reasoning_tokens: the tokenizer has no token of its own for {CLOSES}")
    return tokens


def check_budget(budget: int, tokenizer: Any, max_new_tokens: int) -> None:
    """Refuse a budget that leaves no room for an answer.

    Raises:
        UsageError: The budget is out of range; the message names the largest.
    """
    most = max_new_tokens - len(closing_tokens(tokenizer)) - 1
    if not 1 <= budget <= most:
        raise UsageError(
            f"max_reasoning_tokens: expected 1 to {most}, so that an answer fits into max_completion_length "
            f"{max_new_tokens}; got {budget}"
        )


class ReasoningBudget:
    """Follows the responses of a rollout and closes the reasoning that is still open when the budget is spent.

    Args:
        policy: Whose responses they are.
        budget: Tokens of reasoning.
        responses: B.
        max_new_tokens: T.

    Attributes:
        forced: (B, T) bool, the tokens that were not drawn.
    """

    def __init__(self, policy: Policy, budget: int, responses: int, max_new_tokens: int) -> None:
        check_budget(budget, policy.tokenizer, max_new_tokens)
        device = policy.device
        self._budget = budget
        self._closing = torch.tensor(closing_tokens(policy.tokenizer), device=device)
        self._open = torch.ones(responses, dtype=torch.bool, device=device)
        self.forced = torch.zeros(responses, max_new_tokens, dtype=torch.bool, device=device)

    def __call__(
        self,
        tokens: Tensor,  # (n,) what the policy drew
        live: Tensor | None,  # (n,) by which responses; None for all
        step: int,
    ) -> Tensor:
        """Return the tokens that the responses take, (n,)."""
        rows = slice(None) if live is None else live
        place = step - self._budget
        if place < 0:
            self._open[rows] &= tokens != self._closing[0]
            return tokens
        if place >= len(self._closing):
            return tokens
        self.forced[rows, step] = self._open[rows]
        return torch.where(self._open[rows], self._closing[place], tokens)
