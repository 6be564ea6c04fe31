"""One table for the bases and dictionaries of one place: what they lose, how sparse they are, how many are dead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from unweave.data import Batch, TokenData
from unweave.drivers import describe
from unweave.errors import EmptyDataError, InputError
from unweave.execution import check_inputs, trace
from unweave.features.refining import refine_features
from unweave.features.sites import Site, check_fits, find_site, site_trace
from unweave.features.streaming import collect_activations
from unweave.graph import Graph
from unweave.intervals import Estimate, divide, interval_of, resampled_sums
from unweave.ops import Dictionary
from unweave.progress import track
from unweave.scope import Scope, divergence, loss, position_mask
from unweave.statistics import Sums, accumulate

__all__ = ["FeatureRow", "PrivilegedBasis", "compare_features", "describe_latents", "measure_privilege"]

# what every row is held against
ORIGINAL, AT_MEAN = "original", "at its mean"


class FeatureRow(NamedTuple):
    """How one dictionary does at one place.

    Attributes:
        kl_nats: divergence to the network's output when the reconstruction stands in for the activation.
        loss_nats: the next-token loss then; NaN for networks without tokens.
        loss_recovered: (L_mean - L) / (L_mean - L*), with L_mean the loss when the activation is at its mean.
        kl_recovered: 1 - KL / KL at the mean: the same without labels.
        variance_explained: 1 - E|x - x^|^2 / E|x - E x|^2.
        l0: active latents per token.
        dead: the share of latents that no token activates.
        hoyer: (sqrt(n) - |f|_1 / |f|_2) / (sqrt(n) - 1), mean over tokens: 0 all alike, 1 a single one.
        kurtosis: excess kurtosis of a latent over tokens, mean over those that vary.
        n_latents, n_tokens: sizes.
    """

    kl_nats: Estimate
    loss_nats: Estimate
    loss_recovered: Estimate
    kl_recovered: Estimate
    variance_explained: float
    l0: float
    dead: float
    hoyer: float
    kurtosis: float
    n_latents: int
    n_tokens: int


class PrivilegedBasis(NamedTuple):
    """Whether the coordinates of an activation are special among all its rotations.

    Attributes:
        kurtosis: mean excess kurtosis of the coordinates.
        rotated_mean, rotated_std: of the same number over random rotations.
        z: how many of these standard deviations the first lies above.
        percentile: the share of rotations with a smaller kurtosis.
    """

    kurtosis: float
    rotated_mean: float
    rotated_std: float
    z: float
    percentile: float


def compare_features(
    graph: Graph,
    where: str,
    dictionaries: Mapping[str, Dictionary],
    data: TokenData,
    scope: Scope | None = None,
    *,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> dict[str, FeatureRow]:
    """Dictionaries and bases of one place on the same data, which none of them should have been fitted on.

    Args:
        where: see :mod:`unweave.features.sites`.
        dictionaries: by name.
        scope: the positions that count, for losses as for sparsity; by default every next-token prediction.

    Returns:
        By name; intervals are 95%, by bootstrap over sequences, the same draws for all.

    Raises:
        UnknownNameError, InputError: no such place, or a dictionary that does not fit.
        EmptyDataError: the scope selects no position.

    Cost:
        Two passes for sums, and a forward pass for every dictionary and two more.

    Exact?
        Yes, on these tokens.

    Example:
        >>> import unweave
        >>> from unweave.features import find_basis
        >>> graph, data = unweave.capture("zoo:induction"), unweave.load_data("zoo:induction", limit=16)
        >>> basis = find_basis(graph, "blocks.0.attn", data, "neuron")
        >>> round(compare_features(graph, "blocks.0.attn", {"neurons": basis}, data)["neurons"].loss_recovered.value, 3)
        1.0
    """
    site, scope = find_site(graph, where), scope or Scope()
    if not dictionaries or {ORIGINAL, AT_MEAN} & set(dictionaries):
        raise InputError(f"give dictionaries by name, none of them {ORIGINAL!r} or {AT_MEAN!r}")
    for dictionary in dictionaries.values():
        check_fits(graph, site, dictionary)
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    totals = accumulate(data, _Totals(graph, site, scope), description="means", **options)
    if float(totals["tokens"]) == 0:
        raise EmptyDataError("the scope selects no position of this data set")
    mean = totals["x"] / totals["tokens"]
    sums = {
        name: accumulate(data, _LatentSums(graph, site, scope, d, mean), description=f"latents of {name}", **options)
        for name, d in dictionaries.items()
    }
    losses = _losses(graph, site, scope, {**dictionaries, AT_MEAN: _constant(mean.float())}, data, options)
    tables = {name: resampled_sums(table, seed) for name, table in losses.items()}
    rows = {}
    for name, dictionary in dictionaries.items():
        rows[name] = _row(tables, name, sums[name], int(totals["tokens"]), dictionary.n_latents)
    return rows


def _constant(mean: Float[Tensor, " width"]) -> Dictionary:
    """The dictionary that says the mean, whatever it hears."""
    zeros = torch.zeros(1, len(mean)).to(mean)
    return Dictionary(zeros, zeros[:, 0], zeros.T, mean)


# ---- sums over tokens -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Totals:
    graph: Graph
    site: Site
    scope: Scope

    def __call__(self, batch: Batch) -> Sums:
        x = self.site.activations(site_trace(self.graph, self.site, batch))
        x = x[position_mask(self.scope, batch).to(x.device)].double()
        return {"x": x.sum(0), "tokens": torch.tensor(float(len(x)))}


@dataclass(frozen=True)
class _LatentSums:
    graph: Graph
    site: Site
    scope: Scope
    dictionary: Dictionary
    mean: Float[Tensor, " width"]

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Sums:
        t = site_trace(self.graph, self.site, batch)
        mask = position_mask(self.scope, batch).to(self.graph.device)
        x = self.site.activations(t)[mask].float()
        heard = self.site.heard(t)[mask].float() if self.dictionary.is_transcoder else x
        d = self.dictionary.to(x)
        latents = d.encode(heard)
        active = latents != 0
        f = latents.double()
        size, length = f.abs().sum(1), f.norm(dim=1)
        root = f.shape[1] ** 0.5
        hoyer = (root - size / length.clamp(min=1e-30)) / max(root - 1, 1e-30)
        out = {f"f{power}": f.pow(power).sum(0) for power in (1, 2, 3, 4)}
        return out | {
            "active": active.sum(0).double(),
            "hoyer": torch.where(length > 0, hoyer, 0.0).sum(),
            "some": (length > 0).sum().double(),
            "left_over": (x - d.decode(latents)).double().square().sum(),
            "variance": (x.double() - self.mean.to(x.device)).square().sum(),
        }


def _kurtosis(sums: Sums, n: int) -> float:
    """Mean excess kurtosis over the latents that vary."""
    m1, m2, m3, m4 = (sums[f"f{power}"] / n for power in (1, 2, 3, 4))
    variance = m2 - m1.square()
    fourth = m4 - 4 * m1 * m3 + 6 * m1.square() * m2 - 3 * m1.pow(4)
    varies = variance > 1e-9 * m2.clamp(min=1e-30)
    return float((fourth[varies] / variance[varies].square() - 3).mean()) if bool(varies.any()) else float("nan")


# ---- losses ---------------------------------------------------------------------------------------------


def _runner(graph: Graph, site: Site, dictionary: Dictionary) -> Callable[[Batch], Tensor]:
    """The network's output with the reconstruction in place of the activation."""
    if site.kind == "stream":
        d = dictionary.to(graph.tensors[0].new_zeros((), dtype=_dtype(graph)))
        patch = {site.name: lambda x: d.decode(d.encode(x))}
        return lambda batch: trace(graph, check_inputs(graph, batch.inputs, batch.mask), patch=patch).output
    replaced = refine_features(graph, {site.name: dictionary}, error=False)
    return lambda batch: trace(replaced, check_inputs(replaced, batch.inputs, batch.mask)).output


