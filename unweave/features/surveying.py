"""All there is to say of one place: dictionaries of several sizes beside bases, in one table and one folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from unweave.data import TokenData
from unweave.drivers import Descriptions, describe
from unweave.errors import InputError, StorageError
from unweave.features.bases import find_basis
from unweave.features.comparison import FeatureRow, PrivilegedBasis, compare_features, measure_privilege
from unweave.features.loading import hook_of, save_dictionary
from unweave.features.losses import first_weights
from unweave.features.recipes import Recipe
from unweave.features.refining import refine_features
from unweave.features.sites import find_site
from unweave.features.splitting import Splitting, measure_splitting
from unweave.features.streaming import collect_activations
from unweave.features.training import fit_dictionary
from unweave.files import write_folder, write_json
from unweave.graph import Graph
from unweave.intervals import Estimate
from unweave.ops import Dictionary
from unweave.scope import Scope
from unweave.storage import finite

__all__ = [
    "FeatureSurvey",
    "check_survey_destination",
    "describe_dictionary",
    "survey_features",
    "untrained_dictionary",
]

RESULTS = "features.json"
BASES = ("neuron", "random", "principal", "sparse")


@dataclass(frozen=True)
class FeatureSurvey:
    """Dictionaries and bases of one place.

    Attributes:
        where: the place.
        trained: dictionaries by name.
        rows: of these and of the bases, by name, on held-out data.
        privilege: whether the coordinates themselves are special; None where there is but one.
        splitting: by (smaller, larger), for neighbours in size.
        descriptions: of latents and directions, by name; empty where they were not asked for.
    """

    where: str
    trained: Mapping[str, Dictionary]
    rows: Mapping[str, FeatureRow]
    privilege: PrivilegedBasis | None
    splitting: Mapping[tuple[str, str], Splitting]
    descriptions: Mapping[str, Descriptions]

    def table(self) -> list[dict[str, Any]]:
        """One plain row for each dictionary and basis."""
        out = []
        for name, row in self.rows.items():
            plain = {k: v._asdict() if isinstance(v, Estimate) else v for k, v in row._asdict().items()}
            out.append({"name": name, **plain, **self._described(name)})
        return out

    def _described(self, name: str) -> dict[str, Any]:
        if name not in self.descriptions:
            return {}
        row = self.descriptions[name].summary()[0]
        return {
            "description_score": row["score"],
            "random_description_score": row["random_score"],
            "described": row["labelled"] / row["directions"],
        }

    def facts(self) -> dict[str, Any]:
        """All of it as plain data; of descriptions, each latent's with a label, the best first."""
        pairs = [
            {"small": a, "large": b, "recovered": s.recovered, "split": s.split, "new": s.new}
            for (a, b), s in self.splitting.items()
        ]
        words = {
            name: sorted((r for r in found.table() if r["label"] is not None), key=lambda r: -r["score"])
            for name, found in self.descriptions.items()
        }
        privilege = None if self.privilege is None else self.privilege._asdict()
        facts = {"where": self.where, "rows": self.table(), "privilege": privilege, "splitting": pairs, "words": words}
        plain: dict[str, Any] = finite(facts)
        return plain

    def save(self, folder: str | Path, *, model_name: str | None = None, more: Mapping[str, Any] | None = None) -> Path:
        """Write a folder: each dictionary as SAELens has it in a folder of its name, and features.json.

        Args:
            more: plain data for features.json.

        Raises:
            StorageError: it could not be written.
        """

        def write(temporary: Path) -> None:
            for name, dictionary in self.trained.items():
                save_dictionary(dictionary, temporary / name, hook_name=hook_of(self.where), model_name=model_name)
            write_json(temporary / RESULTS, {"format": "unweave-features", **self.facts(), **(more or {})})

        write_folder(folder, write)
        return Path(folder)


