"""The benchmarks in tiny settings: counts equal closed forms, and the record is complete."""

import json

import numpy as np
import pytest
import torch

from benchmarks import codec, context_balance, host_waits, launch_cost, memory, optimizer_step, step
from megasora.batch import ContextSplit
from megasora.config import load
from megasora.kernels.launch import INTERPRETED
from megasora.parallel.context_split import (
    attention_work_per_rank,
    received_tokens_per_rank,
    sent_tokens_per_rank,
    tokens_per_rank,
)

HEAD = {"date", "commit", "uncommitted_changes", "cpu", "cores", "python", "torch", "numpy"}


def recorded(main, tmp_path, *arguments):
    path = tmp_path / "results" / "record.json"
    main([*arguments, "--out", str(path)])
    record = json.loads(path.read_text())
    assert record.keys() >= HEAD
    assert len(record["commit"]) == 40
    return record


# ---- context_balance


def test_an_even_split_gives_every_rank_the_same_tokens_and_work():
    split = context_balance.even_split([1, 7, 64, 1000, 3], 8, 256)
    tokens, work = tokens_per_rank(split), attention_work_per_rank(split)
    assert tokens.max() - tokens.min() <= 1
    assert work.max() <= work.mean() + 1000 + 64 + 7 + 3
    length_G = np.zeros(5, dtype=int)
    for _, segment, start, stop in split.pieces_Q4.tolist():
        length_G[segment] += stop - start
    assert length_G.tolist() == [1, 7, 64, 1000, 3]


def test_a_contiguous_split_fills_one_rank_after_the_other():
    split = context_balance.contiguous_split([3, 6, 2], 3, 4)
    assert split.pieces_Q4.tolist() == [[0, 0, 0, 3], [0, 1, 0, 1], [1, 1, 1, 5], [2, 1, 5, 6], [2, 2, 0, 2]]


@pytest.mark.parametrize("seed", range(3))
def test_a_heavy_tailed_mix_fills_the_pack_within_its_bounds(seed):
    lengths = context_balance.heavy_tailed(5000, 8, 4000, seed)
    assert 8 <= lengths.min() and lengths.max() <= 4000
    assert 5000 - 8 < lengths.sum() <= 5000


def test_balance_counts_the_bytes_of_a_plain_ring(tmp_path):
    record = recorded(context_balance.main, tmp_path, "--ranks", "16", "--slots-per-rank", "4096", "--seeds", "1")
    assert record.keys() == HEAD | {"mix", "model", "cases"}
    (case,) = record["cases"]
    results = {r["variant"]: r for r in case["results"]}
    tokens = 16 * 4096 * (1 - results["plain ring"]["padding"]) / 16  # of a rank, on average
    bytes_per_token = 15 * (2 * 2 + 2 * 2 + 2 * 4)  # to each of 15 ranks: K, V twice in bf16; gradients in fp32
    assert results["plain ring"]["mb_per_layer_mean"] == pytest.approx(tokens * bytes_per_token * 5120 / 1e6, rel=1e-12)
    assert results["USP"]["relative_to_usp_mean"] == 1.0
    assert results["split_pack, ring"]["work_max_over_mean"] < 1.001 < results["plain ring"]["work_max_over_mean"]


# ---- host_waits


def test_host_waits_are_counted_with_and_without_the_loader(tmp_path, monkeypatch):
    monkeypatch.setattr(host_waits, "PACKS", {"two clips": ((2, 2, 3), 2)})
    record = recorded(host_waits.main, tmp_path, "--repeats", "1")
    assert record.keys() == HEAD | {"device", "results"}
    results = {r["variant"]: r for r in record["results"]}
    assert results.keys() == {"step", "loader"}
    assert results["step"]["copies"] > 10 and results["step"]["waits"] == 0
    assert results["loader"]["copies"] == 1 and results["loader"]["waits"] == 0 < results["loader"]["loader_ms"]


# ---- launch_cost


def test_launch_costs_are_of_every_operation_and_a_block_in_both_ways(tmp_path):
    record = recorded(launch_cost.main, tmp_path, "--calls", "1", "--rounds", "1")
    assert record.keys() == HEAD | {"costs", "launcher_us"}
    cases = [(c["what"], c["variant"]) for c in record["costs"]]
    assert cases == [(w, v) for w in (*launch_cost.OPERATIONS_OF_BLOCKS, "block") for v in launch_cost.VARIANTS]
    assert all(c["forward_us"] > 0 for c in record["costs"])


# ---- memory


def test_a_storage_counts_while_it_is_referenced():
    weight = torch.ones(100, requires_grad=True)
    with memory.LiveStorages([weight]) as storages:
        doubled = weight.detach() * 2
        assert storages.alive() == 400
        view = doubled[10:]
        del doubled
        assert storages.alive() == 400
        del view
        assert storages.alive() == 0
        view_of_known = weight.detach()[:50]  # not counted
        assert storages.alive() == 0
        loss = (weight.exp() * 3).sum()  # the result of exp is saved for its backward
        assert storages.alive() == 400 + 4
        loss.backward()
        assert storages.alive() == 4 + 400  # the gradient instead
        assert len(view_of_known) == 50


