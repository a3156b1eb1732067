"""The checks T0 to T16 of an audit: each a function of a Context that returns a Check.

After Carlini et al. 2019 (arXiv:1902.06705), Athalye et al. 2018, Tramer et al. 2020, Croce & Hein 2020,
Zimmermann et al. 2022 and Pintor et al. 2022. To add one, write it and list it in ``CHECKS``.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from fortify import attacks as fortify_attacks
from fortify.attacks import CW, FGSM, PGD, margin, perturbation_norms
from fortify.audit.autoattack import WHITE_BOX, autoattack
from fortify.audit.context import FAIL, NOT_RUN, PASS, Check, Context
from fortify.intervals import cluster_interval, wilson
from fortify.models import predict

FEWEST_GROUPS = 5  # of which an interval can be drawn at all
WHITE = 255.0  # grey levels: a budget of the whole range


class _FalseGradient(torch.autograd.Function):
    """The model's value with another gradient: zeros, or random signs."""

    @staticmethod
    def forward(ctx, x, model, generator):
        ctx.generator, ctx.shape, ctx.like = generator, x.shape, x
        with torch.no_grad():
            return model(x)

    @staticmethod
    def backward(ctx, _):
        if ctx.generator is None:
            return torch.zeros_like(ctx.like), None, None
        signs = torch.randint(0, 2, ctx.shape, generator=ctx.generator) * 2.0 - 1
        return signs.to(ctx.like), None, None


class FalseGradient(nn.Module):
    """``model`` as an attack sees it when its gradient says nothing: zeros, or random signs from ``seed``.

    Same predictions, same parameters, so that only what the attack does without a gradient is left.
    """

    def __init__(self, model: nn.Module, *, seed: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)
        for name in ("arch", "num_classes"):
            if hasattr(model, name):
                setattr(self, name, getattr(model, name))

    def forward(self, x: Tensor) -> Tensor:
        return _FalseGradient.apply(x, self.model, self.generator)


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio (Croce & Hein 2020), untargeted, (N,): needs three classes or more."""
    ordered = logits.sort(1).values
    return margin(logits, labels) / (ordered[:, -1] - ordered[:, -3] + 1e-12)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each image, (N,)."""
    return nn.functional.cross_entropy(logits, labels, reduction="none")


@dataclass(frozen=True)
class Meaning:
    """A check in words: its name, the question it belongs to, and what must be true, in a line."""

    name: str
    question: str
    must_hold: str


_CORRECT = "Are the attacks correct, and strong enough?"
_BEHAVE = "Do they behave as attacks must?"
_BETTER = "Does another attacker do better?"
_FIGURE = "Is the accuracy under attack what it seems, and complete?"
_AUDIT = "Does the audit see?"
QUESTIONS = (_CORRECT, _BEHAVE, _BETTER, _FIGURE, _AUDIT)
MEANINGS = {
    "T0": Meaning(
        "contract of the attacks",
        _CORRECT,
        "Each attacked image stays in [0, 1] and within its budget, a budget of zero changes nothing, one "
        "seed gives one result, and the model stays as it was.",
    ),
    "T0b": Meaning(
        "null attack",
        _CORRECT,
        "Without a gradient to follow an attack breaks nothing. If it does, the pipeline damages images.",
    ),
    "T1": Meaning("loss rises", _CORRECT, "The loss rises on nearly each image, and never falls on average."),
    "T2": Meaning(
        "converged",
        _CORRECT,
        "More steps, more starts, other step sizes and an independent loop break nearly nothing more.",
    ),
    "T3": Meaning("PGD at least FGSM", _BEHAVE, "What one step of FGSM breaks, PGD breaks."),
    "T4": Meaning("accuracy falls with the budget", _BEHAVE, "A larger budget never raises the accuracy."),
    "T5": Meaning("whole range", _BEHAVE, "Where each pixel may take any value, nothing stays correct."),
    "T6": Meaning("random noise", _BEHAVE, "Noise of the same size breaks no image that the attack left."),
    "T7": Meaning(
        "Square and AutoAttack",
        _BETTER,
        "Square, which needs no gradient, and AutoAttack break nearly nothing that PGD left. If Square does, "
        "gradients are masked.",
    ),
    "T8": Meaning("transfer", _BETTER, "Images crafted on other models break nearly nothing that PGD left."),
    "T9": Meaning("gradients and losses", _CORRECT, "No gradient is zero, and no other loss breaks more."),
    "T10": Meaning("mutants are caught", _AUDIT, "Attacks and defences broken on purpose fail a check."),
    "T11": Meaning(
        "local linearity",
        _FIGURE,
        "The model does not stop one-step attacks alone, with gradients that turn within the budget.",
    ),
    "T13": Meaning(
        "worst case per image", _FIGURE, "The worst case over the attacks stands beside their mean."
    ),
    "T14": Meaning("8-bit files", _FIGURE, "Attacked images survive being saved as 8-bit files."),
    "T15": Meaning("interval by group", _FIGURE, "The interval knows which slices belong together."),
    "T16": Meaning(
        "CW converged",
        _CORRECT,
        "A longer CW breaks nearly no more images within its budget, nor with much smaller changes.",
    ),
}


