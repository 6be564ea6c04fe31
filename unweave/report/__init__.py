"""Results as one self-contained HTML page that opens from disk.

The page is a template, a style sheet and a script (the folder viewer) with the data beside them as JSON
(:mod:`unweave.report.facts` is the format).
"""

from unweave.report.checking import MAX_EDGES, validate_report_data
from unweave.report.facts import (
    Curve,
    CurvePoint,
    FaithfulnessRow,
    ModelFacts,
    PredictionPoint,
    ProofRow,
    ReportData,
    ScopeFacts,
    WorstToken,
)
from unweave.report.figures import Interval
from unweave.report.modules import (
    InterfaceDirection,
    InterfaceRow,
    ModuleBand,
    ModuleEffectRow,
    ModulesFacts,
    NullFigure,
    NullTestRow,
    PartitionFacts,
    TokenInContext,
    TrafficFacts,
)
from unweave.report.nodes import (
    DescriptionFacts,
    DirectionFacts,
    DriverFacts,
    EdgeFacts,
    ExampleFacts,
    KindFacts,
    NodeFacts,
    PatternFacts,
    ReadDirection,
    WriteDirection,
)
from unweave.report.page import bundle, render_report, write_report

__all__ = [
    "Curve",
    "CurvePoint",
    "DescriptionFacts",
    "DirectionFacts",
    "DriverFacts",
    "EdgeFacts",
    "ExampleFacts",
    "FaithfulnessRow",
    "InterfaceDirection",
    "InterfaceRow",
    "Interval",
    "KindFacts",
    "MAX_EDGES",
    "ModelFacts",
    "ModuleBand",
    "ModuleEffectRow",
    "ModulesFacts",
    "NodeFacts",
    "NullFigure",
    "NullTestRow",
    "PartitionFacts",
    "PatternFacts",
    "PredictionPoint",
    "ProofRow",
    "ReadDirection",
    "ReportData",
    "ScopeFacts",
    "TokenInContext",
    "TrafficFacts",
    "WorstToken",
    "WriteDirection",
    "bundle",
    "render_report",
    "validate_report_data",
    "write_report",
]
