"""From a detector and images to rows, and from rows to tables: AUROC, detection, accuracy, what is implied.

One row per (detector, attack, image); every figure is derived from them. Intervals draw whole groups.
"""

import math
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fortify import lidc
from fortify.attacks import perturbation_norms
from fortify.data import Slices, load_folder
from fortify.detect.detectors import Detector
from fortify.files import find_root
from fortify.intervals import cluster_interval, whole_percent
from fortify.models import predict
from fortify.runtime import describe_device, device_of
from fortify.tables import crossed

COLUMNS = (
    "detector",
    "attack",  # "clean", "pgd", "fgsm", "cw", or "adaptive"
    "by",  # of an adaptive attack: the strategy that first evaded, "" where none did
    "index",
    "label",
    "prediction",
    "success",  # misclassified
    "score",
    "alarm",
    "evaded",  # misclassified and no alarm
    "linf_255",
)
LINF = ("pgd", "fgsm")  # static attacks within the Linf budget
_DRAWS = 2000


def score_rows(
    detector: Detector,
    clean: Tensor,
    labels: Sequence[int],
    *,
    attack: str,
    index: Sequence[int],
    attacked: Tensor | None = None,
    by: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Rows (:data:`COLUMNS`) of ``attacked`` images (N, C, H, W), None for the ``clean`` ones themselves.

    ``labels`` and ``index`` (N,), the latter the images' positions in the slices.
    """
    shown = clean if attacked is None else attacked
    scores, probabilities = detector.judge(shown)
    scores, predictions = scores.numpy(), probabilities.argmax(1).numpy()
    success, alarm = predictions != np.asarray(labels), scores > detector.threshold
    values = (detector.name, attack, [""] * len(shown) if by is None else by, index, labels, predictions)
    values += (success, scores, alarm, success & ~alarm, perturbation_norms(clean, shown)[0].numpy())
    return pd.DataFrame(dict(zip(COLUMNS, values, strict=True)))


def auroc_interval(
    clean: np.ndarray,
    attacked: np.ndarray,
    clean_groups: np.ndarray,
    attacked_groups: np.ndarray,
    *,
    seed: int = 0,
    draws: int = _DRAWS,
) -> tuple[float, float, float]:
    """(AUROC, low, high): the share of pairs in which the attacked image has the higher score, ties half.

    ``clean`` (N,) and ``attacked`` (M,) are scores. 95 % percentile bootstrap, whole groups drawn for both at
    once. NaN where either is empty.
    """
    if not len(clean) or not len(attacked):
        return math.nan, math.nan, math.nan
    ids = np.unique(np.concatenate([clean_groups, attacked_groups]))
    own, other = (np.equal.outer(ids, groups).astype(float) for groups in (attacked_groups, clean_groups))
    above = np.greater.outer(attacked, clean) + 0.5 * np.equal.outer(attacked, clean)
    wins = own @ above @ other.T  # of the pairs of each two groups
    drawn = np.random.default_rng(seed).multinomial(len(ids), np.full(len(ids), 1 / len(ids)), draws)
    pairs = (drawn @ own.sum(1)) * (drawn @ other.sum(1))
    shares = np.einsum("dg,gh,dh->d", drawn, wins, drawn)[pairs > 0] / pairs[pairs > 0]
    low, high = np.quantile(shares, [0.025, 0.975])
    return float(above.mean()), float(low), float(high)


def summary(rows: pd.DataFrame, groups: Sequence) -> pd.DataFrame:
    """One line per (detector, attack), shares with 95 % intervals by ``groups``, of every slice (N,).

    ``detected`` of ``broken``: alarms among the misclassified attacked images, those that are misclassified
    when clean left out; ``detection``, its share. ``auroc``: these against all clean images. ``accuracy`` is
    that with rejection (Tramer 2022): of the clean images, how many are correct and raise no alarm; of the
    attacked ones, how many of these are then still correct or raise an alarm. Of clean images ``alarms`` is
    the share of false alarms. ValueError where a detector has no clean rows.
    """
    groups, table = np.asarray(groups), []
    for name, own in rows.groupby("detector", sort=False):
        clean = own[own.attack.eq("clean")].set_index("index")
        if clean.empty:
            raise ValueError(f"there are no clean rows of {name}")
        of_clean = groups[clean.index]
        right = ~clean.success & ~clean.alarm
        for attack, part in own.groupby("attack", sort=False):
            part = part.set_index("index").loc[clean.index]
            line = {"detector": name, "attack": attack, "n": len(part)}
            if attack == "clean":
                line |= _share("alarms", part.alarm, of_clean)
            broken = part.success & ~clean.success if attack != "clean" else part.success & False
            caught, of_broken = part.alarm[broken], groups[part.index[broken]]
            line |= {"broken": int(broken.sum()), "detected": int(caught.sum())}
            line |= _share("detection", caught, of_broken)
            scores = auroc_interval(
                clean.score.to_numpy(), part.score[broken].to_numpy(), of_clean, of_broken
            )
            line |= dict(zip(("auroc", "auroc_low", "auroc_high"), scores, strict=True))
            line |= _share("accuracy", right & ~(part.evaded & right), of_clean)
            table.append(line)
    return pd.DataFrame(table)


def _share(name, values, groups):
    """{name, name_low, name_high} of a share with its interval; NaN of nothing."""
    low, high = cluster_interval(values.to_numpy(bool), groups) if len(values) else (math.nan, math.nan)
    return {name: float(values.mean()) if len(values) else math.nan, f"{name}_low": low, f"{name}_high": high}


def implied(table: pd.DataFrame, rows: pd.DataFrame, groups: Sequence, *, eps_255: float) -> pd.DataFrame:
    """What each detector's figures would imply, one line each.

    By Tramer (2022, arXiv:2107.11630) a detector that is robust within a budget gives a classifier, slow but
    as accurate, that is robust within half of it. ``claimed`` is the accuracy with rejection under the
    static Linf attacks together, which would be the robust accuracy at ``half_255`` grey levels; ``adaptive``
    under all attackers within the budget. Intervals by ``groups``; ``table`` is :func:`summary`'s.
    """
    groups, lines = np.asarray(groups), []
    for name in table.detector.unique():
        own = rows[rows.detector.eq(name)].pivot(
            index="index", columns="attack", values=["success", "alarm", "evaded"]
        )
        own = own.astype(bool)
        right = ~own["success"]["clean"] & ~own["alarm"]["clean"]
        static = right & ~own["evaded"][[a for a in LINF if a in own["evaded"]]].any(axis=1)
        whole = static & ~own["evaded"].get("adaptive", pd.Series(False, own.index))
        line = {"detector": name, "eps_255": eps_255, "half_255": eps_255 / 2, "n": len(own)}
        line |= _share("claimed", static, groups[own.index])
        lines.append(line | _share("adaptive", whole, groups[own.index]))
    return pd.DataFrame(lines)


def trained_accuracy(rows: pd.DataFrame, index: Sequence[int], budgets_255: Sequence[float]) -> list[float]:
    """Accuracy under adaptive PGD at each budget in grey levels, of the slices ``index``; NaN where not run.

    ``rows`` is a rows table of one model (``evaluation.COLUMNS``), of a training to compare with.
    """
    own = rows[rows.attack.eq("pgd") & rows.protocol.eq("adaptive") & rows["index"].isin(index)]
    return [float((~own.success[own.eps_255.eq(eps)]).mean()) for eps in budgets_255]


def layout(table: pd.DataFrame, claims: pd.DataFrame) -> pd.DataFrame:
    """A display table of :func:`summary` and :func:`implied`: a line a detector, percent with intervals."""
    of = {attack: part.set_index("detector") for attack, part in table.groupby("attack")}
    lines = []
    for name in table.detector.unique():
        own = {attack: part.loc[name] for attack, part in of.items()}
        claim = claims.set_index("detector").loc[name]
        pgd = own["pgd"]
        area = f"{pgd.auroc:.2f} ({pgd.auroc_low:.2f}–{pgd.auroc_high:.2f})" if pgd.broken else "–"
        lines.append(
            {
                "detector": name,
                "false alarms (%)": _shown(own["clean"], "alarms"),
                "AUROC, PGD": area,
                "alarms, PGD (%)": _shown(pgd, "detection"),
                "alarms, adaptive (%)": _shown(own["adaptive"], "detection"),
                "correct or rejected, PGD and FGSM (%)": _shown(claim, "claimed"),
                "correct or rejected, all attackers (%)": _shown(claim, "adaptive"),
            }
        )
    return pd.DataFrame(lines)


def _shown(line, name):
    if math.isnan(line[name]):
        return "–"
    return f"{100 * line[name]:.0f} ({100 * line[f'{name}_low']:.0f}–{100 * line[f'{name}_high']:.0f})"


def answer(
    table: pd.DataFrame, claims: pd.DataFrame, trained: Sequence[float], alone: float, times: pd.DataFrame
) -> str:
    """The short answer of notebook 13, in Markdown, from :func:`summary`, :func:`implied`, :func:`latency`.

    ``trained``: accuracy of adversarial training at the budget and at half of it (NaN: not run); ``alone``:
    of the guarded network without a detector, at the budget. Fractions.
    """
    of = {attack: part.detection.dropna() for attack, part in table.groupby("attack")}
    best = claims.loc[claims.adaptive.idxmax()]

    def span(values):
        if not len(values):
            return "no part (no attack succeeded)"
        low, high = (whole_percent(value) for value in (values.min(), values.max()))
        return f"{low} %" if low == high else f"{low} to {high} %"

    words = [
        f"The detectors raise an alarm on {span(of['pgd'])} of the slices that PGD breaks. They raise one "
        f"on {span(of['adaptive'])} of the slices that attackers who know the detector break.",
        f"The best detector on these test slices is *{best.detector}*. Under all attackers within the "
        f"budget {_shown(best, 'adaptive')} % of {best.n} slices are correct or rejected. PGD and "
        f"FGSM alone suggest {whole_percent(best.claimed)} %. Without a detector the network classifies "
        f"{whole_percent(alone)} % correctly"
        + (", which the interval includes." if best.adaptive_low <= alone <= best.adaptive_high else "."),
    ]
    if not math.isnan(trained[0]):
        words.append(
            f"Adversarial training classifies {whole_percent(trained[0])} % correctly at the same budget, "
            "without a detector."
        )
    of_both, of_one = times.set_index("detector").p50_ms[[best.detector, "none"]]
    words.append(
        f"Network and *{best.detector}* together take about {of_both:.{0 if of_both > 1 else 1}f} ms a slice "
        f"(median), and the network alone about {of_one:.{0 if of_one > 1 else 1}f} ms."
    )
    return "**Short answer of this run**\n\n" + "\n".join(f"- {line}" for line in words)


def other_slices(source: str, *, size: int, most: int, seed: int = 0) -> Slices | None:
    """At most ``most`` images of another dataset, drawn at random, as :class:`fortify.data.Slices`.

    ``source``: "lidc" (:func:`fortify.lidc.load_lidc_nodules`), or a folder for
    :func:`fortify.data.load_folder`, absolute or below the checkout. None where it is "" and where LIDC has
    not been fetched.
    """
    if not source or (source == "lidc" and not lidc.is_there()):
        return None
    if source == "lidc":
        slices = lidc.load_lidc_nodules(size=size)
    else:
        slices = load_folder(find_root() / source, size=size)
    chosen = np.random.default_rng(seed).permutation(len(slices))[:most]
    return slices.subset(np.sort(chosen))


def false_alarms(
    detectors: Mapping[str, Detector], images: Tensor, groups: Sequence, source: str
) -> pd.DataFrame:
    """Alarms on clean images (N, C, H, W) of another ``source``, one line a detector; by ``groups``."""
    lines = []
    for name, detector in detectors.items():
        alarms = pd.Series(detector.score(images).numpy() > detector.threshold)
        line = {"detector": name, "images": source, "k": int(alarms.sum()), "n": len(alarms)}
        lines.append(line | _share("alarms", alarms, np.asarray(groups)))
    return pd.DataFrame(lines)


def latency(detectors: Mapping[str, Detector], images: Tensor, *, warm_up: int = 5) -> pd.DataFrame:
    """Milliseconds a slice, one at a time: network and detector together, and the network alone.

    ``images`` (N, C, H, W): each is timed once, after ``warm_up`` others. Columns: detector, n, p50_ms,
    p99_ms, threads, processor, of this machine as it was at that moment.
    """
    model = next(iter(detectors.values())).model
    timed = {"none": lambda x: predict(model, x)} | {name: d.score for name, d in detectors.items()}
    taken = {name: [] for name in timed}
    for i in [*range(min(warm_up, len(images))), *range(len(images))]:
        for name, call in timed.items():  # in turn, so that what else the machine does falls on all alike
            started = time.perf_counter()
            call(images[i : i + 1])
            taken[name].append(1000 * (time.perf_counter() - started))
    lines, about = [], {"threads": torch.get_num_threads(), "processor": processor(model)}
    for name, own in taken.items():
        p50, p99 = np.quantile(own[-len(images) :], [0.5, 0.99])
        lines.append(
            {"detector": name, "n": len(images), "p50_ms": round(p50, 3), "p99_ms": round(p99, 3)} | about
        )
    return pd.DataFrame(lines)


def alarms_layout(table: pd.DataFrame) -> pd.DataFrame:
    """A display table of :func:`false_alarms`' rows: a line a detector, a column a source, in %."""
    cells = table.assign(cell=[_shown(row, "alarms") for _, row in table.iterrows()])
    cells["of"] = [f"{row.images} ({row.n})" for row in table.itertuples()]
    return crossed(cells, index="detector", columns="of")


def processor(model: torch.nn.Module) -> str:
    """What computes: the GPU's name, or the processor's as the system says it."""
    device = device_of(model)
    if device.type != "cpu":
        return describe_device(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
