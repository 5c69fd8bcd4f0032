"""VideoDiT: what a clip's output depends on, and what it must not depend on."""

import dataclasses

import pytest
import torch

from megasora.batch import segment_ids
from megasora.config import ModelConfig, TextConfig
from megasora.data.pack import Record, make_batch
from megasora.diffusion.flow import build_rows
from megasora.model.dit import VideoDiT
from megasora.text import build_text_encoder

PATCH_DIM = 6
CLIPS = [  # grid, caption, clean latent frames at (head, tail), timestep
    ((3, 2, 2), "a red circle", (1, 0), 0.7),
    ((1, 3, 2), "an image", (0, 0), 0.2),
    ((2, 2, 3), "two squares move slowly", (0, 1), 0.9),
    ((4, 1, 2), "", (1, 2), 0.5),
    ((2, 2, 2), "up", (0, 0), 0.4),
]
BOTH = pytest.mark.parametrize("modulation", ["block", "shared"])
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def make_model(modulation="block", random=True, **options) -> VideoDiT:
    """A small float64 model; `random`: with no zero left from the initialisation."""
    config = ModelConfig(width=24, depth=2, heads=2, modulation=modulation, **options)
    torch.manual_seed(0)
    model = VideoDiT(config, PATCH_DIM, build_text_encoder(TextConfig()).build_embedder(24, config.text_depth, 2))
    model.initialise(0)
    if random:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.double()


def make_pack(clips=CLIPS, padding=0, hide=()):
    """Clips at their own timesteps, some frames clean; a clip's content follows from its place in CLIPS."""
    records = []
    for grid, caption, _, _ in clips:
        number = next(i for i, clip in enumerate(CLIPS) if clip[0] == grid)
        tokens = grid[0] * grid[1] * grid[2]
        patches = torch.randn(tokens, PATCH_DIM, generator=torch.Generator().manual_seed(number))
        text = build_text_encoder(TextConfig()).encode([caption])[0]
        native = (8.0 * grid[1], 8.0 * grid[2], 4.0 * grid[0] - 3, 8.0 + number)
        records.append(Record(number, patches, grid, text, native, caption))
    batch = make_batch(records, sum(len(r.patches_LP) for r in records) + padding)
    cu_rows, timesteps, owner = build_rows(
        batch, torch.tensor([t for *_, t in clips]), [clean for _, _, clean, _ in clips]
    )
    drop = batch.drop_text_G | torch.tensor([i in hide for i in range(len(clips))])
    return dataclasses.replace(
        batch, cu_rows=cu_rows, timesteps_R=timesteps.float(), row_segment_R=owner, drop_text_G=drop
    )


def outputs(model, batch):
    """The output of each clip."""
    return model(batch)[: batch.num_tokens].split(batch.cu_segments.diff().tolist())


def loss_of(out, number):
    return (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(100 + number), dtype=out.dtype)).sum()


def gradients(model, batches):
    model.zero_grad()
    for batch in batches:
        sum(loss_of(o, int(i)) for o, i in zip(outputs(model, batch), batch.sample_ids_G, strict=True)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@BOTH
def test_output_is_zero_and_every_block_the_identity_at_the_start(modulation):
    model = make_model(modulation, random=False)
    seen = []
    for block in model.blocks.values():
        block.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0], out)))
    batch = make_pack()
    assert (model(batch) == 0).all()
    assert len(seen) == 2
    for before, after in seen:
        assert torch.equal(before, after) and before.abs().max() > 0.1


@BOTH
def test_the_first_step_reaches_the_output_layer_and_then_everything(modulation):
    model = make_model(modulation, random=False)
    first = {name for name, g in gradients(model, [make_pack()]).items() if g.abs().max() > 0}
    assert first == {"patch_out.weight", "patch_out.bias"}
    reached = {name for name, g in gradients(make_model(modulation), [make_pack()]).items() if g.abs().max() > 0}
    assert reached == {name for name, _ in model.named_parameters()}


