"""README's generated part: the finding, one figure, one table and five findings, all of the published tables.

A file that is not published yet leaves out its sentence or its cells, and the next publish fills them.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from fortify.evaluation import BLACK_BOX, interval_of
from fortify.intervals import whole_percent
from fortify.tables import to_markdown

_ARCHS = {"resnet_small": "small ResNet", "resnet18": "ResNet-18", "resnet50": "ResNet-50"}
_SPLITS = {"random": "random", "grouped": "unseen groups"}
_TRAININGS = ("normal", "adversarial")
_REFERENCE = "ResNet-50, 224 px"
# A line of the table: the baseline, and what notebook 7 measures where baselines are not published yet.
SIMPLE = {
    "nearest thumbnail": ("look-up: nearest thumbnail", "nearest neighbour"),
    "histogram forest": ("random forest on a grey-level histogram", "histogram"),
    "frozen features": ("linear head on frozen ImageNet features", ""),
    "largest class": ("largest class", "majority class"),
}
# Those that see no detail, or no lung, and may be ahead of a network all the same.
_RIVALS = {
    "histogram forest": "a random forest on grey-level histograms",
    "frozen features": "a linear head on frozen ImageNet features",
}


@dataclass(frozen=True)
class Network:
    """A profile whose Table 1 README shows: what it is called there, and its published tables."""

    name: str
    tables: Path

    @classmethod
    def of_profile(cls, parameters: dict, tables: Path) -> "Network":
        """Named by ``arch`` and ``size`` of the profile's ``parameters``, or the notebooks' values."""
        arch = parameters.get("arch", "resnet50")
        return cls(f"{_ARCHS.get(arch, arch)}, {parameters.get('size', 224)} px", tables)


def sections(
    networks: Sequence[Network], figures: Path, strips: Sequence[Path], benchmarks: Path
) -> dict[str, str]:
    """{section of README: Markdown}.

    ``networks`` come in the order of the table's rows; the last is the main profile's, whose ``figures`` (a
    folder relative to README) and ``strips`` (pictures of the published protocol) there are, and the first is
    whose figures the sentences quote.
    """
    main = networks[-1].tables
    return {
        "finding": " ".join(finding(networks[0].tables, main)) + "\n",
        "hero": hero(figures, strips),
        "summary": summary(networks),
        "findings": "".join(f"- {line}\n" for line in findings(networks[0].tables, main, benchmarks)),
    }


def finding(lead: Path, main: Path) -> Iterator[str]:
    """Three sentences: under attack on both splits, on unseen groups, and what the printed table shows."""
    random, grouped = (accuracies(lead, split) for split in _SPLITS)
    if random is None or grouped is None:
        return
    shares = [_percent(table, name, "pgd") for table in (random, grouped) for name in _TRAININGS]
    words = (
        "On a random split of the slices, adversarial training raises the accuracy under attack from {} to {}"
    )
    words = f"{words}, and on unseen groups from {{}} to {{}}".format(*shares)
    most = simple_classifiers(lead, main, "grouped").get("largest class")
    if most:
        words += f", where one answer for all slices gives {whole_percent(most['clean'][0] / 100)} %"
    yield f"{words}."
    benign = grouped.loc[("adversarial", "clean"), "recall_benign"]
    seen = "no benign slice" if benign == 0 else f"{whole_percent(benign)} % of the benign slices"
    yield f"On unseen groups it recognises {seen}{_against_rivals(lead, main, grouped)}."
    matrix = _matrix(main, "random")
    if matrix is not None:
        clean, clamp, attack = (
            matrix.loc[("normal", name), "accuracy"] for name in ("clean", "clamp alone", "published PGD")
        )
        same = abs(clamp - attack) <= 0.05
        yield (
            "In the study's public code a fixed clamp of the grey levels, without any attack, lowers the "
            f"accuracy of normal training on one random split from {whole_percent(clean)} % to "
            f"{whole_percent(clamp)} %"
            + (
                ", as far as that code's PGD does."
                if same
                else f". That code's PGD lowers it to {whole_percent(attack)} %."
            )
        )


def _against_rivals(lead, main, grouped):
    """Which simple classifiers classify more clean slices of unseen groups correctly, or about as many."""
    rows = simple_classifiers(lead, main, "grouped")
    low, high = (100 * end for end in interval_of(grouped.loc[("adversarial", "clean")]))
    shares = {name: rows[name]["clean"][0] for name in _RIVALS if name in rows}
    ahead = {name: share for name, share in shares.items() if share > high}
    named = ahead or {name: share for name, share in shares.items() if share >= low}
    if not named:
        return ""
    words = " and ".join(f"{_RIVALS[name]} ({whole_percent(share / 100)} %)" for name, share in named.items())
    verb = "classifies" if len(named) == 1 else "classify"
    more = (
        "more clean slices correctly than it does"
        if ahead
        else "about as many clean slices correctly as it does"
    )
    return f", and {words} {verb} {more} ({_percent(grouped, 'adversarial', 'clean')})"


def hero(figures: Path, strips: Sequence[Path]) -> str:
    """README's figure; until it is published, the published protocol on one slice."""
    root_of = {path.name: path for path in strips}
    if "hero.png" in root_of:
        words = "A test slice, its near-duplicate in training, accuracy by split, the clamp and a real attack"
        caption = (
            "*Above: one slice of a random split, the training slice most like it, and the normally trained "
            "network's answers, with counts over the test slices. Below: accuracy on clean and on attacked "
            "slices by split, with 95 % intervals as in the table.*"
        )
        return f"![{words}]({(figures / 'hero.png').as_posix()})\n\n{caption}\n"
    if not strips:
        return ""
    return strip(figures / strips[0].name)


