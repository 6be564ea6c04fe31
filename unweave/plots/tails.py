"""The tail of a divergence: on how few tokens a graph is far from its network."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from unweave.errors import InputError
from unweave.evaluation import Faithfulness
from unweave.plots.style import axes_of, legend, named, styles

__all__ = ["kl_tail"]


def kl_tail(rows: Faithfulness | Mapping[str, Faithfulness], ax: Axes | None = None) -> Axes:
    """The share of tokens that are at least so many nats off: the survival function, on two log scales.

    The worst tokens that an evaluation kept are exact, the k-th largest of n tokens at k / n; below them stand the
    99.9% and 99% quantiles, good to 1%. For more of the curve, evaluate with a larger ``n_worst``.

    Args:
        rows: of :func:`unweave.evaluate`, one or several by name; those that are nowhere off (the original) are left
            out.
        ax: where to draw; a figure of its own without.

    Returns:
        The axes, a line per graph.

    Raises:
        InputError: no graph is off anywhere.

    Example:
        >>> from unweave.evaluation import Faithfulness
        >>> from unweave.intervals import Estimate
        >>> one, worst = Estimate(0.1, 0.0, 0.2), ((2.0, 0, 3, (1, 2), 4, 5), (1.0, 0, 1, (1,), 4, 5))
        >>> ax = kl_tail(Faithfulness(one, one, one, one, 0.5, 0.9, 2.0, worst, 1, 1000))
        >>> [line.get_ydata().tolist() for line in ax.get_lines()]
        [[0.01, 0.002, 0.001]]
    """
    several = {"graph": rows} if isinstance(rows, Faithfulness) else rows
    off = {name: row for name, row in several.items() if row.kl_max > 0}
    if not off:
        raise InputError("no graph is off at any token, so there is no tail to draw")
    ax = axes_of(ax)
    for (name, row), style in zip(off.items(), styles(len(off)), strict=True):
        nats, share = _tail(row)
        ax.plot(nats, share, label=named(name), markersize=4, linewidth=1, **style)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g}%"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("divergence at a token (nats)")
    ax.set_ylabel("share of tokens with at least that")
    legend(ax)
    return ax


def _tail(row: Faithfulness) -> tuple[np.ndarray, np.ndarray]:
    """(nats rising, share of tokens at least so far off)."""
    known = [(nats, (k + 1) / row.n_tokens) for k, (nats, *_) in enumerate(row.worst)] or [
        (row.kl_max, 1 / row.n_tokens)
    ]
    least, reached = known[-1]
    known += [(nats, q) for nats, q in ((row.kl_p999, 1e-3), (row.kl_p99, 1e-2)) if q > reached and 0 < nats <= least]
    nats, share = np.array([pair for pair in reversed(known) if pair[0] > 0]).T
    return nats, share
