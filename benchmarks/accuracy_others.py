"""The same weights, data and counted MACs in the hands of other pruners: one command, one table.

    python benchmarks/accuracy_others.py --shared ../shared [--only resnet20] [--speedups 1.5,2,3,4]

onnxsim cuts files: `apply_structured_pruning` and `apply_structured_wanda_pruning`, each with one share for every
layer and with a global threshold. Torch-Pruning cuts modules: the CIFAR ResNets are built in PyTorch with the weights
of the files that still have their BatchNormalization, the inner widths of the blocks are pruned (its plain call over
all widths fails on the padded shortcuts) under several importances, and each result is also measured after the
statistics of its BatchNormalization are taken again on the calibration images. Gradients, where an importance asks
for them, are those of the network's own answers: no labels. Of every method the sparsity is found by bisection so
that the counted speed-up is the least one at or above the one asked for. Nobody trains. Writes
benchmarks/accuracy_others.md and .json; needs onnxsim, torch, torch-pruning and onnxprune.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torchvision_schemas  # noqa: F401  before whatever imports torchvision
from accuracy import Case, Data, accuracy, cifar, digits, squeezenet, wilson
from onnx import numpy_helper

from onnxprune.counting import count_model_macs
from onnxprune.data import Preprocessing, load_calibration
from onnxprune.graph import Graph

Made = Callable[[], list[tuple[str, onnx.ModelProto]]]  # models, with a word on what is special about each

HERE = Path(__file__).parent
IMAGES = 2000  # for calibration
GRADIENT_IMAGES = 256
WANDA_IMAGES = 256
STEPS = 9  # of bisection
CIFAR = ("resnet20", "resnet56")


@dataclass(frozen=True)
class Row:
    """One line of the table; accuracies in per cent, the interval is Wilson's at 95 %."""

    network: str
    method: str
    speedup: float
    counted: float | None
    after: float | None
    low: float | None
    high: float | None
    seconds: float
    note: str = ""


def calibration(case: Case, count: int) -> np.ndarray:
    """The model's input for some calibration samples."""
    options = dict(zip(case.options[::2], case.options[1::2], strict=False)) if "--bgr" not in case.options else {}
    numbers = {k: tuple(map(float, options[f"--{k}"].split(","))) for k in ("mean", "std") if f"--{k}" in options}
    graph = Graph(onnx.load(case.model))
    if "--bgr" in case.options:
        data = case.options[1]
        preprocessing = Preprocessing(scale=1.0, mean=(104.0, 117.0, 123.0), bgr=True, crop=227)
    else:
        data, preprocessing = options.get("--data"), Preprocessing(**numbers)
    found = load_calibration(
        data, graph.inputs, model_path=case.model, samples=count, seed=0, preprocessing=preprocessing
    )
    return next(iter(found.feeds(list(range(len(found)))).values()))


def closest(make: Callable[[float], Any], speedup_of: Callable[[Any], float], wanted: float) -> Any:
    """What comes out at the smallest sparsity that reaches the speed-up; None if none does."""
    low, high, best = 0.0, 0.99, None
    for _ in range(STEPS):
        middle = (low + high) / 2
        made = make(middle)
        if speedup_of(made) >= wanted:
            high, best = middle, made
        else:
            low = middle
    return best


# ---------------------------------------------------------------------------------------------------------- onnxsim


def by_onnxsim(case: Case, wanted: float) -> Iterator[tuple[str, Made]]:
    """Method names, and what makes the models."""
    import onnxsim

    model = onnx.load(case.model)
    full = count_model_macs(model)
    name = Graph(model).inputs[0].name

    def ways() -> Iterator[tuple[str, Callable[[float], onnx.ModelProto]]]:
        for scope in (False, True):
            where = "global" if scope else "uniform"
            yield (
                f"onnxsim L2, {where}",
                lambda r, s=scope: onnxsim.apply_structured_pruning(model, r, global_sparsity=s),
            )

            def wanda(r: float, s: bool = scope) -> onnx.ModelProto:
                images = calibration_of(case)
                return onnxsim.apply_structured_wanda_pruning(
                    model, [{name: x[None]} for x in images], sparsity=r, global_sparsity=s
                )

            yield f"onnxsim Wanda, {where}", wanda

    kept: dict[str, np.ndarray] = {}

    def calibration_of(case: Case) -> np.ndarray:
        if case.name not in kept:
            kept[case.name] = calibration(case, WANDA_IMAGES)
        return kept[case.name]

    for method, way in ways():

        def made(way: Callable[[float], onnx.ModelProto] = way) -> list[tuple[str, onnx.ModelProto]]:
            found = closest(way, lambda m: full / count_model_macs(m), wanted)
            return [] if found is None else [("", found)]

        yield method, made