def strip(picture: Path) -> str:
    """The published protocol on one slice, as a picture; Markdown."""
    words = "One slice: original, clamped, tanh, published PGD and correct PGD, with predictions and changes"
    caption = (
        "*Top: the slice after each operation, and the normally trained network's answer. Bottom: the "
        "change. The counts are of all test slices. The clamp and tanh are steps of the study's code and "
        "use no gradient.*"
    )
    return f"![{words}]({picture.as_posix()})\n\n{caption}\n"


def summary(networks: Sequence[Network]) -> str:
    """The table: split by network and training, then simple classifiers; Markdown with its caption."""
    main, lines, tested = networks[-1].tables, [], {}
    for split, shown in _SPLITS.items():
        for network in networks:
            table = accuracies(network.tables, split)
            if table is None:
                continue
            tested.setdefault(split, []).append((network.name, table.n.iloc[0], table.seeds.iloc[0]))
            for training in _TRAININGS:
                clean, pgd = (table.loc[(training, attack)] for attack in ("clean", "pgd"))
                cells = (_interval(clean), _interval(pgd), clean.balanced_accuracy, clean.recall_benign)
                lines.append((shown, f"{network.name}, {training} training", *cells))
        for name, row in simple_classifiers(networks[0].tables, main, split).items():
            cells = [_points(row["clean"]), _points(row["attacked"]), row["balanced"], row["benign"]]
            lines.append((shown, SIMPLE[name][0], *cells))
    if not tested:
        return ""
    eps = budget(networks[0].tables)
    columns = ["Split", "Classifier", "Clean", f"PGD {eps}", "Balanced, clean", "Benign recall, clean"]
    table = pd.DataFrame(lines, columns=columns)
    for column in columns[4:]:
        table[column] = ["–" if pd.isna(share) else whole_percent(share) for share in table[column]]
    counts = "; ".join(
        f"{_SPLITS[split]}, {name}: {n:,} predictions, {seeds} seeds"
        for split, own in tested.items()
        for name, n, seeds in own
    )
    words = (
        "Percent of test slices, pooled over seeds. Brackets hold 95 % intervals, which resample whole "
        "groups. Balanced accuracy is the mean of the three classes' recalls; guessing gives 33. Look-up "
        "gives a slice the class of the training thumbnail most like it. PGD is crafted on the classifier "
        "itself. "
    )
    if any((folder / "table1_grouped_classes.csv").is_file() for folder in (main, networks[0].tables)):
        words += "A classifier without a gradient is attacked as a black box. "
    else:
        words += (
            "The last three lines of a split are of ten other splits (notebook 7) and were not attacked "
            "(–). Their intervals are Wilson's, which count slices as independent and are too narrow "
            "beside the others. "
        )
    words += f"Counts: {counts}. On the random split the seeds' test sets overlap. "
    words += "All attacks and counts: [results](docs/results.md)."
    if not any(name.startswith(_REFERENCE) for own in tested.values() for name, *_ in own):
        words += f" **The study's {_REFERENCE} (`make paper`, one GPU) has not been run here yet.**"
    return to_markdown(table, caption=words)


