"""Registers the policy loss with verl when verl imports this: VERL_USE_EXTERNAL_MODULES, group `verl.plugins`."""

from __future__ import annotations

from verl.trainer.ppo.core_algos import register_policy_loss

from rlaif_fast.adapters.verl import policy_loss

register_policy_loss("rlaif_fast")(policy_loss)
