"""The sentences that open notebook 08, made of the run's own audits, and its checks in words."""

from collections.abc import Mapping

import pandas as pd

from fortify.audit.checks import MEANINGS, QUESTIONS
from fortify.audit.context import FAIL, NOT_RUN, PASS, Suite
from fortify.audit.mutants import tally
from fortify.audit.report import Audit
from fortify.tables import listed

# What a failed check says of the accuracy under attack.
_INVALID = ("T0", "T0b")
_UPPER = ("T1", "T2", "T3", "T4", "T5", "T6", "T7", "T8", "T9", "T16")
_ONE_STEP = ("T11",)


def audit_answer(audits: Mapping[str, Audit], mutants: pd.DataFrame, suite: Suite) -> str:
    """What the audits of {training: :class:`Audit`} found, and what they caught of ``mutants``. Markdown."""
    lines = []
    for name, found in audits.items():
        table = found.table
        failed, missing = (table[table.verdict.eq(verdict)] for verdict in (FAIL, NOT_RUN))
        passed, ran = int(table.verdict.eq(PASS).sum()), int(table.verdict.ne(NOT_RUN).sum())
        text = f"**{name.capitalize()} training**: {passed} of {ran} checks pass."
        if len(failed):
            text += f" Failed: {_named(failed)}."
        if failed.id.isin(_INVALID).any():
            text += " **So the accuracy under attack is invalid.**"
        if failed.id.isin(_UPPER).any():
            text += " **So the true accuracy under attack may be lower than reported.**"
        if failed.id.isin(_ONE_STEP).any():
            text += " **So the model only looks robust: it withstands one-step attacks alone.**"
        if failed.empty:
            text += " So the audit finds no sign that the attacks are weak."
        if len(missing):
            text += f" Not run: {_named(missing)}."
        lines += [text, f"{name.capitalize()} training: {_accuracies(found, suite)}."]
    lines.append(f"The audit catches **{tally(mutants)}** attacks and defences that were broken on purpose.")
    if missed := list(mutants.name[~mutants.caught]):
        lines[-1] += f" It misses {listed(missed)}, so a check that passes says less."
    return "\n".join(f"- {line}" for line in lines)


def _named(checks):
    return listed([f"*{name}*" for name in checks.check])


def _accuracies(found, suite):
    own = found.accuracies.set_index("attack")
    text = f"{own.k['clean']} of {own.n['clean']} slices are correct when clean. "
    text += f"{own.k['PGD, cross-entropy']} remain correct under PGD"
    if whole := [name for name in own.index if "AutoAttack to " in name]:
        text += f", {own.k[whole[-1]]} under {suite.autoattack}"
        if suite.autoattack != "AutoAttack":
            text += f" ({suite.autoattack_steps} steps, {suite.square_queries} queries)"
    return text + f", and {own.k['worst case']} under the worst attack for each slice"


def checks_in_words() -> str:
    """Every check by name (its code in the CSV behind it) and what must be true, question by question."""
    lines = []
    for question in QUESTIONS:
        own = {id: meaning for id, meaning in MEANINGS.items() if meaning.question == question}
        lines += [f"**{question}**", ""]
        lines += [f"- *{meaning.name}* ({id}): {meaning.must_hold}" for id, meaning in own.items()] + [""]
    return "\n".join(lines)