def named(id: str, verdict: str, measured: str, limit: str, note: str = "") -> Check:
    """A :class:`Check` with the name that ``MEANINGS`` gives its id."""
    return Check(id, MEANINGS[id].name, verdict, measured, limit, note)


def _check(id, fails, *, measured, limit, note=""):
    return named(id, FAIL if fails else PASS, measured, limit, note)


def contract(ctx: Context) -> Check:
    """T0: what is true of every attack. Runs last: it answers for all that was crafted in this audit."""
    few = torch.arange(ctx.n) < ctx.suite.contract_images
    pgd = PGD(ctx.suite.eps_255, steps=ctx.suite.contract_steps)
    hopeless = CW(binary_search_steps=1, steps=1, stepsize=1e-9)  # moves nothing: it must fail, and say so
    for attack in (FGSM(ctx.suite.eps_255), pgd, ctx.suite.cw, hopeless):
        ctx.craft(attack, where=few, training=True)  # the attack, not its caller, sees to eval mode
    clean = predict(ctx.model, ctx.images[few])
    for attack in (FGSM(0), PGD(0, steps=ctx.suite.contract_steps)):
        _, images = ctx.craft(attack, where=few)
        same = torch.equal(predict(ctx.model, images[few]), clean)
        ctx.note(attack, "changes the prediction with no budget", not same)
    _, first = ctx.craft(pgd, where=few)
    ctx.forget()  # or the second run would be the first
    ctx.note(pgd, "gives two results for one seed", not torch.equal(first, ctx.craft(pgd, where=few)[1]))
    found = "; ".join(f"{fault} ({attack})" for fault, attack in ctx.faults.items())
    return _check("T0", ctx.faults, measured=found or "no breach", limit="no breach")


def null_attack(ctx: Context) -> Check:
    """T0b: without a gradient to follow, an attack must find nothing; if it does, the pipeline did."""
    attack = PGD(ctx.suite.eps_255, steps=ctx.suite.contract_steps, random_start=False)
    lost = {
        name: int(ctx.craft(attack, model=FalseGradient(ctx.model, seed=seed))[0].sum())
        for name, seed in (("zero gradients", None), ("random signs", ctx.seed))
    }
    # Random signs are noise, and noise of that size may cost a fragile model something by itself.
    noise = int(ctx.misclassified(ctx.random_signs(0)).sum())
    allowed = ctx.suite.tolerated(ctx.n, ctx.suite.gap_points)
    return _check(
        "T0b",
        lost["zero gradients"] > allowed or lost["random signs"] > noise + allowed,
        measured=", ".join(f"{name} break {ctx.share(count)}" for name, count in lost.items()),
        limit=f"zero gradients {allowed}, random signs {noise + allowed}",
        note=f"random noise of the same size breaks {ctx.share(noise)}" if noise else "",
    )


