"""Do attacks, networks and what was learned carry over: to other models, other patients, another dataset?"""

from fortify.transfer.answer import nodule_answer, transfer_answer
from fortify.transfer.crafting import (
    Ensemble,
    InputDiverse,
    Momentum,
    random_signs,
    transfer_table,
    transferred,
)
from fortify.transfer.networks import Regime, attackers_share, regimes_of, trained
from fortify.transfer.nodules import (
    Study,
    attack_layout,
    attacked_nodules,
    attacked_table,
    clean_logits,
    gains_over_size,
    group_agreement,
    nodule_accuracies,
    nodule_folds,
    nodule_layout,
    open_study,
    size_logits,
    trained_on_folds,
    with_frozen_features,
)

__all__ = [
    "Ensemble",
    "InputDiverse",
    "Momentum",
    "Regime",
    "Study",
    "attack_layout",
    "attacked_nodules",
    "attacked_table",
    "attackers_share",
    "clean_logits",
    "gains_over_size",
    "group_agreement",
    "nodule_accuracies",
    "nodule_answer",
    "nodule_folds",
    "nodule_layout",
    "open_study",
    "random_signs",
    "regimes_of",
    "size_logits",
    "trained",
    "trained_on_folds",
    "transfer_answer",
    "transfer_table",
    "transferred",
    "with_frozen_features",
]
