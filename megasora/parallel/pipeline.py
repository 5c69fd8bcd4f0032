"""Pipeline parallelism: the blocks are divided into stages, and the packs of a step pass through them as microbatches.

    pack m: stage 0 --hidden [L, D]--> stage 1 --> ... --> last stage --> prediction [L, P] --> loss
            stage 0 <--gradient------- stage 1 <-- ... <-- last stage <-----------------------'

All ranks of the axis have all packs, so only hidden states and their gradients are sent; schedules are given microbatch
indices. The order of the microbatches on each rank is a schedule of torch.distributed.pipelining:

    1f1b         one stage per rank; one forward, one backward (arXiv 2104.04473, fig. 4)
    interleaved  several stages per rank, stage s on rank s mod p: smaller bubbles, more messages (fig. 4, below)
    zbv          two stages per rank, placed like a V: down the ranks and up again; the backward pass first sends the
                 gradient of its input and computes weight gradients in what would be a bubble (arXiv 2401.10241,
                 section 6; weight_grad_store.py)

Tested with torch 2.11 and 2.13: torch's private classes for received tensors differ between them, so buffers are
allocated here, from the one shape that is sent.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B, ScheduleZBVZeroBubble

from megasora.errors import MegaSoraError
from megasora.parallel.mesh import Axis
from megasora.parallel.weight_grad_store import WeightGradStore, apply_deferred_weight_grads

Loss = Callable[[Tensor, int], Tensor]  # (prediction [L, P], microbatch index) -> scalar
AccumulateGrads = Callable[[nn.Module], None]
MAX_PENDING_SENDS = 2  # of a stage, in each direction
NO_BUFFER = torch.empty(0, device="meta")  # torch 2.11 needs a tensor where no buffer is allocated


def num_stages(schedule: str, pipeline: int, stages_per_rank: int) -> int:
    """Number of stages of the whole pipeline. `stages_per_rank` is used by interleaved only: 1f1b has one, zbv two."""
    return pipeline * {"1f1b": 1, "interleaved": stages_per_rank, "zbv": 2}[schedule]


def rank_of_stage(schedule: str, pipeline: int, stage: int) -> int:
    """The rank of the pipeline axis that holds a stage: ranks are visited in a loop, by zbv in a V."""
    is_second_half_of_v = schedule == "zbv" and stage >= pipeline
    return 2 * pipeline - 1 - stage if is_second_half_of_v else stage % pipeline


def stage_numbers(schedule: str, pipeline: int, stages_per_rank: int, rank: int) -> list[int]:
    """The stages that a rank of the pipeline axis holds, in ascending order."""
    stages = range(num_stages(schedule, pipeline, stages_per_rank))
    return [stage for stage in stages if rank_of_stage(schedule, pipeline, stage) == rank]


def check_microbatches(schedule: str, pipeline: int, packs_per_step: int, data: int) -> None:
    """Checks that the schedule can run the packs that each of `data` pipelines gets in a step.

    1f1b needs at least `pipeline`; interleaved works in rounds of at least `pipeline`, all of one size; zbv takes any
    number, and has no bubbles from 2 pipeline - 1 on. Raises MegaSoraError with the nearest numbers that are valid.
    """

    def is_valid(packs: int) -> bool:
        if schedule == "interleaved":
            return packs >= 1 and packs % max(1, packs // pipeline) == 0
        return packs >= (pipeline if schedule == "1f1b" else 1)

    packs = packs_per_step // data
    if not is_valid(packs):
        below = next((n for n in range(packs - 1, 0, -1) if is_valid(n)), None)
        above = next(n for n in range(packs + 1, packs + 2 * pipeline + 1) if is_valid(n))
        remedy = " or ".join(str(n * data) for n in (below, above) if n is not None)
        rule = f"at least {pipeline}" if schedule == "1f1b" else f"equal rounds of {pipeline} or more"
        raise MegaSoraError(
            f"data.packs_per_step={packs_per_step} over {data} pipelines is {packs} packs each; parallel.schedule="
            f"{schedule} with parallel.pipeline={pipeline} needs {rule}; use data.packs_per_step={remedy}"
        )


class Pipeline:
    """The stages of one rank, for training and for prediction. All ranks of the axis must make the same calls.

    axis              the pipeline axis, split
    stages            {stage number: module}, for the numbers of `stage_numbers`. A module is called as
                      module(pack, hidden): hidden is None in the first stage, else [L, D], and must not be changed in
                      place. It returns [L, D], in the last stage [L, P].
    num_stages        of the whole pipeline
    schedule          1f1b, interleaved or zbv
    device            the device of the stages
    accumulate_grads  called with a stage's module when the gradients of one microbatch are in the `.grad` of its
                      parameters: once per microbatch, for zbv twice, after the backward pass and after the deferred
                      weight gradients. It may add them to its own sums and set `.grad` to None; then no other stage
                      has gradients when it is called.
    hidden            a tensor with the shape and dtype of the hidden states in training, the same for all packs; may be
                      on `meta`
    hidden_length     how many hidden states this rank has of a pack: the first dim of `hidden`, for a pack of training.
                      Packs of `forward_only` may have any length
    """

    def __init__(
        self,
        axis: Axis,
        stages: dict[int, nn.Module],
        num_stages: int,
        schedule: str,
        device: torch.device,
        accumulate_grads: AccumulateGrads,
        hidden: Tensor,
        hidden_length: Callable[[Any], int],
    ):
        self.hidden_length = hidden_length
        self.axis, self.modules, self.schedule_name, self.device = axis, stages, schedule, device
        self.hidden = torch.empty(hidden.shape, dtype=hidden.dtype, device="meta", requires_grad=True)
        self.stage_ranks = [rank_of_stage(schedule, axis.size, stage) for stage in range(num_stages)]
        self.packs: list[Any] = []  # of the current step
        self.loss: Loss | None = None
        self.schedule, self.num_packs = None, 0

        store = WeightGradStore() if schedule == "zbv" else None
        self.stages = []
        for number, module in sorted(stages.items()):
            if store is not None:
                apply_deferred_weight_grads(module, store)
            stage = Stage(
                PackStageModule(module, self.packs), number, num_stages, device, group=axis.group,
                # With both, torch does not infer shapes by running the stages on empty tensors.
                input_args=() if number == 0 else self.hidden, output_args=self.hidden,
                dw_builder=None if store is None else store.pop,
            )  # fmt: skip
            stage.hidden, stage.eager_send = self.hidden, schedule != "1f1b"
            stage.accumulate_grads = partial(accumulate_grads, module)
            self.stages.append(stage)

    @property
    def has_last_stage(self) -> bool:
        """Whether this rank has the last stage: predictions and losses."""
        return self.stage_ranks[-1] == self.axis.rank

    def forward_backward(self, packs: list[Any], loss: Loss) -> None:
        """Forward and backward pass of all packs: adds to each parameter's `.grad` the unscaled sum over packs, unless
        `accumulate_grads` moves it to its own sums.

        `loss(prediction [L, P], microbatch index)` is called once per pack, on the rank of the last stage only, and
        returns a scalar. len(packs) must pass `check_microbatches`.
        """
        if len(packs) != self.num_packs:
            self.schedule, self.num_packs = self.build_schedule(len(packs)), len(packs)
        microbatches = torch.arange(len(packs))
        self.packs[:], self.loss = packs, loss
        try:
            self.schedule.step(microbatch=microbatches, target=microbatches, return_outputs=False)
            for stage in self.stages:
                wait_all_but(0, stage.token_sends)
                wait_all_but(0, stage.grad_sends)
        except RuntimeError as error:  # torch wraps what a stage raises
            if isinstance(error.__cause__, MegaSoraError):
                raise error.__cause__ from None
            raise
        finally:
            self.packs.clear()
            self.loss = None

    def build_schedule(self, num_packs: int) -> Schedule1F1B | ScheduleInterleaved1F1B | ScheduleZBVZeroBubble:
        def loss_of(prediction: Tensor, microbatch: Tensor) -> Tensor:
            return self.loss(prediction, int(microbatch)).clone()  # not a view, so that Stage can detach it in place

        if self.schedule_name == "1f1b":
            return Schedule1F1B(self.stages[0], num_packs, loss_fn=loss_of, scale_grads=False)
        schedule = ScheduleInterleaved1F1B if self.schedule_name == "interleaved" else ScheduleZBVZeroBubble
        return schedule(self.stages, num_packs, loss_fn=loss_of, scale_grads=False)

    @torch.no_grad()
    def forward_only(self, packs: list[Any]) -> list[Tensor] | None:
        """Predictions [L, P] of packs of any number and length, on the rank with the last stage; None on the others.

        torch's own forward-only run needs as many packs as stages, and fails for zbv. Here all ranks go through the
        same order of (stage, microbatch), and sender and receiver both post a message at the sender's position in it,
        so that no two ranks wait for each other.
        """
        own_rank, group, last = self.axis.rank, self.axis.group, len(self.stage_ranks) - 1
        inputs: dict[tuple[int, int], tuple[Tensor, dist.Work | None]] = {}  # by (stage, microbatch)
        predictions, sends = [], []
        for stage, rank in enumerate(self.stage_ranks):
            next_rank = None if stage == last else self.stage_ranks[stage + 1]
            for microbatch, pack in enumerate(packs):
                if rank == own_rank:
                    hidden, receive = inputs.pop((stage, microbatch), (None, None))
                    if receive is not None:
                        receive.wait()
                    out = self.modules[stage](pack, hidden)
                    if stage == last:
                        predictions.append(out)
                    elif next_rank == own_rank:
                        inputs[stage + 1, microbatch] = out, None
                    else:
                        sends.append(dist.isend(out.contiguous(), group=group, group_dst=next_rank))
                elif next_rank == own_rank:
                    shape = self.hidden_length(pack), *self.hidden.shape[1:]
                    buffer = torch.empty(shape, dtype=self.hidden.dtype, device=self.device)
                    inputs[stage + 1, microbatch] = buffer, dist.irecv(buffer, group=group, group_src=rank)
        wait_all_but(0, sends)
        return predictions if self.has_last_stage else None


class PackStageModule(nn.Module):
    """A stage as torch calls it: with the received hidden states, if any, and the index of the microbatch."""

    def __init__(self, stage: nn.Module, packs: list[Any]):
        super().__init__()
        self.stage, self.packs = stage, packs

    def forward(self, hidden: Tensor | None = None, *, microbatch: Tensor) -> Tensor:
        return self.stage(self.packs[int(microbatch)], hidden).contiguous()  # only contiguous tensors can be sent


class Stage(PipelineStage):
    """A PipelineStage that accumulates gradients after each microbatch, in memory that does not grow with their number.

    torch allocates buffers [L, D] for the tokens and the gradient of every microbatch permanently, and keeps what was
    sent (except in 1f1b) and all losses with their graphs until the end of the step. Here a buffer exists from its
    receive to its use, at most MAX_PENDING_SENDS sends are pending, and a loss is detached after its backward pass.
    """

    hidden: Tensor  # shape and dtype of what is received, on `meta`
    eager_send: bool  # False: the schedule issues the sends, in one batch with the receives
    accumulate_grads: Callable[[], None]

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_forward_infra(*args, **kwargs)
        for infos in self.args_recv_info.values():
            free_recv_buffers(infos)
        return prepared

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_backward_infra(*args, **kwargs)
        for infos in self.grad_recv_info.values():
            free_recv_buffers(infos)
        return prepared

    def _validate_fwd_outputs(self, outputs: tuple[Tensor, ...]) -> None:
        """Does nothing: torch 2.11 would compare the prediction [L, P] of the last stage with [L, D]."""

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        """The messages that connect neighbours, without those of torch 2.11 to this rank itself, which gloo rejects."""
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]

    def clear_runtime_states(self) -> None:  # before each step
        super().clear_runtime_states()
        self.token_sends: list[dist.Work] = []
        self.grad_sends: list[dist.Work] = []

    def get_fwd_send_ops(self, microbatch: int) -> list[dist.P2POp]:
        return self.send(super().get_fwd_send_ops(microbatch), self.token_sends)

    def get_bwd_send_ops(self, microbatch: int) -> list[dist.P2POp]:
        return self.send(super().get_bwd_send_ops(microbatch), self.grad_sends)

    def send(self, ops: list[dist.P2POp], pending: list[dist.Work]) -> list[dist.P2POp]:
        """Issues the sends and waits until at most MAX_PENDING_SENDS are pending. Returns the ops left to torch: none,
        unless `eager_send` is False.

        A schedule places the send and the receive of a message next to each other. Waiting for an earlier message
        therefore never waits for a later one.
        """
        if not self.eager_send:
            return ops
        pending += [dist.isend(op.tensor, group=op.group, group_dst=op.group_peer) for op in ops]
        wait_all_but(MAX_PENDING_SENDS, pending)
        return []

    def get_fwd_recv_ops(self, microbatch: int) -> list[dist.P2POp]:
        self.allocate_recv_buffers(self.args_recv_info[microbatch])
        return super().get_fwd_recv_ops(microbatch)

    def get_bwd_recv_ops(self, microbatch: int) -> list[dist.P2POp]:
        self.allocate_recv_buffers(self.grad_recv_info[microbatch])
        return super().get_bwd_recv_ops(microbatch)

    def allocate_recv_buffers(self, infos: tuple) -> None:
        """`infos`: torch's descriptions of the tensors to receive; empty for tokens of the first and gradients of the
        last stage."""
        for info in infos:
            info.buffer = torch.empty_like(self.hidden, device=self.device)

    def forward_one_chunk(self, microbatch: int, *args: Any, **kwargs: Any) -> Any:
        for info in self.args_recv_info[microbatch]:
            info.buffer.requires_grad_()
        out = super().forward_one_chunk(microbatch, *args, **kwargs)
        free_recv_buffers(self.args_recv_info[microbatch])  # the graph holds the tokens now
        return out

    def backward_one_chunk(self, microbatch: int, loss: Tensor | None = None, **kwargs: Any) -> None:
        super().backward_one_chunk(microbatch, loss=loss, **kwargs)
        free_recv_buffers(self.grad_recv_info[microbatch])
        if loss is not None:
            loss.detach_()
        self.accumulate_grads()

    def backward_weight_one_chunk(self, microbatch: int, **kwargs: Any) -> None:
        super().backward_weight_one_chunk(microbatch, **kwargs)
        self.accumulate_grads()


def free_recv_buffers(infos: tuple) -> None:
    for info in infos:
        info.buffer = NO_BUFFER


def wait_all_but(newest: int, works: list[dist.Work]) -> None:
    """Waits for all but the newest works, and removes those from the list."""
    while len(works) > newest:
        works.pop(0).wait()
