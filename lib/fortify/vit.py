"""A small vision transformer whose first layers are convolutions, for images of any size."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

PATCH = 16  # px of the image, across, that a token stands for: the stem halves the image four times


class ConvStemViT(nn.Module):
    """ViT with a convolutional stem (Xiao et al. 2021, arXiv:2106.14881): (B, 3, H, W) -> (B, num_classes).

    Four 3 x 3 convolutions of stride 2 and one of 1 x 1 take the place of the patches, and of one of six
    blocks. A token stands for :data:`PATCH` x :data:`PATCH` pixels. Its place is told by sines and cosines,
    which hold for any grid, and the mean of all tokens is classified (Beyer et al. 2022, arXiv:2205.01580).
    2.5 million weights at a ``width`` of 192, that of ViT-Tiny.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        width: int = 192,
        depth: int = 5,
        heads: int = 3,
        stem: Sequence[int] = (24, 48, 96, 192),
    ) -> None:
        super().__init__()
        parts, before = [], 3
        for channels in stem:
            parts += [
                nn.Conv2d(before, channels, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(inplace=True),
            ]
            before = channels
        self.stem = nn.Sequential(*parts, nn.Conv2d(before, width, 1))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        found = self.stem(x)
        tokens = found.flatten(2).transpose(1, 2)  # (B, rows * columns, width)
        tokens = self.blocks(tokens + places(*found.shape[2:], tokens.shape[2]).to(tokens))
        return self.fc(self.norm(tokens).mean(1))


class Block(nn.Module):
    """A transformer block: attention, then two linear layers, each of what LayerNorm makes of its input.

    Attention is written out. torch's fused kernels, which differ by machine and by whether gradients are
    wanted, gain nothing on the few tokens of small images.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        batch, n, width = tokens.shape
        apart = self.qkv(self.norm1(tokens)).view(batch, n, 3, self.heads, width // self.heads)
        q, k, v = apart.permute(2, 0, 3, 1, 4)  # each (B, heads, n, width of a head)
        weights = (q @ k.transpose(2, 3) * (width // self.heads) ** -0.5).softmax(3)
        tokens = tokens + self.projection((weights @ v).transpose(1, 2).reshape(batch, n, width))
        return tokens + self.mlp(self.norm2(tokens))


def places(rows: int, columns: int, width: int) -> Tensor:
    """Fixed positions of a grid of tokens, (rows * columns, width): sines and cosines of row and column.

    ``width`` is a multiple of 4.
    """
    waves = 10_000 ** -torch.linspace(0, 1, width // 4)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    row, column = (place.reshape(-1, 1) * waves for place in (row, column))
    return torch.cat([row.sin(), row.cos(), column.sin(), column.cos()], 1)
