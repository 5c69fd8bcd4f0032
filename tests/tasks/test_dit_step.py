"""A training step of a DiT on a GPU: the host waits for nothing, and a share of a pack is copied in one piece."""

import dataclasses
import weakref
from types import SimpleNamespace

import pytest
import torch

from megasora.build import build_model, patch_dim
from megasora.config import load
from megasora.data.pack import Record, make_batch
from megasora.device_transfer import DeviceTransfer, Packed, map_tensors, to_device
from megasora.diffusion.flow import FlowMatching
from megasora.model.dit import VideoDiT
from megasora.parallel.context_attention import ContextAttention
from megasora.parallel.share import share_length, share_pack
from megasora.parallelize import apply_context_parallel
from megasora.tasks.dit import DiTTask, NoisedShares, Share
from megasora.testing.host_waits import HostWaits
from megasora.text.embedders import FeatureEmbedder

SETTINGS = [
    "model.width=48", "model.heads=2", "model.depth=2", "model.text_depth=1", "data.tokens_per_pack=96",
    "model.kernel_backend=torch", "codec.channels=3", "objective.frame_conditioning.first=1",
]  # fmt: skip
GRIDS = [(3, 2, 4), (1, 3, 3), (2, 4, 4)]
TEXT_DIM = 16


def config_of(*settings):
    return load(None, [*SETTINGS, *settings])


def features_config():
    """Wan's conditioning, which needs features of words in place of words: zeros for a hidden caption."""
    config = config_of("model.modulation=shared", "model.qk_norm=across_heads")
    config.model.conditioning = "timestep"
    return config


def build(config):
    m = config.model
    if m.conditioning == "full":
        return build_model(config, patch_dim(config))
    return VideoDiT(m, patch_dim(config), FeatureEmbedder(TEXT_DIM, m.width, m.text_depth, m.heads))


VARIANTS = {
    "adaLN": config_of,
    "shared modulation, recompute": lambda: config_of("model.modulation=shared", "model.recompute=full"),
    "kept attention": lambda: config_of("model.recompute=keep_attention", "model.qk_norm=across_heads"),
    "Wan": features_config,
}
each_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


def pack_of(config, seed=0):
    """Three clips, and padding."""
    records = []
    for i, (t, h, w) in enumerate(GRIDS):
        draw = torch.Generator().manual_seed(seed + i)
        patches = torch.randn(t * h * w, patch_dim(config), generator=draw)
        words = torch.randint(0, 257, (2 + i, TEXT_DIM), generator=draw)
        if config.model.conditioning == "timestep":
            words = words / 257
        records.append(Record(i, patches, (t, h, w), words, (8.0 * h, 8.0 * w, 4.0 * t - 3, 8.0), "x"))
    return make_batch(records, config.data.tokens_per_pack)


class CountedTransfer(DeviceTransfer):
    """Copies as if the CPU were another device, and counts the buffers that exist there."""

    def __init__(self):
        super().__init__("cpu")
        self.copies, self.alive, self.started, self.most_alive = True, set(), 0, 0

    def copy(self, host):
        memory = host.numpy().copy()
        self.started += 1
        self.alive.add(self.started)
        weakref.finalize(memory, self.alive.discard, self.started)
        self.most_alive = max(self.most_alive, len(self.alive))
        return torch.from_numpy(memory), None


def share_of(config, model, pack, step=0):
    clean, noise = FlowMatching(config.objective, 0).draw(pack, step)
    return Share(dataclasses.replace(clean, plan=model.plan(clean)), noise)


def gradients_of_a_step(model, shares, transfer):
    num_tokens = torch.full((), sum(share.value.noise.num_noised for share in shares), device=transfer.device)
    noised = NoisedShares(shares, transfer, num_tokens)
    model.zero_grad()
    for index, pack in enumerate(noised):
        noised.loss(model(pack), index).backward()
    return noised.error_sum, [p.grad.clone() for p in model.parameters()]


