"""Power-function averages of any width, after training, from saved ones [Karras et al., arXiv 2312.02696, section 3.3].

Every saved average is the weights of all updates, weighted by its profile, a power function up to the update at which
it was saved. The profile that is asked for is approximated by a linear combination of those of the saved averages, by
least squares; the same combination of the tensors is the average.

As an addition, the coefficients are constrained to sum to 1: weights that did not change are reproduced exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megasora.optim.ema_decays import gamma_of

RELATIVE_TOLERANCE = 1e-10  # singular values below this share of the largest are noise: snapshots that nearly agree


class Profile(NamedTuple):
    """The weights of updates in a power-function average."""

    update: int  # at which it was saved; later ones have no weight
    sigma: float  # relative width


class Combination(NamedTuple):
    coefficients: list[float]  # of the saved averages; they sum to 1
    error: float  # || combination - wanted profile || / || wanted profile ||


def combine_profiles(saved: Sequence[Profile], wanted: Profile) -> Combination:
    """The linear combination of the saved profiles that is closest to the wanted one. `saved`: at least one.

    Minimises |sum_i x_i p_i - p|^2 with sum_i x_i = 1, over profiles scaled to norm 1, in fp64.
    """
    norms = np.array([math.sqrt(inner_product(p, p)) for p in saved])
    norm = math.sqrt(inner_product(wanted, wanted))
    gram = np.array([[inner_product(a, b) for b in saved] for a in saved]) / np.outer(norms, norms)
    target = np.array([inner_product(a, wanted) for a in saved]) / (norms * norm)
    ones = norm / norms  # y = x norms / norm: the scaled coefficients, whose constraint is ones . y = 1
    shift = ones / (ones @ ones)  # fulfils the constraint; the rest of y is orthogonal to `ones`
    projection = np.eye(len(saved)) - np.outer(ones, ones) / (ones @ ones)
    rest = np.linalg.pinv(projection @ gram @ projection, RELATIVE_TOLERANCE, hermitian=True)
    scaled = shift + projection @ rest @ projection @ (target - gram @ shift)
    error = max(0.0, 1 - 2 * scaled @ target + scaled @ gram @ scaled)
    return Combination([float(x) for x in scaled * ones], math.sqrt(error))


def inner_product(a: Profile, b: Profile) -> float:
    """Integral of the product of two profiles (g + 1) tau^g / T^(g + 1), each 0 after its T; by logarithms, because
    powers of numbers of updates exceed the range of floats."""
    if a.update > b.update:
        a, b = b, a
    gamma_a, gamma_b = gamma_of(a.sigma), gamma_of(b.sigma)
    power = (gamma_b + 1) * math.log(a.update / b.update)  # of (T_a / T_b), T_a <= T_b
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) / a.update * math.exp(power)
