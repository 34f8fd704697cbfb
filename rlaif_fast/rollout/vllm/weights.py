"""A policy's weights as an engine loads them: adapters merged, in safetensors, in a folder that both see."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlaif_fast.errors import writing
from rlaif_fast.policy.families import unwrap
from rlaif_fast.policy.policy import Policy

SHARED_MEMORY = Path("/dev/shm")  # a file system in memory, where there is one
SHARD_BYTES = 1 << 30  # of merged weights held at once
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def merged_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Each weight as the forward pass uses it, by its name in a checkpoint; tied ones once.

    An adapter that is switched off is left out; the weights are then those of the reference policy.
    """
    base = unwrap(model)
    for name, parameter in base.named_parameters():
        if ".lora_" in name:
            continue
        owner, adapted, leaf = name.rpartition(".base_layer.")
        weight = parameter.detach()
        if adapted and leaf == "weight":
            weight = _with_adapters(base.get_submodule(owner), weight)
        yield f"{owner}.{leaf}" if adapted else name, weight


def _with_adapters(layer: Any, weight: Tensor) -> Tensor:
    """The weight of an adapted layer as it is used now."""
    if layer.disable_adapters or layer.merged:
        return weight
    for adapter in layer.active_adapters:
        weight = weight + layer.get_delta_weight(adapter).detach().to(weight.dtype)
    return weight


def fingerprint(model: Any) -> tuple[int, ...]:
    """Sums of the weights' bits, and which adapters are on: whether an engine still has the model's weights.

    It shows every change, in place or by another tensor. Reading the weights costs a small part of writing them.
    """
    base = unwrap(model)
    sums = [
        p.detach().contiguous().view(INTEGERS[p.element_size()]).sum(dtype=torch.int64)
        for p in base.parameters()
    ]
    switches = [int(bool(getattr(module, "disable_adapters", False))) for module in base.modules()]
    return (*torch.stack([total.to(sums[0].device) for total in sums]).tolist(), *switches)


class WeightsFolder:
    """The folder with the newest weights; removed with the object.

    Args:
        root: Where to make the folder; None is shared memory where the system has it, else the place of temporary
            files.

    Attributes:
        version: Of the weights written last; 0 before the first.
    """

    def __init__(self, root: str | Path | None = None) -> None:
        if root is None and SHARED_MEMORY.is_dir():
            root = SHARED_MEMORY
        with writing(root or tempfile.gettempdir()):
            self._made = tempfile.TemporaryDirectory(prefix="rlaif_fast-weights-", dir=root)
        self.path = Path(self._made.name)
        self.version = 0
        self._written: tuple[int, ...] | None = None

    @torch.no_grad()
    def write(self, policy: Policy) -> bool:
        """Write a new version if the weights have changed since the last; returns whether it did."""
        from safetensors.torch import save_file

        found = fingerprint(policy.model)
        if found == self._written:
            return False
        self._written = None  # until all of them are there
        for file in self.path.glob("*.safetensors"):
            file.unlink()
        with writing(self.path):
            for place, shard in enumerate(_shards(merged_weights(policy.model))):
                save_file(shard, self.path / f"model-{place:05d}.safetensors", metadata={"format": "pt"})
        self._written = found
        self.version += 1
        return True

    def close(self) -> None:
        """Remove the folder."""
        self._made.cleanup()


def _shards(weights: Iterator[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """The weights in main memory, about `SHARD_BYTES` at a time."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, weight in weights:
        shard[name] = weight.cpu().contiguous()
        size += weight.nbytes
        if size >= SHARD_BYTES:
            yield shard
            shard, size = {}, 0
    if shard:
        yield shard
