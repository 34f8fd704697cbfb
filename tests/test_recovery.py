"""What is damaged is noticed: every file that a run goes on from, every kind of damage, one line each."""

import itertools
import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from fuzzing import fuzz_seed
from test_run_dir import Weights, Words

from rlaif_fast.errors import RlaifFastError
from rlaif_fast.outputs import write_atomically
from rlaif_fast.runs.checkpoint import CheckpointStore
from rlaif_fast.runs.files import json_line
from rlaif_fast.runs.folder import RunDir
from rlaif_fast.runs.integrity import Damage, sealed, unseal
from rlaif_fast.runs.recovery import recover

SEED = fuzz_seed()
STEPS = (2, 4, 6)


def write_run(path: Path) -> RunDir:
    """A run that began RL and wrote three checkpoints there; the second is the best. Two are kept, and the best."""
    run = RunDir.create(path)
    run.config.write_text("model: tiny\nbeta: 0.1\n")
    store = CheckpointStore(run.checkpoints, {"preprocessor_config.json": '{"image_mean": [0.5]}'}, run=run)

    def record(file: Path, **values) -> None:
        with file.open("a") as lines:
            lines.write(json_line(values))

    def save(name, step, **roles):
        model = Weights(16)
        model.weight.data += step
        state = {"step": step, "moments": torch.full((16,), float(step))}
        store.save(name, model, Words(), state, last=True, **roles)

    for step in range(3):
        record(run.metrics, stage="sft", step=step, loss=1 / (step + 1))
    record(run.samples, phase="sft", greedy="red")
    record(run.quarantine, path="bad.mp4", reason="no video")
    record(run.predictions("sft"), example_id="1", correct=True)
    save("sft", 0, sft=True)
    store.mark(best="sft")
    for step in range(1, 7):
        record(run.metrics, stage="rl", step=step, loss=1 / step)
        record(run.rollouts, step=step, responses=["a", "b"])
        if step in STEPS:
            save(f"rl-{step:06d}", step, best=step == 4)
    record(run.metrics, stage="rl", step=7)  # behind the last checkpoint
    return run


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("written") / "run").path


@pytest.fixture
def run(written, tmp_path) -> RunDir:
    return RunDir(shutil.copytree(written, tmp_path / "run"))


def last(run: RunDir) -> str:
    return CheckpointStore(run.checkpoints, {}, read_only=True).path("last").name


def test_folders_that_no_run_writes_are_left_alone(run):
    notes, copy = run.checkpoints / "notes", run.checkpoints / "my-backup"
    notes.mkdir()
    (notes / "mine.txt").write_text("mine")
    shutil.copytree(run.checkpoints / "rl-000004", copy)
    half = run.checkpoints / ".rl-000007.partial"
    half.mkdir()
    assert recover(run) == [] and last(run) == "rl-000006"
    CheckpointStore(run.checkpoints, {}, run=run).mark(best="rl-000006")
    assert (notes / "mine.txt").read_text() == "mine" and (copy / "manifest.json").is_file()
    assert not half.exists() and not (run.checkpoints / "rl-000004.partial").exists()


def test_a_whole_run_says_nothing_and_is_cut_back(run):
    assert recover(run) == []
    assert last(run) == "rl-000006"
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()][-1] == 6
    assert recover(run) == []


def test_the_checkpoints_that_are_kept(run):
    names = {path.name for path in run.checkpoints.iterdir() if path.is_dir()}
    assert names == {"sft", "rl-000004", "rl-000006"}
    index = json.loads((run.checkpoints / "index.json").read_text())
    assert (index["last"], index["best"], index["sft"]) == ("rl-000006", "rl-000004", "sft")


# --- one damage of each kind --------------------------------------------------------------------------------


def flip(path: Path, rng: random.Random, limit: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    place = rng.randrange(min(len(data), limit or len(data)))
    data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(data))


def cut(path: Path, rng: random.Random, limit: int | None = None) -> None:
    os.truncate(path, rng.randrange(min(path.stat().st_size, limit or path.stat().st_size)))


