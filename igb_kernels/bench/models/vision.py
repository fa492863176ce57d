"""ResNet (He et al., CVPR 2016), ViT (Dosovitskiy et al., ICLR 2021), and dense prediction by SegNet (Badrinarayanan et
al., TPAMI 2017) with MTAN's attention (Liu et al., CVPR 2019)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from igb_kernels.bench.models.base import Criterion, MultiTask, linear_heads


def _normed(inputs: int, outputs: int, size: int = 1, stride: int = 1) -> list[nn.Module]:
    """A convolution without bias, and its batch norm."""
    return [nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs)]


# ---- ResNet -------------------------------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions around which the input goes."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.residual = nn.Sequential(
            *_normed(inputs, width),
            nn.ReLU(inplace=True),
            *_normed(width, width, 3, stride),
            nn.ReLU(inplace=True),
            *_normed(width, outputs),
        )
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(*_normed(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] to [B, 4·width, H/stride, W/stride]."""
        return F.relu(self.residual(x) + self.shortcut(x))


def resnet(tasks: int, *, batch: int, image: int, blocks: Sequence[int] = (3, 4, 6, 3), width: int = 64) -> MultiTask:
    """Yes or no for each attribute of an image, as with CelebA's 40."""
    layers: list[nn.Module] = [*_normed(3, width, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    inputs = width
    for stage, count in enumerate(blocks):
        for block in range(count):
            layers.append(Bottleneck(inputs, width << stage, 2 if stage and block == 0 else 1))
            inputs = 4 * width << stage
    encoder = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    targets = list(torch.randint(0, 2, (tasks, batch, 1)).float())
    heads = linear_heads(inputs, tasks)
    return MultiTask(
        encoder, heads, torch.randn(batch, 3, image, image), targets, [F.binary_cross_entropy_with_logits] * tasks
    )


# ---- ViT ----------------------------------------------------------------------------------------------------------


def transformer(width: int, layers: int, heads: int, *, norm_first: bool) -> nn.TransformerEncoder:
    """Layers of attention and a network of four times the width, without dropout: results can then be compared."""
    layer = nn.TransformerEncoderLayer(
        width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm_first
    )
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


class ViT(nn.Module):
    """From an image to the class token's last state."""

    def __init__(self, image: int, patch: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + (image // patch) ** 2, width))
        self.layers = transformer(width, layers, heads, norm_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] to [B, width]."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        last: Tensor = self.norm(self.layers(x)[:, 0])
        return last


def vit(
    tasks: int,
    *,
    batch: int,
    image: int = 224,
    patch: int = 16,
    width: int = 768,
    layers: int = 12,
    attention_heads: int = 12,
    classes: int = 10,
) -> MultiTask:
    """A classification for each task."""
    encoder = ViT(image, patch, width, layers, attention_heads)
    targets = list(torch.randint(0, classes, (tasks, batch)))
    heads = linear_heads(width, tasks, classes)
    return MultiTask(encoder, heads, torch.randn(batch, 3, image, image), targets, [F.cross_entropy] * tasks)


# ---- SegNet with MTAN's attention ---------------------------------------------------------------------------------


class Stage(nn.Module):
    """Convolutions, each with its batch norm; returns what the first and what the last of them give."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in pairwise(channels)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, H, W], twice."""
        first = x = self.layers[0](x)
        for layer in self.layers[1:]:
            x = layer(x)
        return first, x


class SegNet(nn.Module):
    """VGG-16's convolutions and their mirror image, which puts maxima back where they were."""

    def __init__(self, widths: Sequence[int], depths: Sequence[int]) -> None:
        super().__init__()
        inputs = [3, *widths[:-1]]
        self.down = nn.ModuleList(Stage([a] + [b] * n) for a, b, n in zip(inputs, widths, depths, strict=True))
        outputs = [widths[0], *widths[:-1]]
        self.up = nn.ModuleList(Stage([b] * n + [a]) for a, b, n in zip(outputs, widths, depths, strict=True))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """First and last maps of each stage, downwards and up again."""
        x, features, places = images, [], []
        for stage in self.down:
            first, last = stage(x)
            features += [first, last]
            x, place = F.max_pool2d(last, 2, return_indices=True)
            places.append(place)
        for stage, place in zip(reversed(self.up), reversed(places), strict=True):
            first, last = stage(F.max_unpool2d(x, place, [2, 2]))
            features += [first, last]
            x = last
        return tuple(map(_aside, features))


def _aside(x: Tensor) -> Tensor:
    """The same, for those who read it alone: what is made of `x` elsewhere is not made of this."""
    return x.view_as(x)


class Attention(nn.Module):
    """A mask on the shared network's last maps of a stage, from its first ones and the task's own so far."""

    def __init__(self, first: int, own: int, last: int, outputs: int) -> None:
        super().__init__()
        self.mask = nn.Sequential(*_normed(first + own, last), nn.ReLU(), *_normed(last, last), nn.Sigmoid())
        self.out = nn.Sequential(*_normed(last, outputs, 3), nn.ReLU())

    def forward(self, first: Tensor, own: Tensor | None, last: Tensor) -> Tensor:
        """[B, outputs, H, W]."""
        x = first if own is None else torch.cat([first, own], dim=1)
        result: Tensor = self.out(self.mask(x) * last)
        return result


class DenseHead(nn.Module):
    """A task's attention along the whole SegNet, and its prediction for each pixel."""

    def __init__(self, widths: Sequence[int], outputs: int) -> None:
        super().__init__()
        above = [widths[0], *widths[:-1]]
        self.down = nn.ModuleList(
            Attention(w, a if i else 0, w, w) for i, (w, a) in enumerate(zip(widths, above, strict=True))
        )
        self.up = nn.ModuleList(Attention(w, w, a, a) for w, a in zip(reversed(widths), reversed(above), strict=True))
        self.out = nn.Sequential(nn.Conv2d(widths[0], widths[0], 3, padding=1), nn.Conv2d(widths[0], outputs, 1))

    def forward(self, features: tuple[Tensor, ...]) -> Tensor:
        """[B, outputs, H, W]."""
        stages = zip([*self.down, *self.up], features[::2], features[1::2], strict=True)
        own = None
        for i, (attention, first, last) in enumerate(stages):
            if own is not None and i >= len(self.down):
                own = F.interpolate(own, scale_factor=2.0)
            own = attention(first, own, last)
            if i < len(self.down):
                own = F.max_pool2d(own, 2)
        prediction: Tensor = self.out(own)
        return prediction


def _normals_apart(prediction: Tensor, target: Tensor) -> Tensor:
    return (1 - F.cosine_similarity(prediction, target, dim=1)).mean()


def segnet_mtan(
    tasks: int,
    *,
    batch: int,
    image: tuple[int, int],
    widths: Sequence[int] = (64, 128, 256, 512, 512),
    depths: Sequence[int] = (2, 2, 3, 3, 3),
    classes: int = 13,
) -> MultiTask:
    """Segmentation, depth and surface normals, and again from the fourth task on; each with attention of its own.
    `depths` are at least 2, and `image` is divisible by 2 as often as there are stages."""
    kinds: list[tuple[int, Criterion, Callable[[], Tensor]]] = [
        (classes, F.cross_entropy, lambda: torch.randint(0, classes, (batch, *image))),
        (1, F.l1_loss, lambda: torch.rand(batch, 1, *image)),
        (3, _normals_apart, lambda: F.normalize(torch.randn(batch, 3, *image), dim=1)),
    ]
    own = [kinds[k % len(kinds)] for k in range(tasks)]
    heads = nn.ModuleList(DenseHead(widths, outputs) for outputs, _, _ in own)
    targets, criteria = [target() for _, _, target in own], [criterion for _, criterion, _ in own]
    return MultiTask(SegNet(widths, depths), heads, torch.randn(batch, 3, *image), targets, criteria)
