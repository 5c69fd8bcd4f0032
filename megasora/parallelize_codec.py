"""Context parallelism of the codec network: clips are divided over the ranks of the context axis, in frames and rows.

    stacks of a pack  --share_stacks-->  a StackPiece each  --VideoVAE with its boundary-->  --whole_rows-->  the loss

The only file that imports what divides clips in `megasora.parallel`. The network does not know of other processes: a
rank calls it with its piece and with a boundary that gets what lies around the piece from other ranks. The loss and
every gradient of a clip are sums over the ranks: what they compute is divided by counts over all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megasora.codec.vae.boundary import Boundary, ClipBoundary
from megasora.parallel.clip_exchange import gather_stack, rows_to_frames
from megasora.parallel.clip_split import Piece, StackSplit, even_ranges, frame_range, split_stacks
from megasora.parallel.halo import ROWS, HaloBoundary
from megasora.parallel.mesh import Mesh


@dataclass(frozen=True)
class StackPiece:
    """What this rank computes of a stack of clips of one size, and how."""

    piece: Piece
    split: StackSplit
    boundary: Boundary  # to call the network with
    mesh: Mesh
    factors: tuple[int, int, int]

    def take_frames(self, frames: Tensor) -> Tensor:
        """[B, 3, T, H, W] of the stack -> [b, 3, t, h, W], the input of the network; a view."""
        return self.piece.take(frames, self.factors)

    def take_latents(self, latents: Tensor) -> Tensor:
        """The same of latents, or of the noise that is added to them, [B, C, T', H/fh, W/fw]."""
        return self.piece.take(latents)

    def whole_rows(self, x: Tensor) -> Tensor:
        """What a network gives for the piece, [b, C, t, h, W] -> [b, C, t', H, W], the frames of which this rank
        computes the loss; t' may be 0. Frames, or logits of a discriminator. Differentiable; all ranks of a clip must
        call it."""
        if not self.split.is_split or not self.mesh.rows.is_split:
            return x
        first = self.mesh.time.rank * self.mesh.rows.size
        latent_rows = [
            stop - start for start, stop in (p.rows for p in self.split.pieces[first:][: self.mesh.rows.size])
        ]
        rows_per_latent = x.shape[ROWS] // latent_rows[self.mesh.rows.rank]
        return rows_to_frames(x, [rows * rows_per_latent for rows in latent_rows], self.mesh.rows)

    def take_targets(self, frames: Tensor) -> Tensor:
        """[B, 3, T, H, W] of the stack -> what `whole_rows` should give of its reconstruction; a view. Without the
        padding of T, the padded frames are missing here too."""
        return frames[slice(*self.piece.clips), :, slice(*self.loss_frames())]

    def loss_frames(self) -> tuple[int, int]:
        """The range of frames of each clip of which this rank computes the loss."""
        start, stop = frame_range(self.piece.frames, self.factors[0])
        if not self.split.is_split:
            return start, stop
        own_start, own_stop = even_ranges(stop - start, self.mesh.rows.size)[self.mesh.rows.rank]
        return start + own_start, start + own_stop


class ContextParallelCodec:
    """Divides the stacks of packs over the context axis of `mesh`. All ranks must create one.

    Stacks that are split must come in one order on all ranks, before the others. A rank may have nothing of a pack: its
    parameters then still need gradients, of zero, since ZeRO sums them over all ranks.
    """

    def __init__(self, mesh: Mesh, factors: Sequence[int]):
        self.mesh, self.factors = mesh, (factors[0], factors[1], factors[2])
        self.halo = HaloBoundary(mesh.time, mesh.rows)
        self.clip = ClipBoundary()

    def split(self, sizes: Sequence[Sequence[int]]) -> list[StackSplit]:
        """The split of each stack of a pack; `sizes` as of `split_stacks`."""
        return split_stacks(sizes, self.factors, self.mesh.time.size, self.mesh.rows.size)

    def share_stacks(self, sizes: Sequence[Sequence[int]]) -> list[StackPiece | None]:
        """This rank's piece of each stack of a pack; None where it has nothing. ValueError as of `split_stacks`."""
        pieces = []
        for split in self.split(sizes):
            piece = split.pieces[self.mesh.context.rank]
            boundary = self.halo if split.is_split else self.clip
            pieces.append(StackPiece(piece, split, boundary, self.mesh, self.factors) if piece is not None else None)
        return pieces

    def gather_frames(self, frames: Tensor | None, split: StackSplit, like: Tensor) -> Tensor:
        """The whole stack [B, 3, T, H, W] on every rank, from the pieces [b, 3, t, h, W] that the ranks have computed.

        `like`: a tensor of the stack's shape. Without a gradient; all ranks of the context axis must call it.
        """
        return gather_stack(frames, split, self.mesh.context, like, self.factors)

    def pop_bytes_sent(self) -> int:
        """Bytes that this rank has sent for halos since the last call, forward and backward."""
        return self.halo.pop_bytes_sent()
