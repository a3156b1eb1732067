"""What the project aimed at, beside what its published networks reach: a table for docs/recipe.md."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from fortify.tables import to_markdown
from fortify.workflow.front import accuracies, gains_over_adversarial


@dataclass(frozen=True)
class Aim:
    """A figure that was aimed at: ``measure`` (tables of a profile, split) gives per cent or None."""

    split: str
    words: str
    aim: float
    measure: Callable[[Path, str], float | None]
    least: bool = True  # else at most


def _share(attack, column):
    def of(tables, split):
        table = accuracies(tables, split)
        return None if table is None else 100 * table.loc[("adversarial", attack), column]

    return of


def _price(tables, split):
    gains = gains_over_adversarial([tables], split, "frozen features")
    return None if gains is None else gains.loc["clean", "gain_percent"]


AIMS = (
    Aim("random", "clean", 95.0, _share("clean", "accuracy")),
    Aim("random", "PGD at 4/255", 93.6, _share("pgd", "accuracy")),
    Aim("grouped", "clean", 80.0, _share("clean", "accuracy")),
    Aim("grouped", "PGD at 4/255", 72.0, _share("pgd", "accuracy")),
    Aim("grouped", "balanced accuracy, clean", 65.0, _share("clean", "balanced_accuracy")),
    Aim("grouped", "benign slices recognised, clean", 25.0, _share("clean", "recall_benign")),
    Aim("grouped", "points behind frozen ImageNet features, clean", 6.0, _price, least=False),
)


def aims(published: Mapping[str, Path]) -> str:
    """The table: each of :data:`AIMS` beside the best adversarially trained network of it. Markdown.

    ``published`` {profile: its tables}. An aim that none of them has a figure of is left out.
    """
    lines = []
    for aim in AIMS:
        found = {name: aim.measure(tables, aim.split) for name, tables in published.items()}
        found = {name: value for name, value in found.items() if value is not None and pd.notna(value)}
        if not found:
            continue
        best = (max if aim.least else min)(found, key=found.get)
        reached = found[best] >= aim.aim if aim.least else found[best] <= aim.aim
        lines.append(
            {
                "split": {"grouped": "unseen groups"}.get(aim.split, aim.split),
                "measure": aim.words,
                "aim": f"{'at least' if aim.least else 'at most'} {aim.aim:g}",
                "best": f"{found[best]:.0f}",
                "of profile": f"`{best}`",
                "reached": "yes" if reached else "no",
            }
        )
    if not lines:
        return ""
    caption = (
        "Test slices, per cent, pooled over the seeds; adversarial training. The aims are this "
        "project's own. Epochs are chosen on validation slices."
    )
    return to_markdown(pd.DataFrame(lines), left=2, caption=caption)
