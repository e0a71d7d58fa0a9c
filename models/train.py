"""Train the two small digit networks that lie beside this script.

Usage, from the repository root:

    pip install torch==2.13.0 numpy scikit-learn onnx onnxruntime
    python models/train.py

It runs on one CPU thread, takes a few minutes, downloads nothing (the data come with scikit-learn) and writes
into the folder of this script:

    digits_cnn.onnx        plain Conv-ReLU network, BatchNormalization folded into the convolutions
    digits_resnet.onnx     residual network, BatchNormalization kept as nodes
    <name>.calib.npz       `images` uint8 [N, H, W], without labels, a subset of the training images
    <name>.test.npz        `images` uint8 [N, H, W] and `labels` uint8 [N], never used in training

Both networks take `input`, float32 [N, 1, 24, 24] = images / 255, and return `logits`, float32 [N, 10].
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

SIZE = 24  # three times the original 8x8, and divisible by 8 for the three poolings of the plain network
CLASSES = 10
TRAIN_IMAGES = 1000  # the remaining 797 of the 1,797 images are the test split
CALIB_IMAGES = 300
BATCH = 50
OPSET = 17


@dataclass(frozen=True)
class Split:
    """The images of one run, uint8 [N, H, W], and their labels, uint8 [N]."""

    train_images: np.ndarray
    train_labels: np.ndarray
    calib_images: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load_split(seed: int) -> Split:
    """Upscale the digits to SIZE x SIZE and divide them, each class in proportion, into training and test images."""
    digits = load_digits()
    raw = torch.from_numpy(digits.images.astype(np.float32))[:, None] / 16.0  # the original pixels are 0..16
    scaled = F.interpolate(raw, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    # Rounding to uint8 happens before training, so that the networks see exactly what the stored files hold.
    images = (scaled[:, 0] * 255.0).round().clamp(0, 255).to(torch.uint8).numpy()
    labels = digits.target.astype(np.uint8)

    train_index, test_index = train_test_split(
        np.arange(len(labels)), train_size=TRAIN_IMAGES, stratify=labels, random_state=seed
    )
    calib_index = np.random.default_rng(seed).choice(train_index, size=CALIB_IMAGES, replace=False)
    assert not set(train_index) & set(test_index)
    return Split(
        train_images=images[train_index],
        train_labels=labels[train_index],
        calib_images=images[calib_index],
        test_images=images[test_index],
        test_labels=labels[test_index],
    )


def conv_bn_relu(in_channels: int, out_channels: int) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    ]


class PlainCNN(nn.Module):
    """VGG-like: three stages of two convolutions and a max-pooling, one hidden fully connected layer, a classifier."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 96), hidden: int = 96) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for width in widths:
            layers += [*conv_bn_relu(channels, width), *conv_bn_relu(width, width), nn.MaxPool2d(2)]
            channels = width
        self.features = nn.Sequential(*layers)
        side = SIZE // 2 ** len(widths)
        self.hidden = nn.Linear(channels * side * side, hidden)
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(hidden, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.flatten(self.features(x), 1)
        return self.classifier(self.dropout(F.relu(self.hidden(x))))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut, which is a 1x1 projection where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        # No nn.Identity here: with `None` the exported graph has a direct edge instead of an Identity node.
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.shortcut is None else self.shortcut(x)
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + residual)


