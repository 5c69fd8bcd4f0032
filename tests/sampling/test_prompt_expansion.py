"""`sample.expand`: the captions of a run that prompts are expanded with, and each way to expand them."""

import dataclasses
import json
import shutil
import sys

import numpy as np
import pytest
from saved_runs import flip

from megasora.config import load, load_run_config
from megasora.data import caption_sample
from megasora.data.caption_sample import choose_clips, load_caption_sample, read_caption, save_caption_sample
from megasora.data.shard_reader import ShardSplit
from megasora.errors import MegaSoraError
from megasora.sampling.instruction_model import choose_examples, clean, shorten
from megasora.sampling.prompt_expansion import build_expander

CAPTIONS = ["a red circle moves right", "a blue circle moves left", "a red square moves left", "a blue square moves up"]


@pytest.fixture(scope="module")
def datasets(shards):
    return [ShardSplit.open(shards, "train")]


def stored_captions(shards):
    return [shards.read(i, lambda caption: None).caption for i in range(len(shards))]


def config_of(run, expand, **settings):
    config = load(None, [f"sample.expand={expand}", *(f"{key}={value}" for key, value in settings.items())])
    (run / "captions.json").write_text(json.dumps({"clips": 4, "captions": CAPTIONS * 2}))
    return config


# ---------------------------------------------------------------- captions of a run


def test_the_run_folder_keeps_the_captions_of_the_shards(tmp_path, datasets):
    save_caption_sample(tmp_path, datasets, [1.0])
    values = json.loads((tmp_path / "captions.json").read_text())
    assert values == {"clips": 60, "captions": stored_captions(datasets[0])}
    assert load_caption_sample(tmp_path, load().data) == values["captions"]


def test_captions_of_an_earlier_launch_stay(tmp_path, datasets):
    (tmp_path / "captions.json").write_text('{"captions": ["kept"]}')
    save_caption_sample(tmp_path, datasets, [1.0])
    assert load_caption_sample(tmp_path, load().data) == ["kept"]


def test_without_that_file_captions_are_those_of_the_shards(tmp_path, datasets):
    data = load(None, [f"data.shards={datasets[0].folder}"]).data
    assert load_caption_sample(tmp_path, data) == stored_captions(datasets[0])


def test_a_run_without_captions_and_shards_says_what_to_do(tmp_path):
    data = load(None, [f"data.shards={tmp_path}/gone"]).data
    with pytest.raises(MegaSoraError, match=r"no .*captions\.json.*no dataset\.json in .*gone.*sample\.expand=none"):
        load_caption_sample(tmp_path, data)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"captions": 1}', '{"captions": [1]}', "{" * 9999])
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / "captions.json").write_text(text)
    with pytest.raises(MegaSoraError, match=r"captions\.json is damaged"):
        load_caption_sample(tmp_path, load().data)


def test_each_dataset_has_its_share_of_the_captions(monkeypatch, datasets):
    monkeypatch.setattr(caption_sample, "MAX_CAPTIONS", 8)
    first, second = (dataclasses.replace(datasets[0]) for _ in range(2))
    own = caption_sample.sample_captions([first], [2.0])
    assert len(own) == 8 and set(own) <= set(stored_captions(first))
    both = caption_sample.sample_captions([first, second], [3.0, 1.0])
    assert both[6:] == caption_sample.sample_captions([second, first], [1.0, 3.0])[:2] and len(both) == 8


def test_a_damaged_caption_is_left_out_and_training_reports_it(tmp_path, shards):
    shutil.copytree(shards, tmp_path / "shards")
    dataset = ShardSplit.open(tmp_path / "shards", "train")
    expected = [read_caption(dataset, i) for i in range(len(dataset))]
    flip(tmp_path / "shards" / dataset.shard_name(3), int(dataset.index.rows[3]["caption"]["offset"]))
    damaged = ShardSplit.open(tmp_path / "shards", "train")
    assert [read_caption(damaged, i) for i in range(len(damaged))] == [*expected[:3], None, *expected[4:]]


