"""The local judge against plain forward passes of the same model."""

from __future__ import annotations

import string

import pytest
import torch

pytest.importorskip("transformers")

from rlaif_fast.data.schema import Example
from rlaif_fast.errors import UsageError
from rlaif_fast.oracle import RankRequest, build_oracle
from rlaif_fast.oracle.base import gives_scores
from rlaif_fast.oracle.identity import model_digest
from rlaif_fast.oracle.local import _LISTWISE, _POINTWISE, LocalOracle
from rlaif_fast.oracle.monitors import blind_control, oracle_stats
from rlaif_fast.oracle.protocols import answers_block, question_block
from rlaif_fast.policy.plain import model_inputs
from rlaif_fast.policy.tiny import TinySize, make_tiny
from rlaif_fast.rollout.shared_prefix import GroupCache
from rlaif_fast.trainer.options import TrainConfig
from rlaif_fast.trainer.setup import make_oracle
from rlaif_fast.video.base import Clip

SIZE = TinySize(
    hidden_size=64, layers=2, heads=4, intermediate_size=96, vision_hidden_size=32, vision_layers=1
)
ANSWERS = ("a red square", "a blue square", "square square", "nothing", "a red square moves left")


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen2_5_vl"])
def checkpoint(request, tmp_path_factory):
    words = {"Yes", "No", "what", "happens", "?", *" ".join(ANSWERS).split()}
    size = TinySize(**{**vars(SIZE), "hidden_size": 128}) if request.param == "qwen2_5_vl" else SIZE
    return make_tiny(tmp_path_factory.mktemp("tiny"), words, family=request.param, size=size, seed=3)


def clip(seed):
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randint(0, 256, (4, 32, 32, 3), generator=generator, dtype=torch.uint8)
    return Clip(frames, (0.0, 0.5, 1.0, 1.5), key=f"clip{seed}")


def requests(count=3):
    return [
        RankRequest(f"r{n}", "what happens ?", ANSWERS[: 5 - n % 2], clips=(clip(n),)) for n in range(count)
    ]


def judge(checkpoint, **options):
    return LocalOracle(**{"model": str(checkpoint), "device": "cpu", "max_pixels": 1024, **options})


def next_logps(oracle, prompt, reply=()):
    """Log-probabilities of the next token after a prompt and some tokens, by the model's own forward."""
    token_ids = torch.tensor([list(reply) or [0]])
    inputs = model_inputs(
        oracle.policy.model, [prompt], token_ids, torch.tensor([len(reply)]), group_sizes=[1]
    )
    with torch.no_grad():
        logits = oracle.policy.model(**inputs).logits[0, -1]
    return (logits.float() + oracle.policy.head_bias).log_softmax(-1)


def test_the_weights_are_part_of_the_identity(checkpoint):
    assert f"weights={model_digest(str(checkpoint))} " in judge(checkpoint).identity


def test_the_dtype_is_part_of_the_identity(checkpoint):
    names = {name: judge(checkpoint, dtype=name).identity for name in ("auto", "float32", "bfloat16")}
    assert names["auto"] == names["float32"] != names["bfloat16"]


@pytest.mark.parametrize("protocol", ["likelihood", "pointwise"])
def test_a_model_that_gives_nan_judges_nothing(checkpoint, protocol):
    oracle = judge(checkpoint, protocol=protocol)
    with torch.no_grad():
        oracle.policy.model.get_input_embeddings().weight.fill_(float("nan"))
    for ranking in oracle.rank(requests(2)):
        assert not ranking.valid
        assert ranking.error == "the judge's model gave NaN"


def test_likelihood_is_the_mean_token_log_probability(checkpoint):
    oracle = judge(checkpoint, protocol="likelihood", batch_size=2)
    group = requests(3)
    for request, ranking in zip(group, oracle.rank(group)):
        prompt = oracle.encoder.encode(Example(id="x", question=request.question), request.clips)
        expected = []
        for text in request.responses:
            reply = oracle.encoder.encode_answer(text)
            steps = [next_logps(oracle, prompt, reply[:t])[token].item() for t, token in enumerate(reply)]
            expected.append(torch.tensor(steps).mean().exp().item())
        assert ranking.scores == pytest.approx(expected, rel=1e-4)
        order = sorted(expected, reverse=True)
        assert ranking.ranks == tuple(order.index(value) for value in expected)
        assert ranking.tokens > 0


