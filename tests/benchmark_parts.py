"""Files of benchmarks as they ship, and evaluations of a tiny policy on them."""

from __future__ import annotations

import http.server
import json
import shutil
import threading
from pathlib import Path

import pytest

from rlaif_fast import evaluate
from rlaif_fast.data import VOCABULARY
from rlaif_fast.evals.records import Record
from rlaif_fast.oracle import RankRequest
from rlaif_fast.policy.tiny import make_tiny, words_of
from rlaif_fast.video.testing import counter_frames, write_video

VIDEOMME_ROW = {
    "video_id": "001",
    "duration": "short",
    "domain": "Knowledge",
    "sub_category": "Humanity & History",
    "url": "https://www.youtube.com/watch?v=fFjv93ACGo8",
    "videoID": "fFjv93ACGo8",
    "question_id": "001-1",
    "task_type": "Counting Problem",
    "question": "How many candles are on the tree?",
    "options": ["A. One.", "B. Two.", "C. Three.", "D. Four."],
    "answer": "C",
}


def put(path: Path, content) -> Path:
    """Write a text, or an object as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def run(folder, model, out, *more) -> int:
    words = ["--benchmark=videomme", f"--data={folder}", f"--model={model}", f"--output_dir={out}", "--fps=4"]
    length = [] if "--short=false" in more else ["--max_completion_length=4"]
    return evaluate.main([*words, *length, *(word for word in more if word != "--short=false")])


class JudgeServer(http.server.BaseHTTPRequestHandler):
    """Says yes where the answer has a word of the reference."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        text = body["messages"][1]["content"][-1]["text"]
        reference = json.loads(text.split("Reference answer: ")[1].splitlines()[0])
        answer = json.loads(text.split("<answers>\n")[1].splitlines()[0])["text"]
        self.server.seen.append(body)
        if self.server.down:
            self.send_error(400)
            return
        right = reference in answer.split()
        reply = json.dumps({"pred": "yes" if right else "no", "score": 4 if right else 1})
        if "nonsense" in answer:
            reply = "yes, I think"
        content = json.dumps(
            {"choices": [{"message": {"content": reply}, "finish_reason": "stop"}], "usage": {}}
        )
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, *_):
        pass


def request(response, reference="man"):
    return RankRequest("r", "who is driving ?", (response,), reference=reference)


def record(number, video, correct, **groups):
    return Record(
        str(number), video, {"task type": "counting", **groups}, "q", "A", "A" if correct else "B", correct
    )


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", counter_frames(8, 32, 32), codec="mpeg4")


@pytest.fixture
def video(clip, tmp_path):
    """Puts a video of that name, below the folder of the benchmark, and returns its path."""

    def copy(name: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return str(shutil.copy(clip, path))

    return copy


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    words = set(VOCABULARY) | set(words_of(("A B C D . one two man who is driving ? ball",)))
    return str(make_tiny(tmp_path_factory.mktemp("model") / "tiny", words, seed=3))


@pytest.fixture
def videomme(tmp_path, video) -> Path:
    """A Video-MME folder: two videos that can be read, one that is damaged, one that is missing."""
    rows = []
    for number, (name, duration) in enumerate(
        (("one", "short"), ("two", "long"), ("bad", "long"), ("gone", "short"))
    ):
        for turn in (1, 2):
            identity = {"question_id": f"{number}-{turn}", "videoID": name, "duration": duration}
            rows.append(VIDEOMME_ROW | identity | {"answer": "ABCD"[number]})
    put(tmp_path / "bench/test-0.json", rows)
    for name in ("one", "two"):
        video(f"bench/data/{name}.mp4")
    put(tmp_path / "bench/data/bad.mp4", "no video\n" * 50)
    return tmp_path / "bench"


@pytest.fixture
def judge():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), JudgeServer)
    server.seen, server.down = [], False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
