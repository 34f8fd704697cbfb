"""The embedded oracle: partial credit in the promised order, ties where equal."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaif_fast.oracle import RankRequest, ReferenceOracle
from rlaif_fast.oracle.choices import parse_choice
from rlaif_fast.oracle.scoring import chrf, parse_number, token_f1

FORM = r"the (red|green|blue) (square|circle) moves (left|right)\."


def scores_of(oracle, group):
    [ranking] = oracle.rank([group])
    assert ranking.error is None
    return ranking.scores


def request(reference, responses=("a", "b"), **kwargs):
    return RankRequest(id="r", question="?", responses=tuple(responses), reference=reference, **kwargs)


def form_request(*responses):
    return request("The red square moves left.", responses, metadata={"form": FORM})


def test_form_orders_exact_then_facts_then_malformed():
    group = form_request(
        "the red square moves left",  # exact after normalising
        "the red square moves right.",  # two facts of three
        "the red circle moves right.",  # one fact
        "the blue circle moves right.",  # none, yet well-formed
        "red square moves left left",  # malformed, near
        "square square",  # malformed, far
        "",
    )
    (ranking,) = ReferenceOracle().rank([group])
    assert ranking.ranks == (0, 1, 2, 3, 4, 5, 6)
    assert ranking.valid
    assert ranking.confidence == 1.0


def test_equal_scores_tie_and_all_equal_groups_tie_wholly():
    oracle = ReferenceOracle()
    group = form_request(
        "the blue square moves left.", "the red circle moves left.", "THE RED square  moves left"
    )
    assert oracle.rank([group])[0].ranks == (1, 1, 0)
    same = form_request("nonsense", "nonsense", "other words")
    assert oracle.rank([same])[0].ranks == (0, 0, 0)


WORDS = ("the", "red", "square", "moves", "left", "circle", "right", "left.")


@pytest.mark.parametrize(
    ("reference", "response", "right"),
    [
        ("?", "?", True),
        ("?", "", False),
        ("?", "!", False),
        ("?", "...", False),
        ("红色的圆", "红色的圆。", True),
        ("हाँ", "हाँ।", True),
        ("نعم", "نعم؟", True),
        ("3", "\u22123", False),
        ("-3", "\u22123", True),
        ("\u22123", "-3.0", True),
    ],
)
def test_signs_of_any_script_are_read(reference, response, right):
    oracle, asked = ReferenceOracle(), request(reference, (response, "other words"))
    assert oracle.is_correct(asked, response) is right
    assert (scores_of(oracle, asked)[0] >= 0.9) is right


@given(words=st.lists(st.sampled_from(WORDS), max_size=9))
def test_malformed_never_reaches_well_formed(words):
    text = " ".join(words)
    worst = "the blue circle moves right."
    oracle = ReferenceOracle()
    malformed, well_formed, exact = scores_of(oracle, form_request(text, worst, "the red square moves left."))
    assert 0.0 <= malformed <= 1.0
    if malformed < 0.3:
        assert malformed < well_formed < exact
    else:
        assert re.fullmatch(FORM, f"{text.rstrip('.')}.")


@pytest.mark.parametrize(
    ("response", "index"),
    [
        ("A", 0),
        ("(b)", 1),
        ("B.", 1),
        ("C) a green bird", 2),
        ("answer: A", 0),
        ("The answer is (C).", 2),
        ("a Dog.", 0),
        ("It is a green bird I think", 2),
        ("A or B", None),
        ("A. B. C.", None),
        ("F", None),
        ("", None),
        ("a horse", None),
        ("a dog and a cat", None),
    ],
)
def test_parse_choice(response, index):
    assert parse_choice(response, ["a dog", "a cat", "a green bird"]) == index


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3.0),
        ("there are three squares", 3.0),
        ("-1,234.5", -1234.5),
        ("3 or 4", None),
        ("none", None),
        ("x3", None),
        ("the one on the left: 2", 2.0),
        ("\u22123", -3.0),
    ],
)
def test_parse_number(text, value):
    assert parse_number(text) == value


def test_choice_is_scored_by_letter():
    oracle = ReferenceOracle()
    group = request("B", ("(B)", "red", "blue!", "green", "whatever", ""), options=("red", "blue", "green"))
    scores = scores_of(oracle, group)
    assert scores[0] == scores[2] == 1.0
    assert scores[1] == scores[3] > scores[4] == scores[5] == 0.0
    assert oracle.is_correct(group, "answer: B")
    assert not oracle.is_correct(group, "A")


def test_options_that_are_letters_themselves():
    oracle = ReferenceOracle()
    for reference, options in (("C", ("b", "c", "a")), ("B", ("B", "A", "C", "D"))):
        group = request(reference, (reference, f"({reference})", "D"), options=options)
        scores = scores_of(oracle, group)
        assert scores[0] == scores[1] == 1.0 > scores[2]
        assert [oracle.is_correct(group, text) for text in group.responses] == [True, True, False]


def test_a_letter_of_no_option_is_a_text():
    group = request("E", ("E", "A"), options=("red", "blue"))
    scores = scores_of(ReferenceOracle(), group)
    assert scores[0] == 1.0 > scores[1]
    assert not ReferenceOracle().is_correct(group, "A")


def test_a_letter_reference_without_options():
    oracle = ReferenceOracle()
    assert scores_of(oracle, request("B", ("B.", "C", "the cat"))) == (1.0, 0.2, 0.0)


def test_number_credit_falls_with_distance():
    scores = scores_of(ReferenceOracle(), request("4", ("4", "there are four", "5", "9", "many", "4 or 5")))
    assert scores[0] == 1.0
    assert scores[1] == 0.9
    assert scores[1] > scores[2] > scores[3] > scores[4] == 0.0
    assert scores[5] < scores[3]
    assert ReferenceOracle(tolerance=0.3).is_correct(request("4"), "5")
    assert not ReferenceOracle().is_correct(request("4"), "5")


def test_free_text_uses_words_and_characters():
    reference = "A man opens the door"
    scores = scores_of(
        ReferenceOracle(),
        request(reference, ("a man opens the door.", "a man opened a door", "a dog runs", "!!")),
    )
    assert scores[0] == 1.0
    assert 0.9 > scores[1] > scores[2] > scores[3] == 0.0
    assert token_f1("a man opens the door", reference) == 1.0
    assert token_f1("man man", reference) == pytest.approx(2 / 7)
    assert chrf(reference, reference) == pytest.approx(1.0)


def test_is_correct_by_form_needs_every_fact():
    oracle = ReferenceOracle()
    group = form_request("a", "b")
    assert oracle.is_correct(group, "The red square moves left")
    assert not oracle.is_correct(group, "the red square moves right.")
    assert not oracle.is_correct(group, "red square left")


def test_extract_finds_the_answer_inside_reasoning():
    oracle = ReferenceOracle(extract=r"<answer>(.*?)</answer>")
    group = request(
        "B", ("<think>A?</think><answer>B</answer>", "B", "<answer>A</answer>"), options=("x", "y")
    )
    assert scores_of(oracle, group) == (1.0, 0.5, 0.2)


@pytest.mark.parametrize("extract", [None, r"(?:</think>|\Z)\s*(.*)", r"so: (.*)"])
@pytest.mark.parametrize(
    "said",
    [
        *("{}", "<answer>{}</answer>", "\\boxed{{{}}}", "<answer>\\boxed{{{}}}</answer>"),
        *("<|begin_of_box|>{}<|end_of_box|>", "<answer><|begin_of_box|>{}<|end_of_box|></answer>"),
        *("**{}**", '"{}."', "“{}”", "`{}`.", "**{}.**"),
    ],
)
@pytest.mark.parametrize("answer", ["red", "4", "a man's dog", "É e"])
def test_marks_around_an_answer_are_no_part_of_it(extract, said, answer):
    """Also where `extract` takes what stands behind the reasoning."""
    oracle = ReferenceOracle(extract=extract)
    response = (
        f"blue? so: </think>\n{said.format(answer)}"
        if extract != r"so: (.*)"
        else f"so: {said.format(answer)}"
    )
    group = request(answer, (response, response.replace(answer, "nothing")))
    right, wrong = scores_of(oracle, group)
    assert right == 1.0 > wrong
    assert [oracle.is_correct(group, text) for text in group.responses] == [True, False]


def test_marks_that_a_reference_has_are_expected_behind_the_reasoning_too():
    oracle = ReferenceOracle(extract=r"</think>\s*(.*)")
    group = request("<answer>red</answer>", ("</think><answer>red</answer>", "</think>red"))
    assert scores_of(oracle, group)[0] == 1.0 > scores_of(oracle, group)[1]


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("<think>The result goes into <answer> tags.</think><answer>{}</answer>", True),
        ("<think>maybe <answer>red</answer>, no</think>\n<answer>{}</answer>", True),
        ("<think>maybe <answer>red</answer>, no</think>\n{}", True),
        ("<think>no, <answer>{}</answer></think>\n", True),
        ("<think>no, <answer>{}</answer></think>\nred", False),
        ("<think>x</think><answer>red</answer></think><answer>{}</answer>", False),
    ],
)
def test_a_block_inside_the_reasoning_is_no_answer_where_one_follows(said, right):
    group = request("blue", ("x", "y"))
    assert ReferenceOracle().is_correct(group, said.format("blue")) is right
    choice = request("B", ("x", "y"), options=("red", "blue"))
    assert ReferenceOracle().is_correct(choice, said.format("B").replace("red", "A")) is right


def test_two_boxes_that_differ_are_no_answer():
    oracle = ReferenceOracle(extract=r"</think>\s*(.*)")
    two = "</think><|begin_of_box|>red<|end_of_box|> <|begin_of_box|>blue<|end_of_box|>"
    assert scores_of(oracle, request("red", (two, "</think>red"))) == (0.0, 1.0)


def test_what_cannot_be_judged_is_an_error_not_a_default():
    oracle = ReferenceOracle()
    missing, bad = request(None), request("green", metadata={"form": "(red|blue)"})
    for ranking in oracle.rank([missing, bad]):
        assert not ranking.valid
        assert ranking.ranks == (None, None)
        assert ranking.error
    assert "no reference answer" in oracle.rank([missing])[0].error
    [broken] = oracle.rank([request("green", metadata={"form": "(red"})])
    assert "regular expression" in broken.error


@given(
    reference=st.text(max_size=20).filter(lambda text: text.strip()),
    response=st.text(max_size=20),
)
def test_scores_stay_in_range_and_the_reference_itself_wins(reference, response):
    oracle = ReferenceOracle()
    scores = scores_of(oracle, request(reference, (response, reference)))
    assert 0.0 <= scores[0] <= scores[1] == 1.0
    assert oracle.is_correct(request(reference), reference)


@pytest.mark.parametrize(
    ("reference", "response"),
    [
        ("4", "<think>There are 3 on the left and 1 more.</think><answer>4</answer>"),
        ("4", "<think>3 and 1</think>\n4"),
        ("4", "Three and one make \\boxed{4}"),
        ("a red ball", "<think>It is red, not blue.</think> <answer> A red ball. </answer>"),
        ("a red ball", "<ANSWER>a red ball"),
        ("a red ball", "a red ball"),
        ("<think>x</think><answer>4</answer>", "<think>x</think><answer>4</answer>"),  # scored whole
    ],
)
def test_the_answer_behind_reasoning_is_scored(reference, response):
    oracle = ReferenceOracle()
    asked = RankRequest("r", "q", (response, "something else"), reference=reference)
    assert oracle.is_correct(asked, response)
    [ranking] = oracle.rank([asked])
    assert ranking.ranks == (0, 1) and ranking.scores[0] == 1.0


@pytest.mark.parametrize(
    "response",
    [
        "<think>It must be 4",  # reasoning that does not end
        "<answer>4</answer> or <answer>5</answer>",
        "<think>4</think><answer>5</answer>",
        "\\boxed{4} \\boxed{5}",
        "<think>4</think>",
    ],
)
def test_reasoning_alone_is_no_answer(response):
    asked = RankRequest("r", "q", (response,), reference="4")
    assert not ReferenceOracle().is_correct(asked, response)