def test_pointwise_is_the_probability_of_yes(checkpoint):
    oracle = judge(checkpoint, protocol="pointwise")
    [request] = requests(1)
    yes, no = (oracle.encoder.tokenizer.get_vocab()[word] for word in ("Yes", "No"))
    expected = []
    for text in request.responses:
        question = question_block(request) + answers_block([("answer", text)])
        prompt = oracle.encoder.encode(Example(id="x", question=question, system=_POINTWISE), request.clips)
        logps = next_logps(oracle, prompt)
        expected.append(torch.sigmoid(logps[yes] - logps[no]).item())
    [ranking] = oracle.rank([request])
    assert ranking.scores == pytest.approx(expected, rel=1e-4)
    order = sorted(expected, reverse=True)
    assert ranking.ranks == tuple(order.index(value) for value in expected)


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    """A checkpoint whose template leaves a prompt inside the reasoning."""
    words = {"Yes", "No", "A", "B", "C", "D", "E", "what", "happens", "?", "<think>", "</think>"}
    folder = make_tiny(
        tmp_path_factory.mktemp("thinker"), words | {*" ".join(ANSWERS).split()}, size=SIZE, seed=3
    )
    template = folder / "chat_template.jinja"
    start = "<|im_start|>assistant\n"
    template.write_text(template.read_text().replace(start, start + "<think>\n"))
    return folder


@pytest.mark.parametrize("protocol", ["likelihood", "pointwise", "listwise"])
def test_a_judge_that_reasons_is_asked_behind_the_reasoning(thinker, protocol, monkeypatch):
    """Inside it, the odds of an answer were those of a first thought, and what closes it favoured long responses."""
    oracle = judge(thinker, protocol=protocol, **({"orders": 2} if protocol == "listwise" else {}))
    encoder = oracle.encoder
    assert encoder.reasons and len(encoder.closing) >= 1
    seen = []
    encode_media = oracle.policy.encode_media
    monkeypatch.setattr(
        oracle.policy,
        "encode_media",
        lambda prompts, *rest: seen.extend(prompts) or encode_media(prompts, *rest),
    )
    [request] = requests(1)
    [ranking] = oracle.rank([request])
    ends = [prompt.input_ids.tolist()[-len(encoder.closing) :] for prompt in seen]
    assert ends and all(end == encoder.closing for end in ends)
    expected = []
    for text in request.responses if protocol != "listwise" else ():
        if protocol == "pointwise":
            question = question_block(request) + answers_block([("answer", text)])
            prompt = encoder.encode(Example(id="x", question=question, system=_POINTWISE), request.clips)
            yes, no = (encoder.tokenizer.get_vocab()[word] for word in ("Yes", "No"))
            logps = next_logps(oracle, prompt, encoder.closing)
            expected.append(torch.sigmoid(logps[yes] - logps[no]).item())
            continue
        prompt = encoder.encode(Example(id="x", question=request.question), request.clips)
        reply, begin = encoder.encode_answer(text), len(encoder.closing)
        assert reply[:begin] == encoder.closing
        steps = [next_logps(oracle, prompt, reply[:t])[reply[t]].item() for t in range(begin, len(reply))]
        expected.append(torch.tensor(steps).mean().exp().item())
    if expected:
        assert ranking.scores == pytest.approx(expected, rel=1e-4)


@pytest.fixture(scope="module")
def spaced(tmp_path_factory):
    """A checkpoint whose tokenizer, like those of real models, spells a letter behind a space by another token."""
    from transformers import AddedToken, AutoModelForImageTextToText, AutoTokenizer

    folder = make_tiny(tmp_path_factory.mktemp("spaced"), " ".join(ANSWERS).split(), size=SIZE, seed=3)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(f" {letter}") for letter in "ABCDEFGH"])
    model = AutoModelForImageTextToText.from_pretrained(folder)
    torch.manual_seed(0)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)  # which would make them all but equal
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_listwise_generates_a_permutation_greedily(checkpoint, shared_prefix):
    check_listwise(judge(checkpoint, orders=2, shared_prefix=shared_prefix))


