"""The sentences that open notebook 07, made of the run's own tables."""

from collections.abc import Mapping

import pandas as pd

from fortify.intervals import whole_percent
from fortify.leakage.meter import CLASSIFIERS

BASELINE = "majority class"
_FAR = 10  # points: what counts as a difference between the splits


def leakage_answer(summed: pd.DataFrame, regions: pd.DataFrame, *, majority: Mapping[str, float]) -> str:
    """What the leak meter's summary and :func:`fortify.leakage.lungs_or_scanner` say, as Markdown.

    ``summed`` is :func:`fortify.leakage.summary`; ``regions`` has the columns ``split`` and ``model`` too;
    ``majority`` {split: share of the largest class among the test slices of the networks}.
    """
    cells = summed.set_index(["classifier", "split"])
    splits = list(dict.fromkeys(summed.split))
    lines = []
    for name, what in (
        ("nearest neighbour", "**Looking up** the nearest training thumbnail"),
        ("frame", "**The frame** of the slice, where there is no lung,"),
    ):
        first, *others = [f"{_percent(cells.loc[(name, split)])} on {split} splits" for split in splits]
        first = first.replace(") on", ") of the test slices correctly on")
        lines.append(f"{what} classifies {' and '.join([first, *others])}.")
    gap = 100 * cells.gap.get(("nearest neighbour", "random"), 0.0)
    if gap > _FAR:
        lines[0] += f" Near-duplicates in training are worth {gap:.0f} points to it."
    if "grouped" in splits:
        grouped = cells.xs("grouped", level="split").drop(BASELINE)
        best = grouped.accuracy.idxmax()
        sees = "sees the whole slice" if CLASSIFIERS[best].sees_lung else "sees no lung"
        lines.append(
            f"On grouped splits the best of these simple classifiers is *{best}*, which {sees}: "
            f"{_percent(grouped.loc[best])}. Always naming the largest class gives "
            f"{_percent(cells.loc[(BASELINE, 'grouped')])}."
        )
    for (split, model), part in regions.groupby(["split", "model"], sort=False):
        own = part.set_index("view")
        whole, lungs, body = (own.loc[name] for name in ("whole image", "lungs blanked", "body blanked"))
        change = 100 * (lungs.accuracy - whole.accuracy)
        grey = 100 * (own.accuracy["lungs at grey 128"] - whole.accuracy)
        lines.append(
            f"**{model.capitalize()} training, {split} split**: {_percent(whole)} on whole slices. "
            f"Blanking the lungs changes that by {change:+.0f} points ({grey:+.0f} with another grey); "
            f"blanking the body leaves {_percent(body)}. The largest class has {100 * majority[split]:.0f} %."
        )
    return "\n".join(f"- {line}" for line in lines)


def _percent(row):
    return f"{whole_percent(row.accuracy)} % ({row.k:.0f} of {row.n:.0f})"


def meter_layout(summed: pd.DataFrame) -> pd.DataFrame:
    """The display table of a leak meter's summary: a line a classifier, a column a split, and the gap."""
    shown = {"classifier": list(dict.fromkeys(summed.classifier))}
    shown["sees the lungs"] = ["yes" if CLASSIFIERS[name].sees_lung else "no" for name in shown["classifier"]]
    for split, own in summed.groupby("split", sort=False):
        own = own.set_index("classifier").loc[shown["classifier"]]
        shown[f"{split} (%)"] = [
            f"{100 * r.accuracy:.0f} ({100 * r.low:.0f}–{100 * r.high:.0f})" for r in own.itertuples()
        ]
    gaps = summed.drop_duplicates("classifier").set_index("classifier").gap.loc[shown["classifier"]]
    shown["gap in points"] = [f"{100 * gap:+.0f}" if pd.notna(gap) else "" for gap in gaps]
    return pd.DataFrame(shown)


def region_layout(regions: pd.DataFrame) -> pd.DataFrame:
    """The display table of what the networks classify when parts are blanked, without the attacks."""
    own = regions[~regions.attacked]
    shown = {"view": list(dict.fromkeys(own["view"]))}
    for (split, model), part in own.groupby(["split", "model"], sort=False):
        part = part.set_index("view").loc[shown["view"]]
        shown[f"{model}, {split} (%)"] = [
            f"{100 * r.accuracy:.0f} ({100 * r.low:.0f}–{100 * r.high:.0f})" for r in part.itertuples()
        ]
    return pd.DataFrame(shown)
