"""The operators that run the kernels under autograd and torch.compile.

    rank_penalty   rlaif_fast::rank_advantages
    rank_loss      rlaif_fast::rank_loss
    logits_loss    rlaif_fast::logits_stats, logits_grad
    linear_loss    rlaif_fast::linear_stats, linear_grad, linear_grpo_rank_loss

The compiled extension adds rank_penalty, token_loss, row_stats, row_grad_out, row_loss_ and compact_rows_, which these
call on the CPU, and on a GPU rank_penalty and row_loss_. Each operator takes the name of a backend that
`backends.select` chose. Gradients flow through ordinary autograd, once; derivatives by `torch.func` or in forward mode
are refused.
"""

from rlaif_fast.loss.ops.linear_logps import linear_logps
from rlaif_fast.loss.ops.linear_loss import in_backward, linear_loss, padded_logps, with_close
from rlaif_fast.loss.ops.logits_loss import selective_log_softmax
from rlaif_fast.loss.ops.rank_loss import rank_loss
from rlaif_fast.loss.ops.rank_penalty import rank_advantages

__all__ = [
    "in_backward",
    "linear_logps",
    "linear_loss",
    "padded_logps",
    "rank_advantages",
    "rank_loss",
    "selective_log_softmax",
    "with_close",
]
