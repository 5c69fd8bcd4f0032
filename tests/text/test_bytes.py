"""Captions as words of bytes, and their embedder."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megasora.config import TextConfig
from megasora.errors import MegaSoraError
from megasora.text import build_text_encoder
from megasora.text.bytes import PAD, WORD_BYTES, BytesEncoder

CAPTIONS = ["a red circle moves right", "", "green", "ein blauer Kreis geht nach oben", "赤い丸が右へ動く"]


def make(max_tokens=64) -> BytesEncoder:
    return build_text_encoder(TextConfig(max_tokens=max_tokens))


def embed(embedder, encoded):
    cu_text = torch.tensor([0, *map(len, encoded)]).cumsum(0).to(torch.int32)
    return embedder(torch.cat(encoded), embedder.plan(cu_text)).split([len(e) for e in encoded])


def make_embedder(depth=2):
    torch.manual_seed(0)
    return make().build_embedder(16, depth, 2).double()


def test_a_word_is_its_bytes_and_padding():
    (words,) = make().encode(["A  red\tdot"])
    expected = [[*word.encode(), *[PAD] * (WORD_BYTES - len(word))] for word in ("a", "red", "dot")]
    assert words.dtype == torch.int64 and words.tolist() == expected


def test_no_byte_of_a_long_word_or_another_script_is_lost():
    caption = "x" * 40 + " 赤い丸が右へ動く"
    (words,) = make().encode([caption])
    assert bytes(b for b in words.flatten().tolist() if b != PAD).decode() == caption.replace(" ", "")
    assert len(words) == 3 + 2  # 40 bytes; 24 bytes


@given(st.text(max_size=80))
@example("\0 nul\0 \x1c\x85\u3000 ÿ\xff 😀" + "é" * 20)
@settings(deadline=None)
def test_words_are_the_bytes_between_white_space(caption):
    expected = []
    for word in caption.lower().split():
        data = list(word.encode())
        expected += [data[i : i + WORD_BYTES] for i in range(0, len(data), WORD_BYTES)]
    (words,) = make(max_tokens=1000).encode([caption])
    assert words.dtype == torch.int64
    assert words.tolist() == [piece + [PAD] * (WORD_BYTES - len(piece)) for piece in expected or [[]]]


def test_an_empty_caption_is_one_word_of_padding():
    for words in make().encode(["", "  \n"]):
        assert words.tolist() == [[PAD] * WORD_BYTES]


def test_case_and_white_space_do_not_matter():
    plain, loud = make().encode(["a red dot", "  A RED\n Dot "])
    assert torch.equal(plain, loud)


def test_a_caption_over_the_limit_is_an_error_and_is_not_truncated():
    encoder = make(max_tokens=3)
    assert len(encoder.encode(["one two three"])[0]) == 3
    message = r"caption of 4 words .*text.max_tokens=3; shorten the caption or raise text.max_tokens"
    with pytest.raises(MegaSoraError, match=message):
        encoder.encode(["short", "one two three four"])


def test_the_encoder_is_not_precomputed():
    assert make().precomputed is False
    assert make().fingerprint == make(max_tokens=7).fingerprint  # a limit does not change the tokens


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_the_embedding_of_a_caption_does_not_depend_on_the_other_captions(depth):
    embedder, encoded = make_embedder(depth), make().encode(CAPTIONS)
    for packed, words in zip(embed(embedder, encoded), encoded, strict=True):
        torch.testing.assert_close(packed, embed(embedder, [words])[0], rtol=1e-12, atol=1e-12)


def test_the_order_of_words_matters():
    embedder = make_embedder()
    one, other = embed(embedder, make().encode(["red on blue", "blue on red"]))
    assert not torch.allclose(one[0], other[2], atol=1e-3)


def test_the_order_of_letters_matters():
    embedder = make_embedder(depth=0)
    one, other = embed(embedder, make().encode(["dog", "god"]))
    assert not torch.allclose(one, other, atol=1e-3)


def test_a_word_affects_earlier_words_only_through_blocks():
    for depth, same in ((0, True), (1, False)):
        embedder = make_embedder(depth)
        one, other = embed(embedder, make().encode(["a dot moves left", "a dot moves right"]))
        assert torch.allclose(one[0], other[0], atol=1e-12) is same


def test_every_weight_of_the_embedder_gets_a_gradient():
    embedder = make_embedder()
    torch.cat(embed(embedder, make().encode(CAPTIONS))).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in embedder.parameters())
    used = {name for name, p in embedder.named_parameters() if p.grad.abs().max() > 1e-12}
    assert used == {name for name, _ in embedder.named_parameters()}
