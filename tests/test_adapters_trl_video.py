"""Videos in the prompts of TRL's real GRPO trainer: every pass sees the row's own video, and so does the oracle."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: pip install 'rlaif-fast[adapters-test]'")
pytest.importorskip("torchvision", reason="torchvision is not installed, and Qwen-VL's processor needs it")

from rlaif_fast.adapters.trl import OracleGRPOTrainer

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import trl_video

    return trl_video


def test_six_steps_see_the_videos(example, tmp_path, monkeypatch):
    asked, rows = [], []
    closeness, learn = example.closeness, OracleGRPOTrainer._compute_loss

    def note_the_clip(request):
        asked.append(len(request.clips[0].frames))
        return closeness(request)

    def learn_and_check(self, model, inputs):
        ids = inputs["prompt_ids"]
        for row, video in enumerate(inputs["videos"]):
            grid = video["video_grid_thw"]
            rows.append(int(grid[0, 0]))
            assert int((ids[row] == self._video_pad_token_id).sum()) == int(grid.prod()) // 4
            assert len(video["pixel_values_videos"]) == int(grid.prod())
        return learn(self, model, inputs)

    monkeypatch.setattr(example, "closeness", note_the_clip)
    monkeypatch.setattr(OracleGRPOTrainer, "_compute_loss", learn_and_check)
    trainer = example.main(str(tmp_path), steps=6)
    assert trainer.state.global_step == 6
    assert set(asked) == set(example.COUNTS)
    assert {2 * depth for depth in rows} == set(example.COUNTS)  # two frames a temporal patch
    first = next(entry for entry in trainer.state.log_history if "kl" in entry)
    # the reference pass sees the video as the learning one does
    assert first["kl"] == pytest.approx(0.0, abs=1e-6)


def test_the_log_probabilities_are_those_of_the_model_that_sees(example, tmp_path, monkeypatch):
    scored = []
    scores = OracleGRPOTrainer._scores

    def note(self, output):
        if not scored:
            scored.append((output, self.policy_logps(output)))
        return scores(self, output)

    monkeypatch.setattr(OracleGRPOTrainer, "_scores", note)
    trainer = example.main(str(tmp_path), steps=1, learning_rate=0.0)
    output, logps = scored[0]
    model, pad = (
        trainer.accelerator.unwrap_model(trainer.model),
        trainer.processing_class.tokenizer.pad_token_id,
    )
    for row, video in enumerate(trainer._videos):
        ids = torch.cat([output["prompt_ids"][row], output["completion_ids"][row]])
        ids = ids[output["prompt_mask"][row].argmax() :][None]  # no padding on the left
        length = output["completion_ids"].shape[1]
        attention = torch.ones_like(ids)
        attention[0, -length:] = output["completion_mask"][row]
        types = torch.where(ids == trainer._video_pad_token_id, 2, 0)
        fields = {name: value for name, value in video.items() if value.numel()}
        answers = []
        for patches in (fields["pixel_values_videos"], torch.zeros_like(fields["pixel_values_videos"])):
            seen = fields | {"pixel_values_videos": patches}
            with torch.no_grad():
                logits = model(
                    input_ids=ids, attention_mask=attention, mm_token_type_ids=types, use_cache=False, **seen
                ).logits[0, -length - 1 : -1]
            answers.append(
                logits.log_softmax(-1).gather(-1, output["completion_ids"][row][:, None])[:, 0]
                * output["completion_mask"][row]
            )
        ours = logps[row] * output["completion_mask"][row]
        torch.testing.assert_close(ours, answers[0], rtol=1e-4, atol=1e-5)
        assert (ours - answers[1]).abs().max() > 1e-3  # not those of a model that sees grey
    assert pad is not None


@pytest.mark.parametrize("options", [{"use_vllm": True}])
def test_what_goes_with_no_video_is_refused(example, tmp_path, monkeypatch, options):
    trainer = example.main(str(tmp_path), steps=1)
    for name, value in options.items():
        monkeypatch.setattr(trainer, name, value)
    prompts = example.with_prompts({"video": [str(tmp_path / "4.mp4")]})["prompt"]
    with pytest.raises(ValueError, match="videos in prompts go with no pictures"):
        trainer._tokenize_prompts(prompts)


def test_two_processes(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(ROOT / "examples/trl_video.py"), str(tmp_path)],
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "'train_loss'" in done.stdout
