"""Figures with their intervals, side by side: hypotheses, scrubbing, and whatever else has a 95% interval."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from matplotlib import rcParams
from matplotlib.axes import Axes

from unweave.errors import InputError
from unweave.falsification import Scrubbed
from unweave.hypotheses import Interchange
from unweave.intervals import UNKNOWN, Estimate
from unweave.plots.style import COLOURS, GREY, axes_of, label_ticks, legend, named

__all__ = ["interchange_bars", "interval_bars", "scrubbed_bars"]

THICKNESS = 0.8


def interval_bars(
    groups: Mapping[str, Mapping[str, Estimate]], ax: Axes | None = None, *, unit: str = "nats per token"
) -> Axes:
    """Bars with 95% intervals: a group of bars per name, a colour per kind.

    Args:
        groups: by name, then by kind, figures of one unit; every group has the same kinds. NaN is not drawn.
        ax: where to draw; a figure of its own without.
        unit: of all figures.

    Returns:
        The axes, the first group on top.

    Raises:
        InputError: no figure, groups of different kinds, or more kinds than colours (6).

    Example:
        >>> ax = interval_bars({"mine": {"lost": Estimate(0.2, 0.1, 0.4)}})
        >>> float(ax.patches[0].get_width()), ax.get_xlabel()
        (0.2, 'nats per token')
    """
    kinds = list(next(iter(groups.values()), {}))
    colours = (*COLOURS, GREY)
    if not kinds:
        raise InputError("there is no figure to draw: give at least one group with one estimate")
    if any(list(group) != kinds for group in groups.values()):
        raise InputError(f"every group must have the kinds of the first, {', '.join(kinds)}, in that order")
    if len(kinds) > len(colours):
        raise InputError(f"{len(kinds)} kinds cannot be told apart by {len(colours)} colours; draw fewer at a time")
    n = len(kinds)
    ax = axes_of(ax, 6.4, min(1.3 + 0.28 * n * len(groups), 10.0))
    for place, kind in enumerate(kinds):
        value, low, high = np.array([group[kind] for group in groups.values()], dtype=np.float64).T
        at = np.arange(len(groups)) + ((place + 0.5) / n - 0.5) * THICKNESS
        ax.barh(at, value, THICKNESS / n, color=colours[place], label=named(kind))
        ax.errorbar(value, at, xerr=_ends(value, low, high), fmt="none", elinewidth=1.2, capsize=3, ecolor=_ink())
    label_ticks(ax.yaxis, list(groups))
    ax.invert_yaxis()
    ax.set_xlabel(unit)
    legend(ax, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=n)
    return ax


def scrubbed_bars(results: Scrubbed | Mapping[str, Scrubbed], ax: Axes | None = None) -> Axes:
    """How much of a behaviour is left when only what a hypothesis names is kept: shares recovered, with intervals.

    Args:
        results: of :func:`unweave.falsification.scrub`; several hypotheses by name.
        ax: where to draw; a figure of its own without.

    Returns:
        The axes; 1 is the network, 0 is everything resampled.

    Raises:
        InputError: no result.
    """
    several = {"hypothesis": results} if isinstance(results, Scrubbed) else results
    groups = {
        name: {"of the loss": found.loss_recovered, "of the divergence": found.recovered}
        for name, found in several.items()
    }
    ax = interval_bars(groups, ax, unit="share recovered")
    ax.axvline(1.0, color=GREY, linewidth=1, linestyle=":")
    return ax


def interchange_bars(found: Interchange, ax: Axes | None = None) -> Axes:
    """Interchange-intervention accuracy of each set of variables next to its controls, as shares of effective pairs.

    Args:
        found: of :func:`unweave.hypotheses.interchange_accuracy`.
        ax: where to draw; a figure of its own without.

    Returns:
        The axes. "elsewhere" is the mean over the other places; its interval is their range.

    Raises:
        InputError: no variables.
    """
    groups = {
        name: {
            "at the hypothesis' sites": accuracy.effective,
            "elsewhere (range)": _range([other.effective.value for other in found.elsewhere[name]]),
            "answers of another source": found.mislabelled[name].effective,
        }
        for name, accuracy in found.accuracy.items()
    }
    ax = interval_bars(groups, ax, unit="interchange accuracy (share of effective pairs)")
    ax.axvline(1.0, color=GREY, linewidth=1, linestyle=":")
    return ax


def _range(values: list[float]) -> Estimate:
    if not values:
        return UNKNOWN
    return Estimate(float(np.mean(values)), min(values), max(values))


def _ends(value: np.ndarray, low: np.ndarray, high: np.ndarray) -> Float[np.ndarray, "2 bars"]:
    """Lengths of an interval to either side, at least 0."""
    return np.stack([value - low, high - value]).clip(min=0)


def _ink() -> str:
    """The colour of text in the style in use."""
    return str(rcParams["text.color"])
