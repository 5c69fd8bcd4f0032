"""Expands a short prompt into a caption in the style of the training captions (`sample.expand`).

    none        the prompt itself
    template    "red right" -> "a red circle moves right", by a grammar of the run's captions (caption_grammar.py)
    FOLDER      an instruction model that is on this machine, through transformers (instruction_model.py)

The captions are those that the training saved in its run folder (data/caption_sample.py), or those of its shards.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megasora.config import Config
from megasora.data.caption_sample import load_caption_sample
from megasora.sampling.caption_grammar import UNKNOWN, CaptionGrammar, Pattern, is_word, join_tokens, split_tokens

MIN_KNOWN = 0.5  # the part of a prompt's words that some caption must have

Expander = Callable[[str, int], str]  # prompt, seed -> caption


def build_expander(config: Config, run_dir: Path, fits: Callable[[str], bool] = lambda caption: True) -> Expander:
    """The expander that `sample.expand` names, for a run.

    `fits`: whether the text encoder takes a caption. A caption of the template that does not fit is not used, one of a
    model is cut. Raises MegaSoraError if there are no captions, or the model cannot be loaded.
    """
    setting = config.sample.expand
    if setting == "none":
        return lambda prompt, seed: prompt
    captions = load_caption_sample(run_dir, config.data)
    if setting == "template":
        expander = TemplateExpander(CaptionGrammar(captions))
        return lambda prompt, seed: caption if fits(caption := expander(prompt, seed)) else prompt
    from megasora.sampling.instruction_model import InstructionModel

    model = InstructionModel(Path(setting), captions, config.text.max_tokens, fits)
    return lambda prompt, seed: model(prompt)


@dataclass(frozen=True)
class Fit:
    """A pattern with slots for all known words of a prompt: `placed`, slot -> word in lower case.

    `unknown`: slot -> the words that no caption has and that come before it; at the end of the prompt, before the next
    slot that has a word, or the end of the pattern.
    """

    pattern: Pattern
    placed: dict[int, str]
    unknown: dict[int, list[str]]

    def replaced(self, slot: int, grammar: CaptionGrammar) -> range:
        """The slots whose words the unknown ones before `slot` replace.

        Of those up to the word before, they are the ones that would be guessed, and what is between these; if none is
        guessed, all.
        """
        start = max((placed + 1 for placed in self.placed if placed < slot), default=0)
        guessed = [i for i in range(start, slot) if grammar.is_open(self.pattern.classes[i])]
        return range(guessed[0], guessed[-1] + 1) if guessed else range(start, slot)

    def cost(self, grammar: CaptionGrammar) -> tuple[int, int, int, int]:
        """The best fit of a prompt has the least; a caption then has fewer words that contradict the prompt."""
        seen = self.pattern.words_of_slot
        is_guessed = {
            slot: any(grammar.is_open(self.pattern.classes[i]) for i in self.replaced(slot, grammar))
            for slot in self.unknown
        }
        return (
            sum(word not in seen[slot] for slot, word in self.placed.items()),
            sum(not guessed for guessed in is_guessed.values()),
            len(self.pattern.classes),
            -len(self.pattern.captions),
        )


class TemplateExpander:
    """Calling it with a prompt and a seed gives the shortest caption of the grammar that has all words of the prompt.

    The words are in the order of the captions. Further words that the pattern needs are those of one caption that has
    most of the prompt's words, chosen by the seed. A word that no caption has stays between its neighbours, in place of
    words that would be guessed there. The prompt is returned as it is if it is a caption already, if more than half of
    its words are unknown, or if no pattern has its words.
    """

    def __init__(self, grammar: CaptionGrammar):
        self.grammar = grammar
        self.longest = max(map(len, grammar.patterns), default=0)

    def __call__(self, prompt: str, seed: int) -> str:
        grammar, tokens = self.grammar, split_tokens(prompt)
        words = [token for token in tokens if is_word(token)]
        known = [word_class for word_class in grammar.classes(words) if word_class != UNKNOWN]
        if (
            not any(map(grammar.is_open, known))
            or not MIN_KNOWN * len(words) <= len(known) <= self.longest
            or grammar.classes(tokens) in grammar.patterns
        ):
            return prompt
        fits = [fit for pattern in grammar.patterns.values() if (fit := self.fit(pattern, words))]
        return self.write(min(fits, key=lambda fit: fit.cost(grammar)), seed) if fits else prompt

    def fit(self, pattern: Pattern, words: list[str]) -> Fit | None:
        """Each known word in a free slot of its class, if possible in one where a caption has it; None without one."""
        placed: dict[int, str] = {}
        unknown: dict[int, list[str]] = {}
        run: list[str] = []
        slot = len(pattern.classes)
        for word, word_class in zip(words, self.grammar.classes(words), strict=True):
            if word_class == UNKNOWN:
                run.append(word)
                continue
            key = word.casefold()
            free = [i for i, c in enumerate(pattern.classes) if c == word_class and i not in placed]
            if not free:
                return None
            slot = next((i for i in free if key in pattern.words_of_slot[i]), free[0])
            placed[slot] = key
            if run:
                unknown[slot], run = run, []
        if run:
            end = min((i for i in placed if i > slot), default=len(pattern.classes))
            unknown[end] = [*unknown.get(end, []), *run]
        return Fit(pattern, placed, unknown)

    def write(self, fit: Fit, seed: int) -> str:
        """The caption of a fit."""

        def agreement(caption: list[str]) -> int:
            return sum(caption[slot].casefold() == word for slot, word in fit.placed.items())

        most = max(map(agreement, fit.pattern.captions))
        tokens = list(random.Random(seed).choice([c for c in fit.pattern.captions if agreement(c) == most]))
        for slot, word in fit.placed.items():
            tokens[slot] = self.grammar.spelling[word]
        pieces = [[token] for token in tokens] + [[]]  # the last one: words after the pattern
        for slot, words in fit.unknown.items():
            replaced = fit.replaced(slot, self.grammar)
            for i in replaced:
                pieces[i] = []
            first = replaced.start if replaced else slot
            pieces[first] = words + pieces[first]
        return join_tokens(token for piece in pieces for token in piece)
