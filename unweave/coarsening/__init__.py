"""Coarser questions need less: a partial order of scopes, what each needs, and what drops out on the way down."""

from unweave.coarsening.lattice import Lattice, join, lattice, meet, refines
from unweave.coarsening.needs import BY, Need, Needs, Step, Violation, dimensions, what_it_needs
from unweave.coarsening.table import subset_by_quotient

__all__ = [
    "BY",
    "Lattice",
    "Need",
    "Needs",
    "Step",
    "Violation",
    "dimensions",
    "join",
    "lattice",
    "meet",
    "refines",
    "subset_by_quotient",
    "what_it_needs",
]