# ---------------------------------------------------------------------------------------------------- Torch-Pruning


def network(path: Path) -> Any:
    """A CIFAR ResNet in PyTorch (He et al. 2015, option A shortcuts) with the weights of a file."""
    import torch
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(outputs)
            self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(outputs)
            self.stride, self.more = stride, outputs - inputs

        def forward(self, x: Any) -> Any:
            y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
            side = x[:, :, :: self.stride, :: self.stride] if self.more else x
            if self.more:
                side = functional.pad(side, (0, 0, 0, 0, self.more // 2, self.more // 2))
            return functional.relu(y + side)

    class ResNet(nn.Module):
        def __init__(self, blocks: int) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)

            def layer(inputs: int, outputs: int) -> nn.Sequential:
                rest = [Block(outputs, outputs, 1) for _ in range(blocks - 1)]
                return nn.Sequential(Block(inputs, outputs, outputs // inputs), *rest)

            self.layer1, self.layer2, self.layer3 = layer(16, 16), layer(16, 32), layer(32, 64)
            self.linear = nn.Linear(64, 10)

        def forward(self, x: Any) -> Any:
            x = self.layer3(self.layer2(self.layer1(functional.relu(self.bn1(self.conv1(x))))))
            return self.linear(x.mean((2, 3)))

    arrays = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    blocks = sum(1 for name in arrays if name.startswith("layer1.") and name.endswith("conv1.weight"))
    net = ResNet(blocks).eval()
    missing = net.load_state_dict(
        {k: torch.tensor(v) for k, v in arrays.items() if k in net.state_dict()}, strict=False
    )
    if any(not key.endswith("num_batches_tracked") for key in missing.missing_keys):
        raise ValueError(f"{path} does not hold {missing.missing_keys}")
    return net


def by_torch_pruning(
    case: Case, wanted: float, multiple: int | None = None, ratio: Callable[[onnx.ModelProto], float] | None = None
) -> Iterator[tuple[str, Made]]:
    """Method names, and what makes the models, each as it is and with BatchNormalization recalibrated.

    Args:
        case: the network.
        wanted: the speed-up, in MACs unless ``ratio`` says what that of a model is.
        multiple: what widths are rounded to.
        ratio: of an exported model.
    """
    import torch
    import torch_pruning as tp
    from torch.nn import functional

    base = network(case.model.with_name(f"{case.name}_bn.onnx"))
    images = torch.tensor(calibration(case, IMAGES))
    example = images[:1]

    kept: dict[str, dict[str, Any]] = {}

    def gradients(way: str, judge: Any) -> dict[str, Any]:
        """What an importance reads from the weights' gradients, by their names; the same for every share."""
        if way not in kept:
            net = copy.deepcopy(base)
            x = images[:GRADIENT_IMAGES]
            with torch.no_grad():
                answers = net(x).argmax(1)
            if way == "Taylor":
                functional.cross_entropy(net(x), answers).backward()
                kept[way] = {name: p.grad for name, p in net.named_parameters()}
            else:
                judge.zero_grad()
                for loss in functional.cross_entropy(net(x[:64]), answers[:64], reduction="none"):
                    net.zero_grad()
                    loss.backward(retain_graph=True)
                    judge.accumulate_grad(net)
                # as its first call would do
                summed, counts = judge._accu_grad, judge._counter
                kept[way] = {name: summed[p] / counts[p] for name, p in net.named_parameters()}
        return kept[way]

    def cut(way: str, everywhere: bool, share: float) -> Any:
        net, judge = copy.deepcopy(base), ways[way]()
        inner = {id(block.conv1) for layer in (net.layer1, net.layer2, net.layer3) for block in layer}
        ignored = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear) and id(m) not in inner]
        if way in ("Taylor", "Hessian"):
            found = gradients(way, judge)
            judge = ways[way]()
            for name, parameter in net.named_parameters():
                parameter.grad = found[name].clone()
        tp.pruner.BasePruner(
            net,
            example,
            importance=judge,
            pruning_ratio=share,
            global_pruning=everywhere,
            ignored_layers=ignored,
            round_to=multiple,
        ).step()
        return net

    def speedup(net: Any) -> float:
        if ratio is not None:
            return ratio(exported(net))
        return tp.utils.count_ops_and_params(base, example)[0] / tp.utils.count_ops_and_params(net, example)[0]

    def exported(net: Any) -> onnx.ModelProto:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "net.onnx"
            axes = {"input": {0: "batch"}}
            torch.onnx.export(net.eval(), (example,), path, input_names=["input"], dynamic_axes=axes, dynamo=False)
            return onnx.load(path)

    def recalibrated(net: Any) -> Any:
        net = copy.deepcopy(net).train()
        for m in net.modules():
            if isinstance(m, torch.nn.BatchNorm2d):
                m.reset_running_stats()
                m.momentum = None  # the mean over all batches
        with torch.no_grad():
            for x in images.split(200):
                net(x)
        return net.eval()

    ways: dict[str, Callable[[], Any]] = {
        "magnitude L1": lambda: tp.importance.GroupMagnitudeImportance(p=1),
        "magnitude L2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "BN scale": tp.importance.BNScaleImportance,
        "Taylor": tp.importance.GroupTaylorImportance,
        "Hessian": tp.importance.GroupHessianImportance,
    }
    for name in ways:
        for everywhere in (False, True):

            def made(name: str = name, everywhere: bool = everywhere) -> list[tuple[str, onnx.ModelProto]]:
                net = closest(lambda share: cut(name, everywhere, share), speedup, wanted)
                if net is None:
                    return []
                return [("", exported(net)), (" + BN recalibrated", exported(recalibrated(net)))]

            yield f"Torch-Pruning {name}, {'global' if everywhere else 'uniform'}", made


# -------------------------------------------------------------------------------------------------------- the table


def rows_of(case: Case, speedup: float, data: Data, full: float) -> Iterator[Row]:
    sources = [by_onnxsim] + ([by_torch_pruning] if case.name in CIFAR else [])
    for source in sources:
        for method, make in source(case, speedup):
            start = time.perf_counter()
            try:
                found = make()
            except Exception as error:  # whatever it raises is its answer
                note = (str(error).splitlines() or [type(error).__name__])[0][:80]
                yield Row(case.name, method, speedup, None, None, None, None, time.perf_counter() - start, note)
                continue
            if not found:
                note = "does not get there"
                yield Row(case.name, method, speedup, None, None, None, None, time.perf_counter() - start, note)
            for variant, model in found:
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / "made.onnx"
                    onnx.save(model, path)
                    after, count = accuracy(path, data)
                counted = full / count_model_macs(model)
                low, high = wilson(after, count)
                shares = [round(100 * v, 2) for v in (after, low, high)]
                seconds = round(time.perf_counter() - start, 1)
                yield Row(case.name, method + variant, speedup, round(counted, 3), *shares, seconds)


def table(rows: list[Row]) -> str:
    import onnxsim
    import torch
    import torch_pruning

    versions = f"onnxsim {onnxsim.__version__}, Torch-Pruning {torch_pruning.__version__}, PyTorch {torch.__version__}"
    lines = [
        "# What other pruners keep of the accuracy",
        "",
        f"{datetime.date.today()}, {platform.machine()}, {versions}. No training, no labels; MACs counted on the file"
        " that comes out, by onnxprune; 95 % intervals. Rows of onnxprune on the same networks are in accuracy.md.",
        "",
        "| network | asked | method | counted | accuracy | interval |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        if r.after is None:
            lines.append(f"| {r.network} | {r.speedup:g}x | {r.method} | | {r.note} | |")
        else:
            interval = f"{r.low:.1f} to {r.high:.1f}"
            lines.append(
                f"| {r.network} | {r.speedup:g}x | {r.method} | {r.counted:.2f}x | {r.after:.2f} % | {interval} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="networks whose name contains this")
    parser.add_argument("--speedups", default="1.5,2,3,4")
    parser.add_argument("--shared", type=Path, default=HERE.parent.parent / "shared")
    parser.add_argument("--output", type=Path, default=HERE / "accuracy_others")
    args = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        cases = [digits("digits_cnn"), digits("digits_resnet")]
        if (args.shared / "data").is_dir():
            cases += [cifar(name, args.shared) for name in CIFAR] + [squeezenet(args.shared, Path(folder))]
        for case in (c for c in cases if args.only in c.name):
            data, full = case.test(), count_model_macs(onnx.load(case.model))
            for speedup in map(float, args.speedups.split(",")):
                for row in rows_of(case, speedup, data, full):
                    rows.append(row)
                    print(row, file=sys.stderr, flush=True)
                    args.output.with_suffix(".md").write_text(table(rows))
                    args.output.with_suffix(".json").write_text(json.dumps([asdict(r) for r in rows], indent=1))


if __name__ == "__main__":
    main()
