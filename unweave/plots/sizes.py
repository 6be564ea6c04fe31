"""How faithful circuits of several sizes are."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes

from unweave.circuits.curve import FaithfulnessCurve
from unweave.errors import InputError
from unweave.plots.style import GREY, axes_of, legend, named, styles

__all__ = ["circuit_sizes"]


def circuit_sizes(curves: FaithfulnessCurve | Mapping[str, FaithfulnessCurve], ax: Axes | None = None) -> Axes:
    """Faithfulness of circuits against the share of all edges that they were given, 95% intervals over prompts.

    Args:
        curves: one ranking's, or several by name, such as ``dissect(...).curves``.
        ax: where to draw; a figure of its own without.

    Returns:
        The axes; 0 is the empty circuit and 1 the whole graph, drawn as lines.

    Raises:
        InputError: no curve.

    Example:
        >>> from unweave.circuits.curve import FaithfulnessCurve
        >>> from unweave.intervals import Estimate
        >>> f = (Estimate(0.4, 0.3, 0.5), Estimate(1.0, 1.0, 1.0))
        >>> ax = circuit_sizes(FaithfulnessCurve((0.1, 1.0), (8, 80), f, (1.0, 0.0), 0.6, 0.3))
        >>> ax.containers[0].lines[0].get_ydata().tolist()
        [0.4, 1.0]
    """
    several = {"circuit": curves} if isinstance(curves, FaithfulnessCurve) else curves
    if not several:
        raise InputError("there is no curve to draw: give at least one FaithfulnessCurve")
    ax = axes_of(ax)
    for level in (0.0, 1.0):
        ax.axhline(level, color=GREY, linewidth=1, linestyle=":")
    for (name, curve), style in zip(several.items(), styles(len(several)), strict=True):
        value, low, high = np.array(curve.faithfulness).T
        ends = np.stack([value - low, high - value]).clip(min=0)
        label = named(f"{name}, CPR {curve.cpr:.2f}")
        ax.errorbar(curve.shares, value, ends, label=label, markersize=5, elinewidth=1, capsize=2, **style)
    ax.set_xscale("log")
    ticks = sorted({share for curve in several.values() for share in curve.shares})
    ax.set_xticks(ticks, [f"{share:.3g}" for share in np.array(ticks) * 100], rotation=45)
    ax.minorticks_off()
    ax.set_xlabel("size (% of all edges)")
    ax.set_ylabel("faithfulness")
    legend(ax)
    return ax
