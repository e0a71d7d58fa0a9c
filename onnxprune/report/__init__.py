"""The report of a run: frozen, printable, with a JSON round trip. Its keys are promised to others (schema 1)."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from onnxprune.comparison import Fidelity
from onnxprune.cost import Latency
from onnxprune.errors import InputError
from onnxprune.promise import LatencyEntry
from onnxprune.verify import Proof

__all__ = [
    "Achieved",
    "DataEntry",
    "Fidelity",
    "FrozenEntry",
    "GroupEntry",
    "Latency",
    "LatencyEntry",
    "Measures",
    "Proof",
    "Report",
    "Target",
    "family_to_json",
    "plain",
    "to_json",
]

SCHEMA_VERSION = "1"


@dataclass(frozen=True)
class Target:
    """What was asked for: a ratio before / after, counted in ``by``."""

    speedup: float
    by: str = "macs"


@dataclass(frozen=True)
class Measures:
    """What a model costs. Latency is None where it was not measured, ``memory`` where it was not counted.

    ``memory`` is the most bytes of activations that are alive at once (see `onnxprune.costs.PeakMemory`).
    """

    macs: int
    params: int
    bytes: int
    latency_ms: Latency | None = None
    memory: int | None = None

    def counted(self) -> dict[str, float]:
        """What was counted, by the names that budgets have."""
        return {"macs": self.macs, "params": self.params, "memory": self.memory or 0}


@dataclass(frozen=True)
class Achieved:
    """Ratios before / after."""

    macs: float
    params: float
    latency: float | None = None
    memory: float | None = None

    def of_unit(self, by: str) -> float | None:
        """The ratio in one of the units that a budget may have."""
        ratios = {"macs": self.macs, "params": self.params, "memory": self.memory, "latency": self.latency}
        return ratios[by]

    @staticmethod
    def of(before: Measures, after: Measures) -> Achieved:
        """The ratios of two measures."""
        times = before.latency_ms, after.latency_ms
        latency = _ratio(times[0].median, times[1].median) if times[0] and times[1] else None
        bytes_alive = before.memory, after.memory
        memory = None if None in bytes_alive else _ratio(bytes_alive[0] or 0, bytes_alive[1] or 0)
        return Achieved(_ratio(before.macs, after.macs), _ratio(before.params, after.params), latency, memory)


@dataclass(frozen=True)
class GroupEntry:
    """A group and how many of its units stay; ``error`` is the relative output error of the layers that read it."""

    name: str
    units: int
    kept: int
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    error: float | None = None


@dataclass(frozen=True)
class FrozenEntry:
    """Channels that stay, the place that holds them and the layers (with their MACs) that it holds back.

    ``rule`` is what the table says of the operator at that place, ``remedy`` what would free the channels.
    """

    reason: str
    node: str
    op: str
    tensor: str
    axis: int
    channels: int
    layers: tuple[str, ...] = ()
    macs: float = 0.0
    rule: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class DataEntry:
    """The calibration data: where from, how many records, SHA-256 of what was used, and whether mirror images, too."""

    source: str
    samples: int
    digest: str
    is_random: bool
    mirrored: bool = False


@dataclass(frozen=True)
class Report:
    """All that a run found and did.

    ``removed`` names, per tensor of the original and axis, the positions that went. ``hashes`` are SHA-256 of the
    original (``model``), of what was written (``pruned``) and of the data (``data``). ``options`` are those that led
    to the choice of channels. ``limits`` are the most that was to be left of costs, by name, besides the target.
    ``latency`` is given where the target is one of time. ``approximate`` names the nodes that take a statistic of fewer
    channels than in the original, where that was allowed.
    """

    target: Target
    before: Measures
    after: Measures
    achieved: Achieved
    groups: tuple[GroupEntry, ...]
    frozen: tuple[FrozenEntry, ...]
    prunable_macs: float
    removed: Mapping[str, Mapping[int, tuple[int, ...]]]
    proof: Proof | None
    fidelity: Fidelity | None
    data: DataEntry | None
    seed: int
    timings: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    limits: Mapping[str, float] = field(default_factory=dict)
    latency: LatencyEntry | None = None
    approximate: tuple[str, ...] = ()
    schema_version: str = SCHEMA_VERSION

    def to_json(self) -> str:
        """The report as a JSON object; numbers that are not finite become null, which JSON has instead."""
        return to_json(self)

    @staticmethod
    def from_json(text: str) -> Report:
        """Read a report back; keys that this version does not know are passed over.

        Raises:
            InputError: the text is not a report of this schema.
        """
        try:
            data = json.loads(text)
        except (ValueError, TypeError) as error:
            raise InputError(f"not a report: expected JSON, found {error}; try a file that --report wrote") from error
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != SCHEMA_VERSION:
            raise InputError(
                f"not a report: expected schema_version {SCHEMA_VERSION!r}, found {version!r}; try a file that "
                "--report of this version wrote"
            )
        report: Report = _decode(Report, data, "report")
        return report


def plain(value: Any) -> Any:
    """What a dataclass holds, in the types that JSON has; keys become strings, NaN and infinity become None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [each.name for each in dataclasses.fields(value)]
        if "schema_version" in names:  # first, where a reader looks for it
            names = ["schema_version", *(name for name in names if name != "schema_version")]
        return {name: plain(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if value is None or isinstance(value, str | bool):
        return value
    if hasattr(value, "tolist"):  # NumPy's scalars and arrays
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return str(value)


def to_json(value: Any, **more: str) -> str:
    """A dataclass or a mapping as a JSON object with a line for each key and each entry; ``more`` keys come first."""
    lines = []
    for key, item in {**more, **plain(value)}.items():
        if isinstance(item, list) and any(isinstance(entry, dict) for entry in item):
            text = ",\n".join(f"  {json.dumps(entry, allow_nan=False)}" for entry in item)
            lines.append(f" {json.dumps(key)}: [\n{text}\n ]")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(item, allow_nan=False)}")
    return "{\n" + ",\n".join(lines) + "\n}"


def family_to_json(reports: Sequence[Report], outputs: Sequence[str]) -> str:
    """The reports of several speed-ups as one JSON object, each with the name of its file."""
    members = [{"output": output, **plain(report)} for report, output in zip(reports, outputs, strict=True)]
    return to_json({"members": members}, schema_version=SCHEMA_VERSION)


def _decode(kind: Any, value: Any, where: str) -> Any:
    """Build what a type says from what JSON gave."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _decode(arguments[0], value, where)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _decode_dataclass(kind, value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_decode(arguments[0], item, f"{where}[{k}]") for k, item in enumerate(value))
    if origin is Mapping and isinstance(value, dict):
        return {
            int(key) if arguments[0] is int and key.isdecimal() else key: _decode(arguments[1], item, f"{where}.{key}")
            for key, item in value.items()
        }
    if kind is float and (value is None or (isinstance(value, int | float) and not isinstance(value, bool))):
        return math.nan if value is None else float(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    name = getattr(kind, "__name__", str(kind))
    raise InputError(
        f"not a report: expected {name} as {where}, found {str(value)[:60]!r}; try a file that --report wrote"
    )


def _decode_dataclass(kind: Any, value: Mapping[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(kind)
    found = {}
    for each in dataclasses.fields(kind):
        if each.name in value:
            found[each.name] = _decode(hints[each.name], value[each.name], f"{where}.{each.name}")
        elif each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING:
            raise InputError(
                f"not a report: expected the key {where}.{each.name}, found none; try a file that --report wrote"
            )
    return kind(**found)


def _ratio(before: float, after: float) -> float:
    return before / after if after else math.inf if before else 1.0