def survey_features(
    graph: Graph,
    where: str,
    data: TokenData,
    held_out: TokenData,
    recipes: Mapping[str, Recipe],
    *,
    bases: Sequence[str] = BASES,
    scope: Scope | None = None,
    tokens: int = 200_000,
    describe_all: bool = False,
    token_strings: Sequence[str] | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> FeatureSurvey:
    """Train dictionaries of one place and hold them against bases on held-out data.

    Activations are collected once for all dictionaries: a forward pass costs more than a step of a small dictionary.

    Args:
        where: see :mod:`unweave.features.sites`.
        recipes: by name; a dictionary of the same size with random columns stands beside each "topk".
        bases: of :data:`unweave.features.BASIS_KINDS`, all but "fisher".
        scope: only positions that it looks at.
        tokens: activations to train on, at most.
        describe_all: describe every latent and direction in words (:func:`unweave.drivers.describe`).

    Returns:
        :class:`FeatureSurvey`.

    Raises:
        UnknownNameError: no such place.
        InputError: no recipe, "fisher", or descriptions of the residual stream, which is no node.
        EmptyDataError: no token is looked at.

    Cost:
        A pass for the activations (memory: tokens x width), the trainings, and those of :func:`compare_features`.

    Exact?
        As :func:`compare_features`. Where training and held-out text share documents the rows flatter.

    Example:
        >>> import unweave
        >>> graph, data = unweave.capture("zoo:induction"), unweave.load_data("zoo:induction", limit=32)
        >>> recipes = {"topk-96": Recipe(96, k=8, steps=20, tokens=128)}
        >>> found = survey_features(graph, "blocks.0.attn", *data.split(held_out=0.5), recipes, bases=("neuron",))
        >>> list(found.rows)
        ['neuron', 'topk-96', 'topk-96, random columns']
    """
    site = find_site(graph, where)
    if not recipes or "fisher" in bases:
        raise InputError("give at least one recipe, and bases other than 'fisher' (see compare_features for it)")
    if describe_all and site.kind == "stream":
        raise InputError(f"{where!r} is the residual stream, which is no node: it cannot be described")
    x = collect_activations(graph, where, data, scope=scope, limit=tokens, batch_size=batch_size)
    options: dict[str, Any] = {"scope": scope, "seed": seed}
    rows = {kind: find_basis(graph, where, data, kind, limit=min(tokens, 20_000), **options) for kind in bases}
    trained = {name: fit_dictionary(x, recipe, progress=progress) for name, recipe in recipes.items()}
    for name, recipe in recipes.items():
        rows[name] = trained[name]
        if recipe.kind == "topk":
            rows[f"{name}, random columns"] = untrained_dictionary(x, recipe)
    passes: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "seed": seed}
    table = compare_features(graph, where, rows, held_out, scope, **passes)
    words = {}
    if describe_all:
        passes |= {"scope": scope, "token_strings": token_strings}
        words = {name: describe_dictionary(graph, where, d, data, held_out, **passes) for name, d in rows.items()}
    privilege = measure_privilege(graph, where, held_out, **options) if site.width > 1 else None
    sizes = sorted(trained, key=lambda name: trained[name].n_latents)
    splits = {(a, b): measure_splitting(trained[a], trained[b]) for a, b in pairwise(sizes)}
    return FeatureSurvey(where, trained, table, privilege, splits, words)


def check_survey_destination(folder: str | Path, overwrite: bool = False) -> None:
    """Refuse a folder that a survey must not replace: ask before a long computation.

    Raises:
        StorageError: it is a file, it holds anything but a survey, or a survey is there and ``overwrite`` is False.
    """
    folder = Path(folder)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise StorageError(f"{folder} is a file; choose another name")
    entries = list(folder.iterdir())
    strange = [e.name for e in entries if e.name != RESULTS and not (e / "cfg.json").is_file()]
    if strange or (entries and not (folder / RESULTS).is_file()):
        what = min(strange, default=f"no {RESULTS}")
        raise StorageError(f"{folder} exists and is no survey of features ({what}); choose another name")
    if entries and not overwrite:
        raise StorageError(f"{folder} exists; pass overwrite=True (--overwrite) to replace it")


def untrained_dictionary(x: Float[Tensor, "tokens d"], recipe: Recipe) -> Dictionary:
    """What a "topk" training of these vectors starts from: random unit columns, read by their transpose.

    Raises:
        InputError: another kind.
    """
    if recipe.kind != "topk":
        raise InputError(f"only 'topk' says by itself how many latents are active, got {recipe.kind!r}")
    columns = first_weights(recipe, x.shape[1], x.shape[1], x.device)["decoder"]
    mean = x.float().mean(0)
    return Dictionary(columns.T, -columns.T @ mean, columns, mean, "topk", recipe.k)


def describe_dictionary(
    graph: Graph,
    where: str,
    dictionary: Dictionary,
    data: TokenData,
    held_out: TokenData,
    *,
    first: int | None = None,
    **options: Any,
) -> Descriptions:
    """Every latent of a dictionary in words, with scores on held-out text.

    Args:
        first: only so many. Training starts at random columns, so the first latents are a random sample of all.
        options: of :func:`unweave.drivers.describe`.

    Returns:
        Its items in the order of the latents.

    Raises:
        InputError: the place is the residual stream, or the graph reads no tokens.
    """
    n = dictionary.n_latents if first is None else min(first, dictionary.n_latents)
    refined = refine_features(graph, {where: dictionary}, {where: [list(range(n))]})
    stem = find_site(graph, where).stem
    return describe(refined, data, held_out, [f"{stem}.latents.0" if n > 1 else f"{stem}.latent.0"], **options)
