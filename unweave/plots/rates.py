"""Rate against distortion: what a share of the numbers costs in nats, next to the baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from unweave.errors import InputError
from unweave.intervals import Estimate
from unweave.pipeline import Decompiled
from unweave.plots.style import axes_of, legend, named, styles

__all__ = ["Curves", "rate_distortion"]

Curves = Mapping[str, Sequence[tuple[float, Estimate]]]


def rate_distortion(found: Decompiled | Curves, ax: Axes | None = None) -> Axes:
    """Divergence on held-out data, in nats per token, against the share of the channels' numbers that is stored.

    Args:
        found: what :func:`unweave.decompile` gives; or, by method, (share, divergence) pairs such as its ``curve``.
        ax: where to draw; a figure of its own without.

    Returns:
        The axes: one line per method with its 95% intervals, nats on a log scale. Divergences that are 0 or less are
        beyond the scale and not drawn.

    Raises:
        InputError: no curve.

    Example:
        >>> ax = rate_distortion({"unweave": [(0.5, Estimate(0.1, 0.08, 0.12)), (0.3, Estimate(0.4, 0.3, 0.5))]})
        >>> ax.get_lines()[0].get_ydata().tolist()
        [0.4, 0.1]
    """
    curves = found.curve if isinstance(found, Decompiled) else found
    if not curves or not all(curves.values()):
        raise InputError("there is no curve to draw: give (share, divergence) pairs for at least one method")
    ax = axes_of(ax)
    for (name, points), style in zip(curves.items(), styles(len(curves)), strict=True):
        sizes, values, low, high = np.array(sorted((size, *kl) for size, kl in points)).T
        ax.plot(sizes, values, label=named(name), markersize=5, **style)
        ax.fill_between(sizes, low, high, color=style["color"], alpha=0.2, linewidth=0)
    ax.set_yscale("log", nonpositive="mask")
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.set_xlabel("size (share of the channels' numbers)")
    ax.set_ylabel("divergence (nats per token)")
    legend(ax)
    return ax
