"""Each training under each evaluation, published and correct; and how much of the attacks is none."""

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


def main_rows(table: pd.DataFrame) -> pd.DataFrame:
    """The at most eight evaluations of a :func:`matrix` that a reader needs first.

    Clean, the two tone curves, the published attacks pooled, FGSM at the largest budget, PGD at the smallest
    and the largest, CW within the middle norm.
    """
    names = list(table.sort_values("order", kind="stable").evaluation.unique())
    fgsm, pgd, cw = ([n for n in names if n.startswith(f"{kind} ")] for kind in ("FGSM", "PGD", "CW"))
    wanted = {"clean", "clamp alone", "tanh alone", "published combined"}
    wanted |= {*fgsm[-1:], *pgd[:1], *pgd[-1:], *cw[len(cw) // 2 :][:1]}
    return table[table.evaluation.isin(wanted)]


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
