"""Questions about generated clips: well formed, even, and not given away by their wording."""

import random
import re
from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_parts import thing, worlds

from rlaif_fast.data import VOCABULARY, chance_by_category
from rlaif_fast.data.synthetic.dataset import SPLITS
from rlaif_fast.data.synthetic.drafts import CATEGORIES
from rlaif_fast.data.synthetic.questions import TOKEN, drafts
from rlaif_fast.data.synthetic.worlds import LEVELS, Event, World, sample_world

# The core categories of Video-MME, and the ones that the easiest level has to offer.
OCR = "OCR problems"


EASY = set(CATEGORIES) - {"action reasoning", OCR}


@given(worlds, st.integers(0, 10**6))
@settings(max_examples=300, deadline=None)
def test_questions_are_well_formed(world, seed):
    found = drafts(world, random.Random(seed))
    assert len({draft.category for draft in found}) == len(found) >= 2
    known = set(VOCABULARY)
    rng = random.Random(seed)
    for draft in found:
        right = re.fullmatch(draft.form, draft.answer)
        assert right and any(right.groups()), (draft.form, draft.answer)
        wrong = draft.corrupted(rng)
        match = re.fullmatch(draft.form, wrong.answer)
        assert match and match.groups() != right.groups()
        options, index = draft.choices(rng, 4)
        assert len(set(options)) == len(options) >= 2
        if draft.category != "counting problem":  # "two" in an option, "are two objects" in an answer
            assert draft.before + options[index] + draft.after == draft.answer
        texts = " ".join([draft.question, draft.answer, wrong.answer, *options])
        assert set(TOKEN.findall(texts)) <= known


def test_vocabulary_is_small_and_needed():
    assert 60 <= len(VOCABULARY) <= 90 and len(set(VOCABULARY)) == len(VOCABULARY)
    used = set("ABCD")
    for i in range(1500):
        for draft in drafts(sample_world(f"v/{i}", 1 + i % 3), random.Random(i)):
            used |= set(TOKEN.findall(f"{draft.question} {draft.answer}"))
    assert used == set(VOCABULARY)


def test_answers_follow_from_the_world():
    world = World(
        "known",
        1,
        (thing("circle", "red", "top left"), thing("square", "blue", "top right")),
        (Event("vanish", 0, 0), Event("flash", time=2)),
    )
    answers = {}
    for seed in range(60):
        answers.update({d.question: d.answer for d in drafts(world, random.Random(seed))})
    assert answers["how many objects are there in total?"] == "there are two objects."
    assert answers["which object vanishes?"] == "the red object vanishes."
    assert answers["what color is the object in the top right?"] == "the object is blue."
    assert answers["where is the red object relative to the blue object?"].endswith(
        "left of the blue object."
    )
    assert answers["when does the screen flash?"] == "the screen flashes at the end."
    assert answers["what shape is the red object?"] == "the red object is a circle."
    assert answers["what happens first?"] == "first the red object vanishes."
    assert answers["what happens last?"] == "last the screen flashes."


def evenness(difficulty, split, count=2500):
    """kind -> how often each fact is the answer."""
    facts = defaultdict(Counter)
    for i in range(count):
        world = sample_world(f"even/{split}/{i}", difficulty, SPLITS[split])
        for draft in drafts(world, random.Random(world.name)):
            facts[draft.kind][re.fullmatch(draft.form, draft.answer).groups()] += 1
    return facts


@pytest.mark.parametrize("difficulty", sorted(LEVELS))
@pytest.mark.parametrize("split", ["rl", "test"])
def test_answers_are_even(difficulty, split):
    """The most frequent answer of a kind of question is at most a quarter more likely than by an even choice.

    Four standard errors are allowed beside it; synopses combine many facts and are left out.
    """
    for kind, counts in evenness(difficulty, split).items():
        total = sum(counts.values())
        if kind == "synopsis" or total < 300:
            continue
        even = 1 / len(counts)
        error = (even * (1 - even) / total) ** 0.5
        slack = 1.5 if kind.startswith("order") or kind in ("which", "hit", "why") else 1.25
        assert max(counts.values()) / total <= slack * even + 4 * error, (kind, counts.most_common(3))


def test_the_wording_of_a_question_does_not_tell_its_answer():
    """What the RL questions teach helps little on the test questions: chance stays near 1 in k."""

    def rows(split, count):
        from rlaif_fast.data import Example

        for i in range(count):
            world = sample_world(f"words/{split}/{i}", 1, SPLITS[split])
            for k, draft in enumerate(drafts(world, random.Random(world.name))):
                yield Example(
                    f"{i}-{k}",
                    draft.question,
                    draft.answer,
                    category=draft.category,
                    metadata={"form": draft.form},
                )

    chance = chance_by_category(list(rows("test", 1200)), reference=list(rows("rl", 2500)))
    limits = {
        "object recognition": 0.38,
        "attribute perception": 0.30,
        "spatial perception": 0.30,
        "counting problem": 0.38,
        "action recognition": 0.17,
        "temporal perception": 0.38,
        "temporal reasoning": 0.22,
        "object reasoning": 0.30,
        "spatial reasoning": 0.55,
        "information synopsis": 0.10,
    }
    assert set(chance) == EASY
    assert {name: value for name, value in chance.items() if value > limits[name]} == {}


def test_options_do_not_tell_which_is_right():
    """Neither the place of an option, nor its words in common with the others, gives the answer away."""
    places, central, total = Counter(), 0, 0
    for i in range(1500):
        rng = random.Random(i)
        for draft in drafts(sample_world(f"mc/{i}", 1), rng):
            options, index = draft.choices(rng, 4)
            if len(options) < 4:
                continue
            words = Counter(word for option in options for word in option.split())
            scores = [sum(words[word] for word in option.split()) / len(option.split()) for option in options]
            best = [k for k in range(4) if scores[k] == max(scores)]
            central += (index in best) / len(best)
            places[index] += 1
            total += 1
    assert total > 2000
    assert max(places.values()) / total < 0.28
    assert central / total < 0.29
