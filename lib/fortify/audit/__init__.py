"""Can a robustness figure be believed? :func:`audit` runs the checks of a careful reviewer on any model."""

from fortify.audit.context import FAIL, NOT_RUN, PASS, AuditData, Check, Suite
from fortify.audit.report import Audit, accuracies_side_by_side, audit, remarks

__all__ = [
    "FAIL",
    "NOT_RUN",
    "PASS",
    "Audit",
    "AuditData",
    "Check",
    "Suite",
    "accuracies_side_by_side",
    "audit",
    "remarks",
]
