"""What the processes of test_world.py do; they import it from here."""

import json
import os
import resource
import signal
import time
from pathlib import Path

import torch
from test_run_dir import Weights, Words
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from rlaif_fast.distributed.world import SharedOutage, World
from rlaif_fast.errors import RlaifFastError, UsageError
from rlaif_fast.oracle import OracleFailedError
from rlaif_fast.runs.checkpoint import CheckpointStore


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
    row = world.gather(torch.arange(12.0).view(3, 4)[world.rank])[-1 - world.rank]  # the other's of two
    answers = {
        "share": world.share("abcde"),
        "sum": world.sum(1.0, world.rank),
        "gather": world.gather({"rank": world.rank}),
        "row": [row.tolist(), row.untyped_storage().nbytes()],
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


def average_in_buckets(world: World, sizes: list[int]) -> list[list[list[float]]]:
    """Gradients of several shapes and dtypes, some absent or not contiguous, averaged in buckets of each size."""
    return [_averaged_in_buckets(world, bucket_bytes) for bucket_bytes in sizes]


def _averaged_in_buckets(world: World, bucket_bytes: int) -> list[list[float]]:
    generator = torch.Generator().manual_seed(world.rank)
    shapes = [(5,), (3, 4), (40,), (2,), (1,), (7, 3)]
    dtypes = [torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float32, torch.float32]
    weights = [torch.nn.Parameter(torch.zeros(shape, dtype=kind)) for shape, kind in zip(shapes, dtypes)]
    for index, weight in enumerate(weights):
        weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)
        if index == 4 and world.rank == 0:
            weight.grad = None
    weights[5].grad = torch.randn(3, 7, generator=generator).T
    world.average_gradients(weights, bucket_bytes)
    return [weight.grad.flatten().tolist() for weight in weights]


def look_for_folders(world: World, cases: list[list[str]]) -> list[list[str]]:
    """What each process says, case by case, when every one of them is a machine with its own folder."""
    world.local_size = 1
    said = []
    for folders in cases:
        try:
            world.check_shared(Path(folders[world.rank]))
        except UsageError as error:
            said.append(world.gather(str(error)))
        else:
            said.append(world.gather(""))
    return said


def run_out_of_memory(world: World, rank: int) -> None:
    """Process `rank` fails by an error that is also what a broken connection raises."""
    world.barrier()
    if world.rank == rank:
        raise RuntimeError("out of memory, says process " + str(rank))
    world.barrier()


def be_killed(world: World, rank: int) -> None:
    """Process `rank` is killed while the others wait for it."""
    world.barrier()
    if world.rank == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    world.barrier()


def be_killed_unnoticed(world: World, rank: int) -> None:
    """Process `rank` is killed while the others are busy."""
    world.barrier()
    if world.rank == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def be_killed_in_an_exchange(world: World, rank: int) -> None:
    """Process `rank` is killed while the others wait for it in an exchange that is not the world's, as FSDP's are."""
    world.barrier()
    if world.rank == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.all_reduce(torch.zeros(1))


def be_killed_while_stuck(world: World, rank: int) -> None:
    """Process `rank` is killed while the others are where Python cannot interrupt them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    be_killed_unnoticed(world, rank)


def sleep(world: World, seconds: float) -> None:
    """Say that all processes are there, and sleep."""
    world.barrier()
    if world.is_main:
        print("asleep", flush=True)
    time.sleep(seconds)


def lose_the_judge(world: World, folder: str) -> None:
    """The judge of process 1 answers and then goes down; each process leaves a file in the folder once it knows."""

    def judge(down: bool) -> str:
        if down and world.rank == 1:
            raise OracleFailedError("the judge is down")
        return "met by none"

    assert world.together(lambda: judge(down=False)) == "met by none"
    try:
        world.together(lambda: judge(down=True))
    except SharedOutage:
        (Path(folder) / str(world.rank)).touch()
        world.barrier()
        raise


def meet_in_a_step(world: World, met: Exception) -> None:
    """Process 1 meets something in a step that all take together."""

    def step() -> None:
        if world.rank == 1:
            raise met

    world.together(step)


def exceed_the_limit(world: World, folders: dict[bool, str]) -> dict[bool, list[str]]:
    """What each process says, asynchronous or not, where its system lets no file of process 1 hold its shards."""
    world.connect()
    model = fully_shard(Weights(100_000), mesh=init_device_mesh("cpu", (world.size,)))
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    told = {}
    for asynchronous, folder in folders.items():
        store = CheckpointStore(Path(folder), {}, read_only=not world.is_main, asynchronous=asynchronous)
        try:
            shards = {"shards": {"weight": model.weight.detach()}}
            store.save("rl-000001", model, Words(), shards, last=True)
            store.wait()
        except RlaifFastError as error:
            told[asynchronous] = world.gather(str(error))
        else:
            told[asynchronous] = world.gather("written")
    return told
