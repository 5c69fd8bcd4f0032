"""Validation of a VideoDiT: the flow-matching loss by timestep on held-out clips.

Each clip gets the same noise at every validation, so only the weights change the figures.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megasora.batch import VideoBatch
from megasora.config import Config
from megasora.data.mixture import Mixture
from megasora.data.pack import make_batch
from megasora.data.packing import pack_clips
from megasora.device_transfer import DeviceTransfer
from megasora.diffusion.flow import FlowMatching, non_finite_clips, velocity_error
from megasora.parallel.mesh import Axis
from megasora.parallel.world import World
from megasora.parallel.zero import ZeroEngine


def validation_loss(
    clips: Mixture,
    count: int,
    config: Config,
    objective: FlowMatching,
    engine: ZeroEngine,
    encode_caption: Callable[[str], Tensor] | None,
    share: Callable[[VideoBatch], VideoBatch],
    transfer: DeviceTransfer,
    data_axis: Axis,
    world: World,
) -> dict[str, Any] | None:
    """Mean squared velocity error of the first `count` clips, in `validation.bins` bins of the timestep in [0, 1].

    Call on all ranks; packs are distributed over the data axis. Returns {"loss": mean of the bins, "bins": [{"low",
    "high", "loss"}]} on the main process, None on the others. A loss that is not finite is NaN or infinite, and
    "non_finite_clips" has the sample ids that it comes from.
    """
    bins, tokens_per_pack = config.validation.bins, config.data.tokens_per_pack
    packs = pack_clips(clips.tokens_I[:count], tokens_per_pack)
    sums, non_finite = torch.zeros(bins, 2, dtype=torch.float64), set()
    # Every rank runs the model equally often, since it may hold some stages only: the last packs are then repeated.
    for first in range(0, len(packs), data_axis.size):
        index = first + data_axis.rank
        records = [clips.read(int(i), encode_caption) for i in packs[min(index, len(packs) - 1)]]
        batch = share(make_batch(records, tokens_per_pack))
        drawn = [objective.draw_at(batch, (i + 0.5) / bins, stream=i) for i in range(bins)]
        plan = engine.plan_pack(drawn[0][0])  # all have the same rows
        packed = transfer.pack([(dataclasses.replace(clean, plan=plan), noise) for clean, noise in drawn])
        drawn = transfer(packed).wait()
        inputs = [noise.add(clean) for clean, noise in drawn]
        predictions = engine.predict([noised for noised, _, _ in inputs])
        if predictions is None or index >= len(packs):
            continue
        for i, prediction in enumerate(predictions):
            loss = velocity_error(prediction, *inputs[i][1:])
            error_sum = float(loss.squared_error_sum)
            sums[i] += torch.tensor([error_sum, float(loss.tokens)], dtype=torch.float64)
            if not math.isfinite(error_sum):
                non_finite |= set(non_finite_clips(batch, loss.squared_error_L))
    sums = world.all_reduce_sum(sums).cpu()
    by_rank = None if bool(sums.isfinite().all()) else world.gather_objects(non_finite)
    if not world.is_main:
        return None
    losses = (sums[:, 0] / sums[:, 1]).tolist()
    return {
        "loss": sum(losses) / bins,
        "bins": [{"low": i / bins, "high": (i + 1) / bins, "loss": loss} for i, loss in enumerate(losses)],
        **({"non_finite_clips": sorted(set().union(*by_rank))} if by_rank else {}),
    }