class ResNet(nn.Module):
    """A 3x3 stem, three stages of two basic blocks, global average pooling and a linear classifier."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64), blocks: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn_relu(1, widths[0]))
        layers: list[nn.Module] = []
        channels = widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                layers.append(BasicBlock(channels, width, stride=2 if stage > 0 and block == 0 else 1))
                channels = width
        self.stages = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.pool(self.stages(self.stem(x))), 1))


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, scale and shift each image a little and add noise; x is float32 [N, 1, H, W] in 0..1."""

    def uniform(limit: float) -> Tensor:
        return (torch.rand(len(x), generator=generator) * 2 - 1) * limit

    angle = uniform(math.radians(12))
    scale = 1 + uniform(0.1)
    # A shift of 2 in affine_grid is the whole image, so 2/SIZE is one pixel: at most two pixels here.
    shift_x, shift_y = uniform(4 / SIZE), uniform(4 / SIZE)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    theta = torch.stack([torch.stack([cos, -sin, shift_x], 1), torch.stack([sin, cos, shift_y], 1)], 1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    moved = F.grid_sample(x, grid, align_corners=False)
    return (moved + 0.03 * torch.randn(x.shape, generator=generator)).clamp(0, 1)


def train(model: nn.Module, split: Split, epochs: int, seed: int) -> None:
    """Train for a fixed number of epochs; the test images play no part, so nothing is selected on them."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.from_numpy(split.train_images)[:, None].float() / 255.0
    labels = torch.from_numpy(split.train_labels).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    steps = epochs * math.ceil(len(images) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    model.train()
    for epoch in range(1, epochs + 1):
        total = 0.0
        for index in torch.randperm(len(images), generator=generator).split(BATCH):
            loss = F.cross_entropy(model(augment(images[index], generator)), labels[index], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(index)
        if epoch % 5 == 0 or epoch == epochs:
            print(f"  epoch {epoch:3d}/{epochs}  training loss {total / len(images):.4f}", flush=True)
    model.eval()


def export(model: nn.Module, path: Path, keep_batchnorm: bool) -> None:
    """Write the ONNX file, with BatchNormalization as nodes or folded into the convolutions before it."""
    # The exporter folds only in mode EVAL. PRESERVE keeps the nodes, and as the model is in eval mode they are
    # inference nodes, with the running statistics as constants. In that mode the exporter also stores equal
    # parameters once: the two BatchNormalizations before an Add get the same gradient for their biases, which stay
    # equal, and one of them becomes an Identity node on the other. Such files are common, so it is left in place.
    mode = torch.onnx.TrainingMode.PRESERVE if keep_batchnorm else torch.onnx.TrainingMode.EVAL
    with warnings.catch_warnings():
        # The TorchScript exporter is called deprecated, but it writes the plain, widely seen form of these graphs.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            model,
            (torch.zeros(1, 1, SIZE, SIZE),),
            path,
            dynamo=False,
            opset_version=OPSET,
            input_names=["input"],
            output_names=["logits"],
            dynamic_axes={"input": {0: "N"}, "logits": {0: "N"}},
            training=mode,
            do_constant_folding=not keep_batchnorm,
        )
    proto = onnx.load(path)
    for node in proto.graph.node:
        node.doc_string = ""  # it may hold source paths of the machine that trained
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path)
    operators = Counter(node.op_type for node in proto.graph.node)
    if bool(operators["BatchNormalization"]) != keep_batchnorm:
        raise RuntimeError(f"{path.name}: unexpected number of BatchNormalization nodes in {dict(operators)}")
    print(f"  {path.name}: IR {proto.ir_version}, opset {proto.opset_import[0].version}, {dict(operators)}")


def onnx_accuracy(model_path: Path, test_path: Path) -> float:
    """Accuracy of the written model on the written test file, in batches of several sizes."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(model_path), options, providers=["CPUExecutionProvider"])
    with np.load(test_path) as data:
        inputs = data["images"][:, None].astype(np.float32) / np.float32(255)
        labels = data["labels"]
    logits = []
    # The first batches are small and odd on purpose: they show that the batch dimension is dynamic.
    for part in np.split(inputs, [1, 8, *range(72, len(inputs), 64)]):
        (result,) = session.run(["logits"], {"input": part})
        assert result.shape == (len(part), CLASSES)
        logits.append(result)
    return float((np.concatenate(logits).argmax(1) == labels).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and export the two digit networks.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    # One thread, so that the order of the sums, and with it the result, does not depend on the number of cores.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    args.out.mkdir(parents=True, exist_ok=True)
    split = load_split(args.seed)

    networks: list[tuple[str, type[nn.Module], bool]] = [
        ("digits_cnn", PlainCNN, False),
        ("digits_resnet", ResNet, True),
    ]
    for name, network, keep_batchnorm in networks:
        torch.manual_seed(args.seed)
        model = network()
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{name}: {parameters:,} parameters while training", flush=True)
        start = time.perf_counter()
        train(model, split, args.epochs, args.seed)
        print(f"  trained in {time.perf_counter() - start:.0f} s")

        model_path, test_path = args.out / f"{name}.onnx", args.out / f"{name}.test.npz"
        export(model, model_path, keep_batchnorm)
        np.savez_compressed(args.out / f"{name}.calib.npz", images=split.calib_images)
        np.savez_compressed(test_path, images=split.test_images, labels=split.test_labels)
        accuracy = onnx_accuracy(model_path, test_path)
        print(f"  test accuracy {accuracy:.2%} of {len(split.test_labels)} images, {model_path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
