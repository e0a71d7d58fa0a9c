"""Export Paddle networks with random weights by paddle2onnx, for `coverage.py`.

    python benchmarks/coverage_paddle.py FOLDER

Needs paddlepaddle, paddle2onnx and packaging; nothing else of the project does. A file that exists is kept; what the
exporter refuses leaves a `.failed` file with its words.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import paddle
from coverage_writing import is_done, write_apart
from paddle import nn
from paddle.vision import models


class _Recurrent(nn.Layer):
    """Convolutions, a bidirectional recurrent network over the columns, and a classifier of every step."""

    def __init__(self, cell: type[nn.Layer]) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2D(3, 16, 3, padding=1), nn.BatchNorm2D(16), nn.Hardswish())
        self.inner = cell(16, 24, direction="bidirect")
        self.head = nn.Linear(48, 11)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """One pass."""
        y = self.features(x).mean(2).transpose([0, 2, 1])
        return nn.functional.softmax(self.head(self.inner(y)[0]))


class _Unet(nn.Layer):
    """Down, up by interpolation and by a transposed convolution, with a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2D(3, 16, 3, padding=1), nn.BatchNorm2D(16), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2D(16, 24, 3, 2, 1), nn.GroupNorm(4, 24), nn.Swish())
        self.up = nn.Conv2DTranspose(24, 16, 2, 2)
        self.side = nn.Conv2D(24, 16, 1)
        self.last = nn.Conv2D(32, 2, 1)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """One pass."""
        a = self.one(x)
        b = self.two(a)
        wide = nn.functional.interpolate(self.side(b), scale_factor=2, mode="nearest")
        return self.last(paddle.concat([a, self.up(b) + wide], 1))


class _Transformer(nn.Layer):
    """Two encoder layers and a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64), 2)
        self.head = nn.Linear(32, 5)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """One pass."""
        return self.head(self.inner(x).mean(1))


MODELS: dict[str, tuple[Callable[[], nn.Layer], list[int | None]]] = {
    "mobilenet_v1": (lambda: models.mobilenet_v1(scale=0.25, num_classes=10), [None, 3, 64, 64]),
    "mobilenet_v2": (lambda: models.mobilenet_v2(scale=0.5, num_classes=10), [None, 3, 64, 64]),
    "mobilenet_v3_small": (lambda: models.mobilenet_v3_small(scale=0.5, num_classes=10), [None, 3, 64, 64]),
    "shufflenet_v2": (lambda: models.shufflenet_v2_x0_25(num_classes=10), [None, 3, 64, 64]),
    "squeezenet": (lambda: models.squeezenet1_1(num_classes=10), [None, 3, 64, 64]),
    "resnet18": (lambda: models.resnet18(num_classes=10), [None, 3, 64, 64]),
    "googlenet": (lambda: models.googlenet(num_classes=10), [None, 3, 224, 224]),
    "densenet121": (lambda: models.densenet121(num_classes=10), [None, 3, 64, 64]),
    "resnext50": (lambda: models.resnext50_32x4d(num_classes=10), [None, 3, 64, 64]),
    "lstm": (lambda: _Recurrent(nn.LSTM), [None, 3, 16, 40]),
    "gru": (lambda: _Recurrent(nn.GRU), [None, 3, 16, 40]),
    "unet": (_Unet, [None, 3, 32, 32]),
    "transformer": (_Transformer, [None, 12, 32]),
}


def randomise(model: nn.Layer) -> None:
    """Give normalisations values of their own, as training does."""
    kinds = (nn.BatchNorm2D, nn.GroupNorm, nn.LayerNorm)
    for layer in model.sublayers():
        if isinstance(layer, kinds):
            for value in layer.state_dict().values():
                value.set_value(paddle.uniform(value.shape, min=0.5, max=1.5))


def export(name: str, opset: int, path: Path) -> None:
    """Write one model, or the exporter's words."""
    try:
        paddle.seed(0)
        make, shape = MODELS[name]
        model = make()
        model.eval()
        randomise(model)
        given = [paddle.static.InputSpec(shape, "float32", "x")]
        paddle.onnx.export(model, str(path.with_suffix("")), input_spec=given, opset_version=opset)
    except Exception as error:  # what the exporter refuses is not ours to judge
        path.with_suffix(".failed").write_text(next(iter(repr(error).splitlines()), "")[:200])


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    paddle.set_device("cpu")
    for name in MODELS:
        for opset in (11, 16):
            path = folder / f"paddle__{name}__paddle2onnx-{opset}__dynamic.onnx"
            if not is_done(path):
                write_apart(path, functools.partial(export, name, opset, path))


if __name__ == "__main__":
    main()