def test_chosen_clips_depend_on_their_ids_only_and_are_spread():
    ids = np.arange(10_000, dtype=np.int64)
    chosen = choose_clips(ids, 1000)
    assert len(set(chosen)) == 1000 and chosen == sorted(chosen)
    assert abs(np.mean(chosen) - 5000) < 300 and max(np.diff(chosen)) < 200
    later = choose_clips(ids + 5000, 1000)  # other shards that share half of the clips
    shared = {i for i in chosen if i >= 5000}
    assert len(shared & {i + 5000 for i in later}) > 0.9 * len(shared)
    assert list(choose_clips(ids[:7], 10)) == list(range(7))


# ---------------------------------------------------------------- ways to expand


def test_none_needs_no_captions(tmp_path):
    assert build_expander(load(), tmp_path)("red right", 0) == "red right"


def test_template_uses_the_captions_of_the_run(tmp_path):
    config = config_of(tmp_path, "template")
    assert build_expander(config, tmp_path)("red right", 0) == "a red circle moves right"


def test_a_template_that_the_text_encoder_does_not_take_is_not_used(tmp_path):
    expand = build_expander(config_of(tmp_path, "template"), tmp_path, lambda caption: len(caption.split()) < 5)
    assert expand("red right", 0) == "red right"


def test_a_run_of_training_expands_prompts(trained):
    config = load_run_config(trained)
    config.sample.expand = "template"
    caption = build_expander(config, trained)("red right", 0)
    assert caption.startswith("a red ") and caption.endswith(" moves right")


def test_the_benchmark_compares_the_same_clips_with_and_without_expansion(trained, tmp_path):
    from benchmarks import prompt_expansion

    prompt_expansion.main([str(trained), "--count", "16", "--out", str(tmp_path / "record.json")])
    *forms, loss = json.loads((tmp_path / "record.json").read_text())["figures"]
    values = {form["name"]: form["value"] for form in forms}
    assert {form["count"] for form in forms} == {16 * prompt_expansion.SEEDS}
    assert values["two words, expanded"] == values["two words reversed, expanded"]
    assert loss["value"] == values["full caption"] - values["two words, expanded"]


# ---------------------------------------------------------------- instruction models

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ANSWER = ["<assistant>", "a", "red", "circle", "moves", "right", "</s>"]


