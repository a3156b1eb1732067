"""Training: one loop, resumable to the same weights, that learns and says when it cannot."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import fortify.training as training
from fortify import checkpoint, objectives
from fortify.attacks import CW, FGSM, PGD, craft
from fortify.augmentation import Augmentation, augment
from fortify.data import to_tensor
from fortify.fused import FusedModel
from fortify.models import build_model, predict
from fortify.objectives import Step
from fortify.training import Recipe, class_weights, fit, layers

STILL = Augmentation(flip=False, degrees=0, zoom=0, translate=0)
THIRDS = {FGSM(4): 1 / 3, PGD(4, steps=2): 1 / 3, PGD(4, steps=2, loss="margin"): 1 / 3}


def weights(model):
    return torch.cat([v.flatten().float() for v in model.state_dict().values()])


@pytest.fixture(scope="module")
def parts(phantoms):
    index = np.arange(len(phantoms))
    return phantoms.subset(index[index % 3 != 0]), phantoms.subset(index[index % 3 == 0])


def small():
    return build_model("resnet_small", num_classes=3, seed=0)


def test_learns_what_it_is_shown(model, phantoms, images, labels):
    seen = slice(0, None, 3)
    assert (predict(model, images[seen]).argmax(1) == labels[seen]).float().mean() > 0.9


def test_adversarial_training_holds_where_normal_training_falls(phantoms, images, labels):
    """On the training images themselves, so that it tests the loop and not the generalisation."""
    some = phantoms.subset(range(0, 120, 2))
    x, y = images[::2], labels[::2]
    recipe = Recipe(epochs=16, batch_size=20, lr=3e-3, augmentation=STILL, label_smoothing=0)
    normal, robust = small(), small()
    fit(normal, some, some, recipe, progress=False)
    attack = PGD(8, steps=4)
    fit(robust, some, some, recipe, attacks={attack: 1.0}, val_attack=attack, progress=False)
    stands = [1 - craft(m, x, y, PGD(8, steps=10)).success.float().mean() for m in (normal, robust)]
    assert stands[1] > stands[0] + 0.3


def test_precision_is_float32_on_a_cpu_unless_asked_for_and_weights_and_validation_always(parts, monkeypatch):
    found, histories, rounded = {}, {}, []

    def fused(*arguments, autocast=None, **options):
        if autocast is None:  # that of the validation
            return FusedModel(*arguments, **options)
        rounded.append(autocast)
        return FusedModel(*arguments, autocast=autocast, **options)

    monkeypatch.setattr(training, "FusedModel", fused)
    for precision in ("auto", "float32", "bfloat16"):
        model, recipe = small(), Recipe(epochs=2, batch_size=16, lr=3e-3, precision=precision)
        histories[precision] = fit(
            model, *parts, recipe, attacks=THIRDS, val_attack=PGD(4, steps=2), progress=False
        )
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        found[precision] = weights(model)
        x, y = torch.from_numpy(parts[1].images)[:, None] / 255, torch.from_numpy(parts[1].labels)
        selected = histories[precision][histories[precision].selected]
        right = (predict(model, x).argmax(1) == y).float().mean().item()
        assert selected.val_accuracy.item() == pytest.approx(right)
        robust = 1 - craft(model, x, y, PGD(4, steps=2)).success.float().mean().item()
        assert selected.val_robust_accuracy.item() == pytest.approx(robust)
    assert torch.equal(found["auto"], found["float32"]) and histories["auto"].equals(histories["float32"])
    assert not torch.equal(found["auto"], found["bfloat16"]) and rounded == [False, False, True]
    losses = [histories[precision].train_loss[0] for precision in ("float32", "bfloat16")]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)  # the signs of small gradients differ


def test_attacks_walk_on_compiled_code_where_asked_for(parts, monkeypatch):
    asked = []
    monkeypatch.setattr(
        training, "FusedModel", lambda *a, **o: asked.append(o.pop("compiled")) or FusedModel(*a, **o)
    )
    for options in ({}, {"compiled": True}):
        fit(small(), *parts, Recipe(epochs=1, batch_size=16), attacks=THIRDS, progress=False, **options)
    assert asked == [False, True]


def test_history_has_a_row_an_epoch_and_one_selected(parts):
    model = small()
    history = fit(
        model, *parts, Recipe(epochs=4, batch_size=16), attacks=THIRDS, val_attack=FGSM(4), progress=False
    )
    assert history.epoch.tolist() == [1, 2, 3, 4]
    best = history.sort_values(["val_robust_accuracy", "val_accuracy", "epoch"]).iloc[-1]
    assert history[history.selected].epoch.tolist() == [best.epoch]
    x, y = torch.from_numpy(parts[1].images)[:, None] / 255, torch.from_numpy(parts[1].labels)
    assert (predict(model, x).argmax(1) == y).float().mean().item() == pytest.approx(best.val_accuracy)
    assert not model.training


def test_same_seed_same_weights(parts):
    recipe, models = Recipe(epochs=1, batch_size=16), [small(), small(), small()]
    for model, seed in zip(models, (5, 5, 6), strict=True):
        fit(model, *parts, recipe, attacks=THIRDS, seed=seed, progress=False)
    assert torch.equal(weights(models[0]), weights(models[1]))
    assert not torch.equal(weights(models[0]), weights(models[2]))


@pytest.mark.parametrize("attacks", [None, THIRDS], ids=["normal", "adversarial"])
def test_an_interrupted_training_ends_in_the_same_weights(parts, tmp_path, monkeypatch, attacks):
    own = {"ema": 0.9} if attacks else {"layer_decay": 0.5}
    recipe = Recipe(epochs=3, batch_size=16, eps_warmup=0.5, mixup=1.0, **own)
    val_attack = PGD(4, steps=2) if attacks else None
    arguments = dict(attacks=attacks, val_attack=val_attack, seed=1, progress=False)
    whole = small()
    expected = fit(whole, *parts, recipe, **arguments)

    save = checkpoint.TrainingState.save

    def killed_after_two(state, file):
        save(state, file)
        if state.epoch == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.TrainingState, "save", killed_after_two)
    with pytest.raises(KeyboardInterrupt):
        fit(small(), *parts, recipe, checkpoints=tmp_path, **arguments)
    monkeypatch.undo()
    epochs = []
    one_epoch = training._epoch
    monkeypatch.setattr(training, "_epoch", lambda *a: epochs.append(1) or one_epoch(*a))
    resumed = small()
    history = fit(resumed, *parts, recipe, checkpoints=tmp_path, **arguments)
    assert len(epochs) == 1, "two of the three epochs were on disk"
    assert torch.equal(weights(resumed), weights(whole))
    assert history.equals(expected)


def test_the_classifying_layer_learns_fastest_and_at_0_alone(parts):
    model = small()
    named = layers(model)
    assert named[-1] is model[1].fc and len(named) == 7  # stem: convolution and norm; four stages; fc
    assert sum(len(list(part.parameters())) for part in named) == len(list(model.parameters()))
    head = {"fc.weight", "fc.bias"}
    for decay, still in ((0.0, True), (0.5, False)):
        model, before = small(), small().state_dict()
        fit(model, *parts, Recipe(epochs=2, batch_size=16, layer_decay=decay), progress=False)
        now = dict(model[1].named_parameters())
        moved = {name for name in now if not torch.equal(now[name], before[f"1.{name}"])}
        assert (moved == head) if still else (head < moved)
    groups = training._parameter_groups(model, Recipe(lr=0.1, layer_decay=0.5))
    assert [group["lr"] for group in groups] == pytest.approx([0.1 * 0.5**depth for depth in range(7)])
    model.class_token = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="child modules"):
        training._parameter_groups(model, Recipe(layer_decay=0.5))


def test_layers_are_the_blocks_of_a_resnet_and_the_parts_of_any_module():
    assert len(layers(build_model("resnet50", num_classes=3))) == 1 + 1 + 16 + 1
    plain = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Linear(2, 2))
    assert layers(plain) == [plain[0], plain[2]]


def test_frozen_statistics_are_those_it_came_with(parts):
    for frozen in (True, False):
        model = small()
        fit(model, *parts, Recipe(epochs=1, batch_size=16, freeze_batchnorm=frozen), progress=False)
        kept = model[1].stem[1].running_mean.abs().max() == 0
        assert kept == frozen


def test_logits_are_adjusted_by_the_shares_of_the_classes(parts):
    """A rare class is predicted more often where its logit was made smaller in the loss."""
    train, val = parts
    rare = np.flatnonzero(train.labels == 0)[:4]
    few = train.subset(np.sort(np.append(rare, np.flatnonzero(train.labels != 0))))
    shift = training._logit_shift(torch.as_tensor(few.labels), 3, 2.0)
    shares = np.bincount(few.labels) / len(few)
    assert shift.numpy() == pytest.approx(2 * np.log(shares), abs=1e-5)
    called = {}
    for power in (0.0, 2.0):
        model, recipe = small(), Recipe(epochs=8, batch_size=16, lr=3e-3, augmentation=STILL)
        fit(model, few, few, replace(recipe, logit_adjustment=power), progress=False)
        called[power] = predict(model, to_tensor(val.images))[:, 0].mean().item()
    assert called[2.0] > called[0.0] + 0.05


def test_a_checkpoint_of_another_recipe_is_not_read(parts, tmp_path):
    fit(small(), *parts, Recipe(epochs=1, batch_size=16), checkpoints=tmp_path, progress=False)
    plain, beside = small(), small()
    recipe = Recipe(epochs=1, batch_size=16, lr=1e-4)
    fit(plain, *parts, recipe, progress=False)
    fit(beside, *parts, recipe, checkpoints=tmp_path, progress=False)
    assert torch.equal(weights(plain), weights(beside))
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_a_checkpoint_of_other_code_is_not_read(parts, tmp_path, monkeypatch):
    for code in ("this code", "this code", "other code"):
        monkeypatch.setattr(checkpoint, "lib_sha256", lambda code=code: code)
        fit(small(), *parts, Recipe(epochs=1, batch_size=16), checkpoints=tmp_path, progress=False)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_any_module_of_the_right_number_of_logits_is_trained(parts, precision):
    side = parts[0].images.shape[1]
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(side * side, 3))
    before, recipe = weights(net), Recipe(epochs=1, batch_size=16, precision=precision)
    attacks = {FGSM(4): 1 / 3, PGD(4, steps=1, loss="margin"): 1 / 3, CW(1, 2): 1 / 3}
    history = fit(net, *parts, recipe, attacks=attacks, progress=False)
    assert not torch.equal(weights(net), before) and np.isfinite(history.train_loss).all()


@pytest.mark.parametrize(("capability", "low"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_a_gpu_that_does_not_convolve_in_bfloat16_trains_in_float32(monkeypatch, capability, low):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert training._autocasts(Recipe(), gpu) == low and not training._autocasts(Recipe(), cpu)
    asked = Recipe(precision="bfloat16")
    assert training._autocasts(asked, gpu) and training._autocasts(asked, cpu)
    assert not training._autocasts(Recipe(precision="float32"), gpu)


def test_the_moments_of_a_resumed_training_lie_as_its_weights(parts, tmp_path):
    """A GPU's weights are channels last; moments that lie otherwise cost each step."""
    states = []
    for _ in range(2):
        net = build_model("resnet_small", num_classes=3, seed=0).to(memory_format=torch.channels_last)
        states.append(checkpoint.TrainingState(net, torch.optim.AdamW(net.parameters(), lr=0.01)))
    first, again = states
    first.model(torch.rand(4, 1, 32, 32)).sum().backward()
    first.optimizer.step()
    first.record(1, 0.0, 0.0, 0.0, 0.0)
    first.save(tmp_path / "c.safetensors")
    again.resume(tmp_path / "c.safetensors")
    pairs = list(zip(first.model.parameters(), again.model.parameters(), strict=True))
    assert any(weight.stride()[1] == 1 for _, weight in pairs if weight.ndim == 4)
    for before, weight in pairs:
        own, read = first.optimizer.state[before], again.optimizer.state[weight]
        assert torch.equal(own["step"], read["step"])
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(own[name], read[name]) and read[name].stride() == weight.stride()