def _dtype(graph: Graph) -> torch.dtype:
    return next(t.dtype for t in graph.tensors if t.is_floating_point())


@torch.no_grad()
def _losses(
    graph: Graph,
    site: Site,
    scope: Scope,
    dictionaries: Mapping[str, Dictionary],
    data: TokenData,
    options: Mapping[str, Any],
) -> dict[str, Float[np.ndarray, "sequences 4"]]:
    """Per sequence: sums of KL and loss, and of the positions that each counts."""
    runners = {name: _runner(graph, site, d) for name, d in dictionaries.items()}
    rows: dict[str, list[np.ndarray]] = {name: [] for name in (ORIGINAL, *runners)}
    size = options["batch_size"]
    for batch in track(data.batches(size), "losses", -(-len(data) // size), show=options["progress"]):
        reference = trace(graph, check_inputs(graph, batch.inputs, batch.mask)).output
        mask = position_mask(scope, batch).to(reference.device)
        for name in rows:
            logits = reference if name == ORIGINAL else runners[name](batch)
            kl = torch.where(mask, divergence(scope, reference, logits, batch), 0.0)
            speaks = not batch.inputs.is_floating_point() and int(batch.inputs.max()) < logits.shape[-1]
            cross, real = loss(logits, batch) if speaks else (torch.zeros_like(kl), torch.zeros_like(mask))
            real = real.to(mask.device) & mask
            columns = [kl.sum(1), mask.sum(1), torch.where(real, cross, 0.0).sum(1), real.sum(1)]
            rows[name].append(torch.stack([c.double() for c in columns], 1).cpu().numpy())
    return {name: np.concatenate(parts) for name, parts in rows.items()}


def _row(
    tables: Mapping[str, Float[np.ndarray, "draws 4"]], name: str, sums: Sums, n: int, n_latents: int
) -> FeatureRow:
    def kl_and_loss(name: str) -> tuple[np.ndarray, np.ndarray]:
        kl, positions, cross, real = tables[name].T
        return divide(kl, positions), divide(cross, real)

    (kl, own), (_, best), (worst_kl, worst) = (kl_and_loss(n) for n in (name, ORIGINAL, AT_MEAN))
    return FeatureRow(
        interval_of(kl),
        interval_of(own),
        interval_of(divide(worst - own, worst - best)),
        interval_of(1 - divide(kl, worst_kl)),
        1 - float(sums["left_over"] / sums["variance"].clamp(min=1e-30)),
        float(sums["active"].sum()) / n,
        float((sums["active"] == 0).double().mean()),
        float(sums["hoyer"] / sums["some"].clamp(min=1)),
        _kurtosis(sums, n),
        n_latents,
        n,
    )


# ---- the privileged basis, and words --------------------------------------------------------------------


def measure_privilege(
    graph: Graph,
    where: str,
    data: TokenData,
    *,
    scope: Scope | None = None,
    rotations: int = 50,
    limit: int = 10_000,
    seed: int = 0,
) -> PrivilegedBasis:
    """Whether the coordinates of an activation have heavier tails than those of random rotations of it.

    kurtosis = mean over coordinates of E (x - E x)^4 / (E (x - E x)^2)^2 - 3. Where all directions are alike, as in a
    residual stream read by everyone through its own matrix, the coordinates' own lies among those of rotations.

    Args:
        rotations: how many.
        limit: tokens at most.

    Raises:
        InputError: fewer than two rotations, or a single coordinate, which has no rotation.

    Cost:
        A forward pass; per rotation a product of all activations with a square matrix.

    Exact?
        A sample of tokens and of rotations; z takes the rotations' values for normal.

    Example:
        >>> import unweave
        >>> graph, data = unweave.capture("zoo:modular_addition"), unweave.load_data("zoo:modular_addition", limit=500)
        >>> measure_privilege(graph, "blocks.0.mlp.code", data).percentile
        1.0

    Source:
        Elhage et al. 2023, "Privileged Bases in the Transformer Residual Stream".
    """
    x = collect_activations(graph, where, data, scope=scope, limit=limit).cpu()
    if rotations < 2 or x.shape[1] < 2:
        raise InputError(f"at least 2 rotations of 2 coordinates are needed, got {rotations} of {x.shape[1]}")
    generator = torch.Generator().manual_seed(seed)
    x = x - x.mean(0)
    own = _mean_kurtosis(x)
    turned = [
        _mean_kurtosis(x @ torch.linalg.qr(torch.randn(x.shape[1], x.shape[1], generator=generator))[0])
        for _ in range(rotations)
    ]
    values = torch.tensor(turned, dtype=torch.float64)
    spread = float(values.std())
    z = (own - float(values.mean())) / max(spread, 1e-12)
    return PrivilegedBasis(own, float(values.mean()), spread, z, float((values < own).double().mean()))


def _mean_kurtosis(x: Float[Tensor, "tokens d"]) -> float:
    """Mean excess kurtosis of the columns that vary, of centred values."""
    second = x.square().mean(0).double()
    varies = second > 1e-9 * second.max()
    return float((x.pow(4).mean(0).double()[varies] / second[varies].square() - 3).mean())


def describe_latents(
    graph: Graph,
    where: str,
    dictionary: Dictionary,
    latents: list[int],
    data: TokenData,
    held_out: TokenData,
    **options: Any,
) -> list[dict[str, Any]]:
    """Some latents in words with held-out scores: :func:`unweave.drivers.describe` on the refined graph.

    Args:
        options: of :func:`unweave.drivers.describe`.

    Returns:
        A plain row for each latent, in the order given.
    """
    refined = refine_features(graph, {where: dictionary}, {where: [[i] for i in latents]})
    stem = find_site(graph, where).stem
    found = describe(refined, data, held_out, [f"{stem}.latent.{i}" for i in latents], **options)
    rows = {row["node"]: row for row in found.table()}
    return [rows[f"{stem}.latent.{i}"] for i in latents]
