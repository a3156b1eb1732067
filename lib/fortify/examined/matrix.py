"""Each training under each evaluation, published and correct: the matrix, and what it says in sentences."""

from collections.abc import Sequence

import pandas as pd

from fortify.evaluation import accuracy_table, at_budget
from fortify.examined.printed import PUBLISHED


def matrix(
    published: pd.DataFrame,
    correct: pd.DataFrame,
    *,
    class_names: Sequence[str],
    budgets_255: Sequence[float],
    cw_l2: float,
) -> pd.DataFrame:
    """Accuracy of each training under each evaluation: a row per (split, model, evaluation), tidy.

    ``published`` are :func:`score_published`'s rows, ``correct`` those of :func:`fortify.scoring.evaluate`
    for the same models. ``evaluation`` names the column of the matrix, ``order`` its place in it. The numbers
    are those of :func:`fortify.evaluation.accuracy_table`; ``published combined`` pools the three published
    attacks, as the paper's last column does. CW is counted within half of ``cw_l2``, all of it, and twice it.
    """
    correct = correct[correct.protocol.eq("adaptive")]
    tables, order = [], {}

    def add(rows, names):
        table = accuracy_table(rows, class_names=class_names, pooled=PUBLISHED)
        table = table[table.attack.isin(names)]
        tables.append(table.assign(evaluation=table.attack.map(names)))
        for words in names.values():
            order[words] = len(order)

    add(at_budget(correct, eps_255=budgets_255[0], cw_l2=cw_l2), {"clean": "clean"})
    for name, words in (("clamp", "clamp alone"), ("tanh", "tanh alone")):
        add(published[published.attack.eq(name)], {name: words})
    names = {attack: f"published {attack.split('_')[1].upper()}" for attack in PUBLISHED}
    add(published[published.attack.isin(PUBLISHED)], names | {"combined": "published combined"})
    for name, words in (("fgsm", "FGSM"), ("pgd", "PGD")):
        for eps in budgets_255:
            add(at_budget(correct, eps_255=eps, cw_l2=cw_l2), {name: f"{words} {eps:g}/255"})
    for l2 in (cw_l2 / 2, cw_l2, 2 * cw_l2):
        add(at_budget(correct, eps_255=budgets_255[0], cw_l2=l2), {"cw": f"CW L2 {l2:g}"})
    table = pd.concat(tables, ignore_index=True)
    columns = ["split", "model", "evaluation", "k", "n", "accuracy", "low", "high", "balanced_accuracy"]
    return table[[*columns, "images", "seeds", "sd"]].assign(order=table.evaluation.map(order))


def findings(
    protocol: pd.DataFrame, table: pd.DataFrame, *, eps_255: float, class_names: Sequence[str]
) -> list[str]:
    """What one split's :func:`matrix` says, in sentences with their counts; ``eps_255`` is a budget of it.

    ``protocol`` are the rows of :func:`score_published` behind it.
    """
    clamped = protocol[protocol.attack.eq("clamp") & protocol.model.eq("normal")].prediction.value_counts()
    called = f"{clamped.iloc[0]} of {clamped.sum()} clamped slices “{class_names[clamped.index[0]]}”"
    cells = table.set_index(["model", "evaluation"])

    def said(model, evaluation):
        cell = cells.loc[(model, evaluation)]
        return f"{cell.accuracy:.1%} ({cell.k}/{cell.n})"

    found = attack_measures(protocol).set_index(["measure", "model"])
    stuck, every = (found.loc[("CW equal to tanh", model)] for model in ("normal", "all"))
    largest = found.loc[("largest change by the clamp", "normal")].grey_levels
    pooled, correct = "published combined", f"PGD {eps_255:g}/255"
    return [
        f"The clamp alone changes a slice by up to {largest:.0f} grey levels (mean over the slices). The "
        f"normally trained model reads {said('normal', 'clamp alone')} after it and "
        f"{said('normal', 'published PGD')} after the published PGD; it calls {called}.",
        f"The published CW is tanh and nothing else, to the last bit of its norm, on {stuck.percent:.1f} % "
        f"({stuck.k:.0f}/{stuck.n:.0f}) of the normal model's images, and on {every.percent:.1f} % "
        f"({every.k:.0f}/{every.n:.0f}) of those of all four.",
        f"Trained as published, the network reads {said('published', pooled)} of the published attacks; "
        f"trained on the two tone curves, without a gradient, {said('tone curves', pooled)}; normally, "
        f"{said('normal', pooled)}; with correct adversarial training, {said('adversarial', pooled)}.",
        f"Under correct PGD at {eps_255:g}/255: published {said('published', correct)}, tone curves "
        f"{said('tone curves', correct)}, normal {said('normal', correct)}, correct adversarial training "
        f"{said('adversarial', correct)}.",
    ]


def attack_measures(protocol: pd.DataFrame) -> pd.DataFrame:
    """How much of the published attacks is no attack, from :func:`score_published`'s rows: a tidy table.

    "CW equal to tanh": on how many images CW's norm is tanh's to the last bit (k of n, ``percent``), for each
    model and for "all". "largest change by ...": the largest change of a grey, mean over the images of the
    normally trained model, in ``grey_levels`` of 255.
    """
    key = ["model", "split", "seed", "index"]
    l2 = {name: part.set_index(key).l2 for name, part in protocol.groupby("attack")}
    stuck = l2["published_cw"].eq(l2["tanh"])
    counted = {model: part for model, part in stuck.groupby("model", sort=False)} | {"all": stuck}
    rows = [
        {
            "measure": "CW equal to tanh",
            "model": model,
            "k": int(part.sum()),
            "n": len(part),
            "percent": 100 * part.mean(),
        }
        for model, part in counted.items()
    ]
    own = protocol[protocol.model.eq("normal")]
    for attack, words in (("clamp", "the clamp"), ("published_pgd", "published PGD"), ("tanh", "tanh")):
        changes = own[own.attack.eq(attack)].linf_255
        measure = f"largest change by {words}"
        rows.append({"measure": measure, "model": "normal", "n": len(changes), "grey_levels": changes.mean()})
    return pd.DataFrame(rows).astype({"k": "Int64"})
