"""What one rank of a divided clip sends: the halo of each convolution, once forward and its gradient once backward."""

import pytest
import torch
from codec_layouts import CHANNELS, VAE, codec_mesh

from megasora.codec.vae.layers import CausalConv3d
from megasora.codec.vae.network import VideoVAE
from megasora.parallelize_codec import ContextParallelCodec
from megasora.testing.recorded_collectives import RecordedCollectives
from megasora.testing.spawn import run_fake_rank

FACTORS, TIME, ROWS = (4, 4, 4), 3, 3
SIZE = (2, 25, 36, 8)  # 7 latent frames: 3, 2, 2; 9 latent rows: 3 each


def record_step(train_encoder):
    """(sends and receives, all values that the convolutions of each kind lack, bytes counted) of this rank."""
    mesh = codec_mesh(TIME, ROWS)
    codec, network = ContextParallelCodec(mesh, FACTORS), VideoVAE(VAE, list(FACTORS), CHANNELS)
    network.encoder.requires_grad_(train_encoder)
    shapes = []
    for name, module in network.named_modules():
        if isinstance(module, CausalConv3d) and module.kernel[1] > 1:
            module.register_forward_pre_hook(lambda _, inputs, name=name: shapes.append((name, inputs[0].shape)))
    (piece,) = codec.share_stacks([SIZE])
    frames = torch.zeros(SIZE[0], 3, *SIZE[1:])
    noise = torch.zeros(SIZE[0], CHANNELS, 7, 9, 2)
    with RecordedCollectives() as recorded:
        out = network(piece.take_frames(frames), piece.take_latents(noise), piece.boundary)
        out.frames.sum().backward()
    lack, returned = [], []  # values beyond the piece that lie in the clip, of each convolution
    for name, (b, c, t, h, w) in shapes:
        before = 2 if mesh.time.rank > 0 else 0
        borders = (mesh.rows.rank > 0) + (mesh.rows.rank < ROWS - 1)
        lack.append(b * c * w * ((t + before) * (h + borders) - t * h))
        with_gradient = name.startswith("decoder") or train_encoder
        is_input = name == ("encoder.conv_in" if train_encoder else "decoder.conv_in")
        returned.append(lack[-1] if with_gradient and not is_input else 0)
    sums = {op: sum(m.elements for m in recorded.messages if m.op == op) for op in ("send", "recv")}
    others = {m.op for m in recorded.messages} - {"send", "recv"}
    return sums, sum(lack), sum(returned), codec.pop_bytes_sent(), others


@pytest.mark.parametrize("train_encoder", [True, False])
def test_a_rank_receives_what_its_convolutions_lack_and_nothing_else(train_encoder):
    """A rank in the middle of the clip receives halos and returns their gradients; what it sends are the halos of
    others, whose gradients it receives. In the middle of rows both are equal, in time they go to the next rank."""
    sums, lack, returned, counted, others = run_fake_rank(record_step, 4, TIME * ROWS, train_encoder)
    assert lack > returned > 0 and not others
    assert sums["recv"] + sums["send"] == 2 * (lack + returned)
    assert counted == 4 * sums["send"]
