"""Bases and dictionaries of nodes, layers and the residual stream, and graphs refined by them."""

from unweave.features.activity import Activity, measure_activity
from unweave.features.bases import BASIS_KINDS, find_basis, refine_basis, rotate_sparse
from unweave.features.comparison import (
    FeatureRow,
    PrivilegedBasis,
    compare_features,
    describe_latents,
    measure_privilege,
)
from unweave.features.components import Components, Recovery, find_components, node_components, recovery
from unweave.features.equivariance import Matches, map_responses, match_kernels, match_responses, shuffle_pixels
from unweave.features.geometry import dimensionality, features_per_dimension, interference
from unweave.features.importance import Importance, feature_importance
from unweave.features.loading import Loaded, hook_of, load_dictionary, place_of, save_dictionary
from unweave.features.polysemanticity import Polysemanticity, polysemanticity
from unweave.features.recipes import Recipe
from unweave.features.refining import refine_features
from unweave.features.sites import Site, find_site
from unweave.features.splitting import Splitting, measure_splitting
from unweave.features.streaming import ActivationStream, collect_activations
from unweave.features.surveying import (
    FeatureSurvey,
    check_survey_destination,
    describe_dictionary,
    survey_features,
    untrained_dictionary,
)
from unweave.features.training import fit_dictionary, train_dictionary
from unweave.ops import Dictionary

__all__ = [
    "ActivationStream",
    "Activity",
    "BASIS_KINDS",
    "Components",
    "Dictionary",
    "FeatureRow",
    "FeatureSurvey",
    "Importance",
    "Loaded",
    "Matches",
    "Polysemanticity",
    "PrivilegedBasis",
    "Recipe",
    "Recovery",
    "Site",
    "Splitting",
    "check_survey_destination",
    "collect_activations",
    "compare_features",
    "describe_dictionary",
    "describe_latents",
    "dimensionality",
    "feature_importance",
    "features_per_dimension",
    "find_basis",
    "find_components",
    "find_site",
    "fit_dictionary",
    "hook_of",
    "interference",
    "load_dictionary",
    "map_responses",
    "match_kernels",
    "match_responses",
    "measure_activity",
    "measure_privilege",
    "measure_splitting",
    "node_components",
    "place_of",
    "polysemanticity",
    "recovery",
    "refine_basis",
    "refine_features",
    "rotate_sparse",
    "save_dictionary",
    "shuffle_pixels",
    "survey_features",
    "train_dictionary",
    "untrained_dictionary",
]
