"""EMA weights: the recurrence in float64, and that sharding and a resume do not change it."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch

from megasora.config import load
from megasora.errors import MegaSoraError
from megasora.fragment import Fragment
from megasora.optim.ema import ShardedEMA
from megasora.optim.ema_decays import constant_decay, ema_decays, gamma_of, power_decay, sigma_of
from megasora.optim.update import Update
from megasora.placement import Placement


def build_ema(weights: list[torch.Tensor], decay: float) -> ShardedEMA:
    return ShardedEMA(weights, {"ema": constant_decay(decay)})


def update(ema: ShardedEMA) -> None:
    """One update that is applied."""
    ema.update(Update(lr=0.0, number=ema.updates))
    ema.updates += 1


def walk(steps: int, size: int = 12, seed: int = 0) -> list[torch.Tensor]:
    """Weights after each step of a random walk."""
    g = torch.Generator().manual_seed(seed)
    return list(torch.randn(steps, size, generator=g).cumsum(0))


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.9999])
def test_ema_is_the_recurrence_with_a_decay_that_grows_to_its_limit(decay):
    weights = torch.zeros(12)
    ema = build_ema([weights], decay)
    expected = torch.zeros(12, dtype=torch.float64)
    for n, point in enumerate(walk(50)):
        weights.copy_(point)
        update(ema)
        d = min(decay, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * point.double()
        torch.testing.assert_close(ema.averages["ema"][0].double(), expected, rtol=1e-5, atol=1e-5)
    assert ema.updates == 50


def test_the_ema_of_constant_weights_is_these_weights_bit_for_bit():
    weights = torch.randn(100)
    ema = build_ema([weights], 0.999)
    for _ in range(30):
        update(ema)
    assert torch.equal(ema.averages["ema"][0], weights)


def test_initial_weights_lose_their_influence_early():
    """Weights jump from 0 to 1: after 50 updates the EMA is above 0.99; a constant decay of 0.9999 would give 0.005."""
    weights = torch.zeros(1)
    ema = build_ema([weights], 0.9999)
    weights.fill_(1.0)
    for _ in range(50):
        update(ema)
    assert float(ema.averages["ema"][0]) > 0.99


def test_ema_weights_change_only_in_update_and_weights_never():
    weights = torch.ones(3)
    ema = build_ema([weights], 0.9)
    weights.mul_(5.0)
    assert torch.equal(ema.averages["ema"][0], torch.ones(3))
    update(ema)
    assert torch.equal(weights, torch.full((3,), 5.0))
    torch.testing.assert_close(ema.averages["ema"][0], torch.full((3,), 0.1 * 1 + 0.9 * 5))


def test_the_ema_of_shards_is_the_shards_of_the_ema():
    full, shards = torch.zeros(12), [torch.zeros(5), torch.zeros(0), torch.zeros(7)]
    one, many = build_ema([full], 0.95), build_ema(shards, 0.95)
    for point in walk(20):
        full.copy_(point)
        for shard, values in zip(shards, point.split([5, 0, 7]), strict=True):
            shard.copy_(values)
        update(one)
        update(many)
    assert torch.equal(torch.cat(many.averages["ema"]), one.averages["ema"][0])


def test_a_resume_from_ema_weights_and_their_number_of_updates_is_bit_exact():
    points, weights = walk(20), torch.zeros(12)
    ema = build_ema([weights], 0.95)
    for n, point in enumerate(points):
        if n == 8:
            saved, updates = copy.deepcopy(ema.averages["ema"]), ema.updates
        weights.copy_(point)
        update(ema)
    resumed_weights = torch.zeros(12)
    resumed = build_ema([resumed_weights], 0.95)
    resumed.averages["ema"][0].copy_(saved[0])
    resumed.updates = updates
    for point in points[8:]:
        resumed_weights.copy_(point)
        update(resumed)
    assert torch.equal(resumed.averages["ema"][0], ema.averages["ema"][0])


def test_ema_weights_have_no_autograd_graph():
    weights = torch.ones(3, requires_grad=True)
    ema = build_ema([weights], 0.9)
    update(ema)
    assert not ema.averages["ema"][0].requires_grad


def test_weights_are_exchanged_for_their_ema_and_come_back_bit_for_bit():
    masters = [torch.randn(7), torch.tensor([1e-40, 1e30, -0.0])]
    ema = build_ema(masters, 0.9)
    for weights in masters:
        weights.add_(1)
    update(ema)
    before, averages = [w.clone() for w in masters], [w.clone() for w in ema.averages["ema"]]
    computed = []  # what the model would compute with
    with ema.in_place_of_weights(lambda: computed.append([w.clone() for w in masters])):
        assert all(torch.equal(w, a) for w, a in zip(masters, averages, strict=True))
    assert all(torch.equal(w, b) for w, b in zip(masters, before, strict=True))
    assert all(torch.equal(w, a) for w, a in zip(ema.averages["ema"], averages, strict=True))
    assert len(computed) == 2 and torch.equal(computed[0][0], averages[0]) and torch.equal(computed[1][0], before[0])
    assert not torch.equal(averages[0], before[0])


def test_after_an_error_no_rank_waits_for_the_others():
    ema, calls = build_ema([torch.zeros(2)], 0.9), []
    with pytest.raises(OSError, match="full"), ema.in_place_of_weights(lambda: calls.append(1)):
        raise OSError("full")
    assert len(calls) == 1


def test_fragments_are_extended_by_the_live_ema():
    weights = torch.zeros(3)
    ema = build_ema([weights], 0.0)
    (fragment,) = ema.extend([Fragment("w", torch.Size([3]), Placement(), 0, 1, 0, {"weights": weights})])
    weights.fill_(2)
    update(ema)
    assert torch.equal(fragment.values["ema"], torch.full((3,), 2.0)) and fragment.values["weights"] is weights


def test_more_averages_are_those_that_are_configured_under_names_that_say_which():
    optim = load(None, ["optim.ema_decay=0.5", "optim.ema_decays=[0.9,0.999]", "optim.ema_sigmas=[0.05,0.1]"]).optim
    weights = torch.zeros(12)
    ema = ShardedEMA([weights], ema_decays(optim))
    alone = {kind: ShardedEMA([weights], {kind: decay}) for kind, decay in ema_decays(optim).items()}
    for point in walk(30):
        weights.copy_(point)
        update(ema)
        for one in alone.values():
            update(one)
    assert list(ema.averages) == ["ema", "ema_0.9", "ema_0.999", "ema_sigma_0.05", "ema_sigma_0.1"]
    for kind, one in alone.items():
        assert torch.equal(ema.averages[kind][0], one.averages[kind][0])
    (fragment,) = ema.extend([Fragment("w", torch.Size([12]), Placement(), 0, 1, 0, {"weights": weights})])
    assert list(fragment.values) == ["weights", *ema.averages]
    with ema.in_place_of_weights(lambda: None, "ema_sigma_0.1"):
        assert torch.equal(weights, alone["ema_sigma_0.1"].averages["ema_sigma_0.1"][0])


def test_by_default_there_is_one_average():
    assert list(ema_decays(load(None, []).optim)) == ["ema"]


@pytest.mark.parametrize(("sigma", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_exponents_are_those_of_the_paper(sigma, gamma):
    assert gamma_of(sigma) == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize("sigma", [0.001, 0.01, 0.05, 0.2, 0.25, 12**-0.5])
def test_the_exponent_is_the_root_of_the_cubic(sigma):
    gamma, inverse = gamma_of(sigma), sigma**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    assert gamma == pytest.approx(max(roots.real), rel=1e-6, abs=1e-6)
    assert sigma_of(gamma) == pytest.approx(sigma, rel=1e-12)


@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.25])
def test_a_power_function_average_has_the_weights_and_the_width_of_its_definition(sigma):
    """Weights are unit vectors, one per update: their average is its own profile."""
    steps, gamma = 400, gamma_of(sigma)
    weights = torch.ones(steps)
    ema = ShardedEMA([weights], {"power": power_decay(sigma)})
    for point in torch.eye(steps):
        weights.copy_(point)
        update(ema)
    profile = ema.averages["power"][0].double()
    edges = (torch.arange(steps + 1, dtype=torch.float64) / steps) ** (gamma + 1)
    torch.testing.assert_close(profile, edges.diff(), rtol=1e-4, atol=1e-9)
    place = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    mean = (profile * place).sum()
    assert float((profile * (place - mean) ** 2).sum().sqrt()) == pytest.approx(sigma, rel=0.01)


def test_averages_that_a_checkpoint_has_not_start_from_its_weights_and_others_end():
    weights = [torch.full((3,), 5.0), torch.full((2,), 6.0)]
    ema = ShardedEMA(weights, {kind: constant_decay(0.9) for kind in ("ema", "ema_0.99")})
    for tensors in ema.averages.values():
        torch._foreach_zero_(tensors)
    said = ema.start_missing({"weights", "exp_avg", "exp_avg_sq", "ema", "ema_sigma_0.05"})
    assert said == [
        "the average ema_0.99 is not in the checkpoint and starts from its weights",
        "the average ema_sigma_0.05 of the checkpoint is not configured (optim.ema_*) and ends",
    ]
    assert all(torch.equal(a, w) for a, w in zip(ema.averages["ema_0.99"], weights, strict=True))
    assert all(not a.any() for a in ema.averages["ema"])  # it was loaded
    assert ema.averages["ema_0.99"][0].data_ptr() != weights[0].data_ptr()
    assert ema.start_missing({"weights", "ema", "ema_0.99"}) == []


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("optim.ema_decays=[0.9999]", "has optim.ema_decay=0.9999; leave it out"),
        ("optim.ema_decays=[0.9,0.9]", "a value occurs twice"),
        ("optim.ema_decays=[1]", "must be above 0 and below 1"),
        ("optim.ema_sigmas=[0.3]", "must be at least 0.001 and at most 0.25"),
        ("optim.ema_sigmas=[0.05,0.05]", "a value occurs twice"),
        ("optim.ema_sigmas=0.05", "must be a list"),
    ],
)
def test_settings_of_averages_that_make_no_sense_are_refused(setting, words):
    with pytest.raises(MegaSoraError, match=re.escape(words)):
        load(None, [setting])


# ---------------------------------------------------------------------- with the optimizer step


def partition(*sizes: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Flat weights with a padding of 3 elements, and views of it of these sizes."""
    flat = torch.randn(sum(sizes) + 3)
    return flat, list(flat[:-3].split(sizes))


