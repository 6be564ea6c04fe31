"""A live page on a graph folder: what is used on each token of a text, and what changes when a part is ablated."""

from unweave.serving.application import make_app, serve
from unweave.serving.reading import Reading, measure_node, read_text

__all__ = ["Reading", "make_app", "measure_node", "read_text", "serve"]
