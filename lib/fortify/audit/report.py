"""Is a robustness figure to be believed? The checks of a careful reviewer, run on any model by one call.

A check (:mod:`fortify.audit.checks`) compares what an attack did with what it must do; a failed one says that
the figure is not to be trusted, or that the model only looks robust.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import pandas as pd
from torch import nn

from fortify import attacks as fortify_attacks
from fortify.audit.checks import CHECKS, worst_over_attacks
from fortify.audit.context import FAIL, NOT_RUN, AuditData, Check, Context, Suite
from fortify.intervals import wilson
from fortify.runtime import device_of, eval_mode, float32_convolutions, seeded
from fortify.tables import to_markdown


@dataclass(frozen=True, eq=False)
class Audit:
    """What :func:`audit` found: the checks, and the accuracy under each attack that it ran."""

    checks: tuple
    accuracies: pd.DataFrame  # attack, k, n, accuracy, low, high (Wilson, 95 %), as fractions
    table: pd.DataFrame = field(init=False)  # id, check, verdict, measured, limit, note

    def __post_init__(self):
        columns = list(Check.__dataclass_fields__)
        rows = [[getattr(check, column) for column in columns] for check in self.checks]
        object.__setattr__(self, "table", pd.DataFrame(rows, columns=columns))

    @property
    def passed(self) -> bool:
        """Whether no check failed. One that did not run is no failure, but no pass either: see the table."""
        return not self.failed

    @property
    def failed(self) -> tuple[str, ...]:
        """The ids of the checks that failed, in order."""
        return tuple(check.id for check in self.checks if check.verdict == FAIL)

    def with_check(self, check: Check) -> "Audit":
        """This audit with one more line, such as the mutants' (T10), in its place."""
        checks = [*(c for c in self.checks if c.id != check.id), check]
        return Audit(tuple(sorted(checks, key=lambda c: _number(c.id))), self.accuracies)

    def to_markdown(self) -> str:
        """The table for a reader, failures in bold."""
        shown = self.table.replace({"verdict": {FAIL: "**fail**", NOT_RUN: "*not run*"}})
        return to_markdown(shown)


def audit(
    model: nn.Module,
    data: AuditData,
    attacks: Suite | None = None,
    *,
    craft: Callable[..., fortify_attacks.Adversarial] = fortify_attacks.craft,
    others: Iterable[nn.Module] = (),
    seed: int = 0,
    only: Iterable[str] | None = None,
) -> Audit:
    """Check the model and the attacks on it: :class:`Audit`.

    ``data`` is :class:`AuditData`; ``attacks`` a :class:`Suite` (default: the paper profile's). ``craft`` is
    the attack implementation under audit, with the signature of :func:`fortify.attacks.craft`. ``others``
    are models to transfer attacks from (T8); ``only`` are the ids of the checks to run. Only images that
    the model classifies correctly are attacked; accuracies count the others as wrong. The model is left as
    it is.
    The same ``seed`` gives the same audit, of a random model or attack too.
    Raises ValueError for an unknown id, or where the model classifies no image correctly.
    """
    suite = Suite() if attacks is None else attacks
    wanted = tuple(CHECKS) if only is None else tuple(only)
    unknown = sorted(set(wanted) - set(CHECKS))
    if unknown:
        raise ValueError(f"unknown checks {unknown}; use some of {', '.join(CHECKS)}")
    # T0 answers for every attack that the others ran, so it comes last.
    order = sorted(wanted, key=lambda name: (name == "T0", _number(name)))
    device = device_of(model)
    # A model that cannot be copied is audited itself: its modes are put back at the end.
    # A model or an attack under audit may draw from the global generators. T0 asks for the same bits twice.
    with eval_mode(model), seeded(seed, device), float32_convolutions(device, deterministic=True):
        ctx = Context(model, data, suite, craft=craft, others=others, seed=seed)
        results = {name: CHECKS[name](ctx) for name in order}
    return Audit(tuple(results[name] for name in CHECKS if name in results), _accuracies(ctx))


def remarks(found: Audit) -> str:
    """An :class:`Audit` in words: which checks fail, at what limit, and what the others note. Markdown."""
    failed, noted = found.table[found.table.verdict.eq(FAIL)], found.table[found.table.note.ne("")]
    text = f"{len(failed)} of {len(found.table)} checks fail." if len(failed) else "No check fails."
    lines = [
        f"- **{row.check}** ({row.id}) fails: {row.measured}. Limit: {row.limit}."
        for row in failed.itertuples()
    ]
    lines += [f"- {row.check} ({row.id}): {row.note}." for row in noted.itertuples()]
    return "\n".join([text, "", *lines])


def accuracies_side_by_side(audits: Mapping[str, Audit]) -> pd.DataFrame:
    """Accuracy under each attack that the audits ran, k/n with its Wilson interval, a column a model.

    Of AutoAttack's parts, each of which goes on where those before it failed, the last: all of it.
    """
    columns = {}
    for name, found in audits.items():
        own = found.accuracies.set_index("attack")
        spread = zip(own.k, own.n, own.low, own.high, strict=True)
        cells = [f"{k}/{n} ({100 * low:.0f} to {100 * high:.0f} %)" for k, n, low, high in spread]
        columns[name] = pd.Series(cells, index=own.index)
    table = pd.DataFrame(columns).reindex(next(iter(columns.values())).index).fillna("").reset_index()
    of = table.attack.str.extract(r"^(.*AutoAttack) to ")[0].fillna(table.attack)
    return table.assign(attack=of).drop_duplicates("attack", keep="last").reset_index(drop=True)


def _number(name):
    """T0, T0b, T1, ... T15 in that order."""
    return int("".join(c for c in name if c.isdigit())), name


def _accuracies(ctx):
    correct = {"clean": ctx.n}
    correct |= {name: int((~broken).sum()) for name, broken in ctx.broken.items()}
    if ctx.broken:
        correct["worst case"] = int((~worst_over_attacks(ctx)).sum())
    rows = [(name, k, ctx.total, k / ctx.total, *wilson(k, ctx.total)) for name, k in correct.items()]
    return pd.DataFrame(rows, columns=["attack", "k", "n", "accuracy", "low", "high"])