def test_averages_of_views_of_one_tensor_are_views_of_one_tensor():
    flat, weights = partition(5, 0, 7)
    ema = ShardedEMA([*weights, torch.randn(4)], ema_decays(load(None, ["optim.ema_sigmas=[0.1]"]).optim))
    taken = ema.take(flat[2:], most=4)
    assert len(taken) == 2 and all(average.shape == (13,) for average, _ in taken)
    for (average, _), kind in zip(taken, ema.averages, strict=True):
        average.fill_(7.0)
        assert bool((ema.averages[kind][2] == 7).all()) and bool((ema.averages[kind][3] != 7).all())
        assert ema.averages[kind][0].tolist()[2:] == [7.0] * 3 and ema.averages[kind][0][0] == weights[0][0]


def test_what_was_taken_along_is_left_out_once():
    flat, weights = partition(5, 7)
    alone = torch.zeros(4)
    decays = {kind: constant_decay(decay) for kind, decay in (("ema", 0.9), ("ema_0.5", 0.5), ("ema_0.7", 0.7))}
    fused, apart = ShardedEMA([*weights, alone], decays), ShardedEMA([*weights, alone], decays)
    for step, point in enumerate(walk(12, 16)):
        flat[:12].copy_(point[:12])
        alone.copy_(point[12:])
        if step != 5:  # the averages of this step are not taken
            for average, weight in fused.take(flat, most=2):
                average.lerp_(flat, weight)
        update(fused)
        update(apart)
    for kind in decays:
        assert all(torch.equal(a, b) for a, b in zip(fused.averages[kind], apart.averages[kind], strict=True))
        assert not torch.equal(fused.averages[kind][0], weights[0])


def test_tensors_without_weights_have_no_averages():
    _, weights = partition(5, 7)
    assert build_ema(weights, 0.9).take(torch.zeros(12), most=4) == []


@pytest.mark.parametrize("flag", [True, False])
def test_averages_change_only_where_the_update_is_applied(flag):
    weights = [torch.tensor([-0.0, 1.0]), torch.randn(6)]
    ema, always = build_ema(weights, 0.9), build_ema(weights, 0.9)
    before = [a.clone() for a in ema.averages["ema"]]
    for w in weights:
        w.fill_(3.0 if flag else float("nan"))
    ema.update(Update(0.0, 0, torch.tensor(flag)))
    always.update(Update(0.0, 0))
    for average, old, other in zip(ema.averages["ema"], before, always.averages["ema"], strict=True):
        expected = other if flag else old
        assert torch.equal(average.view(torch.int32), expected.view(torch.int32))
    assert ema.updates == 0
