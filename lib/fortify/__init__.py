"""Attacks, adversarial training and evaluation for small grey-image classifiers.

Rooms: data, phantom, splits, models, attacks, folding, training, evaluation, figures, tables, runs;
beyond the paper: published, printed, claims, leakage, regions, audit (and audit_context, audit_checks,
audit_zoo), autoattack, figures_beyond.
Importing the package imports none of them: ``from fortify.attacks import PGD, craft``.
"""
