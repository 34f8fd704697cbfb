"""A head whose vocabulary is sharded over the ranks of a process group.

Every rank holds rows [offset, offset + V_local) of the weight and all of the hidden states. One all-gather of
three numbers a row makes the statistics of the whole vocabulary from those of the shards:

    lse   = logsumexp over ranks of lse_r,      sum p z = sum over ranks of exp(lse_r - lse) * (lse_r - H_r)
    logp  = z_y - lse, where z_y comes from the rank that owns the token,        H = lse - sum p z

The gradient of each shard follows locally; that of the hidden states is summed over the ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from rlaif_fast.loss.inputs import RowStats


class VocabularyShard:
    """The part of the vocabulary that this rank holds.

    Args:
        group: Its ranks hold consecutive shards, in the order of the ranks.
        size: V_local, rows of the weight on this rank; shards may differ in size.
        device: Where the tensors are.

    Raises:
        TypeError: This process does not belong to the group.
    """

    def __init__(self, group: dist.ProcessGroup, size: int, device: torch.device) -> None:
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"process_group must be one that this process belongs to; got {group!r}")
        self.group = group
        self.size = size
        sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(group.size())]
        dist.all_gather(sizes, torch.tensor([size], device=device), group=group)
        self.offset = int(sum(sizes[: group.rank()]))  # type: ignore[arg-type]
        self.vocabulary = int(sum(sizes))  # type: ignore[arg-type]

    def local(self, token_ids: Tensor) -> Tensor:  # (M,)
        """Return the ids within this shard, -1 for the tokens of others."""
        ids = token_ids - self.offset
        return ids.where((ids >= 0) & (ids < self.size), -1)

    def combine(self, stats: RowStats) -> RowStats:  # of this shard; logps NaN for the tokens of others
        """Return the statistics of the whole vocabulary."""
        target = (stats.logps + stats.lse).where(stats.logps.isfinite(), -torch.inf)
        mine = torch.stack([stats.lse, stats.lse - stats.entropy, target])  # (3, M)
        everyone = torch.stack(self._gather(mine))  # (ranks, 3, M)
        lse_r, mean_r, target_r = everyone.unbind(1)
        lse = lse_r.logsumexp(0)
        share = (lse_r - lse).exp()
        mean = (share * mean_r).sum(0)
        return RowStats(target_r.amax(0) - lse, lse, lse - mean)

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over the ranks."""
        dist.all_reduce(x, group=self.group)
        return x

    def _gather(self, x: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(x) for _ in range(self.group.size())]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return parts
