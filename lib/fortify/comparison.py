"""Compare trainings on the same splits: objectives, architectures or parts of a recipe, one row a test slice.

A :class:`Contender` says how a network is trained. :func:`run_contender` trains and attacks it on one split,
and :func:`rank` says which of them differ by more than chance, with whole groups resampled.
"""

import functools
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from fortify.attacks import FGSM, PGD, Attack, craft, prepared
from fortify.data import Slices, to_tensor
from fortify.files import write_csv, write_json
from fortify.intervals import cluster_interval, gain_interval, whole_percent
from fortify.models import build_model, predict
from fortify.objectives import OBJECTIVES
from fortify.runs import lib_sha256
from fortify.runtime import device_of, pick_device
from fortify.tables import crossed, listed
from fortify.training import Recipe, fit

NORMAL = "normal"  # the objective of a training without attacks
PAPERS = "the paper's mix"  # of clean and attacked images, as notebook 4 trains


@dataclass(frozen=True)
class Contender:
    """How a network is trained: ``objective`` is a name in ``OBJECTIVES``, or ``"normal"``, without attacks.

    ``attacks`` maps an attack to the share of every batch that it attacks, as :func:`fortify.training.fit`
    takes it; objectives other than the paper's mix attack every image by the PGD among them.
    """

    name: str
    recipe: Recipe
    objective: str = "mix"
    attacks: Mapping[Attack, float] = field(default_factory=dict)
    arch: str = "resnet_small"
    weights: str = ""

    def __post_init__(self):
        if self.objective not in (NORMAL, *OBJECTIVES):
            raise ValueError(
                f"{self.name}: no objective is called {self.objective!r}; there are {NORMAL}, "
                f"{', '.join(OBJECTIVES)}"
            )


def contenders_of(
    objectives: Sequence[str],
    architectures: Sequence[str],
    *,
    baseline: Mapping[str, Any],
    hardening: Mapping[str, Any],
    epochs: int,
    pretrained: Sequence[str] = (),
) -> list[Contender]:
    """Contenders of notebook 10: the ``objectives`` on the run's network, then ``architectures`` by the mix.

    ``pretrained`` are architectures that start from ImageNet weights (:func:`at_hand`), by the mix too.

    ``baseline`` are notebook 2's parameters; of ``hardening``, notebook 4's, the recipe, the budget and PGD's
    steps. All train for ``epochs``, without mixup. Objectives are named as below; KeyError for another one.
    """
    recipe = hardening["train_recipe"] | {"epochs": epochs, "mixup": 0.0}
    shared = Recipe.from_parameters(baseline, **recipe)
    clean, every = replace(shared, clean_share=1.0), replace(shared, clean_share=0.0)
    pgd = PGD(hardening["train_eps_255"], steps=hardening["train_pgd_steps"])
    thirds = {attack: 1 / 3 for attack in (FGSM(pgd.eps_255), pgd, replace(pgd, loss="margin"))}
    ways = {
        "normal": (clean, NORMAL, {}),
        "PGD alone": (every, "mix", {pgd: 1.0}),
        PAPERS: (shared, "mix", thirds),
        "TRADES": (shared, "trades", {pgd: 1.0}),
        "MART": (shared, "mart", {pgd: 1.0}),
        "AWP": (every, "awp", {pgd: 1.0}),
        "N-FGSM": (shared, "n_fgsm", {pgd: 1.0}),
        "noise": (clean, "noise", {}),
    }
    found = [Contender(name, *ways[name], arch=baseline["arch"]) for name in objectives]
    found += [Contender(arch, *ways[PAPERS], arch=arch) for arch in architectures]
    mix, of_imagenet = ways[PAPERS], {"weights": "imagenet"}
    return found + [Contender(f"{arch}, ImageNet", *mix, arch=arch, **of_imagenet) for arch in pretrained]


