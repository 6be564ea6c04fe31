"""Universality: the same nodes, edges, subspaces and features in two networks, and one in the other's place."""

from unweave.universality.aligning import align_tokens, load_aligned
from unweave.universality.matching import EdgeAgreement, Matching, NodePair, compare_edges, match, similarities
from unweave.universality.similarity import CrossMoments, cross_moments, linear_cka, procrustes, svcca
from unweave.universality.spaces import FeatureMatches, match_features, mean_max_cosine, principal_cosines
from unweave.universality.stitching import Stitch, StitchLoss, fit_stitch, stitch

__all__ = [
    "CrossMoments",
    "EdgeAgreement",
    "FeatureMatches",
    "Matching",
    "NodePair",
    "Stitch",
    "StitchLoss",
    "align_tokens",
    "compare_edges",
    "cross_moments",
    "fit_stitch",
    "linear_cka",
    "load_aligned",
    "match",
    "match_features",
    "mean_max_cosine",
    "principal_cosines",
    "procrustes",
    "similarities",
    "stitch",
    "svcca",
]
