"""What calibration costs: time beside one plain pass of the network, memory, and how both grow.

    python benchmarks/calibration.py [--part stages,memory,growth,datafree,startup,cluster] [--shared ../shared]

stages: one plain pass of onnxruntime over N images, and everything that `--speedup 2` does with as many (by default and
with `--quick` and `--thorough`: each uses as many of them as it has a use for), in one process: the ratio of the two,
and where the time goes.
memory: peak resident memory of a process that prunes, over the number of images, and with `--memory 512MiB`.
growth: seconds over the number of images (a straight line through them, and what it misses by) and over the depth of
the network (the exponent of a power law).
datafree: `--select l1 --no-reconstruct` as a library call beside onnxsim's `apply_structured_pruning` and
Torch-Pruning's L1, where they are installed: theirs come without a proof.
startup: `onnxprune --help` and `onnxprune inspect` as whole processes.
cluster: the pass that collects, in one process with one thread and on two such workers of a Dask cluster.

Without --shared's data, a network of `models/` on made-up images of its size stands in. Every figure is the median of
--repeats runs, but for the memory. Writes benchmarks/calibration.md and benchmarks/calibration.json; parts of other
runs stay in them. Times need a quiet machine; the processor's seconds stand beside them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
MODELS = HERE.parent / "models"
Rows = list[dict[str, Any]]

# what runs in a process of its own; its last line is a JSON object
_PRELUDE = """
import json, resource, sys, time
import numpy as np
from peak import peak_mib
spec = json.loads(sys.argv[1])
def done(**found):
    print(json.dumps({"peak_mib": peak_mib(), **found}))
"""
_PRUNE = (
    _PRELUDE
    + """
import onnxruntime as ort
from onnxprune import prune
from onnxprune.progress import Progress
x = np.load(spec["data"], mmap_mode="r")
options = ort.SessionOptions()
options.intra_op_num_threads = spec["threads"]
options.add_session_config_entry("session.intra_op.allow_spinning", "0")
def plain():
    session = ort.InferenceSession(spec["model"], options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    start, cpu = time.perf_counter(), time.process_time()
    for first in range(0, len(x), 64):
        session.run(None, {name: np.asarray(x[first : first + 64])})
    return time.perf_counter() - start, time.process_time() - cpu
before = plain() if spec["plain"] else (0.0, 0.0)
progress = Progress()
start, cpu = time.perf_counter(), time.process_time()
given = {"samples": len(x), **spec["options"]}
result = prune(spec["model"], data=spec["data"], threads=spec["threads"], progress=progress, **given)
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
after = plain() if spec["plain"] else (0.0, 0.0)
done(seconds=seconds, cpu=cpu, plain=(before[0] + after[0]) / 2, plain_cpu=(before[1] + after[1]) / 2,
     stages=progress.timings, kept=[g.kept for g in result.report.groups], warnings=list(result.report.warnings))
"""
)
_STARTUP = (
    _PRELUDE
    + """
import subprocess
start = time.perf_counter()
subprocess.run([sys.executable, "-m", "onnxprune", *spec["arguments"]], check=True, capture_output=True)
seconds, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
done(seconds=seconds, cpu=used.ru_utime + used.ru_stime)
"""
)
_CLUSTER = (
    _PRELUDE
    + """
from distributed import LocalCluster
from onnxprune import collect
from onnxprune.progress import Progress
def run(address):
    progress, found = Progress(), []
    given = {"data": spec["data"], "samples": spec["count"], "budget": "uniform", "threads": 1, "dask": address}
    collect(spec["model"], progress=progress, **given)
    return progress.timings["calibrate"]
with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
    run(cluster.scheduler_address)  # workers load what they need
    alone, together = zip(*[(run(None), run(cluster.scheduler_address)) for _ in range(spec["repeats"])])
done(alone=float(np.median(alone)), together=float(np.median(together)))
"""
)
_DATAFREE = {
    "onnxprune, with its proof": _PRELUDE
    + """
import onnx
from onnxprune import prune
from onnxprune.progress import Progress
model = onnx.load(spec["model"])
progress = Progress()
prune(model, select="l1", reconstruct=False, threads=spec["threads"])
start, cpu = time.perf_counter(), time.process_time()
prune(model, select="l1", reconstruct=False, threads=spec["threads"], progress=progress)
done(seconds=time.perf_counter() - start, cpu=time.process_time() - cpu, stages=progress.timings)
""",
    "onnxsim": _PRELUDE
    + """
import onnx, onnxsim
from importlib.metadata import version
model = onnx.load(spec["model"])
run = onnxsim.apply_structured_pruning
run(model, 0.5)
start, cpu = time.perf_counter(), time.process_time()
run(model, 0.5)
done(seconds=time.perf_counter() - start, cpu=time.process_time() - cpu, version=version("onnxsim"))
""",
    "Torch-Pruning": _PRELUDE
    + """
import torch, torch_pruning as tp
from importlib.metadata import version
torch.set_num_threads(spec["threads"])
class Block(torch.nn.Module):
    def __init__(self, inside, width, stride):
        super().__init__()
        self.a = torch.nn.Conv2d(inside, width, 3, stride, 1)
        self.b = torch.nn.Conv2d(width, width, 3, 1, 1)
        self.short = torch.nn.Conv2d(inside, width, 1, stride) if inside != width else torch.nn.Identity()
    def forward(self, x):
        return torch.relu(self.short(x) + self.b(torch.relu(self.a(x))))
def resnet56():
    layers, inside = [torch.nn.Conv2d(3, 16, 3, 1, 1), torch.nn.ReLU()], 16
    for width, stride in ((16, 1), (32, 2), (64, 2)):
        for k in range(9):
            layers.append(Block(inside, width, stride if k == 0 else 1))
            inside = width
    return torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(64, 10))