@each_variant
def test_the_host_waits_for_nothing_in_a_step_and_each_share_is_one_copy(variant):
    config = variant()
    with torch.device("meta"):
        model = build(config)
    transfer = DeviceTransfer("meta")
    with HostWaits() as loading:
        shares = [transfer.pack(share_of(config, model, pack_of(config, seed))) for seed in (0, 10)]
    assert not loading.copies and not loading.waits
    with HostWaits() as step:
        _, gradients = gradients_of_a_step(model, shares, transfer)
    assert not step.waits and len(step.copies) == len(shares)
    assert all("device_transfer.py" in copy.line for copy in step.copies)
    assert step.operations > 200 and all(gradient.is_meta for gradient in gradients)


def test_a_step_without_a_plan_from_the_loader_would_copy():
    """What the test above holds can be seen: the model makes a missing plan itself, in the step."""
    config = config_of()
    with torch.device("meta"):
        model = build(config)
    clean, noise = to_device(share_of(config, model, pack_of(config)), "meta")
    with HostWaits() as step:
        model(noise.add(dataclasses.replace(clean, plan=None))[0])
    assert len(step.copies) > 5


@each_variant
def test_a_step_with_a_plan_in_one_buffer_is_bitwise_the_same(variant):
    config = variant()
    model = build(config)
    model.initialise(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(0))
    transfer = CountedTransfer()
    planned = [share_of(config, model, pack_of(config, seed), step=4) for seed in (0, 10)]
    unplanned = [Packed(Share(dataclasses.replace(clean, plan=None), noise)) for clean, noise in planned]
    variants = unplanned, list(map(Packed, planned)), list(map(transfer.pack, planned))
    (error, expected), *others = (gradients_of_a_step(model, shares, transfer) for shares in variants)
    assert float(error) > 0 and all(bool(x.isfinite().all()) for x in expected)
    for other, gradients in others:
        assert torch.equal(other, error)
        assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


def test_two_packs_of_a_step_are_on_the_device_at_most():
    config = config_of()
    model = build(config)
    model.initialise(0)
    transfer = CountedTransfer()
    shares = [transfer.pack(share_of(config, model, pack_of(config, seed))) for seed in range(5)]
    gradients_of_a_step(model, shares, transfer)
    assert transfer.started == 5 and transfer.most_alive == 2 and len(transfer.alive) == 0


@pytest.mark.parametrize(("ring", "ulysses"), [(2, 1), (1, 2), (2, 2)])
def test_the_plan_of_a_share_of_context_ranks_moves_as_a_whole(ring, ulysses):
    """With all forms of the attention segments that layers read: the sends and receives of a ring, too."""
    config = config_of(f"parallel.context={ring * ulysses}", f"parallel.ulysses={ulysses}")
    axes = [SimpleNamespace(size=n, rank=0, is_split=False, group=None) for n in (ring, ulysses)]
    with torch.device("meta"):
        model = build(config)
    apply_context_parallel(model, ContextAttention(*axes))
    share = share_pack(pack_of(config), config, SimpleNamespace(ring=axes[0], ulysses=axes[1]))
    assert len(share.patches_LP) == share_length(config)
    transfer = DeviceTransfer("meta")
    clean, noise = transfer(transfer.pack(share_of(config, model, share))).wait()
    tensors = []
    map_tensors((clean, noise), lambda x: tensors.append(x) or x, torch.device("meta"))
    assert all(x.is_meta for x in tensors) and not clean.cu_rows.is_meta
    segments = clean.plan.segments
    parts = (segments.local, *(exchange.segments for exchange in segments.exchanges))
    assert len(segments.exchanges) == ring - 1
    assert all("buckets" in vars(part) and part.device.type == "meta" for part in parts)


def test_a_batch_of_another_step_is_an_error():
    task = DiTTask.__new__(DiTTask)
    with pytest.raises(RuntimeError, match="a batch of step 4 in step 5"):
        task.forward_backward(SimpleNamespace(step=3, shares=[]), 4, lambda phase: None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each_variant
def test_a_step_on_a_gpu_does_not_synchronize(variant):
    config = variant()
    config.model.width, config.model.kernel_backend = 128, "auto"
    model = build(config).to("cuda", torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    transfer = DeviceTransfer("cuda")

    def run():
        return gradients_of_a_step(model, shares, transfer)

    shares = [transfer.pack(share_of(config, model, pack_of(config, seed))) for seed in (0, 10)]
    run()  # compiles kernels, allocates memory
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        error, gradients = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert float(error) > 0 and all(bool(gradient.isfinite().all()) for gradient in gradients)
