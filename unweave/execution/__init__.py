"""Run a graph: the one executor for full, cut and compressed graphs.

Where nothing is cut, all ports of a stage share one residual sum and one matrix product, as in the model
itself. Where edges are cut, ports that hear the same writers share their sum, and all sums of a stage are
one matrix product of its edge table with what was written. Where every writer has a place of its own in the stream
(feature maps), cut edges are zeros in the readers' kernels and nothing has to be summed. There is no loop over edges,
heads or tokens.
"""

from unweave.execution.hooks import BEFORE, Patch
from unweave.execution.plans import PortPlan, StagePlan, plan_of, write_each
from unweave.execution.runs import Run, check_inputs, run, uncut
from unweave.execution.stages import finish_stage, run_stages, trace
from unweave.execution.traces import Trace

__all__ = [
    "BEFORE",
    "Patch",
    "PortPlan",
    "Run",
    "StagePlan",
    "Trace",
    "check_inputs",
    "finish_stage",
    "plan_of",
    "run",
    "run_stages",
    "trace",
    "uncut",
    "write_each",
]