def test_a_training_that_is_refused_or_stops_leaves_the_weights_laid_out_as_they_were(parts, monkeypatch):
    """A file takes no weights that lie otherwise, and outputs would differ in their last digits."""
    train, val = parts

    def stops(*_):
        raise KeyboardInterrupt

    model = build_model("resnet_small", num_classes=3, seed=0)
    two = train.subset([i for i, label in enumerate(train.labels) if label != 1])
    with pytest.raises(ValueError, match="no training image of class 1"):
        fit(model, two, val, Recipe(epochs=1, batch_size=16), progress=False)
    assert all(weight.is_contiguous() for weight in model.parameters())
    monkeypatch.setattr(training, "_epoch", stops)
    with pytest.raises(KeyboardInterrupt):
        fit(model, train, val, Recipe(epochs=1, batch_size=16), progress=False)
    assert all(weight.is_contiguous() for weight in model.parameters())


def test_a_loss_that_is_not_finite_stops_with_epoch_batch_and_checkpoint(parts, tmp_path, monkeypatch):
    one_epoch = training._epoch

    def diverges(state, *arguments):
        losses, correct = one_epoch(state, *arguments)
        if state.epoch == 1:  # the second epoch
            losses[2] = torch.nan
        return losses, correct

    monkeypatch.setattr(training, "_epoch", diverges)
    with pytest.raises(FloatingPointError, match=r"epoch 2, batch 3 of 5.*checkpoint is .*safetensors"):
        fit(small(), *parts, Recipe(epochs=3, batch_size=16), checkpoints=tmp_path, progress=False)