@BOTH
@pytest.mark.parametrize("qk_norm", ["per_head", "none"])
def test_a_clip_in_a_pack_is_the_clip_alone(modulation, qk_norm):
    model = make_model(modulation, qk_norm=qk_norm)
    together, alone = make_pack(padding=5), [make_pack([clip]) for clip in CLIPS]
    for packed, batch in zip(outputs(model, together), alone, strict=True):
        torch.testing.assert_close(packed, outputs(model, batch)[0], **EXACT)
    packed, separate = gradients(model, [together]), gradients(model, alone)
    assert packed.keys() == separate.keys()
    for name in packed:
        torch.testing.assert_close(
            packed[name], separate[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


@BOTH
def test_a_clip_does_not_see_its_neighbours_at_all(modulation):
    model, batch = make_model(modulation), make_pack()
    before = outputs(model, batch)
    changed = batch.patches_LP.clone()
    start, end = batch.cu_segments[2:4].tolist()
    changed[start:end] += 1
    after = outputs(model, dataclasses.replace(batch, patches_LP=changed))
    for i, (a, b) in enumerate(zip(before, after, strict=True)):
        assert torch.allclose(a, b, **EXACT) is (i != 2)


@BOTH
def test_permuting_the_segments_permutes_the_output(modulation):
    model, order = make_model(modulation), [3, 0, 4, 2, 1]
    straight, permuted = outputs(model, make_pack()), outputs(model, make_pack([CLIPS[i] for i in order]))
    for place, i in enumerate(order):
        torch.testing.assert_close(permuted[place], straight[i], **EXACT)


@pytest.mark.parametrize("padding", [1, 3, 64])
def test_padding_does_not_matter(padding):
    model = make_model()
    short, long = make_pack(), make_pack(padding=padding)
    assert len(model(long)) == len(model(short)) + padding
    for a, b in zip(outputs(model, short), outputs(model, long), strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    a, b = gradients(model, [short]), gradients(model, [long])
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_what_stands_in_the_padding_does_not_matter():
    model, batch = make_model(), make_pack(padding=9)
    filled = batch.patches_LP.clone()
    filled[batch.num_tokens :] = 1e3
    for a, b in zip(outputs(model, batch), outputs(model, dataclasses.replace(batch, patches_LP=filled)), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_output_is_independent_of_a_hidden_caption():
    model = make_model()
    other = [(grid, "quite another caption of more words", clean, t) for grid, _, clean, t in CLIPS]
    everyone = range(len(CLIPS))
    for a, b in zip(
        outputs(model, make_pack(hide=everyone)), outputs(model, make_pack(other, hide=everyone)), strict=True
    ):
        torch.testing.assert_close(a, b, **EXACT)


def test_output_depends_on_its_own_caption_unless_hidden():
    model = make_model()
    other = [(grid, "blue" if i == 2 else caption, clean, t) for i, (grid, caption, clean, t) in enumerate(CLIPS)]
    for i, (a, b) in enumerate(zip(outputs(model, make_pack()), outputs(model, make_pack(other)), strict=True)):
        assert torch.allclose(a, b, **EXACT) is (i != 2)
    for i, (a, b) in enumerate(zip(outputs(model, make_pack()), outputs(model, make_pack(hide=[1])), strict=True)):
        assert torch.allclose(a, b, **EXACT) is (i != 1)


def test_each_part_of_the_tokens_has_its_rows():
    """As tensor-parallel ranks cut them: the rows of the parts, one after the other, are those of the pack."""
    model, batch = make_model(), make_pack()
    length = len(batch.patches_LP)
    whole, parts = model.local_rows(batch), []
    assert whole.num_real == batch.num_tokens
    assert torch.equal(whole.row_L, segment_ids(batch.cu_rows, length)[: batch.num_tokens].int())
    for part in torch.arange(length).tensor_split(3):
        model.scatter_tokens = lambda x, part=part: x[part]
        parts.append(model.local_rows(batch))
    assert torch.cat([rows.row_L for rows in parts]).tolist() == whole.row_L.tolist()
    assert {rows.num_rows for rows in parts} == {whole.num_rows} and sum(rows.num_tokens for rows in parts) == length


@BOTH
def test_the_timestep_of_a_row_reaches_the_rest_of_its_clip_by_attention_alone(modulation):
    model, batch = make_model(modulation), make_pack()
    rows = batch.timesteps_R.clone()
    rows[1] = 0.1  # the noised frames of the first clip, whose first frame is clean
    changed = dataclasses.replace(batch, timesteps_R=rows)
    for i, (a, b) in enumerate(zip(outputs(model, batch), outputs(model, changed), strict=True)):
        assert torch.allclose(a, b, **EXACT) is (i != 0)
    for block in model.blocks.values():
        torch.nn.init.zeros_(block.attention.out.weight)
    before, after = outputs(model, batch)[0], outputs(model, changed)[0]
    torch.testing.assert_close(before[:4], after[:4], **EXACT)  # 4 tokens of the clean frame
    assert not torch.isclose(before[4:], after[4:], rtol=1e-6).all(-1).any()


@pytest.mark.parametrize("column", range(4))
def test_output_depends_on_native_size_frames_and_rate(column):
    model, batch = make_model(), make_pack()
    native = batch.native_size_G4.clone()
    native[2, column] *= 2
    for i, (a, b) in enumerate(
        zip(outputs(model, batch), outputs(model, dataclasses.replace(batch, native_size_G4=native)), strict=True)
    ):
        assert torch.allclose(a, b, **EXACT) is (i != 2)


def moved(batch, t=0, h=0, w=0):
    return dataclasses.replace(batch, coords_L3=batch.coords_L3 + torch.tensor([t, h, w]))


def test_output_depends_on_differences_of_coords_and_on_which_frame_is_the_first():
    model, batch = make_model(), make_pack()
    near = {"rtol": 1e-4, "atol": 1e-4}  # angles are fp32
    torch.testing.assert_close(model(batch), model(moved(batch, h=2, w=7)), **near)
    torch.testing.assert_close(model(moved(batch, t=1)), model(moved(batch, t=6, h=1)), **near)
    mirrored = dataclasses.replace(batch, coords_L3=batch.coords_L3 * torch.tensor([1, -1, -1]))
    assert not torch.allclose(model(batch), model(mirrored), rtol=1e-2, atol=1e-2)
    assert not torch.allclose(model(batch), model(moved(batch, t=1)), rtol=1e-2, atol=1e-2)
    torch.nn.init.zeros_(model.first_frame)
    torch.testing.assert_close(model(batch), model(moved(batch, t=1)), **near)


@BOTH
def test_recomputing_gives_equal_gradients(modulation):
    kept, recomputed = (gradients(make_model(modulation, recompute=r), [make_pack()]) for r in ("none", "full"))
    assert kept.keys() == recomputed.keys()
    for name in kept:
        assert torch.equal(kept[name], recomputed[name]), name


def test_recomputing_keeps_less_in_memory():
    def kept_bytes(recompute):
        model, batch = make_model(recompute=recompute), make_pack()
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        seen = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = model(batch)
        return sum(seen.values()), out

    (all_of_it, _), (less, _) = kept_bytes("none"), kept_bytes("full")
    assert less < 0.6 * all_of_it


def test_shared_modulation_has_one_projection_and_a_table_a_block():
    block, shared = make_model("block"), make_model("shared")
    assert block.shared_modulation is None and shared.shared_modulation.weight.shape == (6 * 24, 24)
    assert [b.modulation.table.shape for b in shared.blocks.values()] == [(6, 24)] * 2
    assert [b.modulation.proj.weight.shape for b in block.blocks.values()] == [(6 * 24, 24)] * 2


def test_a_float32_model_takes_and_gives_float32():
    model, batch = make_model().float(), make_pack()
    out = model(batch)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, make_model()(batch).float(), rtol=1e-3, atol=1e-3)


def test_a_bfloat16_model_gives_float32_near_the_exact_output():
    model, batch = make_model(random=False), make_pack()
    for name, p in model.named_parameters():
        if name.startswith(("patch_out", "final")):
            torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(len(name)))
    exact = model(batch)
    out = model.bfloat16()(batch)
    assert out.dtype == torch.float32
    error = (out - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < 0.02
