"""Pipeline parallel: the blocks are cut into stages, and packs pass through them one behind the other.

    pack m: stage 0 --hidden [L, D]--> stage 1 --> ... --> last stage --> prediction [L, P] --> loss
            stage 0 <--gradient------- stage 1 <-- ... <-- last stage <-----------------------'

Every rank of the axis has the packs, so nothing but hidden tokens crosses: schedules are given the packs' numbers.
Which pack a rank works on when is a schedule of torch.distributed.pipelining:

    1f1b         one stage a rank; one forward, one backward (arXiv 2104.04473, fig. 4)
    interleaved  several stages a rank, stage s on rank s mod p: shorter bubbles, more messages (fig. 4, below)
    zbv          two stages a rank, down and up again like a V; the backward pass sends the gradient of its input first
                 and computes those of its weights where it would wait otherwise (arXiv 2401.10241, section 6)

torch splits a backward pass by going through the graph twice. It cannot where modulation makes a weight act on several
places of the residual stream, and it recomputes a checkpointed block once for every group of weights. So zbv here goes
through the graph once, and linear layers put their weight's gradient off (`WeightGradients`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B, ScheduleZBVZeroBubble

from megasora.errors import MegaSoraError
from megasora.parallel.mesh import Axis

Loss = Callable[[Tensor, int], Tensor]
Fold = Callable[[nn.Module], None]
ON_THEIR_WAY = 2  # messages of a stage in one direction that are not waited for


def num_stages(schedule: str, pipeline: int, stages_per_rank: int) -> int:
    """Stages of the whole pipeline. `stages_per_rank` counts for interleaved only: 1f1b has one, zbv two."""
    return pipeline * {"1f1b": 1, "interleaved": stages_per_rank, "zbv": 2}[schedule]


def rank_of_stage(schedule: str, pipeline: int, stage: int) -> int:
    """The rank of the pipeline axis that holds a stage: a loop, or a V for zbv."""
    there_and_back = schedule == "zbv" and stage >= pipeline
    return 2 * pipeline - 1 - stage if there_and_back else stage % pipeline


def stage_numbers(schedule: str, pipeline: int, stages_per_rank: int, rank: int) -> list[int]:
    """The stages that a rank of the pipeline axis holds, rising."""
    stages = range(num_stages(schedule, pipeline, stages_per_rank))
    return [stage for stage in stages if rank_of_stage(schedule, pipeline, stage) == rank]


def check_microbatches(schedule: str, pipeline: int, packs_per_step: int, data: int) -> None:
    """Whether the schedule can run the packs that a step gives one pipeline: packs_per_step over `data` pipelines.

    1f1b needs at least `pipeline`; interleaved works in rounds of at least `pipeline`, all of one size; zbv takes any
    number, and has no bubbles from 2 pipeline - 1 on. MegaSoraError names the nearest numbers that fit.
    """

    def fits(packs: int) -> bool:
        if schedule == "interleaved":
            return packs >= 1 and packs % max(1, packs // pipeline) == 0
        return packs >= (pipeline if schedule == "1f1b" else 1)

    packs = packs_per_step // data
    if not fits(packs):
        below = next((n for n in range(packs - 1, 0, -1) if fits(n)), None)
        above = next(n for n in range(packs + 1, packs + 2 * pipeline + 1) if fits(n))
        remedy = " or ".join(str(n * data) for n in (below, above) if n is not None)
        rule = f"at least {pipeline}" if schedule == "1f1b" else f"equal rounds of {pipeline} or more"
        raise MegaSoraError(
            f"data.packs_per_step={packs_per_step} over {data} pipelines is {packs} packs each; parallel.schedule="
            f"{schedule} with parallel.pipeline={pipeline} needs {rule}; use data.packs_per_step={remedy}"
        )


class Pipeline:
    """One rank's stages, under training and prediction. All ranks of the axis must make the same calls.

    axis    the pipeline axis, split
    stages  {stage number: module}, the numbers of `stage_numbers`. A module is called as module(pack, hidden): hidden
            is None in the first stage, [L, D] elsewhere, and not to be changed in place. It returns [L, D], in the
            last stage [L, P].
    device  where the stages compute
    fold    called with a stage's module when gradients of one pack are in the `grad` of its parameters: once a pack,
            for zbv twice, after the backward pass and after the weights of linear layers. It may add them to a sum of
            its own and clear them; then no other stage has any when it is called.
    hidden  a tensor, on the meta device for instance, of the shape and dtype that crosses; the same for all packs
    """

    def __init__(
        self,
        axis: Axis,
        stages: dict[int, nn.Module],
        num_stages: int,
        schedule: str,
        device: torch.device,
        fold: Fold,
        hidden: Tensor,
    ):
        self.axis, self.modules, self.kind, self.device, self.hidden = axis, stages, schedule, device, hidden
        self.owners = [rank_of_stage(schedule, axis.size, stage) for stage in range(num_stages)]
        self.packs: list[Any] = []  # of the step under way
        self.loss: Loss | None = None
        self.schedule, self.num_packs = None, 0

        later = WeightGradients() if schedule == "zbv" else None
        example = torch.empty(hidden.shape, dtype=hidden.dtype, device="meta", requires_grad=True)
        self.stages = []
        for number, module in sorted(stages.items()):
            if later is not None:
                apply_later(module, later)
            stage = Stage(
                OnPacks(module, self.packs), number, num_stages, device, group=axis.group,
                # Given both, torch does not find shapes out by running the stages on empty tensors.
                input_args=() if number == 0 else example, output_args=example,
                dw_builder=None if later is None else later.take,
            )  # fmt: skip
            stage.fold, stage.sends_itself = partial(fold, module), schedule != "1f1b"
            self.stages.append(stage)

    def train(self, packs: list[Any], loss: Loss) -> None:
        """Forward and backward of all packs. Adds to each parameter's `grad` the sum over packs, unscaled; where `fold`
        clears them, it has the sum.

        `loss(prediction [L, P], number of the pack)` is called once a pack, on the last stage's rank only, and returns
        a scalar. What `check_microbatches` says of len(packs) must hold.
        """
        if len(packs) != self.num_packs:
            self.schedule, self.num_packs = self.build_schedule(len(packs)), len(packs)
        numbers = torch.arange(len(packs))
        self.packs[:], self.loss = packs, loss
        try:
            self.schedule.step(number=numbers, target=numbers, return_outputs=False)
            for stage in self.stages:
                wait_but(0, stage.sent_tokens)
                wait_but(0, stage.sent_gradients)
        except RuntimeError as error:  # torch wraps what a stage raises
            if isinstance(error.__cause__, MegaSoraError):
                raise error.__cause__ from None
            raise
        finally:
            self.packs.clear()
            self.loss = None

    def build_schedule(self, num_packs: int) -> Schedule1F1B | ScheduleInterleaved1F1B | ScheduleZBVZeroBubble:
        def loss_of(prediction: Tensor, number: Tensor) -> Tensor:
            return self.loss(prediction, int(number)).clone()  # no view, so that Stage can cut it off its graph

        if self.kind == "1f1b":
            return Schedule1F1B(self.stages[0], num_packs, loss_fn=loss_of, scale_grads=False)
        kind = ScheduleInterleaved1F1B if self.kind == "interleaved" else ScheduleZBVZeroBubble
        return kind(self.stages, num_packs, loss_fn=loss_of, scale_grads=False)

    @torch.no_grad()
    def predict(self, packs: list[Any]) -> list[Tensor] | None:
        """Predictions [L, P] of any number of packs, on the rank with the last stage; None elsewhere.

        torch's own forward-only run needs as many packs as stages, and fails for zbv. All ranks walk through one order
        of (stage, pack), and both ends of a message post it where its sender's turn is: no two wait for each other.
        """
        me, group, last = self.axis.rank, self.axis.group, len(self.owners) - 1
        arriving: dict[tuple[int, int], tuple[Tensor, dist.Work | None]] = {}
        predictions, sends = [], []
        for stage, owner in enumerate(self.owners):
            next_owner = None if stage == last else self.owners[stage + 1]
            for number, pack in enumerate(packs):
                if owner == me:
                    hidden, work = arriving.pop((stage, number), (None, None))
                    if work is not None:
                        work.wait()
                    out = self.modules[stage](pack, hidden)
                    if stage == last:
                        predictions.append(out)
                    elif next_owner == me:
                        arriving[stage + 1, number] = out, None
                    else:
                        sends.append(dist.isend(out.contiguous(), group=group, group_dst=next_owner))
                elif next_owner == me:
                    buffer = torch.empty(self.hidden.shape, dtype=self.hidden.dtype, device=self.device)
                    arriving[stage + 1, number] = buffer, dist.irecv(buffer, group=group, group_src=owner)
        wait_but(0, sends)
        return predictions if self.owners[last] == me else None


class OnPacks(nn.Module):
    """A stage as torch calls it: with the hidden tokens that arrived, if any, and the number of the pack."""

    def __init__(self, stage: nn.Module, packs: list[Any]):
        super().__init__()
        self.stage, self.packs = stage, packs

    def forward(self, hidden: Tensor | None = None, *, number: Tensor) -> Tensor:
        return self.stage(self.packs[int(number)], hidden).contiguous()  # messages must be


class Stage(PipelineStage):
    """A stage that folds its gradients after each pack, and holds memory for the packs on their way, not for a step's.

    torch allocates buffers [L, D] for each pack's tokens and gradient, for ever, and keeps to the end of the step what
    was sent (but for 1f1b) and all losses with their graphs.
    """

    fold: Callable[[], None]
    sends_itself: bool

    def _post_metadata_inference_cleanup(self) -> None:
        super()._post_metadata_inference_cleanup()
        for number in self.args_recv_info:
            drop_buffers(self.args_recv_info[number])
            drop_buffers(self.grad_recv_info[number])

    def clear_runtime_states(self) -> None:  # before each step
        super().clear_runtime_states()
        self.sent_tokens: list[dist.Work] = []
        self.sent_gradients: list[dist.Work] = []

    def get_fwd_send_ops(self, number: int) -> list[dist.P2POp]:
        return self.send(super().get_fwd_send_ops(number), self.sent_tokens)

    def get_bwd_send_ops(self, number: int) -> list[dist.P2POp]:
        return self.send(super().get_bwd_send_ops(number), self.sent_gradients)

    def send(self, ops: list[dist.P2POp], sent: list[dist.Work]) -> list[dist.P2POp]:
        """Sends, and waits for what was sent a while ago; what is left to torch is nothing.

        In a schedule the two ends of a message come next to each other, so that waiting for one that is further up in
        it waits for nothing that comes later.
        """
        if not self.sends_itself:
            return ops
        sent += [dist.isend(op.tensor, group=op.group, group_dst=op.group_peer) for op in ops]
        wait_but(ON_THEIR_WAY, sent)
        return []

    def get_fwd_recv_ops(self, number: int) -> list[dist.P2POp]:
        make_buffers(self.args_recv_info[number], self.device)
        return super().get_fwd_recv_ops(number)

    def get_bwd_recv_ops(self, number: int) -> list[dist.P2POp]:
        make_buffers(self.grad_recv_info[number], self.device)
        return super().get_bwd_recv_ops(number)

    def forward_one_chunk(self, number: int, *args: Any, **kwargs: Any) -> Any:
        out = super().forward_one_chunk(number, *args, **kwargs)
        drop_buffers(self.args_recv_info[number])  # the graph has the tokens now
        return out

    def backward_one_chunk(self, number: int, loss: Tensor | None = None, **kwargs: Any) -> None:
        super().backward_one_chunk(number, loss=loss, **kwargs)
        drop_buffers(self.grad_recv_info[number])
        if loss is not None:
            loss.detach_()
        self.fold()

    def backward_weight_one_chunk(self, number: int, **kwargs: Any) -> None:
        super().backward_weight_one_chunk(number, **kwargs)
        self.fold()


def wait_but(newest: int, works: list[dist.Work]) -> None:
    """Waits for all but the newest, and forgets them."""
    while len(works) > newest:
        works.pop(0).wait()


def make_buffers(infos: tuple, device: torch.device) -> None:
    for info in infos:
        if not info.is_root_arg:
            info.buffer = torch.empty(info.tensor_meta.shape, dtype=info.tensor_meta.dtype, device=device)


def drop_buffers(infos: tuple) -> None:
    for info in infos:
        info.buffer = None


class WeightGradients:
    """Gradients of weights that a backward pass left to be computed. It is called with each; `take` hands all over."""

    def __init__(self):
        self.waiting: list[tuple[nn.Parameter, Callable[[], Tensor]]] = []

    def __call__(self, weight: nn.Parameter, compute: Callable[[], Tensor]) -> None:
        self.waiting.append((weight, compute))

    def take(self) -> Callable[[], None]:
        """What adds the gradients put off since the last take to their weights' `grad`."""
        taken, self.waiting = self.waiting, []

        @torch.no_grad()
        def run() -> None:
            while taken:  # each releases its activations
                weight, compute = taken.pop(0)
                weight.grad = compute() if weight.grad is None else weight.grad.add_(compute())

        return run


