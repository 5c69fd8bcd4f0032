"""The encoder of `dct`, in numpy: a stream of frames to a stream of latent frames.

Decode workers run it without torch (0.1 s and 40 MB per process instead of 1 s and 240 MB). A latent frame is computed
from its own `factors[0]` frames alone, so memory does not grow with the clip, and a clip gives the same bits as a whole
and in pieces.

The transform is separable: first over (frames, rows), then over (columns, colours), each reduced to the frequencies
that some selected coefficient has. Of the 768 coefficients of 4 x 8 x 8 blocks, 48 are selected by default; they have 8
and 8 such pairs, so the two products need a fifth of the multiplications of one product with the 48 x 768 matrix.

    y[f, g] = sum over (t, h) A[f, (t, h)] sum over (w, c) B[g, (w, c)] x[t, h, w, c];   z_k = y[f_k, g_k] / scale_k
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np

from megasora.codec.clip_sizes import check_sides
from megasora.config import CodecConfig

# standard deviation of an orthonormal coefficient in video, divided by the square root of the block's number of values:
# LEVEL / (1 + SLOPE * f)^POWER, f the length of the frequency vector in cycles per block
LEVEL, SLOPE, POWER = 0.5, 2.0, 2.0
COLOR_FREQUENCY = 0.5  # cycles that one step in the colour basis counts as
CHUNK_BYTES = 2 << 20  # float pixels that are transformed at once: what stays in the cache


def dct_basis(n: int) -> np.ndarray:
    """float64 [n, n]: row f is the orthonormal DCT-II vector of frequency f / 2 cycles."""
    f, x = np.arange(n)[:, None], np.arange(n)[None]
    basis = np.cos(math.pi * (x + 0.5) * f / n) * math.sqrt(2 / n)
    basis[0] /= math.sqrt(2)
    return basis


def select_coefficients(config: CodecConfig) -> tuple[np.ndarray, np.ndarray]:
    """The `channels` lowest frequencies: int [C, 4], indices along colour, time, height, width; float64 [C], scales."""
    pt, ph, pw = config.factors
    indices = np.indices((3, pt, ph, pw)).reshape(4, -1).T
    frequency = np.sqrt(((indices * [COLOR_FREQUENCY, 0.5, 0.5, 0.5]) ** 2).sum(1))
    # ties are broken by position, so the order is the same on every machine
    order = sorted(range(len(indices)), key=lambda i: (round(float(frequency[i]), 6), i))[: config.channels]
    scale = LEVEL * math.sqrt(3 * pt * ph * pw) / (1 + SLOPE * frequency[order]) ** POWER
    return indices[order], scale


class DCTEncoder:
    """Encodes frames one by one: the first frame is one latent frame, then every `factors[0]` frames are one."""

    def __init__(self, config: CodecConfig):
        self.factors, self.channels = tuple(config.factors), config.channels
        coefficients, scale = select_coefficients(config)
        pt, ph, pw = self.factors
        color, time, row, column = (dct_basis(n) for n in (3, pt, ph, pw))
        pairs_th = sorted({(t, h) for _, t, h, _ in coefficients.tolist()})
        pairs_wc = sorted({(w, c) for c, _, _, w in coefficients.tolist()})
        time_row = np.stack([np.outer(time[t], row[h]).ravel() for t, h in pairs_th])
        column_color = np.stack([np.outer(column[w], color[c]).ravel() for w, c in pairs_wc])
        self.time_row = time_row.astype(np.float32)  # A [f, pt*ph]
        self.column_color = np.ascontiguousarray(column_color.T.astype(np.float32))  # B transposed [pw*3, g]
        self.index_in_pairs = np.array(
            [pairs_th.index((t, h)) * len(pairs_wc) + pairs_wc.index((w, c)) for c, t, h, w in coefficients]
        )
        self.gain = (1 / scale).astype(np.float32)
        # a byte p is the pixel x = p / 127.5 - 1: the constant -1 changes the DC coefficient alone
        self.dc = int(np.flatnonzero(~coefficients.any(1))[0])
        self.dc_offset = np.float32(math.sqrt(3 * pt * ph * pw) / scale[self.dc])

    def encode(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """[H, W, 3] each, uint8 or float32 in [-1, 1] -> float32 [H/ph, W/pw, C] each.

        The last frame is repeated to fill its block. Raises MegaSoraError where H or W is not a multiple of the
        factors.
        """
        pt, block, buffers = self.factors[0], [], None
        for index, frame in enumerate(frames):
            if buffers is None or buffers.frame_shape != frame.shape:
                buffers = FrameBuffers(self, frame)
            block.append(frame)
            if index == 0:
                block *= pt
            if len(block) == pt:
                yield self.transform(block, buffers)
                block = []
        if block:
            yield self.transform(block + block[-1:] * (pt - len(block)), buffers)

    def transform(self, frames: list[np.ndarray], buffers: FrameBuffers) -> np.ndarray:
        """`factors[0]` frames -> one latent frame, a few rows of blocks at a time."""
        _, ph, pw = self.factors
        height, width, _ = buffers.frame_shape
        latents = np.empty((height // ph, width // pw, self.channels), np.float32)
        gain = np.tile(self.gain / np.float32(127.5) if frames[0].dtype == np.uint8 else self.gain, width // pw)
        for first in range(0, len(latents), buffers.rows):
            rows = min(buffers.rows, len(latents) - first)
            pixels, reduced, pairs = (a[:rows] for a in (buffers.pixels, buffers.reduced, buffers.pairs))
            for t, frame in enumerate(frames):
                pixels[:, t] = frame[first * ph : (first + rows) * ph].reshape(rows, ph, width, 3)
            np.matmul(self.time_row, pixels.reshape(rows, -1, width * 3), out=reduced)
            blocks = reduced.reshape(rows, -1, width // pw, pw * 3)
            np.matmul(blocks, self.column_color, out=pairs.transpose(0, 2, 1, 3))  # in the order that `take` reads
            out = latents[first : first + rows]
            np.take(pairs.reshape(rows, width // pw, -1), self.index_in_pairs, axis=2, out=out, mode="clip")
            out.reshape(rows, -1)[:] *= gain
            if frames[0].dtype == np.uint8:
                out[:, :, self.dc] -= self.dc_offset
        return latents


class FrameBuffers:
    """Buffers for frames of one size, allocated once per clip."""

    def __init__(self, encoder: DCTEncoder, frame: np.ndarray):
        pt, ph, pw = encoder.factors
        height, width, _ = self.frame_shape = frame.shape
        check_sides(height, width, encoder.factors)
        self.rows = max(1, CHUNK_BYTES // (4 * pt * ph * width * 3))  # of blocks that are transformed at once
        th, wc = len(encoder.time_row), encoder.column_color.shape[1]
        self.pixels = np.empty((self.rows, pt, ph, width, 3), np.float32)
        self.reduced = np.empty((self.rows, th, width * 3), np.float32)
        self.pairs = np.empty((self.rows, width // pw, th, wc), np.float32)
