"""Linear probes: which concept can be read where and when in training, and whether what is read there is used."""

from unweave.probes.coding import OnlineCode, online_code
from unweave.probes.concepts import Concept, control_task, label_concept, token_concept
from unweave.probes.effects import ProbeEffect, probe_effect
from unweave.probes.fitting import LinearProbe, ProbeSums, fit_probe, probe_sums
from unweave.probes.logistic import fit_logistic, logistic_probe
from unweave.probes.tables import ProbeRow, ProbeTable, probe_table, stream_places

__all__ = [
    "Concept",
    "LinearProbe",
    "OnlineCode",
    "ProbeEffect",
    "ProbeRow",
    "ProbeSums",
    "ProbeTable",
    "control_task",
    "fit_logistic",
    "fit_probe",
    "label_concept",
    "logistic_probe",
    "online_code",
    "probe_effect",
    "probe_sums",
    "probe_table",
    "stream_places",
    "token_concept",
]