def test_the_batch_holds_the_shares_asked_for(model, images, labels):
    x, y = images[:30], labels[:30]

    def crafted(parts):
        return [craft(model, *part, attack).images for attack, *part in parts]

    unused = dict.fromkeys(("loss", "mix", "ascend", "predict", "random", "normal"))
    step = Step(model, x, y, THIRDS, clean_share=0.5, craft=crafted, **unused)
    joined, joined_labels = objectives.joined(step)
    assert len(joined) == len(joined_labels) == 15 + 30
    assert torch.equal(joined[:15], x[:15])
    moved = (joined[15:] - x).flatten(1).abs().amax(1) * 255
    assert torch.allclose(moved, torch.full_like(moved, 4.0), atol=1e-3), "each image is attacked once"
    assert torch.equal(joined_labels, torch.cat([y[:15], y]))


def test_attacks_walk_on_the_present_weights(parts, monkeypatch):
    """A fused that is not refreshed would attack the network as it was before training."""
    walked = []
    craft_parts = training.craft_parts

    def spied(model, parts, *, fused):
        x = parts[0][1]
        with torch.no_grad():
            walked.append((fused(x) - model(x)).abs().max().item())
        return craft_parts(model, parts, fused=fused)

    monkeypatch.setattr(training, "craft_parts", spied)
    fit(small(), *parts, Recipe(epochs=2, batch_size=16), attacks=THIRDS, progress=False)
    assert len(walked) == 10 and max(walked) < 1e-3


