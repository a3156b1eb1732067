"""Does a detector protect the network? Detectors of attacked slices, and attackers who know them."""

from fortify.detect.adaptive import STRATEGIES, Evasion, choose, evade, examine
from fortify.detect.detectors import DETECTORS, Detector, calibrate, load_detectors, save_detectors
from fortify.detect.measures import false_alarms, implied, latency, score_rows, summary

__all__ = [
    "DETECTORS",
    "STRATEGIES",
    "Detector",
    "Evasion",
    "calibrate",
    "choose",
    "evade",
    "examine",
    "false_alarms",
    "implied",
    "latency",
    "load_detectors",
    "save_detectors",
    "score_rows",
    "summary",
]
