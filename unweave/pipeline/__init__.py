"""The main job in one call: a model and data in, an executable compressed graph with its account out."""

from unweave.pipeline.decompiling import Decompiled, data_for, decompile, default_scope
from unweave.pipeline.facts import edge_facts, node_facts, token_strings
from unweave.pipeline.provenance import stamp

__all__ = ["Decompiled", "data_for", "decompile", "default_scope", "edge_facts", "node_facts", "stamp", "token_strings"]
