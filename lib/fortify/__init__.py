"""Attacks, adversarial training and evaluation of image classifiers.

The core takes any classifier of images (N, C, H, W) in [0, 1]: attacks, scoring, evaluation, tables, figures,
training, objectives, models, data, splits. Beside it: audit, leakage, examined (the published paper) and
workflow (this project's plumbing).
Importing the package imports none of them: ``from fortify.attacks import PGD, craft``.
"""
