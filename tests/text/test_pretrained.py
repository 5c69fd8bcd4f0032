"""Encoders loaded through transformers: tiny T5 and CLIP models with random weights, so nothing is downloaded."""

import json
import shutil
import sys

import pytest
import torch

from megasora.config import TextConfig
from megasora.errors import MegaSoraError
from megasora.text import build_text_encoder

transformers = pytest.importorskip("transformers", reason="pip install megasora[encoders]")

WORDS = ["a", "red", "blue", "circle", "square", "moves", "left", "right", "slowly"]
CAPTIONS = ["a red circle moves right", "", "blue", "a blue square moves left slowly", "unheard words", "a red circle"]


def save_tokenizer(folder, start=None, end="</s>"):
    """A tokenizer of whole words; `start` is put before every caption and `end` after it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["<pad>", "<unk>", *(token for token in (start, end) if token)]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if end:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start or ''} $A {end}".strip(),
            special_tokens=[(token, vocabulary[token]) for token in (start, end) if token],
        )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token=start, eos_token=end
    )
    fast.save_pretrained(folder)
    return fast


def save_t5(folder, model_type="t5", seed=0, **tokenizer):
    torch.manual_seed(seed)
    config_class, model_class = {
        "t5": (transformers.T5Config, transformers.T5EncoderModel),
        "umt5": (transformers.UMT5Config, transformers.UMT5EncoderModel),
    }[model_type]
    config = config_class(vocab_size=16, d_model=12, d_kv=4, d_ff=20, num_layers=2, num_heads=3, dropout_rate=0.1)
    model_class(config).save_pretrained(folder)
    save_tokenizer(folder, **tokenizer)
    return folder


def save_clip(folder, seed=0):
    torch.manual_seed(seed)
    config = transformers.CLIPTextConfig(
        vocab_size=16, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=3,
        max_position_embeddings=10, bos_token_id=2, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    transformers.CLIPTextModel(config).save_pretrained(folder)
    save_tokenizer(folder, start="<s>")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    return {
        "t5": save_t5(root / "t5"),
        "umt5": save_t5(root / "umt5", "umt5"),
        "clip": save_clip(root / "clip"),
    }


def make(folder, name="t5", max_tokens=10, pad=False):
    return build_text_encoder(TextConfig(name=name, path=str(folder), max_tokens=max_tokens, pad=pad))


@pytest.mark.parametrize("kind", ["t5", "umt5", "clip"])
def test_features_equal_those_of_transformers_for_one_caption_at_a_time(folders, kind):
    encoder = make(folders[kind], "clip" if kind == "clip" else "t5")
    classes = {"t5": "T5EncoderModel", "umt5": "UMT5EncoderModel", "clip": "CLIPTextModel"}
    model = getattr(transformers, classes[kind]).from_pretrained(folders[kind]).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[kind])
    features = encoder.encode(CAPTIONS)
    assert len(features) == len(CAPTIONS)
    for caption, text_SE in zip(CAPTIONS, features, strict=True):
        with torch.no_grad():
            expected = model(**tokenizer(caption, return_tensors="pt")).last_hidden_state[0]
        assert text_SE.dtype == torch.float32 and not text_SE.requires_grad
        torch.testing.assert_close(text_SE, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["t5", "umt5", "clip"])
def test_features_do_not_depend_on_the_batch(folders, kind, monkeypatch):
    """37 captions of 1 to 8 words, encoded in batches of 32, in batches of 4, and one by one."""
    encoder = make(folders[kind], "clip" if kind == "clip" else "t5")
    many = [" ".join(WORDS[i % 9] for i in range(n, n + 1 + 5 * n % 8)) for n in range(37)]
    by_32 = encoder.encode(many)
    alone = [encoder.encode([caption])[0] for caption in many]
    monkeypatch.setattr("megasora.text.pretrained.ENCODER_BATCH", 4)
    assert [len(a) for a in alone] == [len(caption.split()) + (2 if kind == "clip" else 1) for caption in many]
    for a, b, c in zip(by_32, encoder.encode(many), alone, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(b, c, rtol=1e-5, atol=1e-5)


def test_captions_of_similar_length_are_in_one_batch(folders, monkeypatch):
    encoder, sizes = make(folders["t5"]), []
    encode_batch = encoder.encode_batch
    encoder.encode_batch = lambda ids: sizes.append([len(tokens) for tokens in ids]) or encode_batch(ids)
    monkeypatch.setattr("megasora.text.pretrained.ENCODER_BATCH", 3)
    encoder.encode(["red " * n for n in (5, 1, 4, 2, 6, 1, 3)])
    assert sizes == [[2, 2, 3], [4, 5, 6], [7]]


def test_padded_features_are_the_features_and_zeros_up_to_max_tokens(folders):
    for features, padded in zip(
        make(folders["t5"]).encode(CAPTIONS), make(folders["t5"], pad=True).encode(CAPTIONS), strict=True
    ):
        assert padded.shape == (10, 12) and torch.equal(padded[: len(features)], features)
        assert len(features) < 10 and not padded[len(features) :].any()


def test_padding_and_its_length_are_in_the_fingerprint(folders):
    unpadded = make(folders["t5"]).fingerprint
    assert make(folders["t5"], max_tokens=12).fingerprint == unpadded
    assert make(folders["t5"], pad=True).fingerprint == f"{unpadded}-pad10"
    assert make(folders["t5"], max_tokens=12, pad=True).fingerprint == f"{unpadded}-pad12"


def test_an_empty_caption_has_one_token_even_if_the_tokenizer_adds_none(folders, tmp_path):
    without_end = make(save_t5(tmp_path / "without end", end=None))
    for encoder in (make(folders["t5"]), without_end):
        empty, blank, word = encoder.encode(["", "  ", "red"])
        assert empty.shape == blank.shape == (1, 12) and torch.isfinite(empty).all()
        assert len(word) >= 1


def test_a_caption_over_the_limit_is_an_error_and_is_not_truncated(folders):
    encoder = make(folders["t5"], max_tokens=6)
    assert len(encoder.encode(["a red circle moves right"])[0]) == 6  # five words and the end
    message = r"caption of 7 tokens .*text.max_tokens=6; shorten the caption or raise text.max_tokens"
    with pytest.raises(MegaSoraError, match=message):
        encoder.encode(["a red circle moves right slowly"])


def test_max_tokens_over_the_positions_of_clip_is_an_error(folders):
    with pytest.raises(MegaSoraError, match="text.max_tokens=11 is more than the 10 positions.*use at most 10"):
        make(folders["clip"], "clip", max_tokens=11)


def test_weights_are_frozen_and_without_dropout(folders):
    encoder = make(folders["t5"])
    assert encoder.precomputed is True
    assert all(torch.equal(a, b) for a, b in zip(encoder.encode(CAPTIONS), encoder.encode(CAPTIONS), strict=True))
    assert not any(p.requires_grad for p in encoder.encoder.parameters())


def test_fingerprint_depends_on_the_weights_and_not_on_the_folder(folders, tmp_path):
    same = shutil.copytree(folders["t5"], tmp_path / "copy")
    others = [save_t5(tmp_path / "other", seed=1), folders["umt5"]]
    fingerprint = make(folders["t5"]).fingerprint
    assert make(same).fingerprint == fingerprint and fingerprint.startswith("t5-t5-")
    assert len({fingerprint, *(make(folder).fingerprint for folder in others)}) == 3


def test_fingerprint_depends_on_the_config(folders, tmp_path):
    folder = shutil.copytree(folders["t5"], tmp_path / "changed")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "layer_norm_epsilon": 1e-3}))
    assert make(folder).fingerprint != make(folders["t5"]).fingerprint


def test_fingerprint_loads_no_weights(folders):
    encoder = make(folders["t5"])
    assert encoder.fingerprint and encoder.build_embedder(8, 1, 2)
    assert "encoder" not in vars(encoder)


def test_a_missing_folder_is_an_error_with_its_name(tmp_path):
    with pytest.raises(MegaSoraError, match=r"text.path=.*missing cannot be loaded"):
        make(tmp_path / "missing")


def test_an_unreachable_hub_is_an_error_of_one_line(monkeypatch):
    import huggingface_hub

    def no_network(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("An error happened while trying to locate the files\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    with pytest.raises(MegaSoraError, match="text.path=google/umt5-xxl cannot be loaded") as caught:
        make("google/umt5-xxl")
    assert "\n" not in str(caught.value) and caught.value.__suppress_context__


def test_a_hub_name_is_read_from_its_local_copy(folders, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: str(folders["t5"]))
    assert torch.equal(make("some/name").encode(["red"])[0], make(folders["t5"]).encode(["red"])[0])


def test_damaged_or_missing_weights_are_an_error(folders, tmp_path):
    folder = shutil.copytree(folders["t5"], tmp_path / "damaged")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(MegaSoraError, match=r"text.path=.*damaged cannot be loaded"):
        make(folder).encode(["red"])
    weights.unlink()
    with pytest.raises(MegaSoraError, match=r"text.path=.*damaged holds no weights"):
        make(folder)


def test_incomplete_weights_are_an_error(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(folders["t5"], tmp_path / "partial")
    weights = load_file(folder / "model.safetensors")
    weights.pop("encoder.final_layer_norm.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        MegaSoraError, match=r"lacks 1 weights of a T5EncoderModel, e.g. encoder.final_layer_norm.weight"
    ):
        make(folder).encode(["red"])


def test_an_encoder_of_another_type_is_an_error(folders):
    with pytest.raises(MegaSoraError, match="holds a model of type 'clip_text_model'; text.name=t5 reads t5, umt5"):
        make(folders["clip"], "t5")
    with pytest.raises(MegaSoraError, match="holds a model of type 'umt5'; text.name=clip reads clip"):
        make(folders["umt5"], "clip")


def test_missing_transformers_says_what_to_install(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MegaSoraError, match=r"pip install megasora\[encoders\]"):
        make(folders["t5"])


@pytest.mark.parametrize("depth", [0, 2])
def test_the_embedding_of_a_caption_does_not_depend_on_the_other_captions(folders, depth):
    encoder = make(folders["t5"])
    torch.manual_seed(0)
    embedder = encoder.build_embedder(16, depth, 2).double()
    encoded = encoder.encode(CAPTIONS)
    lengths = [len(e) for e in encoded]
    cu_text = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    packed = embedder(torch.cat(encoded), embedder.plan(cu_text))
    assert packed.shape == (sum(lengths), 16)
    for from_pack, features in zip(packed.split(lengths), encoded, strict=True):
        alone = embedder(features, embedder.plan(torch.tensor([0, len(features)], dtype=torch.int32)))
        torch.testing.assert_close(from_pack, alone, rtol=1e-10, atol=1e-10)
