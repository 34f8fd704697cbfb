"""The api oracle against a real OpenAI-compatible server: `transformers serve` with a model trained here."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx")
pytest.importorskip("tenacity")

from rlaif_fast.oracle import RankRequest
from rlaif_fast.oracle.api import ApiOracle
from rlaif_fast.oracle.protocols import PROTOCOLS

pytestmark = pytest.mark.slow

GRADES = {"excellent": 9, "decent": 6, "poor": 3, "nonsense": 0}
THINGS = ("work", "square", "clip", "door", "bird", "answer")
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def pointwise_prompt(question, text):
    run = PROTOCOLS["pointwise"](RankRequest("r", question, (text, "")), (text,), (0,), f"{question}{text}")
    [ask] = next(run)
    return [{"role": "system", "content": ask.system}, {"role": "user", "content": ask.text}]


def examples(count, seed):
    generator = random.Random(seed)
    for _ in range(count):
        grade = generator.choice(sorted(GRADES))
        question = f"How is the {generator.choice(THINGS)} number {generator.randrange(1000)}?"
        yield (
            pointwise_prompt(question, f"{grade} {generator.choice(THINGS)}"),
            json.dumps({"score": GRADES[grade]}),
        )


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A two-layer Llama that has learnt to judge: its score goes by the first word of the answer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    specials = ["<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    corpus = [m["content"] for messages, _ in examples(200, 1) for m in messages] + ['{"score": 0}'] * 20
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>")
    fast.chat_template = CHAT
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    rows = [
        (
            fast(fast.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))["input_ids"],
            [*fast(reply)["input_ids"], fast.eos_token_id],
        )
        for messages, reply in examples(400, 2)
    ]
    generator = random.Random(3)
    for _ in range(400):
        batch = generator.sample(rows, 8)
        width = max(len(prompt) + len(reply) for prompt, reply in batch)
        ids = torch.full((8, width), fast.pad_token_id)
        labels = torch.full((8, width), -100)
        for i, (prompt, reply) in enumerate(batch):
            ids[i, : len(prompt) + len(reply)] = torch.tensor(prompt + reply)
            labels[i, len(prompt) : len(prompt) + len(reply)] = torch.tensor(reply)
        loss = model(input_ids=ids, attention_mask=(ids != fast.pad_token_id).long(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if loss.item() < 0.01:
            break
    folder = tmp_path_factory.mktemp("judge")
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(model_folder, tmp_path_factory):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "serve.log"
    code = "import sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()"
    arguments = ["serve", str(model_folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    import httpx

    try:
        end = time.monotonic() + 300
        while True:
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < end, log.read_text()[-2000:]
            try:
                if (
                    httpx.get(f"http://127.0.0.1:{port}/health", timeout=5, trust_env=False).status_code
                    == 200
                ):
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(30)


def test_a_served_model_ranks(server, model_folder, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    oracle = ApiOracle(
        model=str(model_folder),
        base_url=server,
        protocol="pointwise",
        max_tokens=16,
        timeout=120,
        concurrency=2,
    )
    generator = random.Random(9)
    requests = []
    for n in range(10):
        grades = generator.sample(sorted(GRADES), 4)
        responses = tuple(f"{grade} {generator.choice(THINGS)}" for grade in grades)
        requests.append(RankRequest(f"r{n}", f"How is the {THINGS[n % 6]} number {n}?", responses))
    rankings = oracle.rank(requests)
    right = 0
    for request, ranking in zip(requests, rankings):
        assert ranking.valid, ranking.error
        truth = [-GRADES[text.split()[0]] for text in request.responses]
        right += ranking.ranks == tuple(sorted(truth).index(value) for value in truth)
        assert ranking.tokens > 400
    stats = oracle.stats()
    print(f"{right} of 10 groups ranked right; {stats}")
    assert right >= 8
    assert stats["oracle/api/requests"] == 40 + stats.get("oracle/api/retries", 0.0)


def test_a_server_that_refuses_the_model_says_why(server, model_folder):
    oracle = ApiOracle(model="another", base_url=server, protocol="pointwise")
    [ranking] = oracle.rank([RankRequest("r", "How?", ("poor work", "decent work"))])
    assert not ranking.valid
    assert "400" in ranking.error
    assert oracle.stats()["oracle/api/requests"] == 2  # no use in trying again