def test_budgets_grow_over_the_first_epochs(parts, monkeypatch):
    budgets = []
    craft_parts = training.craft_parts

    def spied(model, parts, *, fused):
        budgets.append([attack.eps_255 for attack, *_ in parts])
        return craft_parts(model, parts, fused=fused)

    monkeypatch.setattr(training, "craft_parts", spied)
    recipe = Recipe(epochs=4, batch_size=80, eps_warmup=0.5)
    fit(small(), *parts, recipe, attacks=THIRDS, progress=False)
    assert budgets == [[2, 2, 2], [4, 4, 4], [4, 4, 4], [4, 4, 4]]


def test_every_image_is_mixed_with_another_in_one_share(images):
    x = images[:12]
    shares = []
    for seed in range(20):
        mixed, others, share = training._mixed(x, torch.Generator().manual_seed(seed))
        assert sorted(others.tolist()) == list(range(12))
        assert torch.allclose(mixed, share * x + (1 - share) * x[others], atol=1e-6)
        shares.append(share.item())
    assert 0.5 <= min(shares) < 0.6 and 0.9 < max(shares) <= 1 and len(set(shares)) == 20


def test_the_loss_of_mixed_images_is_mixed_as_they_are(parts, monkeypatch):
    seen, mixed_of, joined = {}, training._mixed, objectives.joined

    def spied(x, generator):
        seen["mixed"] = mixed_of(x, generator)
        return seen["mixed"]

    def labelled(*arguments):
        x, seen["y"] = joined(*arguments)
        return x, seen["y"]

    monkeypatch.setattr(training, "_mixed", spied)
    monkeypatch.setattr(objectives, "joined", labelled)
    recipe = Recipe(epochs=1, batch_size=len(parts[0]), mixup=1.0, label_smoothing=0, clean_share=0.5)
    history = fit(small(), *parts, recipe, attacks=THIRDS, progress=False)
    (x, others, share), y = seen["mixed"], seen["y"]
    share = share.item()
    with torch.no_grad():
        logits = small().train()(x)
    both = [torch.nn.functional.cross_entropy(logits, label).item() for label in (y, y[others])]
    assert len(x) == round(1.5 * len(parts[0])) and abs(both[0] - both[1]) > 1e-3
    assert history.train_loss[0] == pytest.approx(share * both[0] + (1 - share) * both[1], rel=1e-4)