def test_a_label_is_spelled_as_it_stands_in_the_reply(spaced):
    oracle = judge(spaced, orders=2)
    capitals = [tokens for label, tokens in oracle._label_tokens if label.isupper()]
    assert len(capitals) == 8 and all(first != behind for first, behind in capitals)
    check_listwise(oracle)


@pytest.fixture(scope="module")
def lettered(tmp_path_factory):
    """A checkpoint that spells every letter by one token, and no digit, as Qwen's behind a space."""
    return make_tiny(tmp_path_factory.mktemp("lettered"), {*string.ascii_letters, "square"}, size=SIZE)


def test_a_group_of_more_responses_than_capitals_is_ranked(lettered):
    request = RankRequest("r", "what ?", tuple("square " * n for n in range(1, 33)), clips=(clip(0),))
    [ranking] = judge(lettered, orders=2).rank([request])
    assert ranking.error is None
    for verdict in ranking.verdicts:
        assert sorted(verdict.ranks) == list(range(32))
        assert {*string.ascii_uppercase} < {*verdict.raw[0].split()} < {*string.ascii_letters}


def test_letters_that_a_tokenizer_does_not_tell_apart_are_one_label(lettered):
    from tokenizers.normalizers import Lowercase

    oracle = judge(lettered)
    oracle.encoder.tokenizer.backend_tokenizer.normalizer = Lowercase()
    assert [label for label, _ in oracle._label_tokens] == list(string.ascii_uppercase)


def test_keys_and_values_of_few_prompts_are_held_at_once(checkpoint, monkeypatch):
    held = []
    make = GroupCache.__init__

    def init(cache, policy, prompt_lengths, length):
        held.append(len(prompt_lengths) * length)
        make(cache, policy, prompt_lengths, length)

    monkeypatch.setattr(GroupCache, "__init__", init)
    group = requests(6)
    whole = judge(checkpoint).rank(group)
    in_parts = judge(checkpoint, max_packed_tokens=600).rank(group)
    assert [ranking.ranks for ranking in in_parts] == [ranking.ranks for ranking in whole]
    assert held[0] > 1200 and len(held) > 2 and max(held[1:]) <= 1200


def check_listwise(oracle):
    """Compare with a reply that is drawn token by token with the model's own forward."""
    group = requests(2)  # of five answers and of four
    for request, ranking in zip(group, oracle.rank(group)):
        assert len(ranking.verdicts) == 2
        for showing, verdict in zip(oracle._show(request)[0], ranking.verdicts):
            labels = oracle._labels(showing)
            block = answers_block((labels[i][0], showing.texts[i]) for i in showing.order)
            prompt = oracle.encoder.encode(
                Example(id="x", question=question_block(request) + block, system=_LISTWISE), request.clips
            )
            said, left = [], list(range(len(request.responses)))
            while left:
                behind = bool(said)  # a label's token where the reply begins, or behind a space
                logps = next_logps(oracle, prompt, [labels[i][1][n > 0] for n, i in enumerate(said)])
                best = max(left, key=lambda i: logps[labels[i][1][behind]].item())
                said.append(best)
                left.remove(best)
            assert verdict.ranks == tuple(said.index(i) for i in range(len(said)))
            assert verdict.raw == (" ".join(labels[i][0] for i in said),)
            assert sorted(label for label, _ in labels) == list("ABCDE")[: len(said)]