def blank(path: Path, rng: random.Random, limit: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    end = min(len(data), limit or len(data))
    start = rng.randrange(end)
    stop = min(end, start + rng.randrange(1, 65))
    data[start:stop] = bytes(stop - start) if any(data[start:stop]) else b"\xff" * (stop - start)
    path.write_bytes(bytes(data))


def remove(path: Path, rng: random.Random, limit: int | None = None) -> None:
    path.unlink()


def other(path: Path, rng: random.Random, limit: int | None = None) -> None:
    path.write_bytes(rng.randbytes(path.stat().st_size))


KINDS = (flip, cut, blank, remove, other)


def sealed_length(run: RunDir, path: Path) -> int | None:
    """How much of a record the last checkpoint vouches for; what stands behind is dropped anyway."""
    manifest = unseal(run.checkpoints / "rl-000006" / "manifest.json")
    return manifest["logs"].get(path.name, (None,))[0] if path.parent == run.path else None


def damaged_names(run: RunDir, path: Path) -> set[str]:
    """The checkpoints that cannot be used once this file is damaged anywhere."""
    if run.checkpoints in path.parents and path.parent != run.checkpoints:
        return {path.parent.name}
    return set()


def files_of(run: RunDir) -> list[Path]:
    """Everything that a run goes on from."""
    checkpoints = [path for path in run.checkpoints.rglob("*") if path.is_file()]
    return sorted([*checkpoints, run.config, *(path for path in run.records if path.is_file())])


def recovers(run: RunDir, path: Path, where: str) -> bool:
    """Whether a whole checkpoint is left; either way the damage is told in one line that names the file."""
    try:
        told = recover(run)
    except RlaifFastError as error:
        assert str(path) in str(error) and "\n" not in str(error), where
        # Only what every checkpoint needs leaves none: the start of RL, or records from before it.
        assert path.parent.name == "sft" or path.parent == run.path, where
        return False
    lines = [line for line in told if line.startswith("damaged: ")]
    assert len(lines) == 1 and str(path) in lines[0] and "\n" not in lines[0], (where, told)
    return True


def test_random_damages_are_told_and_gone_back_from(written, tmp_path):
    """200 damages: none silent, each told in a line, an earlier whole checkpoint used wherever there is one."""
    print(f"RLAIF_FAST_FUZZ_SEED={SEED}")
    rng = random.Random(SEED)
    outcomes: Counter[str] = Counter()
    for number in range(200):
        run = RunDir(shutil.copytree(written, tmp_path / f"run-{number}"))
        path, damage = rng.choice(files_of(run)), rng.choice(KINDS)
        before = path.read_bytes()
        damage(path, rng, sealed_length(run, path))
        where = f"{number}: {damage.__name__} {path.relative_to(run.path)}"
        assert not path.exists() or path.read_bytes() != before, where
        if not recovers(run, path, where):
            outcomes["refused"] += 1
        else:
            used = last(run)
            # the best is rl-000004, which rl-000006 needs
            expected = {"rl-000006": "sft", "rl-000004": "sft"}
            if path.parent.name == "rl-000006":
                assert used == "rl-000004", where
            elif path.parent.name in expected:
                assert used == expected[path.parent.name], where
            assert recover(run) == [], where  # and what is left is whole
            outcomes["an earlier checkpoint" if used != "rl-000006" else "put right"] += 1
        shutil.rmtree(run.path)
    print(dict(outcomes))
    assert sum(outcomes.values()) == 200
    assert outcomes["an earlier checkpoint"] > 60


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "used"),
    [
        ("checkpoints/rl-000006/model.safetensors", "rl-000004"),
        ("checkpoints/rl-000006/trainer_state.pt", "rl-000004"),
        ("checkpoints/rl-000006/manifest.json", "rl-000004"),
        ("checkpoints/rl-000006/preprocessor_config.json", "rl-000004"),
        ("checkpoints/rl-000004/tokenizer.json", "sft"),
        ("checkpoints/index.json", "rl-000006"),
        ("config.yaml", "rl-000006"),
    ],
)
def test_each_file_by_name(run, kind, name, used):
    path = run.path / name
    kind(path, random.Random(1))
    told = recover(run)
    assert told[0].startswith(f"damaged: {path} ") and last(run) == used
    assert run.config.read_text() == "model: tiny\nbeta: 0.1\n"