def apply_later(stage: nn.Module, later: WeightGradients) -> None:
    """Makes a stage's linear layers put the gradients of weight and bias off.

    So do other modules with an attribute `later`, which their backward pass calls, if it is not None, as
    later(weight, compute) in place of returning compute(). All other gradients are computed at once.
    """
    for module in stage.modules():
        if type(module) is nn.Linear:
            module.forward = partial(linear_later, module, later)
        elif hasattr(module, "later"):
            module.later = later


def linear_later(linear: nn.Linear, later: WeightGradients, x: Tensor) -> Tensor:
    return LinearLater.apply(x, linear.weight, linear.bias, linear, later)


class LinearLater(Function):
    """x W^T + b; the gradient of x at once, those of W and b later."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, linear: nn.Linear, later: WeightGradients
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.linear, ctx.later = linear, later  # the parameters themselves, to which the gradients go
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_2d, x_2d = grad.reshape(-1, grad.shape[-1]), x.detach().reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[1]:
            ctx.later(ctx.linear.weight, lambda: grad_2d.t() @ x_2d)
        if ctx.needs_input_grad[2]:
            ctx.later(ctx.linear.bias, lambda: grad_2d.sum(0))
        return grad @ weight if ctx.needs_input_grad[0] else None, None, None, None, None
