"""Word classes and patterns of captions, and prompts that become captions by them."""

from collections import defaultdict

import pytest

from megasora.sampling.caption_grammar import CaptionGrammar, join_tokens, split_tokens
from megasora.sampling.prompt_expansion import TemplateExpander
from megasora.testing.clips import (
    BACKGROUNDS,
    COLORS,
    DIRECTIONS,
    HELD_OUT,
    SHAPES,
    SIZES,
    clip_at,
    describe,
)

EVERYTHING = {"colors": tuple(COLORS), "shapes": SHAPES, "backgrounds": BACKGROUNDS, "bounce_fraction": 0.4}
COOKS = [  # captions that are nothing like the rendered ones
    f"In a {room}, {who} {verb} {food}{how}."
    for room, who in zip(["kitchen", "garden", "tent"] * 12, ["a cook", "an aunt", "somebody"] * 12, strict=True)
    for verb in ("chops", "fries", "eats")
    for food in ("onions", "carrots")
    for how in ("", " in silence")
]


def captions(count, **choices):
    return [clip_at(0, "train", i, **choices)[1] for i in range(count)]


@pytest.fixture(scope="module")
def grammar():
    return CaptionGrammar(captions(1500))


@pytest.fixture(scope="module")
def expand(grammar):
    return TemplateExpander(grammar)


@pytest.fixture(scope="module")
def expand_any():
    return TemplateExpander(CaptionGrammar(captions(3000, **EVERYTHING)))


def classes_with_several_words(grammar):
    classes = defaultdict(set)
    for word, word_class in grammar.class_of.items():
        classes[word_class].add(word)
    return {frozenset(words) for words in classes.values() if len(words) > 1}


# ---------------------------------------------------------------- what is learnt


@pytest.mark.parametrize(
    "text", ["a red circle", "bounces slowly, first up", 'a sign "(stop)", red.', "- x - y!", "5.5"]
)
def test_tokens_join_to_the_text_they_are_of(text):
    assert join_tokens(split_tokens(text)) == text


@pytest.mark.parametrize("count", [100, 300, 3000])
def test_interchangeable_words_are_found_without_any_list(count):
    expected = [COLORS, SHAPES, DIRECTIONS, BACKGROUNDS, SIZES, ("slowly", "quickly")]
    found = classes_with_several_words(CaptionGrammar(captions(count, **EVERYTHING)))
    assert found == {frozenset(words) for words in expected}


def test_words_that_follow_each_other_are_never_interchangeable():
    texts = [f"a {a} cat" for a in ("big", "grey")] * 5 + ["a big grey cat", "a grey big cat"]
    assert classes_with_several_words(CaptionGrammar(texts)) == set()
    assert classes_with_several_words(CaptionGrammar(texts[:10])) == {frozenset({"big", "grey"})}


def test_captions_of_another_domain_have_their_own_classes():
    found = classes_with_several_words(CaptionGrammar(COOKS))
    assert {frozenset({"chops", "fries", "eats"}), frozenset({"onions", "carrots"})} <= found


# ---------------------------------------------------------------- prompts of known words


@pytest.mark.parametrize("color", ("red", "green", "blue", "yellow"))
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_two_words_become_the_shortest_caption_that_has_them(expand, color, direction):
    both = {describe(color, shape, direction) for shape in ("circle", "square")}
    assert expand(f"{color} {direction}", seed=0) in both
    assert expand(f"{direction}, {color.upper()}!", seed=0) in both


def test_combinations_that_no_caption_has_expand_like_the_others(expand):
    for color, shape, direction in HELD_OUT:
        assert expand(f"{shape} {color} {direction}", seed=0) == describe(color, shape, direction)


def test_every_word_of_the_prompt_is_kept(expand_any):
    for color in COLORS:
        for background in BACKGROUNDS:
            for word in ("slowly", "left", "small", "bounces"):
                caption = expand_any(f"{background} {word} {color}", seed=1)
                assert {color, background, word} <= set(caption.replace(",", " ").split())


