"""The analysis half of `dct`: frames, one after the other, to latent frames. numpy alone.

Processes that decode video run this and need not load torch (0.1 s and 40 MB against 1 s and 240 MB a process). A
latent frame is computed from its own `factors[0]` frames and from nothing else, so memory does not grow with the clip,
and a clip gives the same bits whether it comes as a whole or in pieces.

The transform is separable: first over (frames, rows), then over (columns, colours), each reduced to the frequencies
that some kept coefficient has. Of the 768 coefficients of 4 x 8 x 8 blocks, 48 are kept by default; they have 8 and 8
such pairs, so that the two products take a fifth of the multiplications of the one with all 48 x 768 numbers.

    y[f, g] = sum over (t, h) A[f, (t, h)] sum over (w, c) B[g, (w, c)] x[t, h, w, c];   z_k = y[f_k, g_k] / scale_k
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np

from megasora.config import CodecConfig
from megasora.errors import MegaSoraError

# standard deviation of an orthonormal coefficient over the block's number of pixels^0.5, as a function of frequency:
# LEVEL / (1 + SLOPE * f)^POWER, f in cycles a block along each axis, root of the sum of squares
LEVEL, SLOPE, POWER = 0.5, 2.0, 2.0
COLOR_FREQUENCY = 0.5  # one step in colour counts as this many cycles
CHUNK_BYTES = 2 << 20  # of float pixels transformed at once: what stays in the cache


def dct_basis(n: int) -> np.ndarray:
    """float64 [n, n]: row f is the orthonormal DCT-II vector of frequency f / 2 cycles."""
    f, x = np.arange(n)[:, None], np.arange(n)[None]
    basis = np.cos(math.pi * (x + 0.5) * f / n) * math.sqrt(2 / n)
    basis[0] /= math.sqrt(2)
    return basis


def kept_coefficients(config: CodecConfig) -> tuple[np.ndarray, np.ndarray]:
    """int [C, 4]: numbers of the kept coefficients along colour, time, height, width; float64 [C]: their scale."""
    pt, ph, pw = config.factors
    numbers = np.indices((3, pt, ph, pw)).reshape(4, -1).T
    frequency = np.sqrt(((numbers * [COLOR_FREQUENCY, 0.5, 0.5, 0.5]) ** 2).sum(1))
    # ties are broken by the coefficient's number, so the order is the same everywhere
    order = sorted(range(len(numbers)), key=lambda i: (round(float(frequency[i]), 6), i))
    kept = numbers[order[: config.channels]]
    scale = LEVEL * math.sqrt(3 * pt * ph * pw) / (1 + SLOPE * frequency[order[: config.channels]]) ** POWER
    return kept, scale


class DCTStream:
    """Frames of one size at a time to latent frames; the first frame alone, then `factors[0]` frames each."""

    def __init__(self, config: CodecConfig):
        self.factors, self.channels = tuple(config.factors), config.channels
        kept, scale = kept_coefficients(config)
        pt, ph, pw = self.factors
        of_color, of_time, of_row, of_column = (dct_basis(n) for n in (3, pt, ph, pw))
        pairs_th = sorted({(t, h) for _, t, h, _ in kept.tolist()})
        pairs_wc = sorted({(w, c) for c, _, _, w in kept.tolist()})
        time_row = np.stack([np.outer(of_time[t], of_row[h]).ravel() for t, h in pairs_th])
        column_color = np.stack([np.outer(of_column[w], of_color[c]).ravel() for w, c in pairs_wc])
        self.time_row = time_row.astype(np.float32)  # A [f, pt*ph]
        self.column_color = np.ascontiguousarray(column_color.T.astype(np.float32))  # B transposed [pw*3, g]
        self.pick = np.array([pairs_th.index((t, h)) * len(pairs_wc) + pairs_wc.index((w, c)) for c, t, h, w in kept])
        self.gain = (1 / scale).astype(np.float32)
        # a byte is x = p / 127.5 - 1: the constant is a multiple of the coefficient without any frequency alone
        self.constant = int(np.flatnonzero(~kept.any(1))[0])
        self.offset = np.float32(math.sqrt(3 * pt * ph * pw) / scale[self.constant])

    def encode(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """[H, W, 3] each, uint8 or float32 in [-1, 1] -> float32 [H/ph, W/pw, C] each.

        The last frame is repeated to a whole block. Raises MegaSoraError where H or W is no multiple of the factors.
        """
        pt, held, work = self.factors[0], [], None
        for number, frame in enumerate(frames):
            if work is None or work.frame_shape != frame.shape:
                work = Workspace(self, frame)
            held.append(frame)
            if number == 0:
                held *= pt
            if len(held) == pt:
                yield self.transform(held, work)
                held = []
        if held:
            yield self.transform(held + held[-1:] * (pt - len(held)), work)

    def transform(self, frames: list[np.ndarray], work: Workspace) -> np.ndarray:
        """`factors[0]` frames -> one latent frame, a few rows of blocks at a time."""
        _, ph, pw = self.factors
        height, width, _ = work.frame_shape
        latents = np.empty((height // ph, width // pw, self.channels), np.float32)
        gain = np.tile(self.gain / np.float32(127.5) if frames[0].dtype == np.uint8 else self.gain, width // pw)
        for first in range(0, len(latents), work.rows):
            rows = min(work.rows, len(latents) - first)
            pixels, reduced, pairs = (a[:rows] for a in (work.pixels, work.reduced, work.pairs))
            for t, frame in enumerate(frames):
                pixels[:, t] = frame[first * ph : (first + rows) * ph].reshape(rows, ph, width, 3)
            np.matmul(self.time_row, pixels.reshape(rows, -1, width * 3), out=reduced)
            blocks = reduced.reshape(rows, -1, width // pw, pw * 3)
            np.matmul(blocks, self.column_color, out=pairs.transpose(0, 2, 1, 3))  # the product lies as it is picked
            out = latents[first : first + rows]
            np.take(pairs.reshape(rows, width // pw, -1), self.pick, axis=2, out=out, mode="clip")
            out.reshape(rows, -1)[:] *= gain
            if frames[0].dtype == np.uint8:
                out[:, :, self.constant] -= self.offset
        return latents


class Workspace:
    """Buffers for frames of one size, allocated once a clip."""

    def __init__(self, stream: DCTStream, frame: np.ndarray):
        pt, ph, pw = stream.factors
        height, width, _ = self.frame_shape = frame.shape
        if height % ph or width % pw:
            raise MegaSoraError(f"frames of {height}x{width} pixels are no multiple of codec.factors={ph}x{pw}")
        self.rows = max(1, CHUNK_BYTES // (4 * pt * ph * width * 3))
        th, wc = len(stream.time_row), stream.column_color.shape[1]
        self.pixels = np.empty((self.rows, pt, ph, width, 3), np.float32)
        self.reduced = np.empty((self.rows, th, width * 3), np.float32)
        self.pairs = np.empty((self.rows, width // pw, th, wc), np.float32)
