"""Attacks, adversarial training and evaluation for small grey-image classifiers.

Rooms: data, phantom, splits, models, attacks, training, evaluation, figures, tables, runs.
Importing the package imports none of them: ``from fortify.attacks import PGD, craft``.
"""
