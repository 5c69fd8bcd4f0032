"""Imported Wan weights under tensor 2 x context 2 give what diffusers gives, and Wan's dialect trains alike in every
kind of layout."""

import dataclasses
from functools import cache

import layouts
import pytest
import torch

from megasora.config import load
from megasora.testing.spawn import run_ranks
from megasora.testing.wan import CLIPS, encoder_folder, make_pack, make_tiny_wan, run_reference, write_weights


def predict_share(settings: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """On each rank: (slots' sample ids [L], positions in their clips [L], predictions [L, P]) of its share."""
    from megasora.batch import segment_ids
    from megasora.diffusion.flow import build_rows
    from megasora.parallel.mesh import build_mesh
    from megasora.parallel.share import share_pack
    from megasora.parallelize import build_local_model

    config = load(None, settings)
    mesh = build_mesh(config.parallel, "cpu")
    model = build_local_model(config, torch.device("cpu"), mesh).stages[0]
    pack = make_pack()
    clean = dataclasses.replace(pack, cu_rows=pack.cu_segments, timesteps_R=torch.zeros(len(CLIPS)))
    share = share_pack(clean, config, mesh)
    clips = [CLIPS[i] for i in share.sample_ids_G]
    cu_rows, timesteps_R, owner = build_rows(share, torch.tensor([c[3] for c in clips]), [c[2] for c in clips])
    share = dataclasses.replace(share, cu_rows=cu_rows, timesteps_R=timesteps_R.float(), row_segment_R=owner)
    with torch.no_grad():
        out_LP = model(share)
    segment_L = segment_ids(share.cu_segments, share.num_tokens)
    return share.sample_ids_G[segment_L], share.positions_L[: share.num_tokens], out_LP[: share.num_tokens]


@pytest.mark.parametrize("axes", [("tensor=2", "context=2"), ("tensor=2", "context=2", "ulysses=2")], ids=",".join)
def test_imported_weights_under_tensor_2_context_2_give_what_diffusers_gives(axes, tmp_path):
    tiny = make_tiny_wan(tmp_path)
    weights = write_weights(tiny, tmp_path / "ours.safetensors")
    pack = make_pack()
    with torch.no_grad():
        theirs = run_reference(tiny.reference, pack)
    settings = [*tiny.settings, f"run.start=init:{weights}", f"run.dir={tmp_path}"]
    settings.append(f"data.tokens_per_pack={len(pack.patches_LP)}")
    ranks = run_ranks(predict_share, 4, [*settings, *(f"parallel.{axis}" for axis in axes)])
    for one, peer in (ranks[:2], ranks[2:]):
        assert all(torch.equal(a, b) for a, b in zip(one, peer, strict=True)), "tensor peers see the same"
    sample_L, place_L, out_LP = (torch.cat(parts) for parts in zip(ranks[0], ranks[2], strict=True))
    for number, expected in enumerate(theirs):
        here = sample_L == number
        assert sorted(place_L[here].tolist()) == list(range(len(expected)))
        error = (out_LP[here][place_L[here].argsort()] - expected).abs().max() / expected.abs().max()
        assert error <= 1e-5, f"clip {number}: {float(error):.1e}"


TEXT_DIM = 16  # as in the packs of layouts.py
LAYOUTS = [
    layouts.layout(2, zero_stage=3, depth=2, packs=2),
    layouts.layout(8, tensor=2, context=2, pipeline=2, depth=2, packs=2),
]


@cache
def single_process(settings: tuple[str, ...], depth: int, dtype: torch.dtype, steps: int) -> dict:
    config = load(None, [*settings, f"model.depth={depth}", "data.packs_per_step=2"])
    return layouts.single_process(config, dtype, steps)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_layout_trains_the_same_model_of_wans_dialect(layout, tmp_path):
    text = encoder_folder(tmp_path / "text", TEXT_DIM)
    dialect = ["model.modulation=shared", "model.conditioning=timestep", "model.qk_norm=across_heads"]
    settings = (*layouts.BASE, *dialect, "model.text_depth=0", "text.name=t5", f"text.path={text}")
    config = load(None, [*settings, *layout.settings])
    results = run_ranks(layouts.train_both, layout.processes, [config])
    exact = single_process(settings, config.model.depth, torch.float64, 1)
    assert not [name for name in exact["weights"] if name.startswith(("native", "pooled", "first", "null"))]
    for what, error in layouts.module_errors([rank[0][0] for rank in results], exact).items():
        assert error <= 1e-10, f"float64: {what} has error {error:.1e}"
    exact = single_process(settings, config.model.depth, torch.float32, layouts.STEPS)
    for what, error in layouts.step_errors(results[0][0][1], exact, config).items():
        assert error <= 2e-5, f"float32 steps: {what} has error {error:.1e}"