def run():
    model = resnet56().eval()
    start, cpu = time.perf_counter(), time.process_time()
    tp.pruner.MagnitudePruner(model, torch.zeros(1, 3, 32, 32), importance=tp.importance.MagnitudeImportance(p=1),
                              pruning_ratio=0.5, ignored_layers=[model[-1]]).step()
    return time.perf_counter() - start, time.process_time() - cpu
run()
seconds, cpu = run()
done(seconds=seconds, cpu=cpu, version=version("torch-pruning"))
""",
}


class Bench:
    """The options of a run, and processes that take them."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder

    def process(self, code: str, **spec: Any) -> dict[str, Any]:
        """What a process prints last; an object with ``error`` where it fails."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.args.threads)}
        environment["OPENBLAS_NUM_THREADS"] = str(self.args.threads)
        environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-c", code, json.dumps({"threads": self.args.threads, **spec})]
        found = subprocess.run(command, capture_output=True, text=True, env=environment)
        if found.returncode:
            return {"error": (found.stderr.strip().splitlines() or ["no reason given"])[-1][:150]}
        result: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
        return result

    def prune(self, model: Path, count: int, plain: bool = False, **options: Any) -> dict[str, Any]:
        return self.process(
            _PRUNE,
            model=str(model),
            data=str(self.images(model, count)),
            plain=plain,
            options={"speedup": 2.0, **options},
        )

    def network(self, name: str) -> Path:
        path = self.args.shared / f"models/{name}.onnx"
        return path if path.is_file() else MODELS / "digits_cnn.onnx"

    def images(self, model: Path, count: int) -> Path:
        """Floats of the model's input size in a file: real images again and again with a little noise, or noise."""
        path = self.folder / f"{model.stem}-{count}.npy"
        if not path.is_file():
            import onnx

            shape = [d.dim_value for d in onnx.load(model).graph.input[0].type.tensor_type.shape.dim][1:]
            rng = np.random.default_rng(0)
            file = np.lib.format.open_memmap(path, "w+", np.float32, (count, *shape))
            real = self._real(model, shape)
            for first in range(0, count, 256):
                part = file[first : first + 256]
                part[:] = rng.standard_normal(part.shape, np.float32)
                if real is not None:
                    part *= 0.02 * real.std()
                    part += real[np.arange(first, first + len(part)) % len(real)]
            file.flush()
            del file
        return path

    def _real(self, model: Path, shape: Sequence[int]) -> np.ndarray | None:
        data = self.args.shared / "data"
        if not data.is_dir():
            return None
        if shape == [3, 32, 32]:
            with np.load(data / "cifar10_calibration.npz") as file:
                x = (file["images"] / np.float32(255) - np.float32((0.485, 0.456, 0.406))) / np.float32(
                    (0.229, 0.224, 0.225)
                )
            return np.ascontiguousarray(x.transpose(0, 3, 1, 2))
        if shape == [3, 227, 227]:
            from PIL import Image

            paths = sorted((data / "imagenet_sample").glob("*.jpg"))[::2]
            crops = [np.asarray(Image.open(p).convert("RGB"), np.uint8)[14:241, 14:241, ::-1] for p in paths]
            return np.stack([(c - np.float32((104, 117, 123))).transpose(2, 0, 1) for c in crops])
        return None

    def median(self, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The run with the median number of seconds."""
        found = [run() for _ in range(self.args.repeats)]
        failed = [f for f in found if "error" in f]
        return failed[0] if failed else sorted(found, key=lambda f: f["seconds"])[len(found) // 2]


# ------------------------------------------------------------------------------------------------------------- parts


def stages(bench: Bench) -> Rows:
    rows = []
    for name, count in (("resnet56", 5000), ("squeezenet1.0_imagenet", 500)):
        model, count = bench.network(name), bench.args.images or count
        for how in bench.args.how.split(","):
            options = {} if how == "default" else {how: True}
            found = bench.median(
                lambda model=model, count=count, options={"samples": None, **options}: bench.prune(
                    model, count, plain=True, **options
                )
            )
            row: dict[str, Any] = {"network": model.stem, "images": count, "how": how}
            if "error" not in found:
                row |= {"plain pass, s": found["plain"], "all of it, s": found["seconds"]}
                row |= {
                    "ratio": found["seconds"] / found["plain"],
                    "ratio of processor time": found["cpu"] / found["plain_cpu"],
                }
                total = sum(found["stages"].values())
                shares = sorted(found["stages"].items(), key=lambda i: -i[1])
                row["stages"] = ", ".join(f"{stage} {100 * t / total:.0f} %" for stage, t in shares)
            rows.append(row | _error(found))
    return rows


def memory(bench: Bench) -> Rows:
    rows = []
    model = bench.network("resnet56")
    for count in [bench.args.images] if bench.args.images else (500, 5000, 50000):
        found = bench.prune(model, count)
        rows.append(_peak(model, count, "default", found))
    model = bench.network("squeezenet1.0_imagenet")
    count = bench.args.images or 500
    whole = bench.prune(model, count)
    short = bench.prune(model, count, memory=512 << 20)
    rows += [_peak(model, count, "default", whole), _peak(model, count, "512MiB", short)]
    if "kept" in whole and "kept" in short:
        rows[-1]["note"] = "the same kept counts" if whole["kept"] == short["kept"] else "other kept counts"
    return rows


def _peak(model: Path, count: int, limit: str, found: dict[str, Any]) -> dict[str, Any]:
    size = model.stat().st_size / (1 << 20)
    row = {"network": model.stem, "images": count, "--memory": limit, "peak, MiB": found.get("peak_mib")}
    return row | {"1.5 GiB + 3x the model, MiB": round(1536 + 3 * size), "s": found.get("seconds")} | _error(found)


def growth(bench: Bench) -> Rows:
    rows: Rows = []
    model = bench.network("resnet20")
    counts = [bench.args.images * k for k in (1, 2)] if bench.args.images else [500, 1000, 2000, 4000]
    seconds = [bench.median(lambda n=n: bench.prune(model, n)).get("seconds", float("nan")) for n in counts]
    line = np.polyfit(counts, seconds, 1)
    off = float(np.abs(np.polyval(line, counts) - seconds).max() / np.mean(seconds))
    for count, each in zip(counts, seconds, strict=True):
        rows.append({"network": model.stem, "images": count, "s": each})
    rows[-1]["note"] = f"{1000 * line[0]:.2f} ms an image + {line[1]:.1f} s; a line misses by {100 * off:.0f} % at most"
    depths, times = [], []
    count = bench.args.images or 500
    for depth in (20, 32, 44, 56):
        model = bench.network(f"resnet{depth}")
        found = bench.median(lambda model=model: bench.prune(model, count))
        depths.append(depth)
        times.append(found.get("seconds", float("nan")))
        rows.append({"network": model.stem, "images": count, "s": times[-1]} | _error(found))
    rows[-1]["note"] = f"seconds grow as layers to the power of {np.polyfit(np.log(depths), np.log(times), 1)[0]:.2f}"
    return rows


def datafree(bench: Bench) -> Rows:
    rows = []
    model = bench.network("resnet56")
    for name, code in _DATAFREE.items():
        found = bench.median(lambda code=code: bench.process(code, model=str(model)))
        row = {"pruner": f"{name} {found.get('version', '')}".strip(), "network": model.stem}
        for column, key in (("ms", "seconds"), ("processor, ms", "cpu")):
            row[column] = round(1000 * found[key]) if key in found else None
        if "stages" in found:
            row["stages"] = ", ".join(f"{stage} {1000 * t:.0f} ms" for stage, t in found["stages"].items())
        rows.append(row | _error(found))
    return rows


def startup(bench: Bench) -> Rows:
    rows = []
    model = bench.network("resnet56")
    for arguments in (["--help"], ["inspect", str(model)]):
        found = bench.median(lambda arguments=arguments: bench.process(_STARTUP, arguments=arguments))
        shown = " ".join(["onnxprune", *(Path(a).name for a in arguments)])
        rows.append({"command": shown, "s": found.get("seconds"), "processor, s": found.get("cpu")} | _error(found))
    return rows


def cluster(bench: Bench) -> Rows:
    rows: Rows = []
    for name, count in (("resnet56", 5000), ("squeezenet1.0_imagenet", 500)):
        model, count = bench.network(name), bench.args.images or count
        data = str(bench.images(model, count))
        found = bench.process(_CLUSTER, model=str(model), data=data, count=count, repeats=bench.args.repeats)
        row = {"network": model.stem, "images": count, "collecting, s": found.get("alone")}
        row |= {"with two workers, s": found.get("together")}
        if "alone" in found:
            row["ratio"] = found["alone"] / found["together"]
        rows.append(row | _error(found))
    return rows


def _error(found: dict[str, Any]) -> dict[str, Any]:
    return {"note": f"failed: {found['error']}"} if "error" in found else {}


PARTS: dict[str, Callable[[Bench], Rows]] = {
    "stages": stages,
    "memory": memory,
    "growth": growth,
    "datafree": datafree,
    "startup": startup,
    "cluster": cluster,
}


# ------------------------------------------------------------------------------------------------------------ tables


def table(title: str, part: dict[str, Any]) -> str:
    columns = list(dict.fromkeys(key for row in part["rows"] for key in row))
    lines = [f"## {title}", "", f"{part['when']}; {part['where']}.", ""]
    lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(_cell(row.get(c)) for c in columns)} |" for row in part["rows"]]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", default=",".join(PARTS), help="some of the parts")
    parser.add_argument("--how", default="default,quick,thorough", help="stages: with which efforts")
    parser.add_argument("--images", type=int, help="so many instead, everywhere: for a quick look")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shared", type=Path, default=HERE.parent.parent / "shared")
    parser.add_argument("--output", type=Path, default=HERE / "calibration")
    args = parser.parse_args(arguments)
    import onnxruntime as ort

    kept = args.output.with_suffix(".json")
    found = json.loads(kept.read_text()) if kept.is_file() else {}
    for name in args.part.split(","):
        with tempfile.TemporaryDirectory() as folder:
            rows = PARTS[name](Bench(args, Path(folder)))
        load = f"load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
        where = (
            f"{platform.machine()}, {args.threads} threads, onnxruntime {ort.__version__}, {args.repeats} runs, {load}"
        )
        found[name] = {"when": str(datetime.date.today()), "where": where, "rows": rows}
        print(json.dumps(rows, indent=1), file=sys.stderr)
        kept.write_text(json.dumps(found, indent=1))
        text = "\n".join(table(part, found[part]) for part in PARTS if part in found)
        args.output.with_suffix(".md").write_text(f"# What calibration costs\n\n{text}")


if __name__ == "__main__":
    main()
