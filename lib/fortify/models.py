"""Classifiers that take grey images in [0, 1]: torchvision nets with normalisation as their first layer."""

import contextlib

import torch
from torch import nn

from fortify.files import read_safetensors, write_safetensors
from fortify.runtime import device_of, eval_mode, float32_convolutions, seeded

# ImageNet statistics, kept for from-scratch training too so that pretrained weights are a drop-in.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class GreyNormalise(nn.Module):
    """(B, 1, H, W) in [0, 1] -> (B, 3, H, W): repeat the grey channel and normalise each copy.

    As the network's first layer it keeps every attack and every budget in grey levels.
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, x):
        if x.ndim != 4 or x.shape[1] != 1:
            raise ValueError(f"the model takes grey images of shape (B, 1, H, W), not {tuple(x.shape)}")
        return (x - self.mean) / self.std


class Float32(nn.Module):
    """Logits in float32, under bf16 autocast too: losses and margins are not rounded to eight bits."""

    def forward(self, x):
        return x.float()


class BasicBlock(nn.Module):
    """The basic block of He et al. (2016), as torchvision's, whose import takes as long as torch's own."""

    def __init__(self, before, width, stride, shortcut):
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = shortcut

    def forward(self, x):
        residual = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        residual += x if self.downsample is None else self.downsample(x)
        return self.relu(residual)


class SmallResNet(nn.Module):
    """ResNet of one basic block per stage, 24-48-96-192 channels: 0.7 million weights (ResNet-50: 23.5).

    The network for machines without a GPU: at 112 px it trains adversarially in minutes on two cores.
    """

    def __init__(self, num_classes, widths=(24, 48, 96, 192)):
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

    def forward(self, x):
        return self.fc(self.stages(self.stem(x)).mean((2, 3)))


def build_model(arch, *, num_classes, weights=None, seed=None):
    """A classifier (B, 1, H, W) float in [0, 1] -> logits (B, num_classes).

    ``arch`` is ``"resnet_small"`` or any torchvision classification net by name (``"resnet50"``).
    ``weights="imagenet"`` downloads torchvision's default weights, all but the classifying layer;
    None is from scratch. ``seed`` fixes the initial weights and leaves the global generator untouched.
    Raises ValueError for an unknown name, OSError where the weights cannot be downloaded.
    """
    if weights not in (None, "imagenet"):
        raise ValueError(f'weights must be None or "imagenet", not {weights!r}')
    with seeded(seed, "cpu") if seed is not None else contextlib.nullcontext():  # weights are drawn there
        if arch == "resnet_small":
            if weights:
                raise ValueError("resnet_small has no ImageNet weights; use weights=None")
            net = SmallResNet(num_classes)
        else:
            net = _torchvision_net(arch, num_classes, weights)
    model = nn.Sequential(GreyNormalise(), net, Float32())
    model.arch, model.num_classes = arch, num_classes
    return model


def _torchvision_net(arch, num_classes, weights):
    import torchvision  # here: it brings torch's compiler along, which takes seconds

    known = torchvision.models.list_models(module=torchvision.models)
    if arch not in known:
        raise ValueError(f"unknown arch {arch!r}; use resnet_small or one of {', '.join(known)}")
    options = {}
    if arch in ("googlenet", "inception_v3"):  # auxiliary heads return a tuple in training
        options = {"aux_logits": False, "init_weights": True}
    net = torchvision.models.get_model(arch, weights=None, num_classes=num_classes, **options)
    if weights:
        default = torchvision.models.get_model_weights(arch).DEFAULT
        try:
            pretrained = default.get_state_dict(progress=False, check_hash=True)
        except OSError as error:
            raise OSError(f"cannot download {default.url}: {error}. Use weights=None.") from error
        own = net.state_dict()
        fitting = {k: v for k, v in pretrained.items() if k in own and v.shape == own[k].shape}
        net.load_state_dict(fitting, strict=False)
    return net


def predict(model, images, *, batch_size=256):
    """Class probabilities (N, num_classes), float32 on the CPU, of images (N, 1, H, W) float in [0, 1].

    In eval mode whatever the model's state, which is as before on return; images are taken in the weights'
    type, and a GPU's convolutions are of that too (:func:`float32_convolutions`).
    Raises ValueError for another shape or type; greys of 0..255 are taken for very bright ones.
    """
    if images.ndim != 4 or not images.is_floating_point():
        kind = f"{tuple(images.shape)} {images.dtype}"
        raise ValueError(f"images must be float (N, 1, H, W) in [0, 1], not {kind}; see data.to_tensor")
    device, dtype = device_of(model), next((p.dtype for p in model.parameters()), torch.float32)
    with eval_mode(model), torch.no_grad(), float32_convolutions(device):
        parts = [model(x.to(device, dtype)).float().softmax(1).cpu() for x in images.split(batch_size)]
    return torch.cat(parts)


def save_model(path, model, *, info=None):
    """Write weights, architecture and ``info`` (a JSON-able dict) as safetensors, atomically."""
    metadata = {"arch": model.arch, "num_classes": model.num_classes, "info": info or {}}
    write_safetensors(path, model.state_dict(), metadata)


def load_model(path, *, device="cpu"):
    """Read a model that :func:`save_model` wrote; returns it in eval mode on ``device``, with ``.info``.

    Safetensors only: nothing is unpickled. Raises ValueError for a damaged or foreign file.
    """
    tensors, metadata = read_safetensors(path)
    if "arch" not in metadata:
        raise ValueError(f"{path} holds no model of this project (no architecture in its metadata)")
    model = build_model(metadata["arch"], num_classes=metadata["num_classes"])
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} does not hold the weights of {metadata['arch']}: {error}") from error
    model.info = metadata["info"]
    return model.to(device).eval()
