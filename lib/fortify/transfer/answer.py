"""The sentences that open notebook 11, made of the run's own tables."""

import pandas as pd

from fortify.transfer.crafting import NOISE, OTHERS
from fortify.transfer.nodules import FEATURES

SIZE = FEATURES["diameter_mm"]
_WORDS = {"clean": "Of the slices that were attacked, clean", "pgd": "The same slices under PGD"}


def _percent(row):
    return f"{100 * row.accuracy:.0f} % ({row.k:.0f} of {row.n:.0f})"


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
    other, lines = other[other.attack.eq(best)], []
    for training in ("normal", "adversarial"):
        of = table[table.target.str.endswith(training)]
        own = _pooled(of[of.white_box & of.attack.eq(best)])
        between = _pooled(other[other.target.str.endswith(training)])
        noise, together = (_pooled(of[of.source.eq(source)]) for source in (NOISE, OTHERS))
        text = f"At {eps_255:g}/255 {best} fools **{training}ly trained** networks in {_percent(own)} of "
        text += f"the cases when crafted on themselves, in {_percent(between)} when crafted on another one; "
        text += f"all other networks together reach {_percent(together)}, " if together.n else ""
        lines.append(text + f"noise of the same size {_percent(noise)}.")
    same, others = (
        _pooled(table[table.source.str.startswith(f"{name} patients")]) for name in ("same", "other")
    )
    if same.n and others.n:
        lines.append(
            f"Surrogates that saw no patient of the target's training reach {_percent(others)}, those with "
            f"as many slices of its own patients {_percent(same)}, pooled over attacks and targets."
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
    by_kind = ", ".join(f"{_percent(own.loc[(kind, 'normal')])} on folds by {kind}" for kind in kinds)
    by_kind = by_kind.replace("folds by random", "random folds")
    groups = agreement.set_index("folds").loc["near-duplicate groups"]
    lines = [
        f"**{source}.** Trained by the same recipe, the network classifies {by_kind} correctly.",
        f"Near-duplicate groups have a pairwise precision of {groups.precision:.2f} and a recall of "
        f"{groups.recall:.2f} against the patients; in folds by them {100 * groups.patient_in_training:.0f} "
        "% of the test slices still have their patient in training.",
    ]
    gain = gains[gains.attack.eq("clean")].set_index(["unit", "nodules", "model"])
    for subset in accuracies.nodules.unique():
        size = accuracies[accuracies.nodules.eq(subset) & accuracies.unit.eq("nodule")]
        size = size[size.model.eq(SIZE)].iloc[0]
        text = f"Of the nodules ({subset}) the diameter alone classifies {_percent(size)} correctly"
        for training in ("normal", "adversarial"):
            if ("nodule", subset, training) in gain.index:
                row = gain.loc[("nodule", subset, training)]
                text += f"; {training} training differs from that by {row.gain_percent:+.0f} points "
                text += f"({row.low_percent:+.0f} to {row.high_percent:+.0f})"
        lines.append(text + ".")
    for attack in ("clean", "pgd"):
        of = attacked[attacked.unit.eq("slice") & attacked.attack.eq(attack)]
        named = ", ".join(f"{row.model} {_percent(row)}" for row in of.itertuples())
        lines.append(f"{_WORDS[attack]}: {named}.")
    return "\n".join(f"- {line}" for line in lines)
