"""A policy whose weights are cut over the processes, by PyTorch's FSDP2.

Every layer holds its part of the weights and gathers the rest while it runs, forward and backward. Gathering is an
exchange, so all processes must make the same passes in the same order. Three rules follow:

- What reads weights outside a layer (the embedding, the fused head) runs inside `Shards.call`, a forward method of the
  root module.
- A process with fewer passes than another fills up with `empty_loss`, whose gradient is zero.
- Where the numbers of passes cannot be equal (a rollout, an evaluation, the reference), `Shards.gathered` holds all
  weights for a while, and nothing is exchanged inside.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from rlaif_fast.errors import UsageError
from rlaif_fast.policy.features import MediaFeatures, VisionEncoder
from rlaif_fast.policy.prompt import EncodedPrompt

if TYPE_CHECKING:
    from rlaif_fast.policy.policy import Policy

T = TypeVar("T")


class Shards(nn.Module):
    """The root of a sharded model.

    Args:
        model: The model, with its layers already sharded.
        filler: A short prompt; it has a picture if the vision tower is sharded.

    Attributes:
        filler: As given.
        is_whole: Whether every weight is gathered at the moment.
    """

    def __init__(self, model: nn.Module, filler: EncodedPrompt) -> None:
        super().__init__()
        self.model = model
        self.filler = filler
        self.is_whole = False
        self._calling = False

    def call(self, work: Callable[[], T]) -> T:
        """Run `work`, which reads weights; its tensors may be sent backward. All processes call it together."""
        if self._calling or self.is_whole:
            return work()
        self._calling = True
        try:
            return self._forward(work)
        finally:
            self._calling = False

    def _forward(self, work: Callable[[], T]) -> T:
        return work()

    def encode(self, vision: VisionEncoder, prompts: Sequence[EncodedPrompt]) -> MediaFeatures | None:
        """The tower's output for the media of some prompts; a sharded tower needs some, unless all is gathered."""
        if not vision.trains:
            return vision(prompts)
        spans: dict[str, tuple[int, int]] = {}

        def work() -> tuple[Tensor, ...]:
            features = vision(prompts)
            if features is None:
                return ()
            spans.update(features.spans)
            return features.levels

        levels = self.call(work)  # FSDP looks for the graph in tuples, not in our class
        return MediaFeatures(levels, spans) if levels else None

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Hold every weight, in the dtype that the model computes in. All processes enter together."""
        if self.is_whole:
            yield
            return
        units = [module for module in self.modules() if isinstance(module, FSDPModule)]
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        self.is_whole = True
        try:
            yield
        finally:
            self.is_whole = False
            for unit in units:
                unit.reshard()
                unit.set_reshard_after_forward(unit is not self, recurse=False)


def shard_policy(policy: Policy, mesh: DeviceMesh, filler: EncodedPrompt, *, offload: bool = False) -> None:
    """Cut the weights of a policy over the processes of `mesh`, in place: by layer, and the rest together.

    Weights that train become float32 shards, which the optimizer updates, with its moments beside them; each pass
    rounds them to the dtype that the model computes in. A vision tower that does not train stays whole in every
    process, so that each can cache its features.

    Args:
        policy: With `shared_prefix`; every process holds the same weights.
        mesh: Of one dimension; or of two, with weights cut over the second and replicated over the first.
        filler: A short prompt for passes without anything to learn; with a medium where the vision tower trains.
        offload: Keep the shards in main memory, with gradients and moments, and update them there.

    Raises:
        UsageError: A trained weight would need more bits than the rest in its passes, but FSDP would round it.
    """
    compute = MixedPrecisionPolicy(
        param_dtype=policy.head_weight.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    place = CPUOffloadPolicy(pin_memory=policy.device.type == "cuda") if offload else OffloadPolicy()
    trains = policy.vision.trains
    root = Shards(policy.model, filler)
    stacks = [list(policy.decoder.layers)]
    if trains:
        stacks.append(policy.vision.family.tower_layers(policy.model))
    ignored = _wider_than_the_rest(policy)
    if not trains:
        ignored |= set(policy.vision.tower.parameters())
    for layer in itertools.chain(*stacks):
        _widen(layer)
        fully_shard(layer, mesh=mesh, mp_policy=compute, offload_policy=place, ignored_params=ignored)
    _widen(root)
    fully_shard(root, mesh=mesh, mp_policy=compute, offload_policy=place, ignored_params=ignored)
    # By default FSDP gathers ahead in the order of the forward passes it saw, but in a rollout or an evaluation each
    # process makes different ones. The first of a stack and the root have nothing to gather ahead.
    for unit, following in [(root, root), *((s[i], s[max(i - 1, 0)]) for s in stacks for i in range(len(s)))]:
        unit.set_modules_to_backward_prefetch([following])
    register_fsdp_forward_method(root, "_forward")
    root.call(lambda: None)  # the first module that runs becomes the root
    root.reshard()  # type: ignore[operator]
    policy.shards = root


def make_mesh(device: torch.device, processes: int, together: int) -> DeviceMesh:
    """The processes of a run in rows of `together`, each of which holds the weights once."""
    if together == processes:
        return init_device_mesh(device.type, (processes,), mesh_dim_names=("shard",))
    shape = (processes // together, together)
    return init_device_mesh(device.type, shape, mesh_dim_names=("copy", "shard"))


def empty_loss(policy: Policy, features: MediaFeatures | None) -> Tensor:
    """A loss whose backward pass makes the same exchanges as any other, with a zero gradient."""
    from rlaif_fast.loss.api import token_logps

    assert policy.shards is not None
    prompt, device = policy.shards.filler, policy.device
    response = torch.full((1, 2), policy.eos_token_ids[0])
    hidden = policy.response_hidden([prompt], response, torch.tensor([2]), features=features)
    logps = token_logps(hidden, policy.head_weight, response[0].to(device), bias=policy.head_bias)
    assert isinstance(logps, Tensor)
    return 0.0 * logps.sum()


def whole(tensor: Tensor) -> Tensor:
    """The tensor that all processes hold together; each gets a copy. A plain tensor is returned unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def cut_like(values: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that every process has whole, each cut like the one of the same name in `held`."""
    return {name: _cut(value, held.get(name)) for name, value in values.items()}


def _cut(value: Tensor, held: Tensor | None) -> Tensor:
    if not isinstance(held, DTensor):
        return value
    value = value.to(held.device, held.dtype)
    return distribute_tensor(value, held.device_mesh, held.placements, src_data_rank=None)


def _widen(module: nn.Module) -> None:
    """Make trained weights that are not sharded yet float32."""
    for parameter in module.parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            parameter.data = parameter.data.float()


def _wider_than_the_rest(policy: Policy) -> set[nn.Parameter]:
    """The frozen weights that the model keeps in more bits than it computes in (the routers of some mixtures).

    Adapters are wider too, but are rounded for a pass like the weights under them.
    """
    bits = policy.head_weight.dtype.itemsize
    wider = {
        name: p
        for name, p in policy.model.named_parameters()
        if p.is_floating_point() and p.dtype.itemsize > bits and ".lora_" not in name
    }
    for name, parameter in wider.items():
        if parameter.requires_grad:
            raise UsageError(
                f"sharding: expected none where {name} trains, which the model keeps in {parameter.dtype}"
            )
    return set(wider.values())
