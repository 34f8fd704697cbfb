"""The weights of the reference: copies of the trained ones, which they replace while the reference runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlaif_fast.policy.shard import own_part, whole

Pairs = Sequence[tuple[nn.Parameter, Tensor]]


def copies_of(parameters: Mapping[str, nn.Parameter]) -> Pairs:
    """Each parameter with a copy of its present values; for a sharded one, a copy of this process's part."""
    return [(p, own_part(p.detach()).clone()) for p in parameters.values()]


@contextlib.contextmanager
def exchanged(pairs: Pairs) -> Iterator[None]:
    """Put each copy in its parameter's place for the duration of the block."""
    _exchange(pairs)
    try:
        yield
    finally:
        _exchange(pairs)


def is_new_lora(trained: Mapping[str, nn.Parameter]) -> bool:
    """Whether only LoRA trains and it has learned nothing yet: every B is zero."""
    return all(".lora_" in name for name in trained) and not any(
        bool(whole(p.detach()).any())
        for name, p in trained.items()
        if ".lora_B." in name or ".lora_embedding_B." in name
    )


def _exchange(pairs: Pairs) -> None:
    """Swap each parameter with its copy; only parts of sharded weights are actually copied."""
    for parameter, other in pairs:
        if isinstance(parameter, DTensor):
            part = own_part(parameter.detach())  # FSDP gathers from this memory, whatever `data` says
            mine = part.clone()
            part.copy_(other)
            other.copy_(mine)
        else:
            mine = parameter.data
            parameter.data = other.data
            other.data = mine