def findings(lead: Path, main: Path, benchmarks: Path) -> Iterator[str]:
    """Five lines, each linked to where it is shown."""
    looked, grouped = (
        {split: simple_classifiers(lead, main, split) for split in _SPLITS},
        accuracies(lead, "grouped"),
    )
    if all("nearest thumbnail" in rows for rows in looked.values()):
        shares = [looked[split]["nearest thumbnail"]["clean"][0] / 100 for split in _SPLITS]
        yield (
            "**A random split can be solved by look-up.** The nearest thumbnail classifies "
            f"{whole_percent(shares[0])} % of its test slices correctly, and {whole_percent(shares[1])} % "
            f"on unseen groups ([results](docs/results.md)){_frame(main)}."
        )
    matrix = _matrix(main, "random")
    eps = budget(main)
    if matrix is not None and ("published", f"PGD {eps}") in matrix.index:
        own, correct, normal = (
            f"{whole_percent(matrix.loc[key, 'accuracy'])} %"
            for key in (("published", "published PGD"), ("published", f"PGD {eps}"), ("normal", f"PGD {eps}"))
        )
        n = matrix.loc[("published", "published PGD"), "n"]
        yield (
            "**The study's training, repeated in short, does not withstand a correct attack.** After "
            f"{_short(main)} it classifies {own} of {n} slices correctly under the study's version of PGD "
            f"and {correct} under PGD at {eps}. Normal training keeps {normal} there ([published "
            "protocol](notebooks/06_published_protocol.ipynb), [claims](docs/claims.md))."
        )
    if grouped is not None:
        normal, trained = (_percent(grouped, name, "pgd") for name in ("normal", "adversarial"))
        yield (
            f"**On unseen groups adversarial training withstands the attack far better than normal "
            f"training.** Accuracy under PGD at {budget(lead)} is {normal} after normal and {trained} after "
            f"adversarial training{_beside_one_answer(lead, main)}{_price(lead, main)} "
            "([results](docs/results.md))."
        )
    yield from _blanked(main)
    yield from _groupings(benchmarks / "grouping_cpu.csv")


def _frame(main):
    """How much the frame alone tells, the pixels that show no lung, of notebook 7's splits."""
    path = main / "leak_summary.csv"
    if not path.is_file():
        return ""
    table = pd.read_csv(path).query("classifier == 'frame'").set_index("split")
    if not set(_SPLITS) <= set(table.index):
        return ""
    shares = [whole_percent(table.accuracy[split]) for split in _SPLITS]
    return (
        f". The frame of the slice alone, which shows no lung, gives {shares[0]} % and {shares[1]} % on "
        f"{table.seeds.min()} other splits of each kind ([leakage](notebooks/07_leakage.ipynb))"
    )


def _beside_one_answer(lead, main):
    """How far adversarial training under attack is ahead of one answer for all slices of unseen groups."""
    gains = gains_over_adversarial((lead, main), "grouped", "largest class")
    if gains is None:
        return ""
    own = gains.loc["pgd"]
    gain, low, high = (-own[f"{name}_percent"] for name in ("gain", "high", "low"))
    chance = ", so this may be chance" if low < 0 < high else ""
    return (
        f". One answer for all slices gives {whole_percent(own.k / own.n)} %. Adversarial training differs "
        f"from that by {gain:+.0f} points (95 % interval {low:+.0f} to {high:+.0f}{chance})"
    )


def _price(lead, main):
    """What robustness costs beside the best network without it, on the same clean slices of unseen groups."""
    gains = gains_over_adversarial((lead, main), "grouped", "frozen features")
    if gains is None or gains.loc["clean", "low_percent"] <= 0:
        return ""
    clean = gains.loc["clean"]
    return (
        f". The price of robustness is that {_RIVALS['frozen features']}, which has none, classifies "
        f"{clean.gain_percent:.0f} points more of the clean slices correctly (95 % interval "
        f"{clean.low_percent:.0f} to {clean.high_percent:.0f})"
    )


def _short(main):
    """How long the study's training was run here, and on how many seeds."""
    seeds = sorted(main.glob("runs/random-s*/06_published_protocol.json"))
    if not seeds:
        return "few epochs"
    epochs = json.loads(seeds[0].read_text(encoding="utf-8"))["parameters"]["published_epochs"]
    return f"{epochs} epochs ({len(seeds)} seed{'s' if len(seeds) > 1 else ''})"


