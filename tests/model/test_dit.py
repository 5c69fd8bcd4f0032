"""VideoDiT: what the output of a clip depends on, and what it must not depend on."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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
    """A small float64 model; `random`: all weights random, none zero as at step 0."""
    config = ModelConfig(width=24, depth=2, heads=2, modulation=modulation, **options)
    torch.manual_seed(0)
    model = VideoDiT(config, PATCH_DIM, build_text_encoder(TextConfig()).build_embedder(24, config.text_depth, 2))
    model.initialise(0)
    if random:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.double()


def make_pack(clips=CLIPS, padding=0, hide=()):
    """Clips at their own timesteps, some frames clean; the content of a clip depends only on its index in CLIPS."""
    records = []
    for grid, caption, _, _ in clips:
        index = next(i for i, clip in enumerate(CLIPS) if clip[0] == grid)
        tokens = grid[0] * grid[1] * grid[2]
        patches = torch.randn(tokens, PATCH_DIM, generator=torch.Generator().manual_seed(index))
        text = build_text_encoder(TextConfig()).encode([caption])[0]
        native = (8.0 * grid[1], 8.0 * grid[2], 4.0 * grid[0] - 3, 8.0 + index)
        records.append(Record(index, patches, grid, text, native, caption))
    batch = make_batch(records, sum(len(r.patches_LP) for r in records) + padding)
    cu_rows, timesteps, segments = build_rows(
        batch, torch.tensor([t for *_, t in clips]), [clean for _, _, clean, _ in clips]
    )
    drop = batch.drop_text_G | torch.tensor([i in hide for i in range(len(clips))])
    return dataclasses.replace(
        batch, cu_rows=cu_rows, timesteps_R=timesteps.float(), row_segment_R=segments, drop_text_G=drop
    )


def outputs(model, batch):
    """The output of each clip."""
    return model(batch)[: batch.num_tokens].split(batch.cu_segments.diff().tolist())


def loss_of(out, index):
    return (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(100 + index), dtype=out.dtype)).sum()


def gradients(model, batches):
    model.zero_grad()
    for batch in batches:
        sum(loss_of(o, int(i)) for o, i in zip(outputs(model, batch), batch.sample_ids_G, strict=True)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@BOTH
def test_at_step_0_the_output_is_zero_and_every_block_the_identity(modulation):
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
def test_at_step_0_only_the_output_layer_has_a_gradient_and_later_all_parameters(modulation):
    model = make_model(modulation, random=False)
    first = {name for name, g in gradients(model, [make_pack()]).items() if g.abs().max() > 0}
    assert first == {"patch_out.weight", "patch_out.bias"}
    later = {name for name, g in gradients(make_model(modulation), [make_pack()]).items() if g.abs().max() > 0}
    assert later == {name for name, _ in model.named_parameters()}


@BOTH
@pytest.mark.parametrize("qk_norm", ["per_head", "none"])
def test_outputs_and_gradients_of_a_pack_equal_those_of_its_clips_alone(modulation, qk_norm):
    model = make_model(modulation, qk_norm=qk_norm)
    pack, alone = make_pack(padding=5), [make_pack([clip]) for clip in CLIPS]
    for packed, batch in zip(outputs(model, pack), alone, strict=True):
        torch.testing.assert_close(packed, outputs(model, batch)[0], **EXACT)
    packed, separate = gradients(model, [pack]), gradients(model, alone)
    assert packed.keys() == separate.keys()
    for name in packed:
        torch.testing.assert_close(
            packed[name], separate[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


@BOTH
def test_a_clip_does_not_depend_on_its_neighbours(modulation):
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
    original, permuted = outputs(model, make_pack()), outputs(model, make_pack([CLIPS[i] for i in order]))
    for position, i in enumerate(order):
        torch.testing.assert_close(permuted[position], original[i], **EXACT)


@pytest.mark.parametrize("padding", [1, 3, 64])
def test_output_does_not_depend_on_the_amount_of_padding(padding):
    model = make_model()
    short, long = make_pack(), make_pack(padding=padding)
    assert len(model(long)) == len(model(short)) + padding
    for a, b in zip(outputs(model, short), outputs(model, long), strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    a, b = gradients(model, [short]), gradients(model, [long])
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_output_does_not_depend_on_the_content_of_padding():
    model, batch = make_model(), make_pack(padding=9)
    filled = batch.patches_LP.clone()
    filled[batch.num_tokens :] = 1e3
    for a, b in zip(outputs(model, batch), outputs(model, dataclasses.replace(batch, patches_LP=filled)), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_output_does_not_depend_on_a_hidden_caption():
    model = make_model()
    other = [(grid, "a different caption of more words", clean, t) for grid, _, clean, t in CLIPS]
    every_clip = range(len(CLIPS))
    for a, b in zip(
        outputs(model, make_pack(hide=every_clip)), outputs(model, make_pack(other, hide=every_clip)), strict=True
    ):
        torch.testing.assert_close(a, b, **EXACT)


def test_output_depends_on_its_own_caption_unless_hidden():
    model = make_model()
    other = [(grid, "blue" if i == 2 else caption, clean, t) for i, (grid, caption, clean, t) in enumerate(CLIPS)]
    for i, (a, b) in enumerate(zip(outputs(model, make_pack()), outputs(model, make_pack(other)), strict=True)):
        assert torch.allclose(a, b, **EXACT) is (i != 2)
    for i, (a, b) in enumerate(zip(outputs(model, make_pack()), outputs(model, make_pack(hide=[1])), strict=True)):
        assert torch.allclose(a, b, **EXACT) is (i != 1)


def test_rows_of_token_shards_concatenate_to_the_rows_of_the_pack():
    """Tokens are sharded as over tensor-parallel ranks."""
    model, batch = make_model(), make_pack()
    length = len(batch.patches_LP)
    pack_rows, shard_rows = model.local_rows(batch), []
    assert pack_rows.num_real == batch.num_tokens
    assert torch.equal(pack_rows.row_L, segment_ids(batch.cu_rows, length)[: batch.num_tokens].int())
    for shard in torch.arange(length).tensor_split(3):
        model.scatter_tokens = lambda x, shard=shard: x[shard]
        shard_rows.append(model.local_rows(batch))
    assert torch.cat([rows.row_L for rows in shard_rows]).tolist() == pack_rows.row_L.tolist()
    assert {rows.num_rows for rows in shard_rows} == {pack_rows.num_rows}
    assert sum(rows.num_tokens for rows in shard_rows) == length


@BOTH
def test_the_timestep_of_a_row_reaches_the_rest_of_its_clip_only_by_attention(modulation):
    model, batch = make_model(modulation), make_pack()
    timesteps_R = batch.timesteps_R.clone()
    timesteps_R[1] = 0.1  # the noised frames of the first clip, whose first frame is clean
    changed = dataclasses.replace(batch, timesteps_R=timesteps_R)
    for i, (a, b) in enumerate(zip(outputs(model, batch), outputs(model, changed), strict=True)):
        assert torch.allclose(a, b, **EXACT) is (i != 0)
    for block in model.blocks.values():
        torch.nn.init.zeros_(block.attention.out.weight)
    before, after = outputs(model, batch)[0], outputs(model, changed)[0]
    torch.testing.assert_close(before[:4], after[:4], **EXACT)  # 4 tokens of the clean frame
    assert not torch.isclose(before[4:], after[4:], rtol=1e-6).all(-1).any()


@pytest.mark.parametrize("column", range(4))
def test_output_depends_on_native_size_frames_and_fps(column):
    model, batch = make_model(), make_pack()
    native = batch.native_size_G4.clone()
    native[2, column] *= 2
    for i, (a, b) in enumerate(
        zip(outputs(model, batch), outputs(model, dataclasses.replace(batch, native_size_G4=native)), strict=True)
    ):
        assert torch.allclose(a, b, **EXACT) is (i != 2)


def shifted(batch, t=0, h=0, w=0):
    return dataclasses.replace(batch, coords_L3=batch.coords_L3 + torch.tensor([t, h, w]))


def test_output_depends_only_on_differences_of_coords_and_on_which_frame_is_first():
    model, batch = make_model(), make_pack()
    tolerance = {"rtol": 1e-4, "atol": 1e-4}  # angles are fp32
    torch.testing.assert_close(model(batch), model(shifted(batch, h=2, w=7)), **tolerance)
    torch.testing.assert_close(model(shifted(batch, t=1)), model(shifted(batch, t=6, h=1)), **tolerance)
    mirrored = dataclasses.replace(batch, coords_L3=batch.coords_L3 * torch.tensor([1, -1, -1]))
    assert not torch.allclose(model(batch), model(mirrored), rtol=1e-2, atol=1e-2)
    assert not torch.allclose(model(batch), model(shifted(batch, t=1)), rtol=1e-2, atol=1e-2)
    torch.nn.init.zeros_(model.first_frame)
    torch.testing.assert_close(model(batch), model(shifted(batch, t=1)), **tolerance)


@BOTH
def test_conditioned_on_timesteps_alone_a_model_has_no_other_input_than_patches_coords_and_captions(modulation):
    model, batch = make_model(modulation, conditioning="timestep"), make_pack()
    full = {name for name, _ in make_model(modulation).named_parameters()}
    left_out = full - {name for name, _ in model.named_parameters()}
    assert {name.split(".")[0] for name in left_out} == {"native", "pooled_text", "first_frame", "null_text"}
    other = dataclasses.replace(shifted(batch, t=1), native_size_G4=batch.native_size_G4 * 2)
    torch.testing.assert_close(model(batch), model(other), rtol=1e-4, atol=1e-4)
    timesteps_R = batch.timesteps_R.clone()
    timesteps_R[-1] += 0.3
    changed = outputs(model, dataclasses.replace(batch, timesteps_R=timesteps_R))
    for i, (a, b) in enumerate(zip(outputs(model, batch), changed, strict=True)):
        assert torch.allclose(a, b, **EXACT) is (i != len(CLIPS) - 1)
    hidden = outputs(model, make_pack(hide=[1]))
    for i, (a, b) in enumerate(zip(outputs(model, batch), hidden, strict=True)):
        assert torch.allclose(a, b, **EXACT) is (i != 1)


@BOTH
def test_recompute_does_not_change_gradients(modulation):
    expected, recomputed = (gradients(make_model(modulation, recompute=r), [make_pack()]) for r in ("none", "full"))
    assert expected.keys() == recomputed.keys()
    for name in expected:
        assert torch.equal(expected[name], recomputed[name]), name


def test_recompute_saves_fewer_bytes_for_the_backward_pass():
    def saved_bytes(recompute):
        model, batch = make_model(recompute=recompute), make_pack()
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        sizes = {}

        def record(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            out = model(batch)
        return sum(sizes.values()), out

    (without, _), (with_recompute, _) = saved_bytes("none"), saved_bytes("full")
    assert with_recompute < 0.6 * without


def test_shared_modulation_has_one_projection_and_a_table_per_block():
    block, shared = make_model("block"), make_model("shared")
    assert block.shared_modulation is None and shared.shared_modulation.weight.shape == (6 * 24, 24)
    assert [b.modulation.table.shape for b in shared.blocks.values()] == [(6, 24)] * 2
    assert [b.modulation.proj.weight.shape for b in block.blocks.values()] == [(6 * 24, 24)] * 2


def test_a_float32_model_returns_float32():
    model, batch = make_model().float(), make_pack()
    out = model(batch)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, make_model()(batch).float(), rtol=1e-3, atol=1e-3)


def test_a_bfloat16_model_returns_float32_near_the_exact_output():
    model, batch = make_model(random=False), make_pack()
    for name, p in model.named_parameters():
        if name.startswith(("patch_out", "final")):
            torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(len(name)))
    exact = model(batch)
    out = model.bfloat16()(batch)
    assert out.dtype == torch.float32
    error = (out - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < 0.02


class OperatorLog(TorchDispatchMode):
    """The names of all operators that are called inside, with `accumulate` of index_put."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function._schema.name.removeprefix("aten::").rstrip("_"))
        return function(*args, **(kwargs or {}))


@BOTH
@pytest.mark.parametrize("options", [{}, {"recompute": "full"}, {"qk_norm": "across_heads"}], ids=str)
def test_a_step_calls_no_operator_that_sums_in_any_order_on_a_gpu(modulation, options):
    """So that a run repeats bitwise: of those that torch.use_deterministic_algorithms lists, for CUDA."""
    model, batch = make_model(modulation, **options).train(), make_pack(padding=3, hide=(1,))
    with OperatorLog() as log:
        loss = model(batch)[: int(batch.cu_segments[-1])].square().mean()
        loss.backward()
    atomic = {"index_add", "scatter_add", "scatter_reduce", "index_reduce", "histc", "bincount", "put", "cumsum"}
    assert "native_layer_norm_backward" in log.names and not log.names & atomic, log.names & atomic
