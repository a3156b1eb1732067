"""What a network's prediction rests on, measured: attribution maps, and how far they can be believed."""

from fortify.explain.attributions import CONTROLS, METHODS, attribute, control
from fortify.explain.measures import (
    alignment,
    average_precision,
    concentration,
    deletion_insertion,
    hits,
    located,
    located_layout,
    measured,
    randomised,
    rank_correlation,
    sanity,
)
from fortify.explain.study import (
    aligned,
    aligned_layout,
    clean_and_attacked,
    explained,
    idle_networks,
    spoken,
)

__all__ = [
    "CONTROLS",
    "METHODS",
    "aligned",
    "aligned_layout",
    "alignment",
    "attribute",
    "average_precision",
    "clean_and_attacked",
    "concentration",
    "control",
    "deletion_insertion",
    "explained",
    "hits",
    "idle_networks",
    "located",
    "located_layout",
    "measured",
    "randomised",
    "rank_correlation",
    "sanity",
    "spoken",
]
