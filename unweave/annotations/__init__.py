"""What a page tells of single nodes and kinds of data: plain rows for :class:`unweave.report.ReportData`."""

from unweave.annotations.drivers import driver_facts
from unweave.annotations.kernels import page_kind, with_kernels
from unweave.annotations.kinds import kind_facts, label_kinds
from unweave.annotations.pairs import pair_facts

__all__ = ["driver_facts", "kind_facts", "label_kinds", "page_kind", "pair_facts", "with_kernels"]
