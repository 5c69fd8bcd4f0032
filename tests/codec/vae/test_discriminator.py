"""The discriminator: exact in pieces, causal, able to learn; the hinge losses; the adaptive weight."""

import pytest
import torch

from megasora.codec.vae.boundary import ClipBoundary
from megasora.codec.vae.discriminator import (
    Discriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from megasora.codec.vae.network import init_weights
from megasora.codec.vae.stream import ChunkBoundary
from megasora.config import AdversarialConfig
from megasora.errors import MegaSoraError


def build(layers=2, factors=(4, 8, 8), time="causal", width=4):
    model = Discriminator(AdversarialConfig(width=width, layers=layers), list(factors), time).double()
    generator = torch.Generator().manual_seed(0)
    init_weights(model, lambda _, shape: torch.randn(shape, generator=generator, dtype=torch.float64))
    return model


def random_clips(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=torch.float64) * 2 - 1


@pytest.mark.parametrize(("factors", "time", "frames"), [((4, 8, 8), "causal", 3), ((2, 8, 8), "causal", 5),
                                                         ((1, 8, 8), "causal", 9), ((1, 8, 8), "none", 9)])  # fmt: skip
def test_logits_are_those_of_patches(factors, time, frames):
    logits = build(3, factors, time)(random_clips(2, 3, 9, 16, 24))
    assert logits.shape == (2, 1, frames, 2, 3)


@pytest.mark.parametrize("lengths", [[1, 4, 4, 8], [5, 12], [13, 4]])
def test_pieces_of_a_clip_have_the_logits_of_the_clip(lengths):
    model, x = build(), random_clips(1, 3, 17, 8, 8)
    boundary, parts = ChunkBoundary(), []
    for piece in x.split(lengths, 2):
        parts.append(model(piece, boundary))
        boundary.next_chunk()
    torch.testing.assert_close(torch.cat(parts, 2), model(x), rtol=0, atol=1e-12)


def test_a_logit_does_not_depend_on_later_frames():
    model, x = build(), random_clips(1, 3, 9, 8, 8)
    changed = x.clone()
    changed[:, :, 5:] += 1
    before, after = model(x), model(changed)
    assert torch.equal(before[:, :, :2], after[:, :, :2]) and not torch.equal(before[:, :, 2], after[:, :, 2])


def test_a_frame_by_itself_has_logits_that_no_other_frame_changes():
    model, x = build(2, (1, 8, 8), "none"), random_clips(1, 3, 4, 8, 8)
    torch.testing.assert_close(model(x)[:, :, 2:3], model(x[:, :, 2:3]), rtol=0, atol=1e-12)


def test_all_blocks_but_the_first_normalise_over_channels():
    model, x = build(), random_clips(1, 3, 5, 8, 8)
    boundary, scaled = ClipBoundary(), []
    for factor in (100, 100_000):  # so large that the epsilon of the norm does not count
        for block in model.blocks:
            block.conv.bias.data.zero_()
        outputs = [factor * x]
        for block in model.blocks:
            outputs.append(block(outputs[-1], boundary))
        scaled.append(outputs)
    torch.testing.assert_close(scaled[1][1], 1000 * scaled[0][1])
    for after, before in zip(scaled[1][2:], scaled[0][2:], strict=True):
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)  # the norm has removed the factor


def test_too_many_layers_are_an_error():
    with pytest.raises(MegaSoraError, match=r"adversarial.layers=4 .* codec.factors\[1\]=8; use at most 3"):
        build(layers=4)


def test_hinge_losses_have_known_values():
    real = torch.tensor([2.0, 0.5, -1.0, 1.0]).view(1, 1, 1, 2, 2)
    fake = torch.tensor([-3.0, -0.5, 1.0, 0.0]).view(1, 1, 1, 2, 2)
    assert discriminator_loss(real, fake).tolist() == [[0.5 * (2.5 + 3.5) / 4]]
    assert generator_loss(fake).tolist() == [[2.5 / 4]]
    both = torch.cat([real, fake], 2), torch.cat([fake, fake], 2)
    assert discriminator_loss(*both).tolist() == [[0.75, 0.5 * ((4 + 1.5 + 0 + 1) + 3.5) / 4]]
    assert discriminator_loss(torch.zeros(2, 1, 3, 4, 4), torch.zeros(2, 1, 3, 4, 4)).tolist() == [[1.0] * 3] * 2


def test_it_learns_to_tell_sharp_clips_from_blurred_ones():
    model = build(2, (2, 4, 4), width=8)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.5, 0.9))
    for step in range(40):
        real = random_clips(4, 3, 3, 8, 8, seed=step).sign() * 0.8
        loss = discriminator_loss(model(real), model(blur(real))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    unseen = random_clips(4, 3, 3, 8, 8, seed=999).sign() * 0.8
    assert discriminator_loss(model(unseen), model(blur(unseen))).mean() < 0.2
    assert generator_loss(model(blur(unseen))).mean() > 1


def blur(x):
    return torch.nn.functional.avg_pool3d(x, (1, 3, 3), 1, (0, 1, 1))


def toy_losses(scale, adversarial_scale, parts=slice(None)):
    """Frames, and two losses of them whose gradients are known; `parts`: the clips of a rank."""
    frames = random_clips(5, 3, 1, 2, 2, seed=3).float()[parts].requires_grad_()
    return [frames], scale * frames[:, 0].sum(), adversarial_scale * (frames[:, 1] - frames[:, 0]).sum()


def test_adaptive_weight_is_the_ratio_of_gradient_norms_at_the_frames():
    frames, reconstruction, adversarial = toy_losses(3.0, 0.5)
    result = adaptive_weight(reconstruction, adversarial, frames)
    assert float(result) == pytest.approx(3 / (0.5 * 2**0.5), rel=1e-5)
    assert not result.requires_grad
    (reconstruction + result * adversarial).backward()  # the graph was kept


def test_adaptive_weight_is_bounded():
    frames, reconstruction, adversarial = toy_losses(1e6, 1e-9)
    assert adaptive_weight(reconstruction, adversarial, frames) == 1e4
    assert adaptive_weight(reconstruction * 0, adversarial, frames) == 0


def test_adaptive_weight_of_ranks_that_share_the_clips_is_that_of_one():
    frames, *losses = toy_losses(2.0, 0.7)
    expected, sent = adaptive_weight(*losses, frames), []
    for parts in (slice(0, 2), slice(2, 5)):
        frames, *losses = toy_losses(2.0, 0.7, parts)
        adaptive_weight(*losses, frames, lambda x: sent.append(x) or x)
    torch.testing.assert_close(adaptive_weight(*losses, frames, lambda _: sent[0] + sent[1]), expected)
