"""Muon's direction of a step [Keller Jordan, https://kellerjordan.github.io/posts/muon], with the scale of Moonlight
[arXiv 2502.16982]: matrices of which all singular values are about 1, so that a step changes all directions alike.

    momentum of the gradients [A, B]  --newton_schulz-->  about U V^T, where U S V^T is its singular value decomposition
                                      --times 0.2 sqrt(max(A, B))-->  elements about as large as those of AdamW's steps

A convolution [O, I, ...] is a matrix [O, I * ...]. A fused projection is several matrices, one below the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of x + x^3 + x^5, chosen for a steep slope at 0
ITERATIONS = 5
SCALE = 0.2  # root mean square of an element of AdamW's steps / lr
MIN_NORM = 1e-15  # of a matrix; one of zeros stays zero
MAX_BATCH_ELEMENTS = {"cpu": 1 << 16, "cuda": 1 << 24}  # of matrices computed together: for the cache, for the memory


def newton_schulz(x_BMN: Tensor) -> Tensor:
    """[B, M, N], M <= N -> [B, M, N]: matrices with the singular vectors of x, their singular values about 0.7 to 1.2;
    those below about 1e-3 of the norm stay smaller. Computed in the dtype of x."""
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram_BMM = torch.bmm(x_BMN, x_BMN.mT)
        factor_BMM = torch.baddbmm(gram_BMM, gram_BMM, gram_BMM, beta=b, alpha=c)
        x_BMN = torch.baddbmm(x_BMN, factor_BMM, x_BMN, beta=a)
    return x_BMN


@torch.no_grad()
def orthogonalize(updates: Sequence[Tensor], num_matrices: Sequence[int]) -> None:
    """Replaces each update [n A, ...] of n = `num_matrices` matrices [A, B] by its step / learning rate, in place.

    Contiguous tensors of one device, at least fp32. Matrices of one shape, or of its transpose, are computed together,
    on a GPU in bf16.
    """
    batches: dict[tuple[int, int], list[Tensor]] = {}  # by (rows, columns): views [n, M, N] with M <= N
    for update, count in zip(updates, num_matrices, strict=True):
        x = update.view(count, update.shape[0] // count, -1)
        x = x.mT if x.shape[1] > x.shape[2] else x
        batches.setdefault((x.shape[1], x.shape[2]), []).extend(x.unbind())
    for (rows, columns), matrices in batches.items():
        size = max(1, MAX_BATCH_ELEMENTS[matrices[0].device.type] // (rows * columns))
        for first in range(0, len(matrices), size):
            batch = matrices[first : first + size]
            x_BMN = torch.stack(batch)
            x_BMN /= x_BMN.norm(dim=(1, 2), keepdim=True).clamp_min(MIN_NORM)
            x_BMN = newton_schulz(x_BMN.to(torch.bfloat16) if x_BMN.is_cuda else x_BMN)
            x_BMN = x_BMN * (SCALE * columns**0.5)
            torch._foreach_copy_(batch, list(x_BMN.unbind()))
