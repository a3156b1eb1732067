"""What people bring: classifiers of any channels, type and output, and images in any container."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fortify import attacks
from fortify.attacks import CW, FGSM, PGD, AttackWarning, craft, perturbation_norms
from fortify.audit import AuditData, Suite, audit
from fortify.evaluation import check_rows
from fortify.fused import spread
from fortify.models import build_model, load_model, predict, save_model
from fortify.runtime import pick_device
from fortify.scoring import evaluate

SUITE = Suite(
    eps_255=4,
    eps_grid_255=(1, 16),
    pgd_steps=5,
    restarts=1,
    square_queries=20,
    autoattack_steps=5,
    noise_draws=2,
    cw=CW(binary_search_steps=2, steps=20, stepsize=0.05),
)
SOME = ("T0", "T1", "T3", "T9")
ATTACKS = [FGSM(4), PGD(4, steps=5), CW(2, 20, 0.05)]


def toy(n=60, channels=1, classes=3):
    """Images with a slightly brighter square whose place tells the class."""
    y = torch.arange(n) % classes
    x = torch.rand(n, channels, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.3 + 0.2
    for image, label in zip(x, y, strict=True):
        image[:, :8, 8 * label : 8 * label + 8] += 0.06
    return x, y


class Net(nn.Module):
    def __init__(self, channels=1, classes=3):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, 8, 5, stride=2, padding=2), nn.BatchNorm2d(8), nn.ReLU(),
            nn.AdaptiveAvgPool2d(8), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(512, classes)

    def forward(self, x):
        return self.head(self.features(x))


def trained(x, y, net=None):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = net or Net(x.shape[1], int(y.max()) + 1)
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for _ in range(60):
            index = torch.randint(0, len(x), (32,))
            loss = nn.functional.cross_entropy(net.train()(x[index]), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval()


@pytest.fixture(scope="module")
def task():
    x, y = toy()
    return trained(x, y), x, y


class Around(nn.Module):
    def __init__(self, net, after=lambda z: z, before=lambda x: x):
        super().__init__()
        self.net, self.before, self.after = net, before, after

    def forward(self, x):
        return self.after(self.net(self.before(x)))


def halved_in_place(x):
    with torch.no_grad():
        return x.mul_(0.5)


KINDS = {
    "tuple": lambda net: Around(net, lambda z: (z, z.sum())),
    "dict": lambda net: Around(net, lambda z: {"logits": z, "features": z * 2}),
    "TorchScript": lambda net: torch.jit.trace(net, torch.rand(2, 1, 32, 32)),
    "compiled": lambda net: torch.compile(net, backend="eager"),
    "DataParallel": nn.DataParallel,
    "double": lambda net: Around(net, before=lambda x: x.double()).double(),
}


@pytest.fixture(scope="module")
def plain(task):
    """Rows and audit of the plain model."""
    net, x, y = task
    return evaluate(net, x, y, ATTACKS)[0], audit(net, AuditData(x, y, np.arange(60)), SUITE, only=SOME)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_any_kind_is_attacked_and_audited_as_the_plain_one(task, plain, kind):
    net, x, y = task
    expected, audited = plain
    own = Net()
    own.load_state_dict(net.state_dict())
    model = KINDS[kind](own.eval())
    rows, _ = evaluate(model, x, y, ATTACKS)
    check_rows(rows)
    differing = (rows.prediction != expected.prediction).groupby(rows.attack).mean()
    assert differing.max() <= 0.05, "but for rounding"
    found = audit(model, AuditData(x, y, np.arange(60)), SUITE, only=SOME)
    assert list(found.table.verdict) == list(audited.table.verdict)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_floating_type(task, dtype):
    net, x, y = task
    own = Net()
    own.load_state_dict(net.state_dict())
    own.to(dtype).eval()
    assert (predict(own, x).argmax(1) == y).float().mean() > 0.9
    found = craft(own, x, y, PGD(4, steps=5))
    expected = craft(net, x, y, PGD(4, steps=5))
    assert found.images.dtype == torch.float32 and perturbation_norms(x, found.images)[0].max() <= 4.0001
    assert abs(int(found.success.sum()) - int(expected.success.sum())) <= 6
    assert audit(own, AuditData(x, y), SUITE, only=["T1"]).passed
    assert {p.dtype for p in own.parameters()} == {dtype}


@pytest.mark.parametrize("channels", [2, 3, 5])
def test_images_of_any_number_of_channels(channels):
    x, y = toy(channels=channels)
    net = trained(x, y)
    rows, kept = evaluate(net, x, y, [FGSM(8), PGD(8, steps=5), CW(2, 20, 0.05)], keep={"fgsm": FGSM(8)})
    check_rows(rows)
    assert kept["fgsm"].shape == (60, channels, 32, 32)
    success = rows.groupby("attack").success.mean()
    assert success["clean"] < 0.1 and success["pgd"] > 0.3
    found = audit(net, AuditData(x, y), SUITE, only=("T0", "T1"))
    assert found.passed, found.table.to_string()


def test_the_networks_built_here_take_three_channels_where_asked(tmp_path):
    x = torch.rand(4, 3, 32, 32)
    model = build_model("resnet_small", num_classes=2, channels=3, seed=0).eval()
    assert predict(model, x).shape == (4, 2)
    save_model(tmp_path / "m.safetensors", model)
    assert torch.equal(predict(load_model(tmp_path / "m.safetensors"), x), predict(model, x))
    with pytest.raises(ValueError, match=r"takes images of shape \(B, 3, H, W\), not \(4, 1, 32, 32\)"):
        predict(model, x[:, :1])
    with pytest.raises(ValueError, match="1 or 3 channels, not 4"):
        build_model("resnet_small", num_classes=2, channels=4)


def test_a_model_that_writes_into_its_input_changes_no_image_of_the_caller(task):
    net, x, y = task
    x = x.clone()
    before, model = x.clone(), Around(trained(x * 0.5, y), before=halved_in_place)
    first, again = predict(model, x), predict(model, x)
    rows, _ = evaluate(model, x, y, [PGD(4, steps=5), CW(2, 20, 0.05)])
    audit(model, AuditData(x, y), SUITE, only=["T0"])
    assert torch.equal(x, before) and torch.equal(first, again)
    assert rows.linf_255[rows.attack.eq("pgd")].max() <= 4.0001
    assert first.argmax(1).eq(y).float().mean() > 0.9


def test_a_model_that_treats_images_differently_is_attacked_on_its_own_function():
    """Bright images: conv, batchnorm, relu; dark ones: conv, relu, batchnorm. The first is bright."""

    class Gated(nn.Module):
        def __init__(self, threshold):
            super().__init__()
            self.threshold = threshold
            self.bright = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
            self.conv, self.norm, self.head = nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Linear(2048, 3)

        def forward(self, x):
            gate = (x.mean((1, 2, 3)) > self.threshold).float().view(-1, 1, 1, 1)
            return self.head((gate * self.bright(x) + (1 - gate) * self.norm(self.conv(x).relu())).flatten(1))

    x, y = toy(120)
    light = x.mean((1, 2, 3))
    order = light.argsort(descending=True)
    model = trained(x[order], y[order], Gated(light.median().item()))
    for images in (order, order[:20].repeat(6)):  # of all kinds; of one kind alone
        for attack in (PGD(4, steps=10), FGSM(4)):
            found, honest = (craft(model, x[images], y[images], attack, fused=f) for f in (None, model))
            assert torch.equal(found.success, honest.success)
    # Dark images among bright ones where no look at the start sees them: their batches are made again.
    hidden = order[:20].repeat(6)
    hidden[52:67] = order[-15:]
    assert not {*range(52, 67)} & {*spread(120, attacks._LOOKED_AT).tolist()}
    for attack in (PGD(4, steps=10), FGSM(4)):
        found, honest = (craft(model, x[hidden], y[hidden], attack, fused=f) for f in (None, model))
        assert torch.equal(found.success, honest.success)
        assert torch.equal(found.images[52:67], honest.images[52:67])


def test_datasets_and_loaders_are_taken_where_images_and_labels_are(task):
    net, x, y = task
    dataset, attack = TensorDataset(x, y), PGD(4, steps=3)
    expected = craft(net, x, y, attack)
    for source in (dataset, DataLoader(dataset, batch_size=7)):
        assert torch.equal(craft(net, source, None, attack).images, expected.images)
        rows, _ = evaluate(net, source, None, [attack])
        assert rows.success[rows.attack.eq("pgd")].tolist() == expected.success.tolist()
        assert torch.equal(predict(net, source), predict(net, x))
        assert len(AuditData(source, None).labels) == len(y)
    assert torch.equal(predict(net, DataLoader(x, batch_size=9)), predict(net, x))
    with pytest.raises(TypeError, match="brings its own labels: pass labels=None"):
        craft(net, dataset, y, attack)
    with pytest.raises(TypeError, match=r"must yield \(image, label\) pairs, not dict"):
        craft(net, DataLoader([{"image": x[0]}]), None, attack)
    with pytest.raises(ValueError, match="labels are missing"):
        craft(net, x, None, attack)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int32, np.uint32, np.uint64])
def test_labels_of_any_integer_type(task, dtype):
    net, x, y = task
    labels = y.numpy().astype(dtype)
    assert torch.equal(craft(net, x.numpy(), labels, FGSM(2)).success, craft(net, x, y, FGSM(2)).success)
    assert craft(net, x, y.tolist(), FGSM(2)).success.shape == y.shape


def test_one_output_and_labels_of_no_class_are_refused_everywhere(task):
    net, x, y = task
    one = Around(net, lambda z: (z[:, 1:2] - z[:, :1]).sigmoid())
    for call in (
        lambda: predict(one, x),
        lambda: craft(one, x, y, FGSM(4)),
        lambda: evaluate(one, x, y, [FGSM(4)]),
        lambda: audit(one, AuditData(x, y), SUITE),
    ):
        with pytest.raises(
            ValueError, match="has one output; attacks and tables need a logit for each class"
        ):
            call()
    strange = y.clone()
    strange[:6] = 7
    for call in (
        lambda: craft(net, x, strange, FGSM(4)),
        lambda: evaluate(net, x, strange, [FGSM(4)]),
        lambda: audit(net, AuditData(x, strange), SUITE),
    ):
        with pytest.raises(ValueError, match=r"0\.\.2, the model's classes, not 0 to 7"):
            call()


@pytest.mark.parametrize(
    ("after", "kind", "message"),
    [
        (
            lambda z: (z, z * 2),
            TypeError,
            "a tuple with 0, 1, not logits .* forward returns the logits alone",
        ),
        (lambda z: {"a": z, "b": z}, TypeError, "a dict with a, b, not logits"),
        (lambda z: None, TypeError, "a NoneType with nothing in it"),
        (lambda z: z.unsqueeze(2), ValueError, r"returns \(8, 3, 1\) for 8 images"),
        (lambda z: z[:5], ValueError, r"returns \(5, 3\) for 8 images"),
    ],
)
def test_outputs_that_are_no_logits_say_how_to_wrap_the_model(task, after, kind, message):
    net, x, y = task
    with pytest.raises(kind, match=message):
        craft(Around(net, after), x, y, FGSM(4))


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (lambda z: z * 1e6, "the loss has no gradient on 8 of 8 images"),
        (lambda z: z * float("nan"), "8 of 8 images have logits that are NaN"),
        (lambda z: z.softmax(1), "it returns probabilities"),
    ],
)
def test_what_makes_attacks_say_nothing_is_one_warning_that_names_the_audit(task, after, message):
    net, x, y = task
    for call in (craft, lambda *a: evaluate(*a[:3], [a[3], FGSM(4), CW(1, 5)])):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            call(Around(net, after), x, y, PGD(4, steps=2))
        said = [str(w.message) for w in said if w.category is AttackWarning]
        assert len(said) == 1 and message in said[0] and "fortify.audit.audit" in said[0]


def test_a_model_without_gradients_is_refused_in_words(task):
    net, x, y = task
    with pytest.raises(ValueError, match="no gradient in its images.* is there a detach, a no_grad or numpy"):
        craft(Around(net, lambda z: z.detach()), x, y, FGSM(4))


def test_an_honest_model_and_an_audit_warn_of_nothing(task):
    net, x, y = task
    with warnings.catch_warnings():
        warnings.simplefilter("error", AttackWarning)
        evaluate(net, x, y, [FGSM(4)])
        audit(Around(net, lambda z: z * 1e6), AuditData(x, y), SUITE, only=["T9"])


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        (
            lambda x: (x - 0.485) / 0.229,
            r"look normalised.*torchvision\.transforms\.Normalize\(mean, std\), model",
        ),
        (lambda x: x * 255, "divide by 255"),
        (lambda x: x.clone().fill_(torch.nan), "look for NaN"),
        (lambda x: x - x.min() - 1e-7, "clamp them"),
    ],
)
def test_images_out_of_range_get_the_hint_that_helps(task, change, hint):
    net, x, y = task
    with pytest.raises(ValueError, match=hint):
        craft(net, change(x), y, FGSM(4))


@pytest.mark.parametrize("attack", [FGSM, PGD])
def test_a_budget_in_units_of_0_to_1_is_refused(attack):
    with pytest.raises(ValueError, match="0.03137 is less than a tenth of one.* write 8"):
        attack(8 / 255)
    assert attack(0.1).eps_255 == 0.1 and attack(0).eps_255 == 0


def test_apples_gpu_is_a_device_and_comes_after_cuda(monkeypatch):
    there = {"cuda": False, "mps": True}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there["cuda"])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there["mps"])
    assert pick_device() == torch.device("mps") == pick_device("mps")
    there["cuda"] = True
    assert pick_device() == torch.device("cuda")
    there["cuda"] = there["mps"] = False
    assert pick_device() == torch.device("cpu")
    with pytest.raises(ValueError, match="device is 'mps', but torch finds no GPU here; use \"auto\""):
        pick_device("mps")


def test_no_float64_is_handed_to_a_device(task, monkeypatch):
    """Apple's GPU knows none, and images of numpy are float64."""
    net, x, y = task
    moved, to = [], torch.Tensor.to

    def watched(tensor, *arguments, **options):
        if arguments and isinstance(arguments[0], torch.device) and tensor.is_floating_point():
            moved.append(tensor.dtype)
        return to(tensor, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "to", watched)
    images = x.double().numpy()
    predict(net, images)
    evaluate(net, images, y.numpy(), [FGSM(4), CW(1, 3)])
    audit(net, AuditData(images, y.numpy()), SUITE, only=["T0", "T11"])
    assert set(moved) == {torch.float32}
