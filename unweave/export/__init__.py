"""Export and import: graphs and scores in the formats of other programs."""

from unweave.export.attribution import Prompt, to_attribution_graph
from unweave.export.eap import from_eap_json, to_eap_json
from unweave.export.mib import MibEntry, check_mib, to_mib
from unweave.export.network import to_dot, to_graphml, to_networkx

__all__ = [
    "MibEntry",
    "Prompt",
    "check_mib",
    "from_eap_json",
    "to_attribution_graph",
    "to_dot",
    "to_eap_json",
    "to_graphml",
    "to_mib",
    "to_networkx",
]
