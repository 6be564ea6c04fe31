"""What nodes compute: a stage reads the stream through norms and linear maps, a core mixes, a linear map writes."""

from unweave.ops.blocks import BlockMap, DenseBlocks, Joined, Pair, Places
from unweave.ops.convolution import Convolution, slid_size
from unweave.ops.cores import ACTIVATIONS, Activation, Attention, Context, Core, FloatInput, Lookup, Readout, Rotary
from unweave.ops.dictionaries import LATENT_ACTIVATIONS, Dictionary
from unweave.ops.feature_core import FeatureCore
from unweave.ops.linear import (
    Dense,
    Identity,
    LinearMap,
    LowRank,
    Masked,
    Pivoted,
    Placed,
    Repeated,
    Stacked,
    mask_numbers,
)
from unweave.ops.norms import LayerNorm, Norm, RMSNorm, norm_bias, wide
from unweave.ops.pooling import Chain, Pool

__all__ = [
    "ACTIVATIONS",
    "LATENT_ACTIVATIONS",
    "Activation",
    "Attention",
    "BlockMap",
    "Chain",
    "Context",
    "Convolution",
    "Core",
    "Dense",
    "DenseBlocks",
    "Dictionary",
    "FeatureCore",
    "FloatInput",
    "Identity",
    "Joined",
    "LayerNorm",
    "LinearMap",
    "LowRank",
    "Lookup",
    "Masked",
    "Norm",
    "Pair",
    "Pivoted",
    "Placed",
    "Places",
    "Pool",
    "RMSNorm",
    "Readout",
    "Rotary",
    "Repeated",
    "Stacked",
    "mask_numbers",
    "norm_bias",
    "slid_size",
    "wide",
]