def loss_rises(ctx: Context) -> Check:
    """T1: the loss is higher after the attack, image by image, and no lower on average as it goes on."""
    steps = ctx.suite.pgd_steps
    lengths, mean = sorted({1, max(1, steps // 5), steps}), []
    clean = cross_entropy(ctx.logits(ctx.images), ctx.labels)
    for length in lengths:  # one step size, so that each is the beginning of the next
        attack = PGD(ctx.suite.eps_255, steps=length, rel_stepsize=2.5 / steps)
        _, images = ctx.pgd() if length == steps else ctx.craft(attack)
        loss = cross_entropy(ctx.logits(images), ctx.labels)
        mean.append(loss.mean().item())
    rising = int((loss > clean).sum())
    falls = any(after < before - 0.01 * max(mean) for before, after in zip(mean, mean[1:], strict=False))
    allowed = ctx.suite.tolerated(ctx.n, 100 * (1 - ctx.suite.rising_share))
    trace = ", ".join(f"{value:.3g} at {length}" for length, value in zip(lengths, mean, strict=True))
    return _check(
        "T1",
        ctx.n - rising > allowed or falls,
        measured=f"rises on {ctx.share(rising)}; mean {clean.mean():.3g} clean, {trace} steps",
        limit=f"all but {allowed}; mean never falls by 1 %",
    )


def converged(ctx: Context) -> Check:
    """T2: more steps, more starts, other step sizes and an independent loop find (nearly) nothing more."""
    suite, correct = ctx.suite, ~ctx.white_box()[0]
    eps, steps = suite.eps_255, suite.pgd_steps
    longer = {
        f"{2 * steps} steps": PGD(eps, steps=2 * steps),
        f"{suite.restarts} more starts": PGD(eps, steps=steps, restarts=suite.restarts),
        "half the step": PGD(eps, steps=steps, rel_stepsize=1.25 / steps),
        "twice the step": PGD(eps, steps=steps, rel_stepsize=5 / steps),
    }
    more = {
        name: int(ctx.craft(attack, where=correct, seed=ctx.seed + 1000)[0].sum())
        for name, attack in longer.items()
    }
    broken, images = ctx.ascend(cross_entropy)
    more["independent loop"] = int((broken & correct).sum())
    # Losses tell a weak attack from a strong one where the same few images fall to both.
    own, independent = (
        cross_entropy(ctx.logits(found), ctx.labels).mean().item() for found in (ctx.pgd()[1], images)
    )
    allowed = suite.tolerated(ctx.n)
    return _check(
        "T2",
        max(more.values()) > allowed or own < suite.loss_share * independent,
        measured="breaks more: "
        + ", ".join(f"{name} {count}" for name, count in more.items())
        + f"; mean loss {own:.3g}, independent loop {independent:.3g}",
        limit=f"{allowed} of {ctx.n}; {suite.loss_share:.0%} of the loss",
    )


def iterated_beats_one_step(ctx: Context) -> Check:
    """T3: per image, what FGSM breaks PGD breaks."""
    ctx.broken["FGSM"] = ctx.craft(FGSM(ctx.suite.eps_255))[0]
    only = int((ctx.broken["FGSM"] & ~ctx.pgd()[0]).sum())
    allowed = ctx.suite.tolerated(ctx.n)
    return _check("T3", only > allowed, measured=f"FGSM breaks {only} that PGD left", limit=f"{allowed}")


def monotone(ctx: Context) -> Check:
    """T4: accuracy never rises with the budget.

    Each budget is attacked anew, on every image. Table 1's rows cannot say this of the attack: there an image
    that a small budget breaks stays broken (:func:`fortify.scoring.evaluate`).
    """
    budgets = sorted({*ctx.suite.eps_grid_255, ctx.suite.eps_255, WHITE})
    correct = [ctx.n, *(int((~ctx.pgd(eps)[0]).sum()) for eps in budgets)]
    rise = max(after - before for before, after in zip(correct, correct[1:], strict=False))
    allowed = ctx.suite.tolerated(ctx.n)
    pairs = zip([0, *budgets], correct, strict=True)
    return _check(
        "T4",
        rise > allowed,
        measured=", ".join(f"{count} at {eps:g}" for eps, count in pairs) + f" (of {ctx.n})",
        limit=f"rises by {allowed} at most",
    )


def whole_range(ctx: Context) -> Check:
    """T5: where every pixel may take any value, nothing is still correct."""
    broken, _ = ctx.pgd(WHITE)
    broken = broken | ctx.pgd(WHITE, loss="margin", where=~broken)[0]
    correct = int((~broken).sum())
    return _check("T5", correct, measured=ctx.share(correct) + " still correct", limit="0")


def random_noise(ctx: Context) -> Check:
    """T6: random noise of the attack's size breaks no image that the attack did not."""
    correct = ~ctx.white_box()[0]
    lost = torch.zeros(ctx.n, dtype=torch.bool)
    for draw in range(ctx.suite.noise_draws):
        lost |= ctx.misclassified(ctx.random_signs(draw), correct & ~lost)
    count = (
        f"breaks {int(lost.sum())} of {int(correct.sum())} still correct, in {ctx.suite.noise_draws} draws"
    )
    return _check("T6", lost.any(), measured=count, limit="0")


def black_box(ctx: Context) -> Check:
    """T7: Square, which needs no gradient, and AutoAttack break (nearly) none that white-box attacks did not.

    With two classes AutoAttack goes without DLR, which needs three.
    """
    suite, (white_box, _) = ctx.suite, ctx.white_box()
    settings = {"eps_255": suite.eps_255, "steps": suite.autoattack_steps, "queries": suite.square_queries}
    settings |= {"seed": ctx.seed, "batch_size": suite.batch_size}
    together, warned = torch.zeros(ctx.n, dtype=torch.bool), []
    parts = [part for part in (*WHITE_BOX, "square") if ctx.classes > 2 or part != "apgd-dlr"]
    try:
        for part in parts:
            # Square meets what is still correct after AutoAttack so far, and after this project's PGD.
            where = ~together if part != "square" else ~(together & white_box)
            found = torch.zeros(ctx.n, dtype=torch.bool)
            if where.any():
                result = autoattack(ctx.model, ctx.images[where], ctx.labels[where], part, **settings)
                found[where] = result.images
                warned += result.warnings
            together |= found
            ctx.broken[f"{suite.autoattack} to {part}"] = together.clone()
    except ImportError as error:
        return named("T7", NOT_RUN, "", "", str(error))
    more, others = int((found & ~white_box).sum()), int((together & ~white_box).sum())
    allowed = suite.tolerated(ctx.n)
    by_square = min(1, allowed)
    note = f"still correct: {suite.autoattack} {ctx.share((~together).sum())}, "
    note += f"PGD {ctx.share((~white_box).sum())}"
    note += "; two classes: without DLR" if ctx.classes < 3 else ""
    note += "; it warns: " + " ".join(dict.fromkeys(warned)) if warned else ""
    return _check(
        "T7",
        more > by_square or others > allowed,
        measured=f"of what PGD left, Square ({suite.square_queries} queries) breaks {more}, "
        f"{suite.autoattack} ({suite.autoattack_steps} steps) {others}",
        limit=f"{by_square}, {allowed}",
        note=note,
    )


def transfer(ctx: Context) -> Check:
    """T8: images crafted on other models break (nearly) none that white-box attacks did not."""
    if not ctx.others:
        return named("T8", NOT_RUN, "", "", "no other model was given: audit(..., others=[model])")
    white_box, more = ctx.white_box()[0], torch.zeros(ctx.n, dtype=torch.bool)
    for number, other in enumerate(ctx.others, 1):
        attack = PGD(ctx.suite.eps_255, steps=ctx.suite.pgd_steps)
        crafted = fortify_attacks.craft(
            other, ctx.images, ctx.labels, attack, seed=ctx.seed, batch_size=ctx.suite.batch_size
        )
        static = ctx.misclassified(crafted.images)
        ctx.broken["transfer" + (f" {number}" if len(ctx.others) > 1 else "")] = static
        more |= static & ~white_box
    count, allowed = int(more.sum()), ctx.suite.tolerated(ctx.n)
    return _check(
        "T8",
        count > allowed,
        measured=f"breaks {count} that PGD left ({len(ctx.others)} other model"
        + ("s)" if len(ctx.others) > 1 else ")"),
        limit=f"{allowed}",
    )


def gradients_say_something(ctx: Context) -> Check:
    """T9: no gradient is zero, and no other loss breaks more than PGD's cross-entropy does.

    A loss that breaks fewer is only a weaker attack, and says nothing against the figure.
    """
    zero = int((ctx.gradients(ctx.images) == 0).all(1).sum())
    losses = {"cross-entropy": ctx.pgd()[0], "margin": ctx.pgd(loss="margin")[0]}
    if ctx.classes > 2:
        losses["DLR"] = ctx.ascend(dlr)[0]
    correct = {name: int((~broken).sum()) for name, broken in losses.items()}
    others = {name: count for name, count in correct.items() if name != "cross-entropy"}
    strongest = min(others, key=others.get)
    more = correct["cross-entropy"] - others[strongest]
    allowed, zeros = ctx.suite.tolerated(ctx.n, ctx.suite.gap_points), min(1, ctx.suite.tolerated(ctx.n))
    counts = ", ".join(f"{name} {count}" for name, count in correct.items())
    return _check(
        "T9",
        zero > zeros or more > allowed,
        measured=f"{ctx.share(zero)} zero gradients; still correct: {counts}",
        limit=f"{zeros} zero gradients; another loss breaks at most {allowed} more",
        note=f"{strongest} breaks {more} more than cross-entropy" if more > allowed else "",
    )


def local_linearity(ctx: Context) -> Check:
    """T11: a model that one step cannot break and many can, its gradients turning within the ball."""
    eps = ctx.suite.eps_255 / 255
    generator = torch.Generator().manual_seed(ctx.seed + 2)
    noise = (torch.rand(ctx.images.shape, generator=generator) * 2 - 1) * eps
    here, there = ctx.gradients(ctx.images), ctx.gradients((ctx.images + noise).clamp(0, 1))
    alignment = nn.functional.cosine_similarity(here, there).mean().item()
    one, many = ctx.craft(FGSM(ctx.suite.eps_255))[0], ctx.pgd()[0]
    gap = 100 * (many.sum() - one.sum()).item() / ctx.n
    limits = ctx.suite.alignment, ctx.suite.overfitting_points
    return _check(
        "T11",
        alignment < limits[0] and gap > limits[1],
        measured=f"gradient alignment {alignment:.2f}; FGSM leaves {gap:.0f} points more than PGD",
        limit=f"not below {limits[0]:g} with {limits[1]:g} points",
    )


def worst_case(ctx: Context) -> Check:
    """T13: per image, the worst case over the attacks is given beside their mean.

    A line to read, not a test: it could only be missing.
    """
    iterated_beats_one_step(ctx), ctx.white_box()
    worst, correct = worst_over_attacks(ctx), [int((~broken).sum()) for broken in ctx.broken.values()]
    measured = f"worst {int((~worst).sum())}, mean {np.mean(correct):.1f}, lowest {min(correct)}"
    limit = f"given, over {len(correct)} attacks"
    return named("T13", PASS, f"{measured} of {ctx.n} still correct", limit)


def worst_over_attacks(ctx: Context) -> Tensor:
    """(n,) bool: broken by any of the attacks run so far."""
    return torch.stack(list(ctx.broken.values())).any(0)


def eight_bits(ctx: Context) -> Check:
    """T14: adversarial images survive being saved as 8-bit files."""
    broken, images = ctx.white_box()
    change = int((ctx.misclassified((images * 255).round() / 255) != broken).sum())
    allowed = ctx.suite.tolerated(ctx.n)
    return _check("T14", change > allowed, measured=f"{change} predictions change", limit=f"{allowed}")


def intervals(ctx: Context) -> Check:
    """T15: the robust accuracy has an interval that knows which slices belong together."""
    count = 0 if ctx.data.groups is None else len(np.unique(ctx.data.groups))
    if count < FEWEST_GROUPS:
        note = f"{count} groups" if count else "no groups were given: AuditData(images, labels, groups)"
        return named("T15", FAIL, "no interval", f"{FEWEST_GROUPS} groups", note)
    ctx.white_box()
    correct = torch.zeros(ctx.total, dtype=torch.bool)
    correct[ctx.right] = ~worst_over_attacks(ctx)
    k, groups = int(correct.sum()), ctx.data.groups
    low, high = cluster_interval(correct.numpy(), groups, seed=ctx.seed, draws=ctx.suite.bootstrap_draws)
    narrow = " to ".join(f"{100 * limit:.1f}" for limit in wilson(k, ctx.total))
    alone = ", each of one image: an interval as if independent" if count == ctx.total else ""
    return named(
        "T15",
        PASS,
        measured=f"{k}/{ctx.total}: {100 * k / ctx.total:.1f} % ({100 * low:.1f} to {100 * high:.1f})",
        limit=f"given, {FEWEST_GROUPS} groups",
        note=f"{count} groups{alone}; slices as if independent: {narrow}; one training seed",
    )


def cw_converged(ctx: Context) -> Check:
    """T16: a CW of twice the steps and two more searches brings (nearly) no more images within its budget.

    Nor does it need much smaller changes: the budget says nothing where no image, or each, is within it. A CW
    that breaks less than half of the images has not converged: it may change them as much as it likes.
    """
    suite, some = ctx.suite, torch.arange(ctx.n) < ctx.suite.cw_images
    longer = replace(suite.cw, steps=2 * suite.cw.steps, binary_search_steps=suite.cw.binary_search_steps + 2)
    norms = []
    for attack in (suite.cw, longer):
        broken, images = (found[some] for found in ctx.craft(attack, where=some))
        l2 = perturbation_norms(ctx.images[some], images)[1]
        norms.append(torch.where(broken, l2, torch.inf))
    own, more = norms
    gained = int(((more <= suite.cw_l2) & (own > suite.cw_l2)).sum())
    medians = own.quantile(0.5, interpolation="lower"), more.quantile(0.5, interpolation="lower")
    allowed = suite.tolerated(len(own))
    return _check(
        "T16",
        gained > allowed or medians[0].isinf() or suite.cw_share * medians[0] > medians[1],
        measured=f"within L2 {suite.cw_l2:g}: {int((own <= suite.cw_l2).sum())} of {len(own)}, a longer CW "
        f"{gained} more; median L2 {medians[0]:.3g}, longer {medians[1]:.3g}",
        limit=f"{allowed} more; {suite.cw_share:.0%} of the median",
    )


CHECKS = {
    "T0": contract,
    "T0b": null_attack,
    "T1": loss_rises,
    "T2": converged,
    "T3": iterated_beats_one_step,
    "T4": monotone,
    "T5": whole_range,
    "T6": random_noise,
    "T7": black_box,
    "T8": transfer,
    "T9": gradients_say_something,
    "T11": local_linearity,
    "T13": worst_case,
    "T14": eight_bits,
    "T15": intervals,
    "T16": cw_converged,
}  # T10, the audit's own audit, is mutants.mutant_check
