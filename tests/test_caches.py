"""What lies in the cache is not taken at its name: the embedded dataset and the tiny model are as they were made."""

import re
import shutil

import pytest

from rlaif_fast.data import SyntheticConfig, make_dataset, read_examples
from rlaif_fast.errors import RlaifFastError
from rlaif_fast.trainer.cached_model import tiny_folder
from rlaif_fast.trainer.options import TrainConfig
from rlaif_fast.trainer.run import Datasets

CONFIG = SyntheticConfig(seed=3, sft_clips=2, rl_clips=2, validation_clips=2, test_clips=2)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("made") / "data", CONFIG).root


@pytest.fixture
def root(made, tmp_path):
    return shutil.copytree(made, tmp_path / "data")


def fewer_rows(root):
    path = root / "test.jsonl"
    path.write_text(path.read_text().partition("\n")[0] + "\n")
    return path


def another_answer(root):
    path = root / "test.jsonl"
    path.write_text(path.read_text().replace("the ", "The ", 1))
    return path


def another_video(root):
    shutil.copy(root / "videos/rl/00000.mp4", root / "videos/rl/00001.mp4")
    return root / "videos/rl"


def a_missing_file(root):
    (root / "sft.jsonl").unlink()
    return root / "sft.jsonl"


DAMAGES = [fewer_rows, another_answer, another_video, a_missing_file]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_dataset_that_is_not_as_it_was_made_is_refused(root, damage):
    assert make_dataset(root, CONFIG).reused
    named = damage(root)
    words = re.escape(f"damaged: {named} is not as it was made; delete {root}, and it is made again")
    with pytest.raises(RlaifFastError, match=words):
        make_dataset(root, CONFIG)
    assert not make_dataset(root, CONFIG, overwrite=True).reused
    assert make_dataset(root, CONFIG).reused


def invert(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4000] = bytes(255 - byte for byte in content[middle : middle + 4000])
    path.write_bytes(content)
    return path


def other_ids(folder):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"red"', '"blue "'))
    return path


def no_manifest(folder):
    (folder / "manifest.json").unlink()
    return folder / "manifest.json"


@pytest.mark.parametrize("damage", [invert, other_ids, no_manifest])
def test_a_tiny_model_that_is_not_as_it_was_made_is_refused(made, tmp_path, damage):
    rows = read_examples(made / "sft.jsonl")
    data = Datasets(sft=rows, rl=rows, validation=[], test=[], metric="accuracy")
    config = TrainConfig(cache_dir=str(tmp_path / "cache"))
    folder = tiny_folder(config, data)
    assert tiny_folder(config, data) == folder
    named = damage(folder)
    with pytest.raises(
        RlaifFastError, match=rf"damaged: {named} is .*; delete {folder}, and it is made again"
    ):
        tiny_folder(config, data)
    shutil.rmtree(folder)
    assert tiny_folder(config, data) == folder
