"""What the processes of test_world.py do; they import it from here."""

import json
from pathlib import Path

import torch

from rlaif_fast.errors import UsageError
from rlaif_fast.trainer.world import World


def exchange(world: World, folder: str) -> dict:
    """What every method gives; the other process writes its answers to `folder`."""
    torch.set_num_threads(1)
    weights = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2, 2))]
    weights[0].grad = torch.full((3,), 1.0 + world.rank)
    if world.rank == 0:  # the other process has no gradient here: a zero
        weights[1].grad = torch.full((2, 2), 8.0)
    world.average_gradients(weights)
    value = torch.tensor([7.0 + world.rank])
    world.broadcast([value])
    order = Path(folder) / "order"
    with world.main_first(), order.open("a") as lines:
        lines.write(str(world.rank))
    answers = {
        "share": world.share("abcde"),
        "sum": world.sum(1.0, world.rank),
        "gather": world.gather({"rank": world.rank}),
        "grads": [weight.grad.flatten().tolist() for weight in weights],
        "broadcast": value.item(),
    }
    (Path(folder) / f"{world.rank}.json").write_text(json.dumps(answers))
    world.barrier()
    return answers


def refuse(world: World, rank: int) -> None:
    if world.rank == rank:
        raise UsageError(f"process {rank} will not")
    world.barrier()