@pytest.mark.parametrize("protocol", ["listwise", "pointwise", "likelihood"])
def test_groups_do_not_depend_on_their_batch_and_frames_are_seen(checkpoint, protocol):
    group = requests(4)
    oracle = judge(checkpoint, protocol=protocol)
    whole = oracle.rank(group)
    few = judge(checkpoint, protocol=protocol, max_packed_tokens=64)  # a group is never cut
    assert [ranking.ranks for ranking in few.rank(group)] == [ranking.ranks for ranking in whole]
    alone = judge(checkpoint, protocol=protocol, batch_size=1)
    assert [ranking.ranks for ranking in whole] == [alone.rank([request])[0].ranks for request in group]
    assert all(ranking.valid for ranking in whole)
    stats = oracle_stats(group, whole)
    assert stats["oracle/invalid"] == 0.0
    assert set(blind_control(oracle, group, whole, sample=2)) <= {"oracle/blind_tau", "oracle/blind_top1"}
    if protocol != "listwise":
        assert whole[0].scores != whole[2].scores  # the same question and answers about another clip


def test_a_judge_that_was_taught_the_answer_ranks_it_first(checkpoint):
    oracle = judge(checkpoint, protocol="likelihood")
    [request] = requests(1)
    prompt = oracle.encoder.encode(Example(id="x", question=request.question), request.clips)
    reply = torch.tensor([oracle.encoder.encode_answer("a blue square")])
    lengths = torch.tensor([reply.shape[1]])
    oracle.policy.model.requires_grad_(True)
    optimizer = torch.optim.AdamW(oracle.policy.model.parameters(), 3e-3)
    for _ in range(12):
        loss = -oracle.policy.response_logps([prompt], reply, lengths).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    oracle.policy.model.requires_grad_(False)
    [ranking] = oracle.rank([request])
    assert ranking.ranks[1] == 0
    assert ranking.scores[1] > 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "listwise"}, "too few for 64"),
        ({"protocol": "pointwise"}, "no single token for Yes"),
        ({"protocol": "likelihood"}, None),
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_a_run_refuses_a_judge_that_cannot_say_its_verdicts_before_it_trains(
    tmp_path, options, message, inside
):
    poor = make_tiny(tmp_path / "poor", {"square"}, size=SIZE)
    judged = {"model": str(poor), **options}
    name = "ensemble" if inside else "local"
    if inside:
        judged = {"members": ["reference", {"name": "local", **judged}]}
    config = TrainConfig(oracle=name, oracle_options=judged, num_generations=64)
    if message is None:
        assert make_oracle(config).name == name
        return
    with pytest.raises(UsageError, match=message):
        make_oracle(config)


def test_what_the_tokenizer_cannot_say_is_a_clear_error(checkpoint, tmp_path):
    poor = make_tiny(tmp_path / "poor", {"square"}, size=SIZE)
    with pytest.raises(UsageError, match="no single token for Yes"):
        judge(poor, protocol="pointwise").rank(requests(1))
    many = RankRequest("r", "what ?", tuple("square " * n for n in range(1, 40)))
    with pytest.raises(UsageError, match="too few for 39"):
        judge(poor).rank([many])
    with pytest.raises(UsageError, match=r"no option 'frames_per_clip'") as refused:
        build_oracle("local", model="x", frames_per_clip=4)
    assert str(refused.value).count("protocol") == 1
    with pytest.raises(UsageError, match="protocol"):
        judge(checkpoint, protocol="pairwise")
    with pytest.raises(UsageError, match="cannot load"):
        build_oracle("local", model=str(tmp_path / "none"))
    listwise = judge(checkpoint)
    assert not gives_scores(listwise)
    assert listwise.rank(requests(1))[0].scores is None
    assert gives_scores(judge(checkpoint, protocol="pointwise"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "pointwise", "orders": 2}, "'orders' must be 1 with protocol='pointwise'"),
        ({"protocol": "likelihood", "orders": 4}, "'orders' must be 1 with protocol='likelihood'"),
        ({"protocol": "likelihood", "extract": "<answer>(.*)"}, "'extract' is not read"),
        ({"protocol": "pointwise", "seed": 1}, "'seed' is not read with protocol='pointwise'"),
        ({"protocol": "likelihood", "fusion": "kemeny"}, "'fusion' is not read with one order"),
        ({"use_clips": False, "min_pixels": 64}, "'min_pixels' is not read with use_clips=False"),
        ({"use_clips": False, "max_pixels": 4096}, "'max_pixels' is not read with use_clips=False"),
    ],
)
def test_options_that_change_no_verdict_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        build_oracle("local", model="x", **options)