def _blanked(main):
    path = main / "lungs_or_scanner.csv"
    if not path.is_file():
        return
    table = pd.read_csv(path)
    table = table[~table.attacked & table.split.eq("random")].set_index(["model", "view"])
    if table.empty:
        return
    (before, after), (whole, blanked) = (
        [table.loc[(model, view)] for view in ("whole image", "lungs blanked")] for model in _TRAININGS
    )
    title = "The adversarially trained network does not need the lungs."
    if blanked.k < whole.k - 0.02 * whole.n:
        title = "Without the lungs the adversarially trained network does worse."
    yield (
        f"**{title}** On one random split it classifies {whole.k} of {whole.n} slices correctly, and "
        f"{blanked.k} with the lungs blanked. For normal training these are {before.k} and {after.k} "
        "([leakage](notebooks/07_leakage.ipynb), [crop](docs/crop.md))."
    )


def _groupings(path):
    if not path.is_file():
        return
    table = pd.read_csv(path).groupby("groups")[["clean", "n"]].sum().eval("100 * clean / n")
    near = table[(table.index >= 55) & (table.index <= 165)]  # about as many as the dataset has cases, 110
    if len(near) > 1:
        yield (
            f"**What counts as one patient is uncertain.** Groupings of {near.index.min()} to "
            f"{near.index.max()} groups (the dataset has 110 cases) give {near.min():.0f} to "
            f"{near.max():.0f} % on clean slices ([groups](docs/groups.md))."
        )


def accuracies(tables: Path, split: str) -> pd.DataFrame | None:
    """Adaptive rows of a split, by training and attack; None where Table 1 of it is not published."""
    path = tables / "accuracy.csv"
    if not path.is_file():
        return None
    table = pd.read_csv(path)
    table = table[table.split.eq(split) & table.protocol.eq("adaptive")].set_index(["model", "attack"])
    return None if table.empty else table


def gains_over_adversarial(published: Sequence[Path], split: str, classifier: str) -> pd.DataFrame | None:
    """How far a simple classifier is ahead of adversarial training, by attack; None where not published.

    Of the first of the folders of tables that has it.
    """
    for folder in published:
        path = folder / "table1_gains.csv"
        if path.is_file():
            table = pd.read_csv(path)
            table = table[table.split.eq(split) & table.model.eq(classifier)].set_index("attack")
            if len(table):
                return table
    return None


def _matrix(main, split):
    path = main / "published_matrix.csv"
    if not path.is_file():
        return None
    table = pd.read_csv(path)
    table = table[table.split.eq(split)].set_index(["model", "evaluation"])
    return None if table.empty else table


def simple_classifiers(lead: Path, main: Path, split: str) -> dict[str, dict[str, Any]]:
    """{baseline: its cells}, of the table of classes, else (without attacks) of notebook 7's classifiers.

    ``clean`` and ``attacked`` are (accuracy, low, high) in percent or None, the others shares.
    """
    for folder in (main, lead):
        path = folder / f"table1_{split}_classes.csv"
        if path.is_file():
            table = pd.read_csv(path)
            table = table[table.unit.eq("slice")]
            return {name: _cells(table[table.model.eq(name)]) for name in SIMPLE if name in set(table.model)}
    path = main / "leak_summary.csv"
    if not path.is_file():
        return {}
    table = pd.read_csv(path).query("split == @split").set_index("classifier")
    found = {}
    for name, (_, there) in SIMPLE.items():
        if not there:
            continue
        row = table.loc[there]
        clean = tuple(100 * row[["accuracy", "low", "high"]])
        found[name] = {"clean": clean, "attacked": None, "balanced": row.balanced_accuracy, "benign": None}
    return found


def _cells(rows):
    rows = rows.set_index("attack")
    clean, attacked = rows.loc["clean"], rows.loc[BLACK_BOX if BLACK_BOX in rows.index else "pgd"]

    def interval(row):
        return row.accuracy_percent, *interval_of(row, "_percent")

    shares = {"balanced": clean.balanced_accuracy_percent / 100, "benign": clean.recall_benign_percent / 100}
    return {"clean": interval(clean), "attacked": interval(attacked)} | shares


def budget(tables: Path) -> str:
    """The headline Linf budget of the published runs, as "4/255"."""
    for path in sorted(tables.glob("runs/*-s*/03_attacks.json")):
        return f"{json.loads(path.read_text(encoding='utf-8'))['parameters']['eps_255']:g}/255"
    return "the headline budget"


def _percent(table, training, attack):
    return f"{whole_percent(table.loc[(training, attack), 'accuracy'])} %"


def _interval(row):
    return _points([100 * share for share in (row.accuracy, *interval_of(row))])


def _points(cell):
    return "–" if cell is None else "{} ({:.0f}–{:.0f})".format(whole_percent(cell[0] / 100), *cell[1:])