def at_hand(archs: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """(those of ``archs`` whose ImageNet weights can be had, {another: why not}).

    Not without a network, for those that are downloaded, nor without the extra ``pretrained`` for Lite0.
    """
    found, missing = [], {}
    for arch in archs:
        try:
            build_model(arch, num_classes=2, weights="imagenet")
            found.append(arch)
        except (ImportError, OSError) as error:
            missing[arch] = str(error)
    return found, missing


def run_contender(
    contender: Contender,
    slices: Slices,
    parts: Mapping[str, np.ndarray],
    *,
    seed: int,
    eps_255: float,
    steps: int,
    lrs: Sequence[float] = (),
    device: str | torch.device = "auto",
    checkpoints: str | Path | None = None,
) -> tuple[nn.Module, pd.DataFrame, dict[str, Any]]:
    """Train on ``parts["train"]`` and attack ``parts["test"]``: (model, rows, facts).

    Of the learning rates ``lrs`` (none: the recipe's) the one of the highest validation accuracy under attack
    is kept (clean for a training without attacks, then the lower one), so test slices play no part.
    ``rows`` has a line a test slice: index, label, prediction (clean), correct (clean) and attacked, whether
    it is still correct under PGD of ``steps`` steps at ``eps_255``, on the cross-entropy and on the margin.
    ``facts``: lr, epoch (kept), epochs, seconds (of the kept training), forwards (:func:`cost_in_forwards`),
    val_accuracy, val_robust_accuracy, parameters and multiply_adds (an image, in millions).
    """
    train, val = slices.subset(parts["train"]), slices.subset(parts["val"])
    judge = None if contender.objective == NORMAL else _judge(contender, eps_255)
    tried = []
    for lr in sorted(lrs) or [contender.recipe.lr]:
        model = build_model(
            contender.arch,
            num_classes=len(slices.class_names),
            weights=contender.weights or None,
            seed=seed,
        ).to(pick_device(str(device)))
        start = time.perf_counter()
        history = fit(
            model,
            train,
            val,
            replace(contender.recipe, lr=lr),
            attacks=None if contender.objective == NORMAL else contender.attacks,
            objective=None if contender.objective == NORMAL else OBJECTIVES[contender.objective](),
            val_attack=judge,
            seed=seed,
            checkpoints=checkpoints,
            progress=False,
        )
        kept = history[history.selected].iloc[0]
        score = (np.nan_to_num(kept.val_robust_accuracy), kept.val_accuracy, -lr)
        tried.append((score, model, kept, time.perf_counter() - start))
    (_, _, negative), model, kept, seconds = max(tried, key=lambda one: one[0])
    rows = _attacked(model, slices.subset(parts["test"]), parts["test"], eps_255, steps, seed)
    facts = {"lr": -negative, "epoch": int(kept.epoch), "epochs": contender.recipe.epochs}
    facts |= {"seconds": seconds, "forwards": cost_in_forwards(contender)}
    facts |= {name: float(kept[name]) for name in ("val_accuracy", "val_robust_accuracy")}
    return model, rows, facts | size_of(model, slices.images.shape[1])


def _judge(contender, eps_255):
    """The attack on validation slices: as many steps as training takes, at the budget that is reported."""
    steps = max((a.steps for a in contender.attacks if isinstance(a, PGD)), default=4)
    return PGD(eps_255, steps=steps)


def _attacked(model, test, index, eps_255, steps, seed):
    images, labels = to_tensor(test.images), torch.as_tensor(test.labels)
    prediction = predict(model, images).argmax(1)
    left = prediction == labels
    options = {"fused": prepared(model, images, labels), "seed": seed}  # once for both losses
    for loss in ("cross_entropy", "margin"):
        chosen = left.nonzero().squeeze(1)
        if len(chosen):
            attack = PGD(eps_255, steps=steps, loss=loss, stop_early=True)
            left[chosen[craft(model, images, labels, attack, subset=chosen, **options).success]] = False
    columns = {"index": np.asarray(index), "label": test.labels, "prediction": prediction.numpy()}
    rows = pd.DataFrame(columns)
    return rows.assign(correct=rows.prediction.eq(rows.label), attacked=left.numpy())


def cost_in_forwards(contender: Contender) -> float:
    """What an epoch costs an image, in forward passes, a backward pass counted as one, or two with weights.

    A training pass is 3 and an attack's step 2; AWP and the objectives that also train on the clean image,
    or ask for its prediction, pay for these.
    """
    pgd = [attack for attack in contender.attacks if isinstance(attack, PGD)]
    steps = max((attack.steps for attack in pgd), default=0)
    clean = contender.recipe.clean_share
    shared = sum(share * 2 * getattr(attack, "steps", 1) for attack, share in contender.attacks.items())
    trained = 3 * (clean + sum(contender.attacks.values()))
    return {
        NORMAL: 3 * clean,
        "mix": trained + shared,
        "awp": 2 * trained + shared,
        "trades": 6 + 1 + 2 * steps,
        "mart": 6 + 2 * steps,
        "n_fgsm": 3 + 2,
        "noise": 3,
    }[contender.objective]


def size_of(model: nn.Module, side: int) -> dict[str, float]:
    """{"parameters": weights, "multiply_adds": in millions, of one image of ``side`` pixels}."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    device, was = device_of(model), model.training
    model.eval()
    with counter, torch.no_grad():
        model(torch.zeros(1, getattr(model, "channels", 1), side, side, device=device))
    model.train(was)
    weights = sum(p.numel() for p in model.parameters())
    return {"parameters": weights, "multiply_adds": counter.get_total_flops() / 2e6}


def standings(rows: pd.DataFrame, groups: Sequence[Any]) -> pd.DataFrame:
    """One line a (split, contender): n, k, accuracy and balanced accuracy, clean and attacked, and
    ``one_answer``, how many of the trainings predict one class for every test slice.

    ``rows`` are those of :func:`run_contender`, with the columns contender, split and seed; ``groups`` (N,)
    the group of every slice. Seeds are pooled. Fractions, with intervals by groups.
    """
    found = []
    for (split, name), own in rows.groupby(["split", "contender"], sort=False):
        group = np.asarray(groups)[own["index"]]
        line = {"split": split, "contender": name, "seeds": own.seed.nunique(), "n": len(own)}
        for kind in ("correct", "attacked"):
            low, high = cluster_interval(own[kind].to_numpy(bool), group)
            line |= {f"k_{kind}": int(own[kind].sum()), kind: own[kind].mean()}
            line |= {f"{kind}_low": low, f"{kind}_high": high}
            line[f"balanced_{kind}"] = own.groupby("label")[kind].mean().mean()
        line["one_answer"] = int(own.groupby("seed").prediction.nunique().eq(1).sum())
        found.append(line)
    return pd.DataFrame(found)


def standings_layout(table: pd.DataFrame) -> pd.DataFrame:
    """A display table of :func:`standings`: a line a contender, each split beside the other, in %.

    Balanced accuracy is of the clean slices.
    """
    names = {"correct": "clean", "attacked": "PGD", "balanced_correct": "balanced"}
    lines = {name: {"contender": name} for name in table.contender.unique()}
    for split, own in table.groupby("split", sort=False):
        for _, row in own.iterrows():
            cells = {f"{split}: {shown}": whole_percent(row[name]) for name, shown in names.items()}
            lines[row.contender] |= cells
    return pd.DataFrame(lines.values()).fillna("–")


def rank(rows: pd.DataFrame, groups: Sequence[Any], *, reference: str) -> pd.DataFrame:
    """How many points more than ``reference`` each contender classifies correctly, of the same slices.

    One line a (split, kind, contender), kind ``"correct"`` (clean) or ``"attacked"``: gain_percent with the
    interval low_percent, high_percent of a bootstrap of whole groups, and ``differs``, whether that excludes
    zero. Only seeds of which both have rows count. ValueError where the reference has none of a split.
    """
    key = ["seed", "index"]
    found = []
    for split, of_split in rows.groupby("split", sort=False):
        base = of_split[of_split.contender.eq(reference)].set_index(key).sort_index()
        if base.empty:
            raise ValueError(f"there is no {reference!r} on the {split} split to compare with")
        for name, own in of_split.groupby("contender", sort=False):
            if name == reference:
                continue
            both = own.set_index(key).merge(
                base, left_index=True, right_index=True, suffixes=("", "_reference")
            )
            group = np.asarray(groups)[both.index.get_level_values("index")]
            for kind in ("correct", "attacked"):
                more = both[kind].astype(int) - both[f"{kind}_reference"].astype(int)
                low, high = gain_interval(more.to_numpy(), group)
                line = {"split": split, "kind": kind, "contender": name, "n": len(both)}
                shares = zip(("gain", "low", "high"), (more.mean(), low, high), strict=True)
                line |= {f"{part}_percent": 100 * share for part, share in shares}
                found.append(line | {"differs": not low <= 0 <= high})
    return pd.DataFrame(found)


def gains_layout(gains: pd.DataFrame, *, kind: str = "attacked") -> pd.DataFrame:
    """A display table of :func:`rank`: a line a contender, a column a split, points with their interval.

    In bold where the interval excludes zero.
    """
    own = gains[gains.kind.eq(kind)]
    cells = [f"{r.gain_percent:+.0f} ({r.low_percent:.0f} to {r.high_percent:.0f})" for r in own.itertuples()]
    cells = [f"**{cell}**" if differs else cell for cell, differs in zip(cells, own.differs, strict=True)]
    return crossed(own.assign(cell=cells), index="contender", columns="split")


def certified(certificates: pd.DataFrame, radii: Sequence[float]) -> pd.DataFrame:
    """Certified accuracy by radius: k of n images predicted correctly within it, with a 95 % interval.

    ``certificates`` are :func:`fortify.smoothing.certify`'s, with the column ``group``, which the interval
    resamples; ``radii`` are L2, image in [0, 1].
    """
    right, group = certificates.prediction.eq(certificates.label), certificates.group.to_numpy()
    found = []
    for radius in radii:
        held = (right & certificates.radius.ge(radius)).to_numpy()
        low, high = cluster_interval(held, group)
        line = {"radius": radius, "k": int(held.sum()), "n": len(held), "accuracy": held.mean()}
        found.append(line | {"low": low, "high": high})
    return pd.DataFrame(found)


def remembered(
    folder: str | Path, key: Mapping[str, Any], make: Callable[[], tuple[pd.DataFrame, dict]]
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """What ``make()`` returns, (rows, facts), read from ``folder`` where it was made of the same ``key``.

    ``key`` is JSON-able and names all that decides the result; this package's code is part of it. So a long
    comparison that is interrupted goes on with the contender that it was at.
    """
    text = json.dumps(key, sort_keys=True) + lib_sha256()
    stem = Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:16]
    rows_file, facts_file = stem.with_suffix(".csv"), stem.with_suffix(".json")
    if rows_file.is_file() and facts_file.is_file():
        return pd.read_csv(rows_file), json.loads(facts_file.read_text(encoding="utf-8"))
    rows, facts = make()
    write_csv(rows_file, rows)
    write_json(facts_file, facts)  # last: it says that both are whole
    return rows, facts


def compare(
    contenders: Sequence[Contender],
    slices: Slices,
    parts: Mapping[str, Mapping[str, np.ndarray]],
    *,
    folder: str | Path,
    eps_255: float,
    steps: int,
    lrs: Sequence[float],
    device: str | torch.device = "auto",
    looks: Mapping[str, Callable[[nn.Module, Slices, pd.DataFrame], dict[str, Any]]] | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Run every contender on every split: (rows, costs), resumable through ``folder``.

    ``parts`` are splits by the name of their run, ``<split>-s<seed>``. The learning rate is chosen on the
    first run of each split (:func:`run_contender`) and kept for its others. ``looks`` are further looks at
    the network of the last split's first run, {name of a contender, or "all": one of
    :mod:`fortify.audit.looks`}. It is trained again for them, so that another look leaves all else as it is.
    ``rows``: those of
    :func:`run_contender` with contender, split and seed; ``costs``: a line a contender and run, its facts. A
    contender that ran before, by the same code, is read.
    """
    first = {name.rpartition("-s")[0]: name for name in reversed(list(parts))}
    looked_at = list(dict.fromkeys(name.rpartition("-s")[0] for name in parts))[-1]
    all_rows, costs = [], []
    for contender in contenders:
        chosen = {}
        for name, part in parts.items():
            split, _, seed = name.rpartition("-s")
            options = {"seed": int(seed), "eps_255": eps_255, "steps": steps, "device": device}
            options |= {"checkpoints": Path(folder) / "checkpoints"}
            own = list(lrs) if name == first[split] else [chosen[split]]
            key = {"contender": repr(contender), "run": name, "eps_255": eps_255, "steps": steps}
            key |= {"data": slices.sha256, "size": slices.images.shape}
            key |= {"parts": {kind: np.asarray(index).tolist() for kind, index in part.items()}}

            def make(lrs=own, contender=contender, part=part, options=options, wanted=()):
                model, rows, facts = run_contender(contender, slices, part, lrs=lrs, **options)
                for look in wanted:
                    facts |= look(model, slices.subset(part["test"]), rows)
                shutil.rmtree(options["checkpoints"], ignore_errors=True)
                return rows, facts

            rows, facts = remembered(folder, key | {"lrs": own}, make)
            chosen[split] = facts["lr"]
            wanted = [look for of, look in (looks or {}).items() if of in (contender.name, "all")]
            if wanted and name == first[looked_at]:  # the kept training once more, and looked at
                again = functools.partial(make, lrs=[facts["lr"]], wanted=wanted)
                named = key | {"lrs": [facts["lr"]], "looks": [repr(look) for look in wanted]}
                facts = remembered(folder, named, again)[1] | {"seconds": facts["seconds"]}
            about = {"contender": contender.name, "split": split, "seed": int(seed)}
            all_rows.append(rows.assign(**about))
            costs.append(about | facts)
    return pd.concat(all_rows, ignore_index=True), pd.DataFrame(costs)


def cost_summary(costs: pd.DataFrame) -> pd.DataFrame:
    """One line a contender: what it costs, the mean over its runs, for a reader.

    ``costs`` are :func:`compare`'s. Columns: contender, weights (M), multiply-adds (M) (an image), forwards
    (:func:`cost_in_forwards`), seconds, and, where an AutoAttack was run, how many of the slices that PGD
    left it broke, as "broken/left".
    """
    found = []
    for name, own in costs.groupby("contender", sort=False):
        line = {"contender": name, "weights (M)": own.parameters.iloc[0] / 1e6}
        line |= {"multiply-adds (M)": own.multiply_adds.iloc[0], "forwards": own.forwards.iloc[0]}
        line["seconds"] = own.seconds.mean()
        if "autoattack_n" in own:
            broken, left = (int(own[f"autoattack_{part}"].sum()) for part in ("broken", "n"))
            line["AutoAttack"] = f"{broken}/{left}" if left else "–"
        found.append(line)
    return pd.DataFrame(found)


def leaders(table: pd.DataFrame, gains: pd.DataFrame, *, reference: str, eps_255: float) -> str:
    """Who classifies most attacked slices, and who is ahead of the reference or behind, a line a split.

    ``table`` is :func:`standings`', ``gains`` :func:`rank`'s. Only what intervals by groups bear out is said
    to be ahead or behind. Trainings that failed are named. Markdown.
    """
    lines = []
    for split, own in table.groupby("split", sort=False):
        base, top = own[own.contender.eq(reference)].iloc[0], own.loc[own.attacked.idxmax()]
        if base.attacked == top.attacked:
            top = base
        said = f"On the {split} split *{top.contender}* classifies most attacked slices correctly: "
        said += f"{whole_percent(top.attacked)} % under PGD at {eps_255:g}/255 ({top.k_attacked}/{top.n})."
        it = f"*{reference}*"
        if top.contender != reference:
            said += f" For {it} this is {whole_percent(base.attacked)} % ({base.k_attacked}/{base.n})."
        said += f" Of clean slices {it} classifies {whole_percent(base.correct)} % correctly "
        said += f"({base.k_correct}/{base.n})."
        apart = gains[gains.split.eq(split) & gains.kind.eq("attacked") & gains.differs]
        ahead, behind = apart[apart.gain_percent > 0], apart[apart.gain_percent < 0]
        if len(ahead):
            named = [f"{r.contender} by {r.gain_percent:.0f} points ({_span(r)})" for r in ahead.itertuples()]
            said += f" Under attack these are ahead of {it} by more than chance: {listed(named)}."
        if len(behind):
            said += f" These are behind it by more than chance: {'; '.join(behind.contender)}."
        if apart.empty:
            said += f" Under attack no other training differs from {it}: every interval includes zero."
        lines.append(f"- {said}")
    lost = [
        f"*{r.contender}* ({r.split} split{f', {r.one_answer} of {r.seeds} folds' if r.seeds > 1 else ''})"
        for r in table[table.one_answer.gt(0)].itertuples()
    ]
    if lost:
        lines.append(f"- Trainings that gave one answer for all test slices, and so failed: {listed(lost)}.")
    return "\n".join(lines)


def _span(row):
    return f"{row.low_percent:.0f} to {row.high_percent:.0f}"
