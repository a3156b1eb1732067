"""The short answers that open notebooks 2 to 5, made of the run's own tables.

Each function has its notebook's name and returns Markdown. Shares are in whole percent and differences in
whole points: their intervals are several points wide.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from fortify.evaluation import interval_of
from fortify.intervals import whole_percent

PHANTOMS = "The images are phantoms: these numbers show that the code runs, and say nothing about lungs."
_SPLITS = {
    "random": "**Random split**, near-duplicates of the test slices in training",
    "grouped": "**Grouped split**, test slices of unseen groups",
}


def rarest(labels: Sequence[int], class_names: Sequence[str]) -> str:
    """Name of the class with the fewest slices, of those that have any."""
    counts = np.bincount(labels, minlength=len(class_names)).astype(float)
    return class_names[int(np.where(counts > 0, counts, np.inf).argmin())]


def largest(labels: Sequence[int], class_names: Sequence[str]) -> tuple[str, float]:
    """The class with the most slices, and its share of them."""
    counts = np.bincount(labels, minlength=len(class_names))
    return class_names[int(counts.argmax())], float(counts.max() / counts.sum())


def baseline(
    clean: pd.DataFrame,
    *,
    split: str,
    rare: str,
    largest: tuple[str, float],
    related: tuple[int, int],
    source: str,
) -> str:
    """Notebook 2: ``clean`` is one model's :func:`fortify.evaluation.accuracy_table` on clean slices.

    ``largest``: the largest class and its share of the test slices; ``related``: how many of the test slices
    belong to a group that has slices in training, and of how many.
    """
    row = clean[clean.attack.eq("clean")].iloc[0]
    lines = [
        f"On the {split} split the normally trained network classifies **{_percent(row.accuracy)}** of the "
        f"clean test slices correctly ({row.k} of {row.n}; {_interval(row)})."
    ]
    recall = row[f"recall_{rare}"]
    if not pd.isna(recall):
        lines.append(
            f"*{rare.capitalize()}* is the rarest class. The network classifies {_percent(recall)} of its "
            "slices correctly."
        )
    lines.append(f"Always answering *{largest[0]}* would be correct for {_percent(largest[1])}.")
    if related[0]:
        lines.append(
            f"{_percent(related[0] / related[1])} of the test slices belong to a group that also has slices "
            "in training. So this accuracy says little about unseen groups."
        )
    else:
        lines.append("No test slice belongs to a group that has slices in training: the groups are unseen.")
    return _listed(lines, source)


def attacks(
    accuracy: pd.DataFrame,
    points: pd.DataFrame,
    scores: pd.DataFrame,
    *,
    eps_255: float,
    largest: float,
    pixels: int,
    source: str,
) -> str:
    """Notebook 3: how little breaks the normally trained network.

    ``accuracy``: :func:`fortify.evaluation.accuracy_table` at ``eps_255``; ``points``: its
    :func:`fortify.evaluation.curve`; ``scores``: its :func:`fortify.evaluation.robustness_scores`.
    ``largest``: share of the largest class; ``pixels``: numbers of an image, to say CW's L2 as grey levels.
    """
    of = accuracy[accuracy.protocol.eq("adaptive")].set_index("attack")
    pgd = of.loc["pgd"]
    lines = [
        _half(points[points.attack.eq("pgd")].sort_values("eps_255")),
        f"PGD at {eps_255:g}/255 leaves **{_percent(pgd.accuracy)}** of the test slices correct ({pgd.k} of "
        f"{pgd.n}; {_interval(pgd)}). Without an attack {_percent(of.accuracy['clean'])} are.",
    ]
    if pgd.accuracy < largest:
        lines.append(f"Always answering the largest class would be correct for {_percent(largest)}.")
    lines.append(f"FGSM, a single step, leaves {_percent(of.accuracy['fgsm'])}.")
    score = scores.iloc[0]
    if score.cw_n:
        text = f"CW breaks {score.cw_k} of the {score.cw_n} slices that are correct when clean"
        if np.isfinite(score.cw_median_l2):
            text += f". Its median change has an L2 of {score.cw_median_l2:.2g}, as much as "
            text += f"{255 * score.cw_median_l2 / pixels**0.5:.2g} grey levels in every pixel"
        lines.append(text + ".")
    return _listed(lines, source)


def _half(points):
    """At which of the budgets that were tried PGD breaks half of what is correct when clean."""
    right, tried = points.k.iloc[0], points[points.eps_255.gt(0)]
    if right == 0:
        return "The network classifies no clean slice correctly: there is nothing to break."
    broken, correct = tried[tried.k <= right / 2].eps_255, "of the slices that are correct when clean"
    if broken.empty:
        return f"Even at {tried.eps_255.max():g}/255 PGD breaks fewer than half {correct}."
    first = f"{broken.min():g}/255"
    if broken.min() == tried.eps_255.min():
        first = f"the smallest budget tried, {first},"
    return f"At {first} PGD breaks at least half {correct}."


def adversarial_training(
    accuracy: pd.DataFrame,
    points: pd.DataFrame,
    gains: pd.DataFrame,
    *,
    split: str,
    eps_255: float,
    rare: str,
    source: str,
) -> str:
    """Notebook 4: what adversarial training holds and costs, against normal training on the same slices.

    ``accuracy``: :func:`fortify.evaluation.accuracy_table` of both models; ``points``: the adversarially
    trained one's curve; ``gains``: :func:`fortify.evaluation.paired_gain` of the two.
    """
    of = accuracy.set_index(["model", "protocol", "attack"])
    pgd, normal = (of.loc[(model, "adaptive", "pgd")] for model in ("adversarial", "normal"))
    lines = [
        f"On the {split} split the adversarially trained network classifies **{_percent(pgd.accuracy)}** of "
        f"the test slices correctly under PGD at {eps_255:g}/255 ({pgd.k} of {pgd.n}; {_interval(pgd)}). "
        f"The normally trained one keeps {_percent(normal.accuracy)}.",
        _both_clean(of) + " " + _price(gains),
    ]
    lines += _rare(of, rare)
    last = points[points.attack.eq("pgd") & points.protocol.eq("adaptive")].sort_values("eps_255").iloc[-1]
    if last.eps_255 > eps_255:
        left = f"PGD leaves {_percent(last.accuracy)} correct"
        lines.append(f"At {last.eps_255:g}/255, the largest budget tried, {left}.")
    static = of.accuracy.get(("adversarial", "static", "pgd"))
    if static is not None:
        lines.append(
            f"PGD crafted on the normal model (static), the easier test, leaves {_percent(static)} correct."
        )
    return _listed(lines, source)


def results(
    accuracy: pd.DataFrame,
    gains: pd.DataFrame,
    ahead: pd.DataFrame,
    *,
    eps_255: float,
    rare: str,
    source: str,
) -> str:
    """Notebook 5: both trainings on each split, the price of robust training, and simple classifiers.

    ``accuracy``: :func:`fortify.evaluation.accuracy_table` of all runs; ``gains``:
    :func:`fortify.evaluation.paired_gain`; ``ahead``: :func:`fortify.evaluation.headline_gains` of the simple
    classifiers, without rows where none was run.
    """
    parts = []
    for split, own in accuracy[accuracy.protocol.eq("adaptive")].groupby("split", sort=False):
        of = own.set_index(["model", "protocol", "attack"])
        pgd, normal = (of.loc[(model, "adaptive", "pgd")] for model in ("adversarial", "normal"))
        trained = "one training" if pgd.seeds == 1 else f"{pgd.seeds:.0f} trainings"
        more = gains[gains.split.eq(split) & gains.attack.eq("pgd")].iloc[0]
        lines = [
            f"Under PGD at {eps_255:g}/255 adversarial training classifies **{_percent(pgd.accuracy)}** of "
            f"the test slices correctly ({_interval(pgd)}), and normal training {_percent(normal.accuracy)}. "
            f"The difference is {_points(more.gain_percent, '+')} ({_between(more)}).",
            _both_clean(of) + " " + _price(gains[gains.split.eq(split)]),
            *_rare(of, rare),
            *_ahead(ahead, split),
        ]
        named = f"{_SPLITS.get(split, f'**{split} split**')}; {trained} of each kind:"
        parts.append("\n\n".join([named, "\n".join(f"- {line}" for line in lines)]))
    return _opening("\n\n".join(parts), source)


def _opening(text, source):
    """The answer under its title; of phantoms (``source``) it says what they are."""
    note = f"\n\n*{PHANTOMS}*" if "phantom" in source else ""
    return f"**Short answer of this run**\n\n{text}{note}"


def _listed(lines, source):
    return _opening("\n".join(f"- {line}" for line in lines), source)


def _percent(share):
    return f"{whole_percent(share)} %"


def _interval(row):
    """Of a row of an accuracy table: by groups, where there is one."""
    (low, high), by = interval_of(row), "" if pd.isna(row.group_low) else " by groups"
    return f"95 % interval{by} {100 * low:.0f} to {100 * high:.0f} %"


def _both_clean(of):
    adversarial, normal = (of.accuracy[(m, "adaptive", "clean")] for m in ("adversarial", "normal"))
    clean = f"On clean slices it classifies {_percent(adversarial)} correctly"
    return f"{clean}, and normal training {_percent(normal)}."


def _price(gains):
    """What robust training costs on clean slices, from the clean row of paired gains of one split."""
    row = gains[gains.attack.eq("clean")].iloc[0]
    gain, between = row.gain_percent, _between(row)
    if row.high_percent < 0:
        return f"The price of robust training is **{_points(-gain)}** ({between})."
    if row.low_percent > 0:
        gains = f"it gains **{_points(gain)}** ({between})"
        return f"Beside normal training it costs no clean accuracy: {gains}. Another training would differ."
    unclear = f"the difference, **{_points(gain, '+')}**, could be chance ({between})"
    return f"The price of robust training is not clear: {unclear}."


def _points(gain, sign=""):
    whole = round(gain)
    return f"{whole:{sign}d} point{'s' * (abs(whole) != 1)}"


def _between(row):
    """The interval of a gain in points."""
    return f"95 % interval by groups {round(row.low_percent):+d} to {round(row.high_percent):+d}"


def _rare(of, rare):
    clean, pgd = (of.loc[("adversarial", "adaptive", a), f"recall_{rare}"] for a in ("clean", "pgd"))
    if pd.isna(clean):
        return []
    words = f"*{rare.capitalize()}* is the rarest class. The network classifies {_percent(clean)} of its"
    return [f"{words} slices correctly when clean, and {_percent(pgd)} under PGD."]


def _ahead(ahead, split):
    """Whether a simple classifier is ahead of adversarial training, from headline gains over it."""
    own, said, behind = ahead[ahead.split.eq(split)], [], []
    for attack, where in (("clean", "on clean slices"), ("pgd", "under attack")):
        more = own[own.attack.eq(attack) & own.gain_percent.ge(0.5)]  # a whole point
        if more.empty:
            behind.append(where)
            continue
        best = more.loc[more.gain_percent.idxmax()]
        text = f"A simple classifier, *{best.model}*, is ahead of it {where}"
        if len(more) > 1:
            text = f"{len(more)} simple classifiers are ahead of it {where}. The best, *{best.model}*, leads"
        text += f" by {_points(best.gain_percent)} ({_between(best)})"
        said.append(text + ("." if best.low_percent > 0 else ", which could be chance."))
    if behind and len(own):
        said.append(f"No simple classifier is a point or more ahead of it {' or '.join(behind)}.")
    return said
