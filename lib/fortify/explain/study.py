"""All measures of the maps of two networks on one dataset, and what they say."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from fortify.attacks import checked
from fortify.explain.attributions import CONTROLS, METHODS, attribute, control
from fortify.explain.measures import alignment, line_of, measured, rank_correlation, sanity
from fortify.intervals import whole_percent
from fortify.models import predict
from fortify.tables import crossed

Maps = dict[tuple[str, str], np.ndarray]  # {(network, method): (N, H, W)}; a control's network is ""


def explained(
    models: Mapping[str, nn.Module],
    images: Any,
    attacked: Mapping[str, Tensor],
    targets: Any,
    *,
    regions: Mapping[str, np.ndarray],
    groups: Sequence[Any],
    noise_level: float,
    seed: int = 0,
    where: str = "",
) -> tuple[Maps, Maps, pd.DataFrame]:
    """(maps, maps of the attacked images, table), by every method, of every network and control.

    ``images`` (N, C, H, W) in [0, 1]; ``attacked`` the same after the attack on each network; ``targets``
    (N,) the classes explained; ``noise_level`` in grey levels, sd. The table holds the rows of
    :func:`fortify.explain.measured`, clean and ", attacked", and of :func:`fortify.explain.sanity` under
    noise, under attack and with layers drawn anew; every measure ends in ``where``.
    """
    images, targets = checked(images, targets)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    noisy = (images + noise_level / 255 * noise).clamp(0, 1)
    pairs = [(name, method) for name in models for method in METHODS]

    def maps_of(shown):
        return {(n, m): attribute(models[n], shown[n], targets, m, seed=seed) for n, m in pairs}

    maps, broken, shaken = (
        maps_of(s) for s in (dict.fromkeys(models, images), attacked, dict.fromkeys(models, noisy))
    )
    maps |= {("", name): control(images, name) for name in CONTROLS}
    shared = {"regions": regions, "groups": groups}
    found = [measured(models, images, targets, maps, **shared)]
    for name, net in models.items():
        own = {pair: of for pair, of in broken.items() if pair[0] == name}
        table = measured({name: net}, attacked[name], targets, own, **shared)
        found.append(table.assign(measure=table.measure + ", attacked"))
    for name, method in pairs:
        again = {"noise": shaken[name, method], "attack": broken[name, method]}
        own = maps[name, method]
        found.append(
            sanity(models[name], images, targets, method, own, again, groups=groups, name=name, seed=seed)
        )
    table = pd.concat(found, ignore_index=True)
    return maps, broken, table.assign(measure=table.measure + where)


def clean_and_attacked(table: pd.DataFrame, measures: Mapping[str, str]) -> pd.DataFrame:
    """A display table: a line a network and method, "clean → attacked" of ``measures`` {name: column}.

    ``slices`` is of how many, the fewest of the measures: a map that is zero everywhere has no share.
    """
    of = table.set_index(["measure", "model", "map"])
    value = of["mean"]
    lines = []
    for name in dict.fromkeys(model for model in table.model if model):
        for method in dict.fromkeys(table[table.model.eq(name) & table["map"].isin(METHODS)]["map"]):
            line = {"training": name, "map": method}
            for measure, column in measures.items():
                clean, attacked = (value[measure + state, name, method] for state in ("", ", attacked"))
                line[column] = f"{clean:.2f} → {attacked:.2f}"
            counts = [min(of.n[m + state, name, method] for m in measures) for state in ("", ", attacked")]
            line["slices"] = " → ".join(map(str, counts)) if len(set(counts)) > 1 else str(counts[0])
            lines.append(line)
    return pd.DataFrame(lines)


ALIGNED = ("alignment", "correlation with the image")  # the measures of :func:`aligned`


def aligned(
    models: Mapping[str, nn.Module], images: Any, maps: Maps, *, groups: Sequence[Any], where: str = ""
) -> pd.DataFrame:
    """How gradient and image resemble each other: rows as :func:`fortify.explain.measured`'s, no floor.

    ``alignment`` is :func:`fortify.explain.alignment`; ``correlation with the image`` the rank correlation of
    the map *gradient* with the control *the image*. ``images`` (N, C, H, W).
    """
    rows = []
    for name, model in models.items():
        correlation = rank_correlation(maps[name, "gradient"], maps["", "the image"])
        for measure, values in zip(ALIGNED, (alignment(model, images), correlation), strict=True):
            rows.append(line_of(measure + where, "gradient", name, values, np.nan, groups))
    return pd.DataFrame(rows)


def aligned_layout(table: pd.DataFrame) -> pd.DataFrame:
    """A display table of :func:`aligned`: a line a network, the means with their intervals."""
    cells = table.assign(cell=[f"{r['mean']:.2f} ({r.low:.2f}–{r.high:.2f})" for _, r in table.iterrows()])
    return crossed(cells.rename(columns={"model": "training"}), index="training", columns="measure")


_STABLE = {
    "attack": "Under attack the map of a slice keeps a rank correlation with its clean map of",
    "drawn anew": "After all layers but the first are initialised again, the rank correlation is",
}


def spoken(table: pd.DataFrame, *, idle: Sequence[str] = ()) -> str:
    """What the table says, as Markdown: lungs and nodules against the controls, stability, and sanity.

    ``table`` holds :func:`explained`'s rows and, where there are nodules, :func:`fortify.explain.located`'s;
    ``idle`` names the networks that hardly classify the nodules.
    """
    lungs = table[table.measure.eq("lungs")].set_index(["model", "map"])
    sentences = [_in_lungs(lungs)] if len(lungs) else []
    sentences += _pointed(table[table.measure.eq("pointing game")])
    if idle:
        sentences.append(
            f"{' and '.join(idle).capitalize()} training hardly learned to classify the nodules (balanced "
            f"accuracy below {100 * IDLE_BELOW:.0f} %), so its maps there say nothing of that training."
        )
    for measure, words in _STABLE.items():
        own = table[table.measure.eq(measure)]
        means = own.groupby("model", sort=False)["mean"].mean()
        said = " and ".join(f"{value:.2f} ({name} training)" for name, value in means.items())
        if said:
            sentences.append(
                f"{words} {said}, averaged over the methods. Maps of two different slices correlate by "
                f"{own.floor.mean():.2f}."
            )
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _in_lungs(lungs):
    """Whether any map has a higher share in the lungs than the best control, and what the shares are."""
    best = {name: own.loc[own["mean"].idxmax()] for name, own in lungs.groupby(level="model", sort=False)}
    control = best.pop("", None)
    said = " and ".join(
        f"{row['mean']:.1f} ({name} training, *{row.name[1]}*; 95 % interval {row.low:.1f} to {row.high:.1f})"
        for name, row in best.items()
    )
    words = f"Share of the best map in the lungs, divided by that of the area: {said}."
    if control is None or not best:
        return words
    words += f" The best control, *{control.name[1]}*, which knows no network, has {control['mean']:.1f}."
    if max(row["mean"] for row in best.values()) < control["mean"]:
        return f"**No map lies in the lungs more than the best control does.** {words}"
    return words


IDLE_BELOW = 0.6  # balanced accuracy of two classes; guessing gives a half


def idle_networks(models: Mapping[str, nn.Module], images: Any, labels: Any) -> list[str]:
    """Names of those ``models`` whose balanced accuracy on ``images`` is below :data:`IDLE_BELOW`."""
    images, labels = checked(images, labels)
    right = {name: predict(model, images).argmax(1) == labels for name, model in models.items()}
    shares = {n: np.mean([r[labels == c].float().mean() for c in labels.unique()]) for n, r in right.items()}
    return [name for name, share in shares.items() if share < IDLE_BELOW]


def _pointed(hits):
    """How often a map's highest pixel lies on the nodule, of each network's best map and the best control."""
    best = {name: own.loc[own["mean"].idxmax()] for name, own in hits.groupby("model", sort=False)}
    said = [
        f"{whole_percent(row['mean'])} % (*{row['map']}*, {name} training; 95 % interval "
        f"{100 * row.low:.0f} to {100 * row.high:.0f})"
        for name, row in best.items()
        if name
    ]
    if not said or "" not in best:
        return []
    words = f"The highest pixel of the best map lies on the nodule in {' and '.join(said)} "
    words += f"of {hits.n.max()} slices"
    return [f"{words}. That of the *{best['']['map']}* does in {whole_percent(best['']['mean'])} %."]
