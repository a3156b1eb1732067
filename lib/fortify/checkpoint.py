"""What an interrupted training needs to go on, and which training a checkpoint belongs to."""

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fortify.files import read_safetensors, write_safetensors
from fortify.runs import lib_sha256
from fortify.runtime import device_of


class TrainingState:
    """What an interrupted training needs to go on: weights, best weights, optimiser, schedule, history.

    ``keep`` says which epoch ends up in ``best``: the ``"best"`` on validation, or the ``"last"``.
    ``eval_model`` is what is validated and kept: ``model``, or with ``ema`` its moving average.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
        *,
        keep: str = "best",
        ema: float = 0.0,
    ) -> None:
        self.model, self.epoch, self.history, self.best = model, 0, [], _copy(model)
        self.optimizer, self.schedule, self.keep = optimizer, schedule, keep
        self.ema, self.averaged = ema, 0
        self.eval_model = copy.deepcopy(model).eval().requires_grad_(False) if ema else model

    @torch.no_grad()
    def average(self) -> None:
        """After a step: let ``eval_model`` follow ``model``, its BatchNorm statistics included."""
        if not self.ema:
            return
        self.averaged += 1
        # A tenth of the new weights at first, so that the initial ones are soon forgotten.
        keep = min(self.ema, self.averaged / (self.averaged + 9))
        floats = [], []
        both = zip(self.eval_model.state_dict().values(), self.model.state_dict().values(), strict=True)
        for ours, theirs in both:
            if ours.is_floating_point():
                floats[0].append(ours)
                floats[1].append(theirs)
            else:  # BatchNorm's count of batches
                ours.copy_(theirs)
        get_ema_multi_avg_fn(keep)(*floats, None)

    def record(self, epoch: int, loss: float, accuracy: float, val_accuracy: float, robust: float) -> None:
        self.epoch = epoch
        lr = self.optimizer.param_groups[0]["lr"]
        row = (epoch, lr, loss, accuracy, val_accuracy, robust)
        self.history.append(dict(zip(_HISTORY, row, strict=True)))
        if self._selected() == len(self.history) - 1:
            self.best = _copy(self.eval_model)

    def table(self) -> pd.DataFrame:
        table = pd.DataFrame(self.history, columns=_HISTORY)
        return table.assign(selected=table.index == self._selected())

    def _selected(self):
        """Position of the epoch to keep: best robust validation accuracy, then clean, then the later one."""
        if self.keep == "last":
            return len(self.history) - 1
        columns = ("val_robust_accuracy", "val_accuracy", "epoch")
        keys = [tuple(np.nan_to_num(row[c], nan=0.0) for c in columns) for row in self.history]
        return keys.index(max(keys))

    def save(self, file: Path) -> None:
        tensors = {f"model/{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"best/{k}": v for k, v in self.best.items()}
        tensors |= {f"eval_model/{k}": v for k, v in self.eval_model.state_dict().items() if self.ema}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{k}": v for k, v in moments.items()}
        groups = self.optimizer.state_dict()["param_groups"]
        schedule = self.schedule.state_dict() if self.schedule else {}
        schedule = {k: v for k, v in schedule.items() if not callable(v)}
        metadata = {"epoch": self.epoch, "averaged": self.averaged, "history": self.history}
        metadata |= {"groups": groups, "schedule": schedule}
        write_safetensors(file, tensors, metadata)

    def resume(self, file: Path) -> None:
        if not file.exists():
            return
        tensors, metadata = read_safetensors(file)
        if "history" not in metadata:
            raise ValueError(f"{file} is no checkpoint of a training; delete it and rerun")
        device, of, moments = device_of(self.model), {}, {}
        for name, tensor in tensors.items():
            kind, key = name.split("/", 1)
            of.setdefault(kind, {})[key] = tensor
        for name, tensor in of["optimizer"].items():
            index, moment = name.split("/")
            moments.setdefault(int(index), {})[moment] = tensor
        self.model.load_state_dict(of["model"])
        if self.ema:
            self.eval_model.load_state_dict(of["eval_model"])
        self.best = {k: v.to(device) for k, v in of["best"].items()}
        self.optimizer.load_state_dict({"state": moments, "param_groups": metadata["groups"]})
        for weight, own in self.optimizer.state.items():  # laid out as the weights, for one step over all
            same = {k: v for k, v in own.items() if v.shape == weight.shape}
            own |= {k: torch.empty_like(weight).copy_(v) for k, v in same.items()}
        if self.schedule:
            self.schedule.load_state_dict(metadata["schedule"])
        self.epoch, self.averaged, self.history = (metadata[k] for k in ("epoch", "averaged", "history"))


def fingerprint(model: nn.Module, train: Any, val: Any, *settings: Any) -> str:
    """Names a checkpoint after everything that decides the result, so that no other training reads it.

    ``settings`` are JSON-able: recipe, attacks, seed. This package's code is part of it.
    """
    digest = hashlib.sha256(lib_sha256().encode())
    for part in (train, val):
        digest.update(np.ascontiguousarray(part.images).tobytes() + np.asarray(part.labels).tobytes())
    for name, tensor in model.state_dict().items():  # the initial weights: architecture, seed, pretraining
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    digest.update(json.dumps(settings, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def stop_if_not_finite(losses: Tensor, epoch: int, file: Path | None) -> None:
    """FloatingPointError when a loss (batches,) is not finite; names epoch, batch and last checkpoint."""
    bad = (~torch.isfinite(losses)).nonzero()
    if len(bad):
        kept = f"The last good checkpoint is {file}." if file and file.exists() else "There is no checkpoint."
        raise FloatingPointError(
            f"the training loss is {losses[bad[0]].item()} at epoch {epoch}, batch {bad[0].item() + 1} of "
            f"{len(losses)}. {kept} Lower lr, or look for constant or corrupted training images."
        )


def _copy(model):
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


_HISTORY = ("epoch", "lr", "train_loss", "train_accuracy", "val_accuracy", "val_robust_accuracy")