def test_a_record_damaged_between_two_checkpoints_costs_the_later_one(run):
    first = unseal(run.checkpoints / "rl-000004" / "manifest.json")["logs"]["metrics.jsonl"][0]
    data = bytearray(run.metrics.read_bytes())
    data[first + 5] ^= 4
    run.metrics.write_bytes(bytes(data))
    told = recover(run)
    assert "metrics.jsonl is not as it was written" in told[0] and last(run) == "rl-000004"
    assert run.metrics.stat().st_size == first


def test_records_are_read_once_for_all_checkpoints(run, monkeypatch):
    """Those of a long run are gigabytes, and several checkpoints vouch for them."""
    read: Counter[str] = Counter()
    opened = Path.open

    def counting(path, *args, **kwargs):
        read[path.name] += "b" in "".join(map(str, args))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", counting)
    assert recover(run) == []
    assert [read[path.name] for path in run.records] == [1] * 5


def test_a_file_that_was_added_and_a_folder_that_is_gone(run):
    (run.checkpoints / "rl-000006" / "model.safetensors.index.json").write_text("{}")
    assert "was added after" in recover(run)[0] and last(run) == "rl-000004"
    shutil.rmtree(run.checkpoints / "rl-000004")
    assert f"damaged: {run.checkpoints / 'rl-000004'} is missing" in recover(run) and last(run) == "sft"


def test_nothing_whole_is_refused_and_left_alone(run):
    for name in ("sft", "rl-000004", "rl-000006"):
        (run.checkpoints / name / "trainer_state.pt").unlink()
    before = sorted(path for path in run.path.rglob("*") if path.is_file())
    with pytest.raises(
        RlaifFastError, match=r"no whole checkpoint is left: damaged: .*trainer_state\.pt is missing"
    ):
        recover(run)
    assert sorted(path for path in run.path.rglob("*") if path.is_file()) == before


def test_a_run_without_checkpoints_starts_over(tmp_path):
    run = RunDir.create(tmp_path / "run")
    run.config.write_text("model: tiny\n")
    run.metrics.write_text('{"step": 1}\n')
    assert recover(run) == [] and not run.metrics.exists()


def test_a_configuration_that_a_resume_changed_is_whole(run):
    run.config.write_text("model: tiny\nbeta: 0.1\nlearning_rate: 0.5\n")
    CheckpointStore(run.checkpoints, {}).note_config(run.config.read_text())
    assert recover(run) == []
    (run.checkpoints / "rl-000006" / "trainer_state.pt").unlink()
    assert len(recover(run)) == 2
    assert "learning_rate: 0.5" in run.config.read_text()


def test_a_damaged_best_is_not_loaded(run):
    store = CheckpointStore(run.checkpoints, {}, read_only=True)
    assert store.checked("best").name == "rl-000004"
    flip(run.checkpoints / "rl-000004" / "model.safetensors", random.Random(0))
    with pytest.raises(RlaifFastError, match=r"damaged: .*model\.safetensors is not as it was written"):
        store.checked("best")


def test_every_bit_of_a_seal_counts(tmp_path):
    path = tmp_path / "index.json"
    text = sealed({"last": "rl-000001", "order": 3}).encode()
    for place, bit in itertools.product(range(len(text)), range(8)):
        data = bytearray(text)
        data[place] ^= 1 << bit
        path.write_bytes(bytes(data))
        with pytest.raises(Damage):
            unseal(path)
    path.write_bytes(text)
    assert unseal(path) == {"last": "rl-000001", "order": 3}


def test_an_index_that_is_replaced_while_it_is_read_is_not_damaged(tmp_path, monkeypatch):
    path = tmp_path / "index.json"
    write_atomically(path, sealed({"order": 1}))
    read_bytes = Path.read_bytes

    def read_before_the_next_is_written(self):
        content = read_bytes(self)
        write_atomically(path, sealed({"order": 2}))
        return content

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", read_before_the_next_is_written)
        assert unseal(path) == {"order": 1}
    assert unseal(path) == {"order": 2}
