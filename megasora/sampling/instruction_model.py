"""Expands prompts with an instruction model that is on this machine, through transformers.

    instructions, examples (short form, caption), prompt  --chat template, greedy decoding-->  caption

The captions of the examples are those of the training. A model without a chat template gets the same as plain text.
Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megasora.errors import CONTROLS, MegaSoraError

if TYPE_CHECKING:
    from types import ModuleType

NUM_EXAMPLES = 8
COMMON = 0.3  # words of more captions than this part of them are left out of the short form of an example
MAX_PROMPT_CHARACTERS = 2000
INSTRUCTIONS = (
    "Rewrite the description of a video as one caption, in the style of the examples. Keep everything that it says, "
    "and add nothing that contradicts it. Answer with the caption only."
)


class InstructionModel:
    """prompt -> caption. Raises MegaSoraError where the model cannot be loaded or transformers is missing.

    `captions`: of the training; the examples are among them. `max_tokens`: of a new caption, in tokens of the model.
    `fits`: whether the text encoder takes a caption; a longer one is cut after a sentence, or else after a word.
    """

    def __init__(
        self, folder: Path, captions: Sequence[str], max_tokens: int, fits: Callable[[str], bool] = lambda caption: True
    ):
        transformers = import_transformers(folder)
        if not (folder / "config.json").is_file():
            raise MegaSoraError(
                f"sample.expand={folder} is none, template, or the folder of an instruction model, with its "
                "config.json; nothing is downloaded"
            )
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # each library raises its own exceptions on damaged files
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise MegaSoraError(
                f"sample.expand={folder} cannot be loaded ({type(error).__name__}: {reason}); give the folder of a "
                "causal language model and its tokenizer, as save_pretrained writes it"
            ) from None
        self.model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        self.max_tokens, self.fits = max_tokens, fits
        self.examples = choose_examples(captions)

    @torch.no_grad()
    def __call__(self, prompt: str) -> str:
        """The caption; the prompt itself if it is very long, or the model answers nothing that fits."""
        if len(prompt) > MAX_PROMPT_CHARACTERS:
            return prompt
        inputs = self.encode(CONTROLS.sub(" ", prompt)).to(self.model.device)
        tokens, mask = self.tokenizer, torch.ones_like(inputs)
        filler = tokens.eos_token_id if tokens.pad_token_id is None else tokens.pad_token_id
        output = self.model.generate(
            inputs,
            attention_mask=mask,
            max_new_tokens=self.max_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=filler,
        )
        answer = self.tokenizer.decode(output[0, inputs.shape[1] :], skip_special_tokens=True)
        return shorten(clean(answer), self.fits) or prompt

    def encode(self, prompt: str) -> torch.Tensor:
        """Token ids [1, S] of the conversation up to the answer."""
        if self.tokenizer.chat_template is None:
            text = INSTRUCTIONS + "\n\n"
            for short, caption in (*self.examples, (prompt, "")):
                text += f"Description: {short}\nCaption: {caption}\n\n"
            return self.tokenizer(text.rstrip(), return_tensors="pt")["input_ids"]
        chat = [{"role": "user", "content": prompt}]
        for short, caption in reversed(self.examples):
            chat[:0] = [{"role": "user", "content": short}, {"role": "assistant", "content": caption}]
        # not as a system message, which some templates refuse
        chat[0] = {"role": "user", "content": f"{INSTRUCTIONS}\n\n{chat[0]['content']}"}
        encoded: Any = self.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        return encoded["input_ids"]


def choose_examples(captions: Sequence[str]) -> list[tuple[str, str]]:
    """(short form, caption) of captions that a hash chooses; the short form has no words that many captions have."""
    different = sorted(set(captions), key=lambda caption: hashlib.sha256(caption.encode()).digest())
    counts = Counter(word for caption in different for word in set(caption.split()))
    examples = []
    for caption in different:
        short = " ".join(word for word in caption.split() if counts[word] <= max(1, COMMON * len(different)))
        if short and short != caption:
            examples.append((short, caption))
    return examples[:NUM_EXAMPLES]


def clean(answer: str) -> str:
    """The first line of an answer that has text, without quotation marks around it and without a label."""
    line = next((line for line in map(str.strip, answer.splitlines()) if line), "")
    line = " ".join(CONTROLS.sub(" ", re.sub(r"^caption:\s*", "", line, flags=re.IGNORECASE)).split())
    return line[1:-1].strip() if len(line) > 1 and line[0] in "\"'“„«" and line[-1] in "\"'”“»" else line


def shorten(caption: str, fits: Callable[[str], bool]) -> str:
    """The longest beginning that fits: whole sentences, or whole words where the first sentence is too long."""
    if fits(caption):
        return caption
    sentences = [match.end() for match in re.finditer(r"[.!?](?=\s)", caption)]
    words = [match.start() for match in re.finditer(r"\s", caption)]
    for end in (*reversed(sentences), *reversed(words)):
        if fits(caption[:end]):
            return caption[:end]
    return ""


def import_transformers(folder: Path) -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise MegaSoraError(
            f"sample.expand={folder} needs transformers ({error}): pip install megasora[encoders]"
        ) from None
    return transformers
