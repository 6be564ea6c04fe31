"""Rate and distortion: a graph that stores fewer numbers and loses as few nats as it can.

Each channel becomes a narrow read, a core and a narrow write, or keeps some of its single weights, chosen by what real
data send through it and by what the output feels of it. See :mod:`unweave.compression.channels` for the choices of the
first form, ``factors`` for its closed forms, ``masks`` and ``compensation`` for the second form, ``refinement`` for the
short training that can follow either.
"""

from unweave.compression.allocation import compress
from unweave.compression.moments import ChannelMoments, channel_moments, survey
from unweave.compression.refinement import refine_factors

__all__ = ["ChannelMoments", "channel_moments", "compress", "refine_factors", "survey"]
