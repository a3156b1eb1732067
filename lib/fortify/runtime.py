"""Where and how torch computes: device, modes, seeds, the precision of convolutions, and a progress bar.

Importing it does not load torch; using it does.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch
    from torch import nn


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """``"auto"`` is CUDA where it is available, else Apple's ``mps``, else the CPU; other names as given.

    ValueError for CUDA or mps where there is none.
    """
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    kind = str(name).split(":")[0]
    if not there.get(kind, True):
        raise ValueError(f'device is {name!r}, but torch finds no GPU here; use "auto" or "cpu"')
    if name == "auto":
        name = next((kind for kind, available in there.items() if available), "cpu")
    return torch.device(name)


def progress_bar(iterable: Iterable, *, desc: str, show: bool = True) -> Iterable:
    """``iterable`` behind a tqdm bar that shows in a terminal or an open notebook and nowhere else.

    ``TQDM_DISABLE=1`` hides it there too: the workflow sets it, so that executed notebooks hold no bars.
    """
    from tqdm.auto import tqdm

    seen = ("ipykernel" in sys.modules or sys.stderr.isatty()) and not os.environ.get("TQDM_DISABLE")
    return tqdm(iterable, desc=desc, leave=False, disable=not (show and seen))


def describe_device(device: str | torch.device) -> str:
    """A device as a reader wants it: the GPU's name, or the processor's kind and torch's thread count."""
    if str(device) == "cpu" and "torch" not in sys.modules:  # nothing was computed with it
        return f"CPU ({platform.machine()})"
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"Apple GPU ({platform.machine()})"
    return f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"


@contextlib.contextmanager
def float32_convolutions(device: str | torch.device, *, deterministic: bool = False) -> Iterator[None]:
    """A context in which cuDNN convolves in float32, not in TF32 with its ten-bit mantissa, its default.

    ``deterministic`` has it choose among those algorithms that give the same bits each time. On a CPU
    nothing changes. Matrix products are as :func:`torch.set_float32_matmul_precision` has them, by default
    float32.
    """
    import torch

    if torch.device(device).type != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    # Where TF32 was set by a name newer than allow_tf32, this has no effect, or torch refuses to read it.
    newer = "tf32" in (torch.backends.fp32_precision, cudnn.fp32_precision)
    newer |= cudnn.rnn.fp32_precision != cudnn.conv.fp32_precision
    setting = (cudnn.conv, "fp32_precision", "ieee") if newer else (cudnn, "allow_tf32", False)
    changes = [(cudnn, "deterministic", cudnn.deterministic or deterministic)]
    changes += [setting] if cudnn.conv.fp32_precision == "tf32" else []
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for change in changes:
            setattr(*change)
        yield
    finally:
        for change in before:
            setattr(*change)


@contextlib.contextmanager
def seeded(seed: int, device: str | torch.device) -> Iterator[None]:
    """The global generators of the CPU and of ``device`` seeded inside the block, after it as before.

    :func:`torch.manual_seed` would seed those of every GPU, also where no work is done there.
    """
    import torch

    device, seed = torch.device(device), int(seed)
    on_gpu = device.type == "cuda"
    apples = torch.mps.get_rng_state() if device.type == "mps" else None
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        if apples is not None:
            torch.mps.manual_seed(seed)
        try:
            yield
        finally:
            if apples is not None:
                torch.mps.set_rng_state(apples)


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer; the CPU where it has none."""
    import torch

    tensor = next(itertools.chain(model.parameters(), model.buffers()), torch.empty(0))
    return tensor.device


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode inside the block; after it each of its modules is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield model
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Eval mode and no gradients for the weights inside the block; the previous state after it.

    Foolbox does neither: in train mode an attack would update BatchNorm statistics, and its backward
    pass would add into the parameters' ``.grad`` and pay for it.
    """
    import torch

    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        with eval_mode(model), torch.inference_mode(False), torch.enable_grad():
            yield model
    finally:
        for parameter, want in wanted.items():
            parameter.requires_grad_(want)
