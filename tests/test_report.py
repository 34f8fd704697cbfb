"""The report of a run made up from real video files, hostile text and plausible numbers."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure
from PIL import Image

from rlaif_fast.data.schema import Example
from rlaif_fast.oracle import build_oracle
from rlaif_fast.report import figures
from rlaif_fast.report.gallery import STRIP_FRAMES, gallery, places
from rlaif_fast.report.html import compare_predictions, main, write_report
from rlaif_fast.report.outcome import accuracy_summary, notes_on_answers, notes_on_data
from rlaif_fast.report.panels import learning_panels
from rlaif_fast.report.stats import MAX_ROWS
from rlaif_fast.runs.files import read_jsonl, write_jsonl
from rlaif_fast.runs.folder import RunDir
from rlaif_fast.trainer.options import TrainConfig

ATTACK = '<script>alert(1)</script><img src=x onerror=alert(2)> & "quotes" $x$ {{ 777*777 }}'

CATEGORIES = {  # accuracy before, after, and of guessing
    "action recognition": (0.41, 0.72, 0.21),
    "attribute perception": (0.47, 0.70, 0.25),
    "counting": (0.55, 0.74, 0.33),
    "object reasoning": (0.38, 0.52, 0.25),
    "object recognition": (0.51, 0.75, 0.28),
    "spatial perception": (0.33, 0.60, 0.24),
    "temporal perception": (0.44, 0.47, 0.31),
    "temporal reasoning": (0.36, 0.55, 0.29),
}
COLORS = {"red": (222, 48, 48), "blue": (62, 92, 238), "green": (52, 190, 74), "yellow": (240, 216, 60)}


def make_video(path: Path, color: tuple[int, int, int], seed: int, size: int = 64) -> None:
    """Encode a disc that crosses a textured background in 12 frames."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    background = 95 + 14 * np.sin(x / 6 + seed)[..., None] * np.cos(y / 9)[..., None] + np.zeros(3)
    start, end = generator.uniform(0.25, 0.75, (2, 2)) * size
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=6, options={"deadline": "realtime", "cpu-used": "8"})
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for index in range(12):
            cx, cy = start + (end - start) * index / 11
            cover = np.clip(size / 6 - np.hypot(x - cx, y - cy), 0, 1)[..., None]
            frame = (
                background * (1 - cover) + np.array(color) * cover + generator.normal(0, 4, (size, size, 3))
            )
            image = av.VideoFrame.from_ndarray(np.clip(frame, 0, 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(image))
        container.mux(stream.encode())


def make_run(
    path: Path, *, seed: int = 0, clips: int = 6, sft_steps: int = 600, rl_steps: int = 150
) -> RunDir:
    """Write everything that a finished run leaves behind."""
    run = RunDir.create(path)
    generator = np.random.default_rng(seed)
    metrics, time = [], 0.0
    for step in range(1, sft_steps + 1, max(1, sft_steps // 300)):
        time += 0.3
        loss = 0.5 + 3 * math.exp(-step / (sft_steps / 7)) + generator.normal(0, 0.04)
        metrics.append({"time": time, "stage": "sft", "step": step, "loss": loss})
    rollouts = []
    for step in range(rl_steps + 1):
        time += 1.1
        done = 1 - math.exp(-3 * step / rl_steps)

        def noisy(low, high, spread, done=done):
            return low + (high - low) * done + generator.normal(0, spread)

        if step:
            metrics.append(
                {
                    "time": time,
                    "stage": "rl",
                    "step": step,
                    "loss": noisy(0.0, -0.01, 0.012),
                    "kl": max(0.0, noisy(0.0, 0.11, 0.006)),
                    "entropy": noisy(0.72, 0.35, 0.02),
                    "kendall_tau": noisy(0.22, 0.55, 0.04),
                    "ndcg": min(1.0, noisy(0.68, 0.86, 0.015)),
                    "top1_agreement": noisy(0.35, 0.62, 0.04),
                    "accuracy": noisy(0.3, 0.58, 0.02),
                    "no_signal": max(0.0, noisy(0.06, 0.24, 0.03)),
                }
            )
            rollouts.append({"step": step, "responses": ["a"] * 8})
        if step % 25 == 0:
            rows = {
                name: {"n": 24, "correct": (correct := int(np.clip(round(24 * noisy(b, a, 0.03)), 0, 24)))}
                | {"accuracy": correct / 24}
                for name, (b, a, _) in CATEGORIES.items()
            }
            accuracy = sum(row["correct"] for row in rows.values()) / (24 * len(rows))
            metrics.append(
                {"time": time, "stage": "eval", "step": step, "phase": "rl", "split": "validation"}
                | {"accuracy": accuracy, "by_category": rows}
            )
    write_jsonl(run.metrics, metrics)
    write_jsonl(run.rollouts, rollouts)

    predictions = {"sft": [], "final": []}
    for category, (before, after, chance) in CATEGORIES.items():
        for index in range(54):
            luck = generator.random()
            for phase, accuracy in (("sft", before), ("final", after)):
                luck = luck if generator.random() < 0.7 else generator.random()
                predictions[phase].append(
                    {
                        "example_id": f"clip{index}-{category}",
                        "category": category,
                        "video": f"clip{index}.mp4",
                    }
                    | {"prediction": "x", "answer": "y", "correct": bool(luck < accuracy), "chance": chance}
                )
    media = path / "media"
    media.mkdir()
    samples = []
    names = list(COLORS)
    for index in range(clips):
        color = names[index % len(names)]
        file = media / f"clip{index}.mp4"
        make_video(file, COLORS[color], seed + index)
        category = list(CATEGORIES)[index % len(CATEGORIES)]
        chosen = index % 3 == 2
        good = "B" if chosen else f"the {color} disc moves to the left"
        near, off, bad = (
            ("A", "C", "the the red")
            if chosen
            else (f"the {color} disc grows", "the purple star moves up", f"{color} disc the to")
        )
        for phase, responses, oracle_ranks, policy_ranks, advantages in (
            (
                "sft",
                [near, good, near, off, bad, near, off, good],
                [2, 0, 2, 5, 7, 2, 5, 0],
                [0, 3, 0, 5, 7, 0, 5, 3],
                [-0.31, 1.52, -0.31, -0.62, -0.9, -0.31, -0.59, 1.52],
            ),
            (
                "final",
                [good, good, good, near, good, good, off, good],
                [0, 0, 0, 6, 0, 0, 7, 0],
                [0, 0, 0, 6, 0, 0, 7, 0],
                [0.12, 0.12, 0.12, -0.3, 0.12, 0.12, -0.42, 0.12],
            ),
        ):
            samples.append(
                {
                    "phase": phase,
                    "step": 0,
                    "example_id": f"clip{index}-{category}",
                    "category": category,
                    "video": str(file),
                    "question": f"What does the {color} disc do?",
                    "options": ["It grows.", "It moves to the left.", "It vanishes."] if chosen else [],
                    "answer": good,
                    "responses": responses,
                    "oracle_ranks": oracle_ranks,
                    "policy_ranks": policy_ranks,
                    "advantages": advantages,
                    "valid": True,
                    "confidence": 1.0,
                    "greedy": near if phase == "sft" else good,
                }
            )
    samples.sort(key=lambda record: record["phase"], reverse=True)
    for record in samples:  # the greedy answers of the gallery are those of the predictions
        for row in predictions[record["phase"]]:
            if row["example_id"] == record["example_id"]:
                row["correct"] = record["greedy"] == record["answer"]
    write_jsonl(run.samples, samples)
    for phase, records in predictions.items():
        write_jsonl(run.predictions(phase), records)

    def share(phase, category=None):
        rows = [row["correct"] for row in predictions[phase] if category in (None, row["category"])]
        return sum(rows) / len(rows)

    run.write_summary(
        {
            "sft_accuracy": share("sft"),
            "final_accuracy": share("final"),
            "by_category": {
                name: {"sft": share("sft", name), "final": share("final", name), "n": 54}
                for name in CATEGORIES
            },
            "seconds": 312.4,
            "peak_rss_bytes": 1_420_000_000,
            "seed": seed,
            "config": {
                "model": "tiny",
                "algorithm": "grpo_rank",
                "advantage": "directed",
                "num_generations": 8,
                "oracle": "reference",
                "learning_rate": 3e-4,
                "beta": 0.04,
                "sft_steps": sft_steps,
                "max_steps": rl_steps,
                "data": "synthetic",
                "label_noise": 0.5,
                "seed": seed,
            },
            "git_commit": "1f2e3d4c5b6a79880123456789abcdef01234567",
            "seconds_by_stage": {
                "rollout": 78.0,
                "update": 61.0,
                "sft": 96.0,
                "data": 31.0,
                "evaluation": 21.0,
                "decode": 9.0,
                "oracle": 2.4,
                "checkpoint": 3.0,
                "report": 4.2,
            },
            "versions": {"python": "3.11.2", "torch": "2.13.0+cpu", "transformers": "5.23.0"},
            "machine": "x86_64, 2 cores, no GPU",
            "notes": [
                "1,204 of 2,410 supervised answers have one fact wrong on purpose, like a weak annotator's."
            ],
        }
    )
    return run


class Page(HTMLParser):
    """What a browser would see: tags with their attributes, and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("report") / "tiny-seed0", clips=2, sft_steps=60, rl_steps=50)


@pytest.fixture(scope="module")
def html(run):
    return write_report(run).read_text(encoding="utf-8")


def test_the_report_needs_nothing_else(html):
    page = Page(html)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/png;base64,", "#")), (tag, name, value)
    assert set(re.findall(r"url\(([^)]{1,2})", html)) <= {"#" + c for c in "abcdefghijklmnopqrstuvwxyz"}
    assert "@import" not in html
    policies = [attributes["content"] for tag, attributes in page.tags if attributes.get("http-equiv")]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_the_report_shows_the_result_and_how_it_was_obtained(run, html):
    summary = run.read_summary()
    text = Page(html).text
    gain = 100 * (summary["final_accuracy"] - summary["sft_accuracy"])
    assert f"{gain:+.1f} points" in text
    assert f"{summary['sft_accuracy']:.1%}" in text and f"{summary['final_accuracy']:.1%}" in text
    for category in CATEGORIES:
        assert category in text
    for shown in (
        "5 min 12 s",
        "1.32 GiB",
        "x86_64, 2 cores, no GPU",
        "400 responses in 50 groups",
        "1f2e3d4c5b",
    ):
        assert shown in text
    assert summary["notes"][0] in text
    assert "torch 2.13.0+cpu" in text and "label_noise" in text
    assert "This run has not finished" not in text


def test_figures_follow_the_page_and_their_names_do_not_collide(html):
    drawn = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(drawn) == 3 * 2 + 1 * 2 + 7  # three figures and a panel for two widths, seven panels for one
    for svg in drawn:
        for name, color in figures.COLORS.items():
            assert color not in svg, name
    assert any("var(--after)" in svg for svg in drawn)
    identifiers = [
        attributes["id"]
        for tag, attributes in Page(html).tags
        if tag in ("path", "clippath") and "id" in attributes
    ]
    assert identifiers and len(identifiers) == len(set(identifiers))


def test_png_figures_are_pictures(run, html):
    names = {"headline", "categories", "curves", "time", "overview"}
    assert {path.stem for path in run.figures.glob("*.png")} == names
    for name in names:
        with Image.open(run.figures / f"{name}.png") as image:
            assert image.width >= 1400
            assert len(image.convert("RGB").resize((300, 200)).getcolors(60_000)) > 50


def test_the_gallery_holds_frames_of_the_clips_and_both_groups(run):
    first, second = gallery(run)
    assert (first.category, second.category) == ("action recognition", "attribute perception")
    assert len(first.frames) == STRIP_FRAMES and first.problem == ""
    assert [frame.time for frame in first.frames] == sorted(frame.time for frame in first.frames)
    for card, color in ((first, COLORS["red"]), (second, COLORS["blue"])):
        picture = _decoded(card.frames[0].uri)
        assert picture.shape == (64, 64, 3)
        assert np.abs(picture.astype(int) - color).sum(-1).min() < 60
    before, after = first.answers
    assert (before.title, before.correct, after.title, after.correct) == (
        "Before RL",
        False,
        "After RL",
        True,
    )
    assert [(row.count, row.oracle, row.policy) for row in before.rows] == [
        (2, 1, 4),
        (3, 3, 1),
        (1, 6, 6),
        (1, 6, 6),
        (1, 8, 8),
    ]
    assert before.rows[0].strength == 1.0 and before.rows[0].oracle_share == 1.0
    assert before.rows[-1].oracle_share == 0.0
    assert sum(row.count for row in after.rows) == 8


def _decoded(uri: str) -> np.ndarray:
    import base64
    import io

    with Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([0, 1, 2], [1, 2, 3]),
        ([0, 0, 2], [1, 1, 3]),
        ([0, 0, 1], [1, 1, 3]),
        ([3, 3, 9], [1, 1, 3]),
        ([5, None, 1.5], [2, None, 1]),
        ([None, None], [None, None]),
    ],
)
def test_places_depend_on_the_order_alone(ranks, expected):
    assert places(ranks) == expected


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A small run whose every text is an attack, whose clip is gone and whose group was not ranked."""
    run = RunDir.create(tmp_path_factory.mktemp("hostile") / "a & <b>")
    record = {
        "example_id": ATTACK,
        "category": ATTACK,
        "video": f"/missing/{ATTACK}",
        "question": ATTACK,
        "options": [ATTACK, "other"],
        "answer": "A",
        "responses": [ATTACK, ""],
        "oracle_ranks": [None, None],
        "policy_ranks": [0, 1],
        "advantages": [0.0, 0.0],
        "valid": False,
        "confidence": 0.0,
        "greedy": ATTACK,
    }
    write_jsonl(run.samples, [{"phase": phase, **record} for phase in ("sft", "final")])
    for phase in ("sft", "final"):
        rows = [{"example_id": ATTACK, "category": ATTACK, "correct": phase == "final", "chance": 0.5}]
        write_jsonl(run.predictions(phase), rows)
    summary = {
        "notes": [ATTACK],
        "config": {"algorithm": ATTACK, "advantage": ATTACK, "num_generations": ATTACK, ATTACK: ATTACK},
        "versions": {ATTACK: ATTACK},
        "machine": ATTACK,
        "git_commit": ATTACK,
        "seconds_by_stage": {ATTACK: 1.0},
    }
    write_report(run, summary=summary)
    return run


def test_no_text_of_a_model_or_a_dataset_becomes_markup(hostile):
    page = Page(hostile.report.read_text(encoding="utf-8"))
    assert "script" not in {tag for tag, _ in page.tags}
    assert not [attributes for tag, attributes in page.tags if tag == "img"]
    assert not [
        attributes for _, attributes in page.tags if any(name.startswith("on") for name in attributes)
    ]
    assert page.text.count(ATTACK) >= 20
    assert "603729" not in page.text  # what {{ 777*777 }} would have become
    assert "a & <b>" in page.text


def test_every_hostile_text_is_shown_as_it_is(hostile):
    text = Page(hostile.report.read_text(encoding="utf-8")).text
    for shown in (
        f"A. {ATTACK}",
        f"Reference: A. {ATTACK}",
        f"No frames: /missing/{ATTACK}: does not exist",
        f"✓{ATTACK}",
        f"✗{ATTACK}",
        "The oracle could not rank this group.",
        "(empty)",
    ):
        assert shown in text


def test_options_behind_the_26th_have_the_labels_of_the_question(hostile, tmp_path):
    run = RunDir.create(tmp_path / "run")
    [record, _] = read_jsonl(hostile.samples)
    write_jsonl(run.samples, [record | {"options": [f"o{n}" for n in range(30)], "answer": "AB"}])
    [card] = gallery(run)
    assert card.options[25:28] == ("Z. o25", "AA. o26", "AB. o27") and card.answer == "AB. o27"


def test_the_summary_given_is_not_written(hostile):
    assert not hostile.finished


def test_an_unfinished_run_shows_what_there_is(tmp_path):
    run = RunDir.create(tmp_path / "run")
    write_jsonl(run.metrics, [{"stage": "rl", "step": step, "kl": step / 10} for step in (1, 2, 3)])
    text = Page(write_report(run).read_text(encoding="utf-8")).text
    assert "This run has not finished" in text
    assert "Learning curves" in text and "Accuracy by category" not in text
    assert [path.name for path in run.figures.iterdir()] == ["curves.png"]


def test_the_report_of_an_unfinished_run_knows_its_settings_and_keeps_no_figure_of_before(tmp_path):
    run = make_run(tmp_path / "run", clips=1, sft_steps=4, rl_steps=20)
    write_report(run)
    assert (run.figures / "overview.png").is_file() and (run.figures / "time.png").is_file()
    run.config.write_text(yaml.safe_dump(run.read_summary()["config"] | {"metric_for_best_model": "none"}))
    run.summary.unlink()
    run.predictions("final").unlink()
    line = {"stage": "eval", "phase": "rl", "split": "validation"}
    tau = {"oracle/length_tau": 0.1, "oracle/reference_tau": 1.0}
    write_jsonl(
        run.metrics,
        [{**line, "step": 0, "accuracy": 0.5}, {**line, "step": 9, "accuracy": 0.2}]
        + [{"stage": "rl", "step": step, **tau} for step in (1, 2)],
    )
    text = Page(write_report(run).read_text()).text
    assert "This run has not finished" in text and "directed advantage, 8 responses a group" in text
    assert "Does the oracle favour long answers?" in text and "being gamed" not in text
    assert "the start was kept" not in text
    assert [path.name for path in run.figures.iterdir()] == ["curves.png"]


def test_the_command_writes_the_same_report_again(tmp_path, capsys):
    run = RunDir.create(tmp_path / "run")
    write_jsonl(run.metrics, [{"stage": "rl", "step": step, "kl": step / 10} for step in (1, 2, 3)])
    html = write_report(run).read_text(encoding="utf-8")
    run.report.unlink()
    assert main([str(run.path)]) == 0
    assert capsys.readouterr().out.strip() == str(run.report)
    assert run.report.read_text(encoding="utf-8") == html


def test_a_report_that_cannot_be_written_is_said_in_one_line(tmp_path, capsys):
    run = RunDir.create(tmp_path / "run")
    write_jsonl(run.metrics, [{"stage": "rl", "step": step, "kl": step / 10} for step in (1, 2, 3)])
    run.figures.write_text("a file where the folder of the figures belongs")
    assert main([str(run.path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and str(run.path) in said


def test_the_command_says_what_is_wrong_in_one_line(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "was not made by a run" in message and message.count("\n") == 1


def test_of_hundreds_of_categories_the_figures_draw_those_with_the_most_questions_and_the_table_all(tmp_path):
    """Two thousand drawn whole took minutes and gigabytes, behind the last step of a run."""
    run = RunDir.create(tmp_path)
    names = [f"of {number:03d}" for number in range(200) for _ in range(1 + (number % 50 == 7))]
    for phase in ("sft", "final"):
        rows = [
            {"example_id": str(place), "category": name, "video": f"v{place}", "chance": 0.25}
            | {"correct": phase == "final" and place % 3 == 0}
            for place, name in enumerate(names)
        ]
        write_jsonl(run.predictions(phase), rows)
    comparison = compare_predictions(run)
    assert comparison is not None and len(comparison.by_category) == 200
    total, *drawn = comparison.drawn
    assert total is comparison.total and len(drawn) == MAX_ROWS
    # Of those with one question the first by name, however well they did; in the order of the gains.
    twice = {name for name in names if names.count(name) == 2}
    once = [name for name in dict.fromkeys(names) if name not in twice][: MAX_ROWS - len(twice)]
    assert {score.name for score in drawn} == twice | set(once)
    gains = [score.change.mean for score in drawn]
    assert gains == sorted(gains, reverse=True)
    page = write_report(run).read_text()
    assert "the 40 of 200 categories with the most questions; the table has all" in page
    assert all(f"<td>{name}</td>" in page for name in names)
    for name in ("overview", "categories"):
        with Image.open(run.figures / f"{name}.png") as image:
            assert image.height < 5000


def test_comparison_pairs_questions_by_name(tmp_path):
    run = RunDir.create(tmp_path)
    assert compare_predictions(run) is None
    row = {"chance": 0.25, "category": "a"}
    write_jsonl(
        run.predictions("sft"),
        [{**row, "example_id": str(i), "correct": i < 2, "video": f"v{i % 2}"} for i in range(5)],
    )
    write_jsonl(
        run.predictions("final"),
        [
            {**row, "example_id": str(i), "correct": i in (1, 2, 3), "video": f"v{i % 2}"}
            for i in (3, 2, 1, 0)
        ],
    )
    comparison = compare_predictions(run)
    assert comparison is not None
    assert (comparison.fixed, comparison.broken, comparison.clips) == (2, 1, 2)
    assert (comparison.total.n, comparison.total.before.mean, comparison.total.after.mean) == (4, 0.5, 0.75)
    assert comparison.total.change.mean == 0.25 and comparison.total.chance == 0.25
    assert comparison.total.change.low == 0.0  # one clip gained nothing: whole clips are drawn
    assert comparison.total.change.high == 0.5


def test_summary_and_report_count_the_same_questions(tmp_path):
    """Of a file that could be read only once; a category of such files was said to have begun at 0."""
    run = RunDir.create(tmp_path)
    right = {"sft": {"0": True, "1": False, "2": True}, "final": {"0": True, "1": True, "3": True}}
    for phase, answers in right.items():
        rows = [
            {"example_id": name, "category": "b" if name == "3" else "a", "video": name, "chance": 0.25}
            | {"correct": value}
            for name, value in answers.items()
        ]
        write_jsonl(run.predictions(phase), rows)
    summary = accuracy_summary(run)
    assert summary == {
        "sft_accuracy": 0.5,
        "final_accuracy": 1.0,
        "by_category": {"a": {"sft": 0.5, "final": 1.0, "n": 2}},
    }
    total = compare_predictions(run).total
    assert (total.before.mean, total.after.mean, total.n) == (0.5, 1.0, 2)
    assert notes_on_answers(run, 5) == [
        "Left out: 3 of 5 test questions, whose files could not be read before RL or after it."
    ]
    run.predictions("sft").unlink()
    assert accuracy_summary(run) == {"sft_accuracy": None, "final_accuracy": None, "by_category": {}}


def test_learning_panels_take_the_last_word_on_a_step_and_skip_gaps():
    metrics = [
        {"stage": "rl", "step": 1, "loss": 1.0, "kl": None},
        {"stage": "rl", "step": 2, "loss": 5.0, "kl": 0.5},
        {"stage": "rl", "step": 2, "loss": 2.0, "kl": 0.5},
        {"stage": "sft", "step": 1, "loss": 3.0},
    ]
    for step, accuracy in ((0, 0.25), (10, 0.75), (20, 0.75)):
        rows = {"a": {"n": 8, "correct": int(8 * accuracy), "accuracy": accuracy}}
        line = {"stage": "eval", "phase": "rl", "split": "validation", "step": step}
        metrics.append({**line, "accuracy": accuracy, "by_category": rows})
    metrics.append({"stage": "eval", "phase": "sft", "split": "validation", "step": 1, "accuracy": 0.1})
    validation, loss = learning_panels(metrics)
    assert (validation.title, loss.title) == ("Validation accuracy", "RL loss")
    assert loss.curves[0].values.tolist() == [1.0, 2.0]
    curve = validation.curves[0]
    assert curve.steps.tolist() == [0, 10, 20] and curve.values.tolist() == [0.25, 0.75, 0.75]
    assert validation.marked_step == 10
    assert curve.low is not None and curve.high is not None
    assert (curve.low < curve.values).all() and (curve.values < curve.high).all()


def test_the_step_marked_is_that_of_the_checkpoint_that_was_kept():
    """By the oracle's verdicts where they chose it; the last where nothing did."""
    line = {"stage": "eval", "phase": "rl", "split": "validation"}
    accuracies = {0: 0.5, 10: 0.4, 20: 0.3}
    metrics = [{**line, "step": step, "accuracy": value} for step, value in accuracies.items()]
    assert [panel.marked_step for panel in learning_panels(metrics)] == [0]
    assert [panel.marked_step for panel in learning_panels(metrics, metric="none")] == [20]
    for record, win_rate in zip(metrics[1:], (0.75, 0.5)):
        record["win_rate"] = win_rate
    accuracy, wins = learning_panels(metrics, metric="oracle")
    assert (accuracy.marked_step, wins.marked_step, wins.title) == (10, 10, "Validation win rate")
    axes = Figure().subplots()
    figures.learning_curve(accuracy)(axes)  # whose best is another step
    assert [text.get_text() for text in axes.texts] == ["kept"]
    assert wins.curves[0].steps.tolist() == [0, 10, 20]
    assert wins.curves[0].values.tolist() == [0.5, 0.75, 0.5]
    worse = [metrics[0], *({**record, "win_rate": 0.25} for record in metrics[1:])]
    assert {panel.marked_step for panel in learning_panels(worse, metric="oracle")} == {0}


def test_a_run_whose_last_checkpoint_is_kept_is_not_said_to_be_its_start(tmp_path):
    run = make_run(tmp_path / "run", clips=1, sft_steps=4, rl_steps=20)
    line = {"stage": "eval", "phase": "rl", "split": "validation"}
    write_jsonl(run.metrics, [{**line, "step": 0, "accuracy": 0.5}, {**line, "step": 9, "accuracy": 0.2}])
    summary = run.read_summary()
    summary["config"] |= {"algorithm": "ppo_rm"}
    kept = Page(write_report(run, summary=summary).read_text()).text
    assert "before and after are one policy" in kept and "ppo_rm, 8 responses a group" in kept
    last = Page(write_report(run, summary=summary | {"metric_for_best_model": "none"}).read_text()).text
    assert "before and after are one policy" not in last


def test_clips_that_all_changed_alike_have_no_interval(tmp_path):
    """Of a handful of questions that nothing changed in, +0.0 to +0.0 was called an interval of 95%."""
    run = RunDir.create(tmp_path)
    for phase in ("sft", "final"):
        rows = [{"example_id": str(n), "category": "a", "video": f"v{n}", "chance": 0.2} for n in range(4)]
        write_jsonl(run.predictions(phase), [row | {"correct": False} for row in rows])
    text = " ".join(Page(write_report(run).read_text()).text.split())
    assert "No interval, since every clip changed alike, on 4 held-out questions" in text
    axes = Figure().subplots()
    figures.categories(compare_predictions(run).drawn)(axes)
    assert {each.get_text() for each in axes.texts} == {"+0.0", "points"}


def test_a_win_rate_has_an_interval_over_clips(tmp_path):
    """A share of a handful of answers stood alone, as if it were exact."""
    run = RunDir.create(tmp_path)
    rows = [
        {"example_id": str(n), "category": "a", "video": f"v{n // 2}", "correct": None, "win": float(n < 6)}
        for n in range(8)
    ]
    write_jsonl(run.predictions("final"), rows)
    summary = accuracy_summary(run)
    assert summary["win_rate"] == 0.75
    page = write_report(run, summary=summary).read_text()
    assert "<dd>75.0%</dd>" in page
    assert "<dt>their 95% interval</dt><dd>27.7% to 95.9%</dd>" in page  # of four clips


def test_smoothing_keeps_constants_lengths_and_means():
    assert figures.smooth(np.full(37, 2.5)) == pytest.approx(np.full(37, 2.5))
    wave = np.array([0.0, 1.0] * 50)
    smoothed = figures.smooth(wave)
    assert len(smoothed) == 100 and np.abs(smoothed - 0.5).max() < 0.25


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.04, "0.0 s"), (9.96, "10.0 s"), (59.6, "1 min 00 s"), (3599.7, "1 h 00 min"), (12, "12 s")],
)
def test_durations_read_well(seconds, shown):
    assert figures.duration(seconds) == shown


def test_long_names_leave_room():
    assert figures.shortened("counting", 8) == "counting"
    assert figures.shortened("object reasoning", 8) == "object…"


def test_points_have_a_sign():
    assert (figures.points(0.1234), figures.points(-0.1), figures.points(0, 0)) == ("+12.3", "−10.0", "+0")


def test_the_reference_oracle_shows_no_curve_that_is_one_by_design():
    metrics = [
        {
            "stage": "rl",
            "step": step,
            "oracle/length_tau": 0.1,
            "oracle/reference_tau": 1.0,
            "oracle/blind_tau": 1.0,
        }
        for step in (1, 2)
    ]
    [length] = learning_panels(metrics, "reference")
    assert [curve.label for curve in length.curves] == [""]
    [all_three] = learning_panels(metrics, "api")
    assert [curve.label for curve in all_three.curves] == ["length", "reference", "blind"]


def test_what_is_said_of_weak_labels_is_true_of_the_run():
    """Nothing where none was taught; of the oracle only where it ranks against the right answers."""
    rows = [Example(id=str(n), question="?", metadata={"corrupted": n < 2}) for n in range(5)]

    def said(oracle, **changes):
        config = TrainConfig(**changes)
        made = build_oracle(oracle, function=len) if oracle == "callable" else build_oracle(oracle)
        data = SimpleNamespace(sft=rows, metric="accuracy")
        return " ".join(notes_on_data(SimpleNamespace(config=config, data=data, oracle=made)))

    assert "2 of 5 supervised answers" in said("reference") and "the undoing of that noise" in said(
        "reference"
    )
    assert "supervised answers" not in said("reference", sft="none")
    for other in (said("callable"), said("reference", oracle_shuffle=True)):
        assert "2 of 5 supervised answers" in other and "the undoing" not in other