def test_images_are_mixed_in_the_first_epochs(parts, monkeypatch):
    mixed, one_epoch = [], training._epoch
    monkeypatch.setattr(training, "_epoch", lambda *a: mixed.append(a[-1]) or one_epoch(*a))
    found = {}
    for share in (0.0, 0.5, 1.0):
        found[share] = small()
        fit(found[share], *parts, Recipe(epochs=4, batch_size=40, mixup=share), progress=False)
    assert mixed == [False] * 4 + [True, True, False, False] + [True] * 4
    made = [weights(model) for model in found.values()]
    assert not torch.equal(made[0], made[1]) and not torch.equal(made[1], made[2])


def test_an_average_keeps_less_of_itself_in_the_first_steps():
    model = small()
    state = checkpoint.TrainingState(model, torch.optim.SGD(model.parameters()), ema=0.5)
    first = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(1)
    for keep in (0.1, 2 / 11, 3 / 12):
        before = {k: v.clone() for k, v in state.eval_model.state_dict().items()}
        state.average()
        for name, own in state.eval_model.state_dict().items():
            wanted = first[name] + 1
            if own.is_floating_point():
                wanted = keep * before[name] + (1 - keep) * wanted
            assert torch.allclose(own, wanted, atol=1e-6), name
    state.averaged = 1000
    before = weights(state.eval_model)
    state.average()
    middle = (before + weights(model)) / 2
    assert torch.allclose(
        weights(state.eval_model)[: len(middle) // 2], middle[: len(middle) // 2], atol=1e-6
    )
    assert not any(parameter.requires_grad for parameter in state.eval_model.parameters())


def test_the_average_is_what_is_judged_and_kept(parts):
    plain, averaged = small(), small()
    fit(plain, *parts, Recipe(epochs=2, batch_size=16), progress=False)
    history = fit(averaged, *parts, Recipe(epochs=2, batch_size=16, ema=0.9), progress=False)
    assert not torch.equal(weights(plain), weights(averaged))
    kept = history[history.selected].val_accuracy.item()
    x, y = training.on_device(parts[1], "cpu")
    assert training.accuracy(averaged, x, y) == pytest.approx(kept)


def test_class_weights_are_inverse_frequencies_with_mean_one_over_examples():
    labels = np.array([0] * 1 + [1] * 4 + [2] * 5)
    found = class_weights(labels, 3)
    assert found * np.bincount(labels) == pytest.approx([10 / 3] * 3)
    assert found[labels].mean() == pytest.approx(1)
    root = class_weights(labels, 3, power=0.5)
    assert root / root[0] == pytest.approx([1, 1 / 2, 1 / 5**0.5])
    assert root[labels].mean() == pytest.approx(1)
    assert class_weights(labels, 3, power=0) == pytest.approx([1, 1, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attacks": {FGSM(4): 0.7, PGD(4): 0.7}}, "sum to at most 1"),
        ({"attacks": {FGSM(4): 0}}, "positive"),
        ({"recipe": Recipe(clean_share=0)}, "fewer than two images"),
        ({"recipe": Recipe(clean_share=0.01, batch_size=8)}, "of a batch of 8 are fewer than two images"),
        ({"recipe": Recipe(clean_share=0), "attacks": {FGSM(4): 0.001}}, "fewer than two images"),
        ({"attacks": {PGD(4, restarts=5): 1}}, "restarts=1"),
    ],
)
def test_impossible_mixes_are_named(parts, arguments, message):
    recipe = arguments.pop("recipe", Recipe(epochs=1))
    with pytest.raises(ValueError, match=message):
        fit(small(), *parts, recipe, progress=False, **arguments)


def test_an_absent_class_and_an_empty_set_are_named(parts, phantoms):
    with pytest.raises(ValueError, match="class 2"):
        fit(small(), phantoms.subset(phantoms.labels < 2), parts[1], Recipe(epochs=1), progress=False)
    with pytest.raises(ValueError, match="neither may be empty"):
        fit(small(), parts[0], phantoms.subset([]), Recipe(epochs=1), progress=False)
    alone = replace(phantoms.subset(phantoms.labels == 0), class_names=("cats",))
    with pytest.raises(ValueError, match="all of one class, cats"):
        fit(small(), alone, alone, Recipe(epochs=1), progress=False)


@pytest.mark.parametrize(
    "arguments",
    [
        {"epochs": 0},
        {"batch_size": 1},
        {"clean_share": 1.5},
        {"eps_warmup": 2},
        {"mixup": -0.1},
        {"ema": 1},
        {"layer_decay": 1.5},
        {"logit_adjustment": -1},
        {"precision": "float16"},
    ],
)
def test_impossible_recipes_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Recipe(**arguments)


# Augmentation


def test_no_ranges_no_change(images):
    views = augment(images, STILL, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(views, images, atol=1e-5)


def test_views_differ_between_images_and_seeds_and_stay_in_range(images):
    strong = Augmentation(gamma=0.4, gain=0.3, level=0.2, noise=0.05)
    same = images[:1].expand(6, -1, -1, -1).contiguous()
    views, again, other = (
        augment(same, strong, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)
    )
    assert views.shape == same.shape and views.min() >= 0 and views.max() <= 1
    assert torch.equal(views, again) and not torch.equal(views, other)
    assert len({v.numpy().tobytes() for v in views}) == 6


def test_flips_are_exact_mirror_images(images):
    same = images[5:6].expand(32, -1, -1, -1).contiguous()
    views = augment(
        same, Augmentation(degrees=0, zoom=0, translate=0), generator=torch.Generator().manual_seed(0)
    )
    mirrors = [images[5], images[5].flip(1), images[5].flip(2), images[5].flip(1, 2)]
    nearest = [min(range(4), key=lambda m: (v - mirrors[m]).abs().max()) for v in views]
    assert set(nearest) == {0, 1, 2, 3}
    assert all((v - mirrors[m]).abs().max() < 1e-4 for v, m in zip(views, nearest, strict=True))


def test_level_and_gain_move_greys_within_their_ranges():
    grey = torch.full((200, 1, 8, 8), 0.5)
    still = dict(flip=False, degrees=0, zoom=0, translate=0)
    for change, low, high in (
        (dict(level=0.1), 0.4, 0.6),
        (dict(gain=0.2), 0.4, 0.6),
        (dict(gamma=1.0), 0.25, 0.5**0.5),
    ):
        means = augment(
            grey, Augmentation(**still, **change), generator=torch.Generator().manual_seed(0)
        ).mean((1, 2, 3))
        assert low - 1e-6 <= means.min() < low + 0.02 and high - 0.02 < means.max() <= high + 1e-6


def test_smoothing_keeps_the_mean_and_takes_the_noise(images):
    noisy = (images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    smooth = Augmentation(flip=False, degrees=0, zoom=0, translate=0, blur=1.0)
    views = augment(noisy, smooth, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(views.mean((1, 2, 3)), noisy.mean((1, 2, 3)), atol=5e-3)
    inner, side = (slice(None), 0, slice(1, -1), slice(1, -1)), noisy.shape[-1] - 2
    expected = sum(
        w * v * noisy[:, 0, i : i + side, j : j + side]
        for i, w in enumerate((0.25, 0.5, 0.25))
        for j, v in enumerate((0.25, 0.5, 0.25))
    )
    assert torch.allclose(views[inner], expected, atol=1e-4)
    half = Augmentation(flip=False, degrees=0, zoom=0, translate=0, blur=0.5)
    views = augment(noisy, half, generator=torch.Generator().manual_seed(0))
    changed = ((views - noisy).flatten(1).abs().amax(1) > 0.01).float().mean()
    assert 0.3 < changed < 0.7


def test_a_square_of_the_share_asked_for_is_cut_out():
    white = torch.ones(300, 1, 40, 40)
    cut = Augmentation(flip=False, degrees=0, zoom=0, translate=0, cutout=0.25)
    holes = 1 - augment(white, cut, generator=torch.Generator().manual_seed(0))
    areas = holes.round().sum((1, 2, 3))
    assert areas.max() == 100, "10 of 40 pixels a side, where the square is whole"
    assert areas.min() >= 25, "a quarter of it at least: its centre lies in the image"
    assert (holes.mean(0) > 0).all(), "anywhere"


@pytest.mark.parametrize(("images", "batch_size"), [(3, 2), (5, 2), (9, 8), (7, 3), (2, 64), (33, 32)])
def test_no_batch_is_of_a_single_image(phantoms, images, batch_size):
    """BatchNorm cannot train on one; torch would say so in the middle of an epoch."""
    some = replace(phantoms.subset(range(images)), labels=np.arange(images) % 2, class_names=("a", "b"))
    model = build_model("resnet_small", num_classes=2, seed=0)
    sizes = []
    hook = model.register_forward_pre_hook(lambda module, args: sizes.append((module.training, len(args[0]))))
    fit(model, some, some, Recipe(epochs=1, batch_size=batch_size), progress=False)
    hook.remove()
    trained = [size for training, size in sizes if training]
    assert min(trained) >= 2 and sum(trained) == images


def test_a_recipe_is_built_in_one_place():
    parameters = {"epochs": 7, "lr": 0.1, "gamma": 0.3, "flip": False, "arch": "resnet50", "split": "random"}
    recipe = Recipe.from_parameters(parameters, gamma=0.5, mixup=0.25)
    assert recipe == Recipe(epochs=7, lr=0.1, mixup=0.25, augmentation=Augmentation(flip=False, gamma=0.5))
    assert Recipe.from_parameters({}) == Recipe()
    with pytest.raises(ValueError, match="a recipe has no gama; it has batch_size, "):
        Recipe.from_parameters(parameters, gama=0.5)


def test_training_and_validation_of_other_classes_are_refused(parts):
    train, val = parts
    two = replace(val.subset(val.labels < 2), class_names=val.class_names[:2])
    with pytest.raises(ValueError, match=r"other classes, .* labels differ.*classes=train.class_names"):
        fit(small(), train, two, Recipe(epochs=1), progress=False)


def test_weights_of_another_type_are_not_trained(parts):
    with pytest.raises(ValueError, match=r"trained in float32, not bfloat16: call model.float\(\) first"):
        fit(small().bfloat16(), *parts, Recipe(epochs=1), progress=False)