def save_chain_model(folder, chain, template=CHAT_TEMPLATE, eos=True):
    """A language model whose next word follows from the last word alone, by `chain`; after its last word, itself."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = list(dict.fromkeys(["<pad>", "<unk>", "</s>", "<user>", "<assistant>", *chain]))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")
    fast.chat_template = template
    fast.save_pretrained(folder)
    size = len(words)
    config = LlamaConfig(
        vocab_size=size, hidden_size=size + size % 2, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=512, eos_token_id=2 if eos else None, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0 if parameter.ndim == 1 else 0.0)  # norms, and layers that add nothing
        model.model.embed_tokens.weight.copy_(torch.eye(size, config.hidden_size))
        for word, following in zip(chain, [*chain[1:], chain[-1]], strict=True):
            model.lm_head.weight[words.index(following), words.index(word)] = 1.0
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chain_model(tmp_path_factory):
    pytest.importorskip("transformers", reason="pip install megasora[encoders]")
    return save_chain_model(tmp_path_factory.mktemp("model"), ANSWER)


def test_a_model_answers_with_the_caption(tmp_path, chain_model):
    expand = build_expander(config_of(tmp_path, chain_model), tmp_path)
    assert [expand(prompt, seed) for prompt in ("red right", "rot", "") for seed in (0, 1)] == [
        " ".join(ANSWER[1:6])
    ] * 6


def test_a_model_sees_instructions_then_captions_of_the_run_then_the_prompt(tmp_path, chain_model, monkeypatch):
    from megasora.sampling.instruction_model import INSTRUCTIONS, InstructionModel

    model = InstructionModel(chain_model, CAPTIONS * 9, 8)
    seen = []
    monkeypatch.setattr(model.tokenizer, "apply_chat_template", lambda chat, **_: seen.append(chat) or {"input_ids": 0})
    model.encode("green up")
    (chat,) = seen
    assert [message["role"] for message in chat] == ["user", "assistant"] * len(model.examples) + ["user"]
    assert {message["content"] for message in chat[1::2]} <= set(CAPTIONS) and len(chat) > 3
    assert chat[0]["content"].startswith(INSTRUCTIONS) and chat[-1]["content"] == "green up"


def test_a_model_without_a_chat_template_continues_a_text(tmp_path):
    pytest.importorskip("transformers", reason="pip install megasora[encoders]")
    folder = save_chain_model(tmp_path / "model", ["Caption:", "a", "blue", "square", "</s>"], template=None)
    assert build_expander(config_of(tmp_path, folder), tmp_path)("blue", 0) == "a blue square"


def test_an_answer_without_end_has_at_most_text_max_tokens(tmp_path):
    pytest.importorskip("transformers", reason="pip install megasora[encoders]")
    folder = save_chain_model(tmp_path / "model", ["<assistant>", "red"], eos=False)
    config = config_of(tmp_path, folder, **{"text.max_tokens": 9})
    assert build_expander(config, tmp_path)("x", 0) == " ".join(["red"] * 9)
    fits = lambda caption: len(caption.split()) <= 4  # noqa: E731
    assert build_expander(config, tmp_path, fits)("x", 0) == " ".join(["red"] * 4)


def test_very_long_prompts_and_empty_answers_leave_the_prompt(tmp_path, chain_model):
    expand = build_expander(config_of(tmp_path, chain_model), tmp_path)
    long = "red " * 25_000
    assert expand(long, 0) == long
    silent = save_chain_model(tmp_path / "silent", ["<assistant>", "</s>"])
    assert build_expander(config_of(tmp_path, silent), tmp_path)("red right", 0) == "red right"


def test_what_is_no_model_is_refused_in_one_line(tmp_path, chain_model):
    with pytest.raises(MegaSoraError, match=r"sample\.expand=nowhere is none, template, or the folder of an .* model"):
        build_expander(config_of(tmp_path, "nowhere"), tmp_path)
    folder = shutil.copytree(chain_model, tmp_path / "broken")
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(MegaSoraError, match=r"sample\.expand=.*broken cannot be loaded \(") as caught:
        build_expander(config_of(tmp_path, folder), tmp_path)
    assert "\n" not in str(caught.value)


def test_without_transformers_the_command_to_install_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        MegaSoraError, match=r"sample\.expand=model needs transformers .*pip install megasora\[encoders\]"
    ):
        build_expander(config_of(tmp_path, "model"), tmp_path)


def test_examples_are_a_short_form_and_its_caption():
    texts = [f"a {thing} rests over a plain background" for thing in ("cat", "dog", "fox", "owl", "hen", "ant", "bee")]
    examples = choose_examples(texts * 3)
    assert len(examples) == 7 and all(
        caption == f"a {short} rests over a plain background" for short, caption in examples
    )
    assert choose_examples(texts[::-1]) == examples


@pytest.mark.parametrize(
    ("answer", "caption"),
    [
        ("a cat", "a cat"),
        ('\n\n "A cat\tsits."\nHere is why', "A cat sits."),
        ("Caption: a cat", "a cat"),
        ("“a cat”", "a cat"),
        ("a \x1b[31mcat\0", "a [31mcat"),
        ("", ""),
        ('"', '"'),
    ],
)
def test_an_answer_is_one_line_without_quotes(answer, caption):
    assert clean(answer) == caption


def test_a_long_answer_is_cut_after_a_sentence_or_else_after_a_word():
    def fits(caption):
        return len(caption.split()) <= 5

    assert shorten("one two three", fits) == "one two three"
    assert shorten("One two. Three 3.5 four. Five six", fits) == "One two. Three 3.5 four."
    assert shorten("one two three four five six seven", fits) == "one two three four five"
    assert shorten("one", lambda caption: False) == ""
