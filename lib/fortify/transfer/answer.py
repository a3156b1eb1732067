"""The sentences that open notebook 11, made of the run's own tables."""

import pandas as pd

from fortify.intervals import whole_percent
from fortify.transfer.crafting import NOISE, OTHERS
from fortify.transfer.nodules import FEATURES

SIZE = FEATURES["diameter_mm"]
_ONE_ANSWER = 0.55  # a balanced accuracy of two classes below this is hardly that of a classifier
_NAMES = {"pgd": "PGD"}


def _percent(row, *, interval=False):
    more = f"; {100 * row.group_low:.0f} to {100 * row.group_high:.0f}" if interval else ""
    return f"{whole_percent(row.accuracy)} % ({row.k:.0f} of {row.n:.0f}{more})"


def _pooled(table):
    return pd.Series(
        {"k": table.k.sum(), "n": table.n.sum(), "accuracy": table.k.sum() / max(table.n.sum(), 1)}
    )


def transfer_answer(table: pd.DataFrame, *, eps_255: float) -> str:
    """What :func:`fortify.transfer.transfer_table` says of transfer to other models, as Markdown.

    Names of models end in ", normal" or ", adversarial". Pooled over the pairs of different models; of an
    attack's columns the one that transfers best from single models.
    """
    models = [name for name in table.target.unique()]
    other = table[~table.white_box & table.source.isin(models)]
    if other.n.sum() == 0:
        return "No image is classified correctly by two models, so nothing can be said of transfer."
    best = max(other.attack.unique(), key=lambda attack: _pooled(other[other.attack.eq(attack)]).accuracy)
    other = other[other.attack.eq(best)]
    named = _NAMES.get(best, best)
    lines = [
        f"These figures are of *{named}*, the attack with the highest share on another network. Whether the "
        "attacks differ was not tested."
    ]
    for training in ("normal", "adversarial"):
        of = table[table.target.str.endswith(training)]
        own = _pooled(of[of.white_box & of.attack.eq(best)])
        between = _pooled(other[other.target.str.endswith(training)])
        noise, together = (_pooled(of[of.source.eq(source)]) for source in (NOISE, OTHERS))
        text = f"At {eps_255:g}/255 it fools **{training}ly trained** networks in {_percent(own)} of the "
        text += f"cases when it is crafted on the network itself, and in {_percent(between)} when it is "
        text += "crafted on another one. "
        if together.n:
            attack = of[of.source.eq(OTHERS)].attack.iloc[0]
            text += (
                f"*{attack.capitalize()}* on all other networks together fools them in {_percent(together)}. "
            )
        lines.append(text + f"Random noise of the same size fools them in {_percent(noise)}.")
    same, others = (
        _pooled(table[table.source.str.startswith(f"{name} groups")]) for name in ("same", "other")
    )
    if same.n and others.n:
        lines.append(
            f"Surrogates trained on groups that the target never saw fool it in {_percent(others)}. "
            f"Surrogates trained on as many slices of the target's own groups fool it in {_percent(same)}. "
            "Both pool attacks and targets."
        )
    return "\n".join(f"- {line}" for line in lines)


def nodule_answer(
    accuracies: pd.DataFrame,
    agreement: pd.DataFrame,
    gains: pd.DataFrame,
    attacked: pd.DataFrame,
    *,
    source: str,
) -> str:
    """What the tables of :mod:`fortify.transfer.nodules` say of the second dataset, as Markdown."""
    own = accuracies[accuracies.unit.eq("slice") & accuracies.nodules.eq("all")].set_index(["split", "model"])
    kinds = [
        kind for kind in ("random", "near-duplicate groups", "patients") if (kind, "normal") in own.index
    ]
    by_kind = ", ".join(
        f"{_percent(own.loc[(kind, 'normal')], interval=True)} on folds by {kind}" for kind in kinds
    )
    by_kind = by_kind.replace("folds by random", "random folds")
    groups = agreement.set_index("folds").loc["near-duplicate groups"]
    lines = [
        f"**{source}.** Trained normally by the same recipe, the network's accuracy is {by_kind} (95 % "
        "intervals by patients)."
    ]
    if {("random", "normal"), ("patients", "normal")} <= set(own.index):
        random, patients = (own.loc[(kind, "normal")] for kind in ("random", "patients"))
        more = 100 * (random.accuracy - patients.accuracy)
        lines[0] += f" So random folds differ from folds by patients by {more:+.0f} points here"
        apart = random.group_low > patients.group_high or patients.group_low > random.group_high
        lines[0] += "." if apart else ". The intervals overlap, so this may be chance."
    lines += [
        f"Near-duplicate groups have a pairwise precision of {groups.precision:.2f} and a recall of "
        f"{groups.recall:.2f} against the patients. In folds by such groups "
        f"{100 * groups.patient_in_training:.0f} % of the test slices still have their patient in training.",
    ]
    gain = gains[gains.attack.eq("clean")].set_index(["unit", "nodules", "model"])
    for subset in accuracies.nodules.unique():
        size = accuracies[accuracies.nodules.eq(subset) & accuracies.unit.eq("nodule")]
        size = size[size.model.eq(SIZE)].iloc[0]
        text = f"The diameter alone classifies {_percent(size)} of the nodules ({subset}) correctly."
        for training in ("normal", "adversarial"):
            if ("nodule", subset, training) in gain.index:
                row = gain.loc[("nodule", subset, training)]
                text += (
                    f" {training.capitalize()} training differs from it by {row.gain_percent:+.0f} points "
                )
                text += f"(95 % interval by patients {row.low_percent:+.0f} to {row.high_percent:+.0f})."
        lines.append(text)
    found = attacked[attacked.unit.eq("slice")].set_index(["attack", "model"])
    for training in ("normal", "adversarial"):
        if ("pgd", training) in found.index:
            clean, pgd = found.loc[("clean", training)], found.loc[("pgd", training)]
            text = f"{training.capitalize()} training classifies {_percent(clean)} of the attacked slices "
            text += f"correctly before and {_percent(pgd)} under PGD."
            if clean.balanced_accuracy < _ONE_ANSWER:
                text += (
                    f" Before it the balanced accuracy is {100 * clean.balanced_accuracy:.0f} %, near that "
                    "of one answer for all slices, so that an attack has little to change."
                )
            lines.append(text)
    heads = accuracies[accuracies.nodules.eq("all") & accuracies.unit.eq("nodule")]
    heads = heads[heads.model.str.startswith("features, ")]
    if len(heads):
        named = ", ".join(f"{row.model[10:]} {_percent(row, interval=True)}" for row in heads.itertuples())
        lines.append(
            "A linear head on frozen features classifies of the nodules correctly, by the network's "
            f"training on the first dataset: {named}. *Untrained* is the control."
        )
    return "\n".join(f"- {line}" for line in lines)
