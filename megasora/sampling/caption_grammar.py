"""A grammar of captions, learnt from captions alone: which words are interchangeable, and the patterns of sentences.

    ["a red circle moves right", "a blue square moves left slowly", ...] --learn-->
        word classes   {red, blue} {circle, square} {left, right} {slowly, quickly}, and words with a class of their own
        patterns       a RED CIRCLE moves RIGHT; a RED CIRCLE moves RIGHT SLOWLY     (each class by one of its words)
    "right red" --expand--> "a red circle moves right"

Words are of one class if they have the same neighbours, to the left and to the right, and are no neighbours themselves.
A pattern is the classes of the words of at least `MIN_CAPTIONS` captions. Nothing is known of any language, but words
are separated by spaces.
"""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megasora.errors import CONTROLS

MAX_COMPARED = 1000  # the most frequent words, which are compared with each other
MIN_WORD_COUNT = 2  # of a rarer word, too few neighbours are known
MIN_OVERLAP = 0.5  # Bhattacharyya coefficient of the neighbours of a word and of a class, on either side
MIN_CAPTIONS = 2  # of a pattern
UNKNOWN = -1
GLUE = "\0"  # at the side of a punctuation mark that has no space


def split_tokens(text: str) -> list[str]:
    """Words and punctuation marks; "left, (up" is "left", GLUE + ",", "(" + GLUE, "up"."""
    tokens = []
    for chunk in CONTROLS.sub(" ", text).split():
        start, end = 0, len(chunk)
        while start < end and is_mark(chunk[start]):
            start += 1
        while end > start and is_mark(chunk[end - 1]):
            end -= 1
        if start == end:  # only marks, between spaces
            tokens.append(chunk)
            continue
        tokens += [mark + GLUE for mark in chunk[:start]]
        tokens.append(chunk[start:end])
        tokens += [GLUE + mark for mark in chunk[end:]]
    return tokens


def join_tokens(tokens: Iterable[str]) -> str:
    return " ".join(tokens).replace(GLUE + " ", "").replace(" " + GLUE, "").replace(GLUE, "")


def is_mark(character: str) -> bool:
    return unicodedata.category(character).startswith("P")


def is_word(token: str) -> bool:
    return not is_mark(token.strip(GLUE)[0])


@dataclass(frozen=True)
class Pattern:
    """A sequence of word classes, and the captions that have it, as tokens."""

    classes: tuple[int, ...]
    captions: list[list[str]]

    @cached_property
    def words_of_slot(self) -> list[set[str]]:
        """Per slot, the words that captions have there, in lower case."""
        return [{token.casefold() for token in slot} for slot in zip(*self.captions, strict=True)]


class CaptionGrammar:
    """`class_of`: word in lower case -> its class; `spelling`: -> as most captions write it; `patterns`."""

    def __init__(self, captions: Iterable[str]):
        sentences = [tokens for tokens in map(split_tokens, captions) if tokens]
        lowered = [[token.casefold() for token in tokens] for tokens in sentences]
        self.class_of = learn_classes(lowered)
        self.num_words = Counter(self.class_of.values())
        spellings: dict[str, Counter[str]] = defaultdict(Counter)
        groups: dict[tuple[int, ...], list[list[str]]] = defaultdict(list)
        for tokens, words in zip(sentences, lowered, strict=True):
            groups[self.classes(words)].append(tokens)
            for token, word in zip(tokens, words, strict=True):
                spellings[word][token] += 1
        self.spelling = {word: counts.most_common(1)[0][0] for word, counts in spellings.items()}
        self.patterns = {
            classes: Pattern(classes, group) for classes, group in groups.items() if len(group) >= MIN_CAPTIONS
        }

    def classes(self, tokens: Iterable[str]) -> tuple[int, ...]:
        """The class of each token; UNKNOWN where no caption has it."""
        return tuple(self.class_of.get(token.casefold(), UNKNOWN) for token in tokens)

    def is_open(self, word_class: int) -> bool:
        """Whether a class has several words, of which a caption chooses one."""
        return self.num_words[word_class] > 1


def learn_classes(sentences: list[list[str]]) -> dict[str, int]:
    """Word -> number of its class. Words that are too rare to compare, and marks, have a class of their own."""
    counts = Counter(word for sentence in sentences for word in sentence)
    columns = {word: i for i, (word, _) in enumerate(counts.most_common(MAX_COMPARED))}
    compared = [word for word in columns if counts[word] >= MIN_WORD_COUNT and is_word(word)]
    rows = {word: i for i, word in enumerate(compared)}
    others = len(columns)  # the column of all rarer neighbours; the last one is that of an edge of the caption
    left, right = (np.zeros((len(rows), len(columns) + 2), np.float32) for _ in range(2))
    adjacent: dict[str, set[str]] = defaultdict(set)
    for sentence in sentences:
        for before, word in zip([None, *sentence], [*sentence, None], strict=True):
            if word in rows:
                left[rows[word], others + 1 if before is None else columns.get(before, others)] += 1
            if before in rows:
                right[rows[before], others + 1 if word is None else columns.get(word, others)] += 1
            if word is not None and before is not None:
                adjacent[word].add(before)
                adjacent[before].add(word)

    classes: list[list[str]] = []
    sums = np.zeros((len(rows), 2, others + 2), np.float32)  # per class: neighbours of its words, left and right
    roots = np.zeros_like(sums)  # square roots of their distributions
    for i, word in enumerate(compared):
        own = np.stack((left[i], right[i]))
        overlap_C = np.einsum("csn,sn->cs", roots[: len(classes)], root_distribution(own)).min(axis=1)
        allowed = [overlap_C[c] >= MIN_OVERLAP and adjacent[word].isdisjoint(classes[c]) for c in range(len(classes))]
        chosen = int(np.where(allowed, overlap_C, -1).argmax()) if any(allowed) else len(classes)
        if chosen == len(classes):
            classes.append([])
        classes[chosen].append(word)
        sums[chosen] += own
        roots[chosen] = root_distribution(sums[chosen])
    class_of = {word: number for number, words in enumerate(classes) for word in words}
    alone = [word for word in counts if word not in class_of]
    return class_of | {word: len(classes) + i for i, word in enumerate(alone)}


def root_distribution(counts_2N: np.ndarray) -> np.ndarray:
    """Square roots of relative frequencies: their dot product is the overlap of two distributions, 0 to 1."""
    return np.sqrt(counts_2N / counts_2N.sum(axis=1, keepdims=True))
