"""Deferred weight gradients: the part of a backward pass that the zero-bubble schedule `zbv` computes later.

The backward pass of a linear layer computes the gradient of its input, for which the previous stage waits, and that of
its weight, which is needed at the optimizer step only. Life cycle of a weight gradient:

    1. `apply_deferred_weight_grads(stage, store)`, once: every linear of the stage gets the store (kernels/linear.py),
       and so does every `DefersWeightGrad` (tensor.py).
    2. Backward pass of a microbatch: the layer returns the gradient of its input and None for its weight, and calls
       `store.put(weight, compute)`. `compute` references the activations that it needs.
    3. Directly after it, `PipelineStage` calls its `dw_builder`, here `store.pop`. That returns a function for all
       gradients that were put since the last call: those of this microbatch in this stage.
    4. Where the schedule has a gap, it calls `backward_weight_one_chunk`, and that the function from `pop`: every
       gradient is computed and added to the weight's `.grad`, and its activations are freed.
    5. `Pipeline` calls `accumulate_grads` after 3 and after 4, which may move every `.grad` to a sum of its own.

torch's own way to split a backward pass goes through the graph twice. It fails where modulation makes a weight act on
several points of the residual stream, and it recomputes a checkpointed block once for every group of weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from megasora.kernels.linear import PLAIN, Linear, linear


class WeightGradStore:
    """Weight gradients that are not computed yet."""

    def __init__(self):
        self.deferred: list[tuple[nn.Parameter, Callable[[], Tensor]]] = []

    def put(self, parameter: nn.Parameter, compute: Callable[[], Tensor]) -> None:
        """Defers one gradient. `compute` returns it in the parameter's shape, and is called under torch.no_grad."""
        self.deferred.append((parameter, compute))

    def pop(self) -> Callable[[], None]:
        """Empties the store; returns a function that computes its gradients and adds them to the `.grad` fields."""
        deferred, self.deferred = self.deferred, []

        @torch.no_grad()
        def accumulate() -> None:
            while deferred:  # each releases its activations
                parameter, compute = deferred.pop(0)
                parameter.grad = compute() if parameter.grad is None else parameter.grad.add_(compute())

        return accumulate


class DefersWeightGrad(nn.Module):
    """Base class of modules that defer a weight gradient: their backward pass calls `wgrad_store.put` instead of
    computing it, unless `wgrad_store` is None. `products` computes their products."""

    def __init__(self):
        super().__init__()
        self.wgrad_store: WeightGradStore | None = None
        self.products = PLAIN


def apply_deferred_weight_grads(stage: nn.Module, store: WeightGradStore) -> None:
    """Makes every nn.Linear of a stage defer the gradients of its weight and bias to `store`, and every
    `DefersWeightGrad` those that it can defer. All other gradients are computed at once."""
    for module in stage.modules():
        if type(module) is nn.Linear:
            module.forward = partial(linear, module=module, products=PLAIN, store=store)
        elif isinstance(module, (Linear, DefersWeightGrad)):
            module.wgrad_store = store
