"""Convolutional networks as people write them: residual, grouped, depthwise; with batch norms that do something."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """torchvision's layout."""

    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.downsample = None
        if stride != 1 or before != after:
            projection = nn.Conv2d(before, after, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """1 x 1, grouped 3 x 3, 1 x 1 (ResNeXt where there are groups)."""

    def __init__(self, before: int, middle: int, after: int, stride: int = 1, groups: int = 2) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, middle, 1, bias=False), nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, 2, dilation=2, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3, self.bn3 = nn.Conv2d(middle, after, 1, bias=False), nn.BatchNorm2d(after)
        self.skip = nn.Conv2d(before, after, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        return F.relu(self.bn3(self.conv3(out)) + self.skip(x))


class PreActivation(nn.Module):
    """Norm and activation before each convolution: what is skipped is linear."""

    def __init__(self, maps: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(maps), nn.Conv2d(maps, maps, 3, padding="same")
        self.bn2, self.conv2 = nn.BatchNorm2d(maps), nn.Conv2d(maps, maps, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(torch.relu(self.bn1(x)))
        return x + self.conv2(torch.relu(self.bn2(out)))


class Separable(nn.Module):
    """Depthwise, then 1 x 1 (MobileNet), with a linear bottleneck and a skip."""

    def __init__(self, maps: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(maps, 2 * maps, 3, padding=1, groups=maps)
        self.pointwise = nn.Conv2d(2 * maps, maps, 1)
        self.bn = nn.BatchNorm2d(maps)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn(self.pointwise(F.silu(self.depthwise(x))))


class ResNet(nn.Module):
    """A stem, two layers of a block each, global average pooling and a linear layer."""

    def __init__(self, channels: int = 2, maps: int = 3, d_out: int = 4, stem: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, maps, stem, 1, stem // 2, bias=False)
        self.bn1, self.relu, self.maxpool = nn.BatchNorm2d(maps), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(BasicBlock(maps, maps))
        self.layer2 = nn.Sequential(BasicBlock(maps, maps + 1, 2))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(maps + 1, d_out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def head(maps: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(maps, 3)]


def on_vectors(model: nn.Module, image: tuple[int, int, int] = (2, 9, 8), seed: int = 0) -> nn.Sequential:
    """The network behind nn.Unflatten, in evaluation mode, its norms set to something."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                for tensor in (module.running_mean, module.weight, module.bias):
                    tensor.copy_(torch.randn(tensor.shape, generator=generator))
                module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
    return nn.Sequential(nn.Unflatten(1, image), model).eval()


def networks() -> dict[str, nn.Sequential]:
    """One of each kind."""
    torch.manual_seed(0)
    return {
        "resnet": on_vectors(ResNet()),
        "bottleneck": on_vectors(nn.Sequential(Bottleneck(2, 4, 6, 2), Bottleneck(6, 4, 6), *head(6))),
        "pre-activation": on_vectors(nn.Sequential(nn.Conv2d(2, 3, 3), PreActivation(3), PreActivation(3), *head(3))),
        "depthwise": on_vectors(nn.Sequential(nn.Conv2d(2, 4, 3, 2), Separable(4), Separable(4), *head(4))),
        "norm-first": on_vectors(nn.Sequential(nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 3, 3), *head(3))),
        "no-head": on_vectors(nn.Sequential(BasicBlock(2, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten())),
    }
