"""The architectures of the coverage benchmark that no package carries: U-Net, CRNN, YOLO-like heads, recurrent ones."""

from __future__ import annotations

import torch
from torch import nn


class UNet(nn.Module):
    """A U-Net with transposed convolutions."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()

        def block(a: int, b: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())

        self.one, self.two, self.three = block(3, width), block(width, 2 * width), block(2 * width, 4 * width)
        self.up2, self.up1 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2), nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.mix2, self.mix1, self.head = block(4 * width, 2 * width), block(2 * width, width), nn.Conv2d(width, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One pass."""
        a = self.one(x)
        b = self.two(nn.functional.max_pool2d(a, 2))
        c = self.three(nn.functional.max_pool2d(b, 2))
        b = self.mix2(torch.cat([self.up2(c), b], 1))
        return self.head(self.mix1(torch.cat([self.up1(b), a], 1)))


class Crnn(nn.Module):
    """Convolutions, then a recurrent network over the columns."""

    def __init__(self, cell: type = nn.LSTM) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d((8, 2)),
        )  # fmt: skip
        self.rnn = cell(64, 24, num_layers=2, bidirectional=True)
        self.head = nn.Linear(48, 11)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One pass."""
        x = self.features(x)
        return self.head(self.rnn(x.flatten(1, 2).permute(2, 0, 1))[0])


class Bottleneck(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c), nn.SiLU())
        self.b = nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c), nn.SiLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One pass."""
        return x + self.b(self.a(x))


class C2f(nn.Module):
    """The split block of YOLOv8."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.one, self.inner = nn.Conv2d(a, b, 1), Bottleneck(b // 2)
        self.two = nn.Conv2d(b + b // 2, b, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One pass."""
        y = list(self.one(x).chunk(2, 1))
        y.append(self.inner(y[-1]))
        return self.two(torch.cat(y, 1))


class Yolo(nn.Module):
    """A small YOLO with a v5-like (anchors) or a v8-like (distribution focal) head."""

    def __init__(self, version: int) -> None:
        super().__init__()
        self.version, w = version, 16
        self.stem = nn.Sequential(nn.Conv2d(3, w, 6, 2, 2), nn.BatchNorm2d(w), nn.SiLU())
        self.down = nn.ModuleList([nn.Sequential(nn.Conv2d(w << k, w << k + 1, 3, 2, 1), nn.SiLU()) for k in range(3)])
        self.c2f = nn.ModuleList([C2f(w << k + 1, w << k + 1) for k in range(3)])
        self.lateral = nn.ModuleList([nn.Conv2d(8 * w + 4 * w, 4 * w, 1), nn.Conv2d(4 * w + 2 * w, 2 * w, 1)])
        self.classes = 5
        out = 3 * (self.classes + 5) if version == 5 else 64 + self.classes
        self.heads = nn.ModuleList([nn.Conv2d(2 * w << k, out, 1) for k in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One pass."""
        x = self.stem(x)
        found = []
        for down, c2f in zip(self.down, self.c2f, strict=True):
            x = c2f(down(x))
            found.append(x)
        p3, p4, p5 = found
        p4 = self.lateral[0](torch.cat([nn.functional.interpolate(p5, scale_factor=2), p4], 1))
        p3 = self.lateral[1](torch.cat([nn.functional.interpolate(p4, scale_factor=2), p3], 1))
        results = []
        for p, head in zip((p3, p4, p5), self.heads, strict=True):
            y = head(p)
            b, _, h, w = y.shape
            if self.version == 5:
                y = y.view(b, 3, self.classes + 5, h, w).permute(0, 1, 3, 4, 2).sigmoid()
                xy, wh, rest = y.split((2, 2, self.classes + 1), 4)
                results.append(torch.cat((xy * 2, (wh * 2) ** 2, rest), 4).reshape(b, -1, self.classes + 5))
            else:
                results.append(y.view(b, -1, h * w))
        if self.version == 5:
            return torch.cat(results, 1)
        y = torch.cat(results, 2)
        box, scores = y.split((64, self.classes), 1)
        b, _, a = box.shape
        box = box.view(b, 4, 16, a).transpose(2, 1).softmax(1)
        weights = torch.arange(16, dtype=torch.float).view(1, 16, 1, 1)
        return torch.cat(((box * weights).sum(1), scores.sigmoid()), 1)


class Recurrent(nn.Module):
    """A recurrent network and a layer on top."""

    def __init__(self, cell: type, both: bool) -> None:
        super().__init__()
        self.rnn = cell(10, 24, 2, batch_first=True, bidirectional=both)
        self.head = nn.Linear(48 if both else 24, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One pass."""
        return self.head(self.rnn(x)[0])
