"""All measures of the maps of two networks on one dataset, and what they say."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from fortify.attacks import checked
from fortify.explain.attributions import CONTROLS, METHODS, attribute, control
from fortify.explain.measures import measured, sanity
from fortify.intervals import whole_percent

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
    """A display table: a line a network and method, "clean → attacked" of ``measures`` {name: column}."""
    value = table.set_index(["measure", "model", "map"])["mean"]
    lines = []
    for name in dict.fromkeys(model for model in table.model if model):
        for method in dict.fromkeys(table[table.model.eq(name) & table["map"].isin(METHODS)]["map"]):
            line = {"training": name, "map": method}
            for measure, column in measures.items():
                clean, attacked = (value[measure + state, name, method] for state in ("", ", attacked"))
                line[column] = f"{clean:.2f} → {attacked:.2f}"
            lines.append(line)
    return pd.DataFrame(lines)


_STABLE = {
    "attack": "Under attack the map of a slice keeps a rank correlation with its clean map of",
    "drawn anew": "After all layers but the first are initialised again, the rank correlation is",
}


def spoken(table: pd.DataFrame) -> str:
    """What the table says, as Markdown: lungs and nodules against the controls, stability, and sanity.

    ``table`` holds :func:`explained`'s rows and, where there are nodules, :func:`fortify.explain.located`'s.
    """
    sentences = []
    lungs = table[table.measure.eq("lungs")].set_index(["model", "map"])
    for name in ("normal", "adversarial"):
        if name in lungs.index:
            best = lungs.loc[name].sort_values("mean").iloc[-1]
            sentences.append(
                f"Of the {name} network's maps *{best.name}* has the highest share in the lungs: it "
                f"is {best['mean']:.1f} times that of the area (95 % interval {best.low:.1f} "
                f"to {best.high:.1f})."
            )
    if "" in lungs.index:
        best = lungs.loc[""].sort_values("mean").iloc[-1]
        sentences.append(
            f"The best control, *{best.name}*, which knows nothing of a network, reaches {best['mean']:.1f}."
        )
        maps = lungs[lungs.index.get_level_values("model") != ""]
        if len(maps) and maps["mean"].max() < best["mean"]:
            sentences[-1] += (
                " So the share in the lungs does not show that a map finds what the prediction rests on."
            )
    sentences += _pointed(table[table.measure.eq("pointing game")])
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