@pytest.mark.parametrize("dialect", memory.DIALECTS)
@pytest.mark.parametrize("mode", memory.MODES)
def test_a_block_retains_what_its_backward_needs_and_nothing_else(dialect, mode):
    d, length, heads, words = 128, 96, 2, memory.WORDS
    r = memory.measure(dialect, d, mode, length)
    norms = {"DiT": heads, "Wan": 1}[dialect]  # of q and k: one per head, or one
    expected = {
        "full": length * 2 * d,
        "keep_attention": length * (4 * d + 4 * heads),  # with the log-sum-exp of each head
        "none": length * (34 * d + 2 * r.mlp_hidden)
        + 2 * r.mlp_hidden  # the bias before the GELU
        + length * 3 * 2 * 4  # means and deviations of three norms
        + length * 4 * norms  # deviations of q of the cross-attention; those of q and k are recomputed
        + length * 2 * 4 * heads  # log-sum-exp
        + words * (3 * 2 * d + 4 * norms)  # k and v of the caption, k normed, its deviations
        + 6 * 2 * d  # shift, scale and gate of a row
        + (2 * d if dialect == "DiT" else 0),  # the input of their projection
    }[mode]
    assert r.retained_bytes == expected
    assert r.ratio == pytest.approx(1, abs=0.1)


def test_memory_records_every_width_and_mode(tmp_path):
    record = recorded(memory.main, tmp_path, "--widths", "64", "--tokens", "32")
    cases = [(r["dialect"], r["width"], r["recompute"]) for r in record["results"]]
    assert cases == [(dialect, 64, mode) for dialect in ("DiT", "Wan") for mode in ("none", "full", "keep_attention")]


# ---- step


def test_only_the_bytes_of_a_step_depend_on_the_split(tmp_path):
    width, tokens_per_pack = 32, 512
    record = recorded(
        step.main, tmp_path, "--tokens", str(tokens_per_pack), "--width", str(width), "--rounds", "2", "--seeds", "1"
    )
    assert [case["layout"] for case in record["cases"]] == list(step.LAYOUTS)
    lengths = context_balance.heavy_tailed(tokens_per_pack, step.SHORTEST, step.LONGEST, 0).tolist()
    losses, norms = [], []
    for case in record["cases"]:
        config = load(None, step.LAYOUTS[case["layout"]][1])
        ring, t = config.parallel.context, config.parallel.tensor
        assert [r["variant"] for r in case["results"]] == list(step.VARIANTS)
        for r in case["results"]:
            split = step.VARIANTS[r["variant"]](lengths, ring, -(-tokens_per_pack // (ring * t)) * t)
            # K and V forward, again backward, and their gradients to the owner; fp32, 2 layers, heads over t ranks
            sent = sent_tokens_per_rank(split) * 2 + received_tokens_per_rank(split)
            expected = [int(n) * 2 * 4 * width // t * 2 for n in sent for _ in range(t)]
            assert r["lengths"] == lengths
            assert r["bytes_sent"] == expected
            assert len(r["seconds"]) == 2 and all(0 < max(c) for c in r["cpu_seconds"])
            losses.append(r["loss"])
            norms.append(r["gradient_norm"])
    assert losses == pytest.approx([losses[0]] * 9, rel=step.TOLERANCE)  # over layouts too
    assert norms == pytest.approx([norms[0]] * 9, rel=step.TOLERANCE)
    assert losses[0] > 0.1 and norms[0] > 0.1


def test_a_split_that_loses_tokens_raises_an_error(monkeypatch):
    def lossy_split(lengths, ranks, slots_per_rank):
        split = step.split_pack(lengths, ranks, slots_per_rank)
        return ContextSplit(split.ranks, split.slots_per_rank, split.pieces_Q4[:-1])

    monkeypatch.setattr(step, "VARIANTS", {"split_pack": step.split_pack, "lossy": lossy_split})
    config = load(
        None,
        ["parallel.context=2", "data.tokens_per_pack=256", "model.width=32", "model.heads=4", "model.depth=1",
         "codec.channels=4", "run.dtype=float32"],
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="with the lossy split"):
        step.measure(config, 2, 0, 1)


# ---- codec


def test_codec_measures_each_way_to_encode_the_same_clip(tmp_path, monkeypatch):
    monkeypatch.setattr(codec, "in_own_process", lambda function, *arguments: function(*arguments))
    sizes = ["--clip", "9", "48", "64", "--long", "96", "128", "--seconds", "1", "2", "--overlap-size", "200", "264"]
    record = recorded(codec.main, tmp_path, *sizes, "--overlaps", "0", "168", "--trials", "1")
    assert [row["codec"].split(",")[0] for row in record["speed"]] == ["dct", "dct", "vae"]
    assert {row["direction"] for row in record["pieces"]} == {"encode", "decode"}
    assert all(row["cpu_seconds"] > 0 for row in record["pieces"])


# ---- optimizer_step


def test_tensors_of_a_model_have_all_of_its_weights():
    for weights in (1 << 17, 16_000_000, 1_420_000_000):
        sizes = optimizer_step.sizes_of(weights)
        assert len(sizes) == optimizer_step.TENSORS and sum(sizes) == weights and min(sizes) > 0


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter, which is off beside a GPU")
def test_bytes_and_launches_of_an_optimizer_step():
    """fp32 weights, moments, average and gradient, weights in bf16: bytes that each pass loads and stores."""
    counts, tensors = optimizer_step.count(1 << 15), optimizer_step.TENSORS
    norm, clip, adamw, copy, average, zero = 4, 8, 28, 6, 12, 4
    assert counts["apart"][0] == pytest.approx(norm + clip + adamw + copy + average + 2 * zero, rel=0.1)
    assert counts["fused"][0] == pytest.approx(norm + 38, rel=0.01)
    assert counts["add, apart"][0] == 6 + 12 and counts["add, at once"][0] == 10
    assert counts["apart"][1] > 2 * tensors and counts["fused"][1] < 20
    assert counts["add, apart"][1] == 2 * tensors and counts["add, at once"][1] == tensors
