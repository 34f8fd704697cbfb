"""OpenRLHF (0.11.2): a policy loss to replace `actor_loss_fn`, and an experience maker with an oracle's advantages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlaif_fast.adapters.ranking import RowRanker, mean_logps
from rlaif_fast.loss.api import grpo_rank_loss
from rlaif_fast.oracle.base import Oracle
from rlaif_fast.policy.vocabulary import texts_of


class PolicyLoss(nn.Module):
    """The clipped loss.

    Args:
        clip_eps_low: `epsilon` of `grpo_rank_loss`.
        clip_eps_high: `epsilon_high`.
        dual_clip: As in `grpo_rank_loss`.
        token_level_loss: Mean over the tokens of the batch, else over responses of the mean over tokens; a response
            without a token does not count.
    """

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
    ) -> None:
        super().__init__()
        self.token_level_loss = token_level_loss
        self.options: dict[str, Any] = {
            "epsilon": clip_eps_low,
            "epsilon_high": clip_eps_high,
            "dual_clip": dual_clip,
        }

    def forward(
        self,
        log_probs: Tensor,  # (B, A)
        old_log_probs: Tensor,  # (B, A)
        advantages: Tensor,  # (B, A)
        action_mask: Tensor | None = None,  # (B, A)
        rollout_log_probs: Tensor | None = None,  # (B, A)
        dp_size: int = 1,
        batch_num_tokens: int | float | Tensor | None = None,
        global_batch_size: int | float | Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return loss, share of clipped tokens, mean of old minus new log-probability, mean of the sampler's minus old,
        and the share of tokens left out because of that difference, which is 0.

        The last two are None without `rollout_log_probs`. These are only compared, not used as weights.

        Raises:
            ValueError: Several processes without the count of the whole batch.
        """
        whole = "batch_num_tokens" if self.token_level_loss else "global_batch_size"
        items = batch_num_tokens if self.token_level_loss else global_batch_size
        if items is None and dp_size > 1:
            raise ValueError(f"{whole} must be given where dp_size is above 1; got dp_size={dp_size}")
        out = grpo_rank_loss(
            log_probs,
            old_logps=old_log_probs,
            advantages=advantages,
            mask=action_mask,
            loss_type="dapo" if self.token_level_loss else "grpo",
            empty_rows="skip",
            num_items_in_batch=None if items is None else items / dp_size,
            **self.options,
        )
        mask = torch.ones_like(log_probs) if action_mask is None else action_mask
        kl = _mean(old_log_probs - log_probs.detach(), mask)
        sampler = None if rollout_log_probs is None else _mean(rollout_log_probs - old_log_probs, mask)
        left_out = None if sampler is None else torch.zeros_like(sampler)
        return out.loss, out.stats["clip_ratio/region_mean"], kl, sampler, left_out


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    return x.masked_fill(~mask.bool(), 0.0).sum() / mask.sum().clamp(min=1)


def experience_maker(base: type, oracle: Oracle, **options: Any) -> type:
    """Return a subclass of OpenRLHF's experience maker whose advantages come from an oracle's order.

    Set `openrlhf.trainer.ppo_trainer.RemoteExperienceMaker` to it in the process that makes the trainer. The
    advantages take the place of rewards, so `algo.advantage.estimator` must be "dr_grpo": they sum to 0 over a group,
    and it subtracts nothing else; any other is refused when the trainer makes the experience maker. A response
    without an action has no advantage.

    Args:
        base: `RemoteExperienceMaker` of `openrlhf.trainer.ppo_utils.experience_maker`.
        oracle: Ranks the `rollout.n_samples_per_prompt` responses of a prompt; a label is the reference answer.
        options: Options of `RowRanker`.
    """
    ranker = RowRanker(oracle, **options)

    class OracleExperienceMaker(base):  # type: ignore[misc, valid-type]
        def __init__(self, *parts: Any, **options: Any) -> None:
            super().__init__(*parts, **options)
            estimator = self.strategy.args.algo.advantage.estimator
            if estimator != "dr_grpo":
                raise ValueError(f'algo.advantage.estimator must be "dr_grpo", got {estimator!r}')

        def compute_advantages_and_returns(self, experiences):
            """Rank the groups, then let OpenRLHF spread the advantages over the tokens."""
            size = self.strategy.args.rollout.n_samples_per_prompt
            scores = [mean_logps(e.action_log_probs.cpu(), e.action_mask.cpu()) for e in experiences]
            ranked = ranker(
                [place // size for e in experiences for place in e.index],
                [prompt for e in experiences for prompt in e.prompts],
                [text for e in experiences for text in _texts(e, self.tokenizer)],
                [label for e in experiences for label in e.labels],
                torch.cat(scores),
                {"images": [image for e in experiences for image in e.images or [None] * len(e.index)]},
            )
            rows = torch.split(ranked.advantages, [len(e.index) for e in experiences])
            for experience, advantages in zip(experiences, rows):
                experience.rewards = advantages.to(experience.action_mask.device)
            return super().compute_advantages_and_returns(experiences)

    return OracleExperienceMaker


def _texts(experience: Any, tokenizer: Any) -> list[str]:
    """The responses; `action_mask` is shifted one token to the left of `sequences`."""
    rows = zip(experience.sequences[:, 1:], experience.action_mask.bool())
    return texts_of(tokenizer, [ids[mask] for ids, mask in rows])
