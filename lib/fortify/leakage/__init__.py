"""How much of the accuracy is memory? The leak meter for image folders, and probes of what models use."""

from fortify.leakage.meter import (
    CLASSIFIERS,
    KNOWN_SCANS,
    SHORTCUT_CUES,
    LeakClassifier,
    draw_splits,
    duplicates,
    group_sensitivity,
    group_table,
    leak_meter,
    near_duplicates,
    scan_recovery,
    shortcut_cues,
    summary,
)
from fortify.leakage.probes import craft_within, lungs_or_scanner, views

__all__ = [
    "CLASSIFIERS",
    "KNOWN_SCANS",
    "SHORTCUT_CUES",
    "LeakClassifier",
    "craft_within",
    "draw_splits",
    "duplicates",
    "group_sensitivity",
    "group_table",
    "leak_meter",
    "lungs_or_scanner",
    "near_duplicates",
    "scan_recovery",
    "shortcut_cues",
    "summary",
    "views",
]
