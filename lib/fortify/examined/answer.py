"""The sentences that open notebooks 06 and 09, made of a run's own tables."""

from collections.abc import Sequence

import pandas as pd

from fortify.examined.claims import OUTCOMES, conditions
from fortify.examined.matrix import attack_measures
from fortify.intervals import whole_percent
from fortify.tables import listed, to_markdown

_TRAINED = {
    "normal": "normal",
    "published": "as published",
    "tone curves": "on two tone curves alone",
    "adversarial": "correct adversarial training",
}
_NEAR, _FAR = 5, 30  # points: what counts as the same accuracy, and as another one


def protocol_answer(
    protocol: pd.DataFrame, table: pd.DataFrame, *, eps_255: float, class_names: Sequence[str]
) -> str:
    """What one split's :func:`fortify.examined.matrix.matrix` says, as Markdown, with its counts.

    ``protocol`` are the rows of :func:`fortify.examined.protocol.score_published` behind it; ``eps_255`` is a
    budget of the matrix. A conclusion is drawn only where the numbers bear it out.
    """
    clamped = protocol[protocol.attack.eq("clamp") & protocol.model.eq("normal")].prediction.value_counts()
    cells = table.set_index(["model", "evaluation"])
    pooled, correct = "published combined", f"PGD {eps_255:g}/255"

    def said(model, evaluation):
        cell = cells.loc[(model, evaluation)]
        return f"{whole_percent(cell.accuracy)} % ({cell.k} of {cell.n})"

    def points(model, evaluation):
        return 100 * cells.accuracy[model, evaluation]

    measures = attack_measures(protocol).set_index(["measure", "model"])
    stuck = measures.loc[("CW equal to tanh", "normal")]
    largest = measures.loc[("largest change by the clamp", "normal")].grey_levels
    clean, clamp, pgd = (points("normal", name) for name in ("clean", "clamp alone", "published PGD"))
    lost = abs(clamp - pgd) <= _NEAR and pgd < clean - 2 * _NEAR
    published, curves = points("published", pooled), points("tone curves", pooled)
    same = abs(published - curves) <= _NEAR and min(published, curves) > points("normal", pooled) + _FAR
    falls = points("published", correct) < published - _FAR
    lines = [
        "- The published attacks end in a fixed operation on the grey levels: a *clamp* of the normalised "
        "image to [0, 1], or its *tanh*. We call these tone curves.",
        f"- The normally trained network classifies {said('normal', 'clean')} of the clean test slices "
        "correctly.",
        f"- After the clamp alone, with no attack, it classifies {said('normal', 'clamp alone')} correctly, "
        f"and after the published PGD {said('normal', 'published PGD')}."
        + (" **The clamp, not the attack, costs the accuracy.**" if lost else ""),
        f"- The clamp changes a slice by up to {largest:.0f} grey levels of 255 (mean over the slices). The "
        f"network then calls {clamped.iloc[0]} of {clamped.sum()} slices “{class_names[clamped.index[0]]}”.",
        f"- For the normally trained network the published CW is tanh of the image and nothing else on "
        f"{stuck.k:.0f} of the {stuck.n:.0f} test slices.",
    ]
    if same:
        lines.append("- **Two tone curves, without any gradient, are enough for the published robustness.**")
    if falls:
        lines.append("- **Withstanding the published evaluation says nothing about correct attacks.**")
    shown = [(words, said(model, pooled), said(model, correct)) for model, words in _TRAINED.items()]
    columns = ["training", "still right: published attacks", f"still right: correct PGD, {eps_255:g}/255"]
    return "\n".join([*lines, "", to_markdown(pd.DataFrame(shown, columns=columns), left=1)])


def tally(claims: pd.DataFrame) -> str:
    """How many claims of a :func:`fortify.examined.claims.ledger` came to what, in a sentence. Markdown."""
    counts = claims.outcome.value_counts()
    words = [
        f"**{counts[n]} {many if counts[n] > 1 else one}**"
        for n, (one, many) in OUTCOMES.items()
        if n in counts
    ]
    return f"The paper makes {len(claims)} claims: {listed(words)}."


def claims_answer(claims: pd.DataFrame) -> str:
    """The tally of a ledger, and below it its claims in short, by verdict. Markdown."""
    lines = [tally(claims), ""]
    for name in OUTCOMES:
        own = claims[claims.outcome.eq(name)]
        if len(own):
            reasons = conditions(own).map(lambda text: f": {text}" if text else "")
            lines += [f"- **{name.capitalize()}**", *("  - " + own.short + reasons)]
    return "\n".join(lines)
