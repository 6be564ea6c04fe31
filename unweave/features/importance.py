"""What each feature is worth to the output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from unweave.data import Batch, TokenData
from unweave.errors import EmptyDataError, InputError, ShapeError
from unweave.execution import Trace, check_inputs, trace
from unweave.features.sites import Site, check_fits, find_site
from unweave.graph import Graph
from unweave.ops import Dictionary
from unweave.paths.weights import node_write
from unweave.scope import Scope, divergence
from unweave.scoring.results import mean_and_error, sequence_moments
from unweave.statistics import FisherPass, Gradients, Sums, Tally, accumulate

__all__ = ["Importance", "feature_importance"]

# sequences of one run where features are ablated one by one
ROWS = 256


class Importance(NamedTuple):
    """What removing each feature costs.

    Attributes:
        nats: per token, float32.
        se: standard error over sequences.
        method: "fisher" or "exact".
    """

    nats: Float[Tensor, " features"]
    se: Float[Tensor, " features"]
    method: str


def feature_importance(
    graph: Graph,
    where: str,
    dictionary: Dictionary,
    data: TokenData,
    *,
    scope: Scope | None = None,
    method: str = "fisher",
    latents: Sequence[int] | None = None,
    instead: Float[Tensor, " _"] | None = None,
    samples: int = 4,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool | None = None,
) -> Importance:
    """Nats per token that the output changes when a feature is held at a constant at all positions, one at a time.

    The activation x becomes x + (c_i - f_i) d_i with f_i the latent, d_i its decoder column and c_i what it is held at.
    "exact" runs this. "fisher" is second order: 1/2 E[(sum over positions of (c_i - f_i) d_i . g)^2], with g the
    gradient at x of a random output direction that has the Fisher information as its second moment.

    Args:
        where: a site of one node or of the stream, see :func:`find_site`.
        latents: which; by default all.
        instead: c, for all latents; by default 0.
        samples: random directions per batch ("fisher").

    Raises:
        InputError: an unknown method or latent, a transcoder, several nodes at once ("exact"), or edges are cut.
        EmptyDataError: the scope selects no position.

    Cost:
        "fisher": one forward and ``samples`` backward passes for all latents. "exact": one forward pass per latent.

    Exact?
        "exact" is. "fisher" is of second order in the change, and estimated from random directions.

    Example:
        >>> import unweave
        >>> from unweave.features import find_basis
        >>> graph, data = unweave.capture("zoo:modular_addition"), unweave.load_data("zoo:modular_addition", limit=64)
        >>> basis = find_basis(graph, "blocks.0.mlp.code", data, "principal", limit=200)
        >>> nats = feature_importance(graph, "blocks.0.mlp.code", basis, data, latents=[0, 1, 2]).nats
        >>> bool((nats > 0).all())
        True
    """
    site, scope = find_site(graph, where), scope or Scope()
    check_fits(graph, site, dictionary)
    if dictionary.is_transcoder or graph.is_cut or method not in ("fisher", "exact") or samples < 1:
        raise InputError(
            'importance needs a dictionary of the activation itself, a graph without cuts, method "fisher" or "exact" '
            f"and samples >= 1; got {method!r}, {samples} samples{', a transcoder' * dictionary.is_transcoder}"
        )
    chosen = torch.tensor(list(range(dictionary.n_latents) if latents is None else latents))
    if len(chosen) == 0 or int(chosen.min()) < 0 or int(chosen.max()) >= dictionary.n_latents:
        raise InputError(f"the dictionary has latents 0..{dictionary.n_latents - 1}, asked for {chosen.tolist()}")
    if instead is not None and instead.shape != (dictionary.n_latents,):
        raise ShapeError(f"instead must have {dictionary.n_latents} numbers, got {tuple(instead.shape)}")
    like = graph.tensors[0]
    held = torch.zeros(dictionary.n_latents) if instead is None else instead
    removal = _Removal(graph, site, scope, dictionary.to(like), chosen.to(graph.device), held.to(like))
    step = FisherPass(graph, scope, samples, seed, (removal,)) if method == "fisher" else removal.measure
    sums = accumulate(data, step, batch_size=batch_size, description=f"importance ({method})", progress=progress)
    if float(sums["tokens"]) == 0:
        raise EmptyDataError("the scope selects no position of this data set")
    return Importance(*mean_and_error(sums, "nats", len(data)), method)


@dataclass(frozen=True)
class _Removal:
    """Features held at constants, one at a time: a measure of a FisherPass, and the same by running it."""

    graph: Graph
    site: Site
    scope: Scope
    dictionary: Dictionary
    chosen: Int[Tensor, " k"]
    instead: Float[Tensor, " latents"]

    def changes(self, x: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos k"]:
        """c - f of the chosen latents."""
        return (self.instead - self.dictionary.encode(x))[..., self.chosen]

    def __call__(self, t: Trace, batch: Batch) -> Tally:
        site, stage = self.site, self.graph.stages[self.site.stage]
        written = self.dictionary.decoder[:, self.chosen]
        if site.kind == "code":
            nodes = range(len(stage.nodes)) if site.node < 0 else [site.node]
            maps = [node_write(stage, i)[:, : stage.code_widths[i]] for i in nodes]
            written = torch.cat(maps, dim=1).to(written) @ written
        changes = self.changes(site.activations(t).detach()) * batch.mask.to(written)[:, :, None]
        place = stage.visible[1] - 1 if site.kind == "stream" else site.stage
        return _RemovalTally(self.scope, batch, changes, written, place)

    @torch.no_grad()
    def measure(self, batch: Batch) -> Sums:
        """Sums of the divergence by sequence and latent."""
        context = check_inputs(self.graph, batch.inputs, batch.mask)
        reference = trace(self.graph, context).output
        found = []
        for part in self.chosen.split(max(1, ROWS // len(batch.inputs))):
            many = batch.repeat(len(part))
            changed = self._run(many, part)
            nats = divergence(self.scope, repeat(reference, "b t o -> (k b) t o", k=len(part)), changed, many)
            found.append(rearrange(nats.sum(1), "(k b) -> b k", k=len(part)))
        return sequence_moments({"nats": torch.cat(found, 1)}, self.scope, batch)

    def _run(self, many: Batch, part: Int[Tensor, " k"]) -> Tensor:
        """The output where copy k of the batch has its latent removed."""
        site, stage, d = self.site, self.graph.stages[self.site.stage], self.dictionary
        if site.kind != "stream" and site.node < 0 and len(stage.nodes) > 1:
            raise InputError(f"{site.name} stands for {len(stage.nodes)} nodes; exact importance needs one of them")
        node = stage.nodes[max(site.node, 0)]
        name = {"stream": site.name, "write": node, "code": f"{node}.code"}[site.kind]
        # patched without the constant of its stage, which the dictionary knows where the node is alone
        constant = stage.bias if site.kind == "write" and site.node < 0 else None

        def patch(x: Tensor) -> Tensor:
            own = x[..., : site.width] if constant is None else x + constant
            changes = rearrange(self.instead - d.encode(own), "(k b) t f -> k b t f", k=len(part))
            one = torch.stack([changes[i, :, :, f] for i, f in enumerate(part.tolist())])
            moved = torch.einsum("kbt,dk->kbtd", one, d.decoder[:, part])
            return x + F.pad(rearrange(moved, "k b t d -> (k b) t d"), (0, x.shape[-1] - site.width))

        return trace(self.graph, check_inputs(self.graph, many.inputs, many.mask), patch={name: patch}).output


@dataclass
class _RemovalTally:
    scope: Scope
    batch: Batch
    changes: Float[Tensor, "batch pos k"]
    written: Float[Tensor, "d k"]
    place: int
    gathered: list[Tensor] = field(default_factory=list)

    def add(self, gradients: Gradients) -> None:
        felt = gradients.totals[self.place] @ self.written
        self.gathered.append(0.5 * (felt * self.changes).sum(1).square())

    def sums(self) -> Sums:
        return sequence_moments({"nats": torch.stack(self.gathered).mean(0)}, self.scope, self.batch)
