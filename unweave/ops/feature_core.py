"""The core that gives the parts of a node by latents in place of the node's own code."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from unweave import tree
from unweave.errors import InputError
from unweave.ops.cores import Context, Core
from unweave.ops.dictionaries import Dictionary
from unweave.ops.linear import LinearMap
from unweave.ops.norms import Norm

__all__ = ["FeatureCore"]

# nodes of so few latents are computed from these latents alone where nodes hear different things
FEW = 8


@tree.register
@dataclass(frozen=True, eq=False)
class FeatureCore(Core):
    """A core whose nodes have as codes: latents of dictionaries, what these leave out, or what nodes had before.

    All that a node could pick from stands one after the other: the codes of the core inside, then for each dictionary
    its latents f and its error x - D f - d. Every read is of one block, the blocks inside one after the other; what
    nodes hear apart is computed apart, a whole core inside for each.

    Attributes:
        inner: the core before it was refined.
        blocks: the widths of the blocks of each of its reads.
        widths: of its nodes' codes.
        write: what it wrote through; None where no dictionary is of what is written.
        bias: what its stage added, where a dictionary is of all that the stage writes.
        post: the norm behind its writes.
        dictionaries: whose latents there are; the read of a transcoder's encoder comes after all others.
        covers: of each dictionary, the node inside that it is of; -1 for all of them together.
        of_code: of each dictionary, whether it is of the code and not of what is written.
        pick: the places of each node's code; -1 for a zero.
    """

    inner: Core
    blocks: tuple[tuple[int, ...], ...]
    widths: tuple[int, ...]
    write: LinearMap | None
    bias: Float[Tensor, " d_model"] | None
    post: Norm | None
    dictionaries: tuple[Dictionary, ...]
    covers: tuple[int, ...]
    of_code: tuple[bool, ...]
    pick: Int[Tensor, "nodes width"]

    def __post_init__(self) -> None:
        size = sum(self.widths) + sum(d.n_latents + d.d_out for d in self.dictionaries)
        if self.pick.numel() and not -1 <= int(self.pick.min()) <= int(self.pick.max()) < size:
            raise InputError(f"nodes pick from {size} places, got {int(self.pick.min())}..{int(self.pick.max())}")
        if len(self.covers) != len(self.dictionaries) or len(self.of_code) != len(self.dictionaries):
            raise InputError("covers and of_code need one entry for each dictionary")

    def for_nodes(self, nodes: Int[Tensor, " n"]) -> Core:
        return dataclasses.replace(self, pick=self.pick[nodes.to(self.pick.device)])

    def forward(self, reads: tuple[Tensor, ...], context: Context) -> Float[Tensor, "batch node pos width"]:
        # rows that are one row seen many times, and from which no gradient is asked, are computed once
        alike = all(read.shape[1] == 1 or read.stride(1) == 0 for read in reads)
        if alike and not any(read.requires_grad for read in reads):
            reads = tuple(read[:, :1] for read in reads)
        rows = max((read.shape[1] for read in reads), default=1)
        if rows == len(self.pick) > 1:
            return self._apart(reads, torch.arange(rows, device=self.pick.device), context, alike)
        codes = self._inner_codes(reads[: len(self.blocks)], context)
        return self._pick(self._places(codes, reads[-1:]))

    def forward_rows(
        self, reads: tuple[Tensor, ...], row_of: Int[Tensor, " nodes"], context: Context
    ) -> Float[Tensor, "batch node pos width"]:
        return self._apart(reads, row_of, context, alike=False)

    def _places(
        self, codes: Float[Tensor, "batch row pos code"], last: tuple[Tensor, ...]
    ) -> Float[Tensor, "batch row pos place"]:
        """All that nodes can pick from, one after the other (``last``: the read of a transcoder)."""
        places = [codes]
        for dictionary, cover, of_code in zip(self.dictionaries, self.covers, self.of_code, strict=True):
            x = self._code(codes, cover) if of_code else self._written(codes, cover)
            latents = dictionary.activate(last[0]) if dictionary.is_transcoder else dictionary.encode(x)
            places += [latents, x - dictionary.decode(latents)]
        return torch.cat(places, dim=-1)

    # ---- nodes that hear different things -----------------------------------------------------------------

    def _apart(
        self, reads: tuple[Tensor, ...], row_of: Int[Tensor, " nodes"], context: Context, alike: bool
    ) -> Float[Tensor, "batch node pos width"]:
        """Node n from row ``row_of[n]``; of a row that only nodes of a few latents take, only these are computed."""
        codes = self._inner_codes(reads[: len(self.blocks)], context)
        last = reads[-1].expand(-1, codes.shape[1], -1, -1) if reads else codes
        found, order = [], []
        for number, (nodes, latents) in self._narrow.items():
            row, d = row_of[nodes], self.dictionaries[number]
            before, gate = self._before(number, codes, last, row, latents, alike)
            few = before if d.activation == "identity" else torch.where(gate, before, 0.0)
            few = torch.where((latents >= 0)[:, None], few, 0.0)
            found.append(torch.nn.functional.pad(few, (0, self.pick.shape[1] - few.shape[-1])))
            order.append(nodes)
        if len(self._wide):
            row = row_of[self._wide]
            some, inverse = row.unique(return_inverse=True)
            places = self._places(codes[:, some], (last[:, some],))
            found.append(self._picked(places[:, inverse], self.pick[self._wide]))
            order.append(self._wide)
        return torch.cat(found, dim=1)[:, torch.cat(order).argsort()]

    @cached_property
    def _narrow(self) -> dict[int, tuple[Int[Tensor, " nodes"], Int[Tensor, "nodes few"]]]:
        """By dictionary, the nodes of at most FEW of its latents and these latents; -1 where there are fewer."""
        out = {}
        at, taken = sum(self.widths), self.pick >= 0
        for number, d in enumerate(self.dictionaries):
            inside = (self.pick >= at) & (self.pick < at + d.n_latents)
            few = (inside == taken).all(1) & (taken.sum(1) <= FEW)
            if bool(few.any()) and (d.is_transcoder or self.post is None or self.of_code[number]):
                nodes = few.nonzero()[:, 0]
                latents = (self.pick[nodes] - at).clamp(min=-1)
                out[number] = nodes, latents[:, : int(taken[nodes].sum(1).max())]
            at += d.n_latents + d.d_out
        return out

    @cached_property
    def _wide(self) -> Int[Tensor, " nodes"]:
        """All other nodes."""
        rest = torch.ones(len(self.pick), dtype=torch.bool, device=self.pick.device)
        for nodes, _ in self._narrow.values():
            rest[nodes] = False
        return rest.nonzero()[:, 0]

    def _before(
        self,
        number: int,
        codes: Float[Tensor, "batch row pos code"],
        last: Float[Tensor, "batch row pos read"],
        row: Int[Tensor, " n"],
        latents: Int[Tensor, "n few"],
        alike: bool,
    ) -> tuple[Float[Tensor, "batch n pos few"], Bool[Tensor, "batch n pos few"]]:
        """(E x + e of these latents, each from its row; which of them are active)."""
        d, few = self.dictionaries[number], latents.clamp(min=0)
        if d.is_transcoder:
            before = _take(last[:, row], few)
        else:
            x, (encoder, bias) = self._code(codes, self.covers[number]), self._encoder(number)
            before = torch.einsum("bntc,nfc->bntf", x[:, row], encoder[few]) + bias[few][:, None]
        if d.k is None:
            return before, before > (0 if d.threshold is None else d.threshold[few][:, None])
        with torch.no_grad():  # latents compete with all others
            if alike:
                row = torch.zeros_like(row)
            some, inverse = row.unique(return_inverse=True)
            whole = last[:, some] if d.is_transcoder else torch.nn.functional.linear(x[:, some], encoder, bias)
            return before, _take(d.active(whole)[:, inverse], few)

    def _encoder(self, number: int) -> tuple[Float[Tensor, "latents code"], Float[Tensor, " latents"]]:
        """The encoder and its bias in terms of the code, what the node writes through multiplied in."""
        d, cover = self.dictionaries[number], self.covers[number]
        if self.of_code[number]:
            return d.encoder, d.encoder_bias
        assert self.write is not None
        weight, bias = self.write.dense().to(d.encoder), d.encoder_bias
        weight = weight if cover < 0 else weight[:, self._starts[cover] : self._starts[cover + 1]]
        if cover < 0 and self.bias is not None:
            bias = bias + d.encoder @ self.bias
        return d.encoder @ weight, bias

    def _inner_codes(self, reads: tuple[Tensor, ...], context: Context) -> Float[Tensor, "batch row pos code"]:
        rows = max((read.shape[1] for read in reads), default=1)
        apart = tuple(
            rearrange(_pad(read, widths).expand(-1, rows, -1, -1, -1), "b r t n w -> (r b) n t w")
            for read, widths in zip(reads, self.blocks, strict=True)
        )
        codes = self.inner.forward(apart, context if rows == 1 else context.expand(rows))
        codes = torch.cat([codes[:, i, :, :width] for i, width in enumerate(self.widths)], dim=-1)
        return rearrange(codes, "(r b) t c -> b r t c", r=rows)

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        return tuple(accumulate(self.widths, initial=0))

    def _code(self, codes: Float[Tensor, "batch row pos code"], cover: int) -> Float[Tensor, "batch row pos width"]:
        return codes if cover < 0 else codes[..., self._starts[cover] : self._starts[cover + 1]]

    def _written(self, codes: Float[Tensor, "batch row pos code"], cover: int) -> Float[Tensor, "batch row pos d"]:
        assert self.write is not None
        if cover < 0:
            y = self.write.apply(codes)
            y = y if self.post is None else self.post.apply(y)
            return y if self.bias is None else y + self.bias
        weight = self.write.dense().to(codes)
        return self._code(codes, cover) @ weight[:, self._starts[cover] : self._starts[cover + 1]].T

    def _pick(self, places: Float[Tensor, "batch row pos place"]) -> Float[Tensor, "batch node pos width"]:
        rows = places.shape[1]
        if rows == 1:
            taken = places[:, 0][..., self.pick.clamp(min=0)] * (self.pick >= 0).to(places)
            return rearrange(taken, "b t n w -> b n t w")
        # copies of nodes bound to positions follow each other
        return self._picked(places, self.pick.repeat_interleave(rows // len(self.pick), 0))

    @staticmethod
    def _picked(
        places: Float[Tensor, "batch row pos place"], pick: Int[Tensor, "row width"]
    ) -> Float[Tensor, "batch row pos width"]:
        return _take(places, pick.clamp(min=0)) * (pick >= 0).to(places)[:, None]

    @property
    def n_parameters(self) -> int:
        loose = [] if self.bias is None else [self.bias]
        return (
            self.inner.n_parameters
            + (0 if self.write is None else self.write.n_parameters)
            + (0 if self.post is None else self.post.n_parameters)
            + sum(t.numel() for t in loose)
            + sum(d.n_parameters for d in self.dictionaries)
        )


def _pad(
    read: Float[Tensor, "batch row pos outputs"], widths: tuple[int, ...]
) -> Float[Tensor, "batch row pos block width"]:
    """The blocks of a read, padded with zeros to the widest."""
    if len(set(widths)) == 1:
        return rearrange(read, "b r t (n w) -> b r t n w", n=len(widths))
    parts = read.split(list(widths), dim=-1)
    return torch.stack([torch.nn.functional.pad(p, (0, max(widths) - p.shape[-1])) for p in parts], dim=-2)


def _take(
    x: Shaped[Tensor, "batch row pos place"], places: Int[Tensor, "row few"]
) -> Shaped[Tensor, "batch row pos few"]:
    """Of each row its own places."""
    return x.gather(-1, places[:, None].expand(x.shape[0], -1, x.shape[2], -1))
