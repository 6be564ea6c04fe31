"""The choices that compression has for one channel, priced in stored numbers and in nats.

A *part* is something that can be made smaller on its own: a read matrix, the values of a key-value head with
its output matrix, an MLP. For a price per number it answers with its best choice; the global allocation is one
price for all parts, which is what reverse water-filling comes to.
"""

from __future__ import annotations

from unweave.compression.head_parts import QueryKeyPart, ValueOutputPart
from unweave.compression.mlp_parts import MlpPart
from unweave.compression.moments import ChannelMoments
from unweave.compression.parts import Part
from unweave.compression.reads import ReadPart
from unweave.graph import Stage
from unweave.ops import Attention, Identity

__all__ = ["channel_parts"]


def channel_parts(stage: Stage, moments: ChannelMoments) -> list[Part]:
    """The parts of an attention or MLP stage."""
    if isinstance(stage.write, Identity):  # its neurons are the stream of the next layer: none can go
        return [ReadPart(stage, moments, 0)]
    if not isinstance(stage.core, Attention):
        return [MlpPart(stage, moments)]
    core = stage.core
    parts: list[Part] = []
    product = core.rotary is None and core.q_norm is None and core.k_norm is None and core.softcap is None
    if product:
        parts.append(QueryKeyPart(stage, moments))
    else:
        parts += [ReadPart(stage, moments, 0), ReadPart(stage, moments, 1)]
    parts.append(ValueOutputPart(stage, moments))
    return parts