def test_the_words_that_are_added_come_from_one_caption_with_the_words_of_the_prompt(expand_any):
    known = set(captions(3000, **EVERYTHING))
    for color in COLORS:
        for word in (*DIRECTIONS, *BACKGROUNDS, *SIZES, "slowly", "bounces"):
            assert {expand_any(f"{word} {color}", seed) for seed in range(5)} <= known


def test_a_word_is_put_only_where_some_caption_has_it(expand_any):
    """Of a bounce, captions say "first to the left", but "first up"."""
    assert expand_any("red circle bounces left", 0) == "a red circle bounces, first to the left"
    assert expand_any("red circle bounces up", 0) == "a red circle bounces, first up"


def test_the_seed_chooses_among_words_that_the_prompt_leaves_open(expand):
    expanded = [expand("blue slowly", seed) for seed in range(40)]
    assert expanded == [expand("blue slowly", seed) for seed in range(40)]
    assert set(expanded) == {
        f"a blue {shape} moves {direction} slowly"
        for shape in ("circle", "square")
        for direction in DIRECTIONS
        if ("blue", shape, direction) not in HELD_OUT
    }


def test_other_captions_expand_by_their_own_grammar():
    expand = TemplateExpander(CaptionGrammar(COOKS))
    assert expand("carrots eats tent", 0) == "In a tent, somebody eats carrots."


# ---------------------------------------------------------------- prompts that stay as they are


def test_captions_are_returned_unchanged(expand, expand_any):
    for text in captions(200):
        assert expand(text, 0) == text
    for text in captions(200, **EVERYTHING):
        assert expand_any(text, 0) == text
    assert expand("A RED circle moves right", 0) == "A RED circle moves right"


def test_an_expanded_prompt_expands_to_itself(expand_any):
    for prompt in ("red right", "striped", "quickly small cyan", "triangle bounces"):
        once = expand_any(prompt, 3)
        assert once != prompt and expand_any(once, 4) == once


@pytest.mark.parametrize(
    "prompt",
    [
        "", " ", "\0\1", "?!", "over background", "a a a a", "moves",  # no word that a caption chooses
        "ein roter Kreis läuft", "红色圆形向右移动", "🔴➡️", "the red circle goes to the right",  # most are unknown
        "red blue", "left circle right",  # no pattern has both
        "\ud800",
    ],
)  # fmt: skip
def test_prompts_that_the_grammar_does_not_cover_are_unchanged(expand, prompt):
    assert expand(prompt, 0) == prompt


@pytest.mark.parametrize("word", ["red ", "x", "x ", "red right elephant ", "\0", "👩‍👩‍👧 ", "(", "红"])
def test_prompts_of_100_kb_are_unchanged(expand, word):
    prompt = word * (100_000 // len(word))
    assert expand(prompt, 0) == prompt


def test_without_captions_of_one_pattern_every_prompt_is_unchanged():
    for texts in ([], ["", " "], ["a dog sleeps", "two cats", "rain over the sea at night"]):
        assert TemplateExpander(CaptionGrammar(texts))("dog rain", 0) == "dog rain"


# ---------------------------------------------------------------- unknown words


@pytest.mark.parametrize(
    ("prompt", "expanded"),
    [
        ("red elephant right", "a red elephant moves right"),  # in place of a guessed shape
        ("purple circle moves right", "a purple circle moves right"),
        ("huge hairy circle moves right", "a huge hairy circle moves right"),
        ("tiny red circle", "a tiny red circle"),  # there is a pattern with a size
        ("red circle right happily", "a red circle moves right happily"),
        ("red circle moving to the right", "a red circle moving to the right"),  # in place of `moves`
        ("red 🎈 right", "a red 🎈 moves right"),
        ("rot\0red\x1b[31m right", "a rot red 31m moves right"),
    ],
)
def test_a_word_that_no_caption_has_stays_between_its_neighbours(expand, prompt, expanded):
    assert expand(prompt, 0) == expanded
