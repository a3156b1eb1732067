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
    spoken,
)

__all__ = [
    "CONTROLS",
    "METHODS",
    "alignment",
    "attribute",
    "average_precision",
    "concentration",
    "control",
    "deletion_insertion",
    "hits",
    "located",
    "located_layout",
    "measured",
    "randomised",
    "rank_correlation",
    "sanity",
    "spoken",
]
