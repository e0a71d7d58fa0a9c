"""What passes over the data leave, and the file that keeps it: enough to prune a model without the data.

Kept are the Gram matrices of what every reader reads in the original network, and the damage that narrowing each group
does to its output; ranks and weights follow from them. The file is an .npz without pickles. Of a Gram matrix it holds
the upper half in float32: the products that the sums are made of are float32 as well, and the ridge of every fit lies
far above the rounding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune import archive
from onnxprune.analysis import GroupInfo
from onnxprune.archive import Damaged
from onnxprune.errors import InputError
from onnxprune.files import Together
from onnxprune.readers import Reader
from onnxprune.statistics import Statistics

FORMAT, VERSION = "onnxprune statistics", 1


@dataclass(frozen=True, eq=False)
class Gram:
    """Of one reader: a matrix (p, p) per group of its convolution, and rows that were summed up."""

    values: Sequence[np.ndarray]
    rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all matrices together."""
        return (len(self.values), *self.values[0].shape)


@dataclass(frozen=True)
class Damage:
    """Of one group: what a few kept counts do to the output; ``digest`` tells the group from others of its name."""

    digest: str
    levels: tuple[int, ...]
    damage: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Gathered:
    """Sums and prices of one model.

    Attributes:
        model: its digest.
        select: how channels were chosen where damage was measured.
        grams: by the name of the reader's weight.
        damage: by the name of the group; empty where none was measured.
        about: the data and the options, as JSON has them.
    """

    model: str
    select: str
    grams: Mapping[str, Gram]
    damage: Mapping[str, Damage]
    about: Mapping[str, Any]

    @staticmethod
    def of(
        model: str,
        select: str,
        readers: Sequence[Reader],
        statistics: Mapping[int, Sequence[Statistics]],
        groups: Sequence[GroupInfo],
        damage: Sequence[tuple[Sequence[int], Sequence[float]]],
        about: Mapping[str, Any],
        biases: Collection[str] = (),
    ) -> Gathered:
        """Put together what was found: statistics per reader's index, damage per group; the biases were added."""
        grams = {
            r.layer.weight: Gram([s.gram for s in statistics[r.index]], statistics[r.index][0].rows)
            for r in readers
            if r.index in statistics
        }
        prices = {
            info.name: Damage(identity(info, biases), tuple(levels), tuple(map(float, found)))
            for info, (levels, found) in zip(groups, damage, strict=bool(damage))
        }
        return Gathered(model, select, grams, prices, about)

    def statistics(self, readers: Sequence[Reader], where: str) -> dict[int, list[Statistics]]:
        """By the index of every reader that reads a group.

        Raises:
            InputError: nothing was gathered for one of them.
        """
        found = {}
        for reader in (r for r in readers if r.columns):
            gram = self.grams.get(reader.layer.weight)
            size = len(reader.weights), reader.width, reader.width
            if gram is None or gram.shape != size:
                raise _other(where, f"layer {reader.layer.node.label!r}")
            found[reader.index] = [
                Statistics.of_linear(values, weights, gram.rows)
                for values, weights in zip(gram.values, reader.weights, strict=True)
            ]
        return found

    def prices(
        self, groups: Sequence[GroupInfo], select: str, where: str, biases: Collection[str] = ()
    ) -> list[tuple[list[int], list[float]]]:
        """Levels and damage of every group; the biases were added to the network.

        Raises:
            InputError: none was measured for one of them, or for this way to choose.
        """
        if select != self.select:
            raise InputError(
                f"{where} holds the damage that --select {self.select} does, found --select {select}; collect again"
                f" with that, or prune with --select {self.select}"
            )
        found = []
        for info in groups:
            damage = self.damage.get(info.name)
            if damage is None or damage.digest != identity(info, biases):
                raise _other(where, f"the channels of {info.name!r}")
            found.append((list(damage.levels), list(damage.damage)))
        return found

    # ------------------------------------------------------------------------------------------------- the file

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write the file, whole or not at all.

        Raises:
            InputError: the file exists and ``force`` is not given, or there is no such folder.
        """
        if Path(path).exists() and not force:
            raise InputError(f"{path} exists already; choose another name or overwrite it with force=True")
        with Together() as files, files.open(Path(path)) as file:
            archive.write(file, *self.pack())

    def pack(self, *, exact: bool = False) -> tuple[dict[str, Any], Iterator[tuple[str, np.ndarray]]]:
        """A description and named arrays; ``exact`` keeps the float64 that the sums are in."""
        about = {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "select": self.select,
            "readers": {name: {"rows": gram.rows, "shape": gram.shape} for name, gram in self.grams.items()},
            "damage": {name: [d.digest, d.levels, d.damage] for name, d in self.damage.items()},
            "about": dict(self.about),
        }
        return about, ((name, _packed(gram.values, exact)) for name, gram in self.grams.items())

    @staticmethod
    def unpack(found: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Gathered:
        """The inverse of `pack`.

        Raises:
            Damaged: the two do not go together.
        """
        try:
            grams = {
                name: Gram(_unpacked(arrays[name], tuple(entry["shape"])), int(entry["rows"]))
                for name, entry in found["readers"].items()
            }
            damage = {
                name: Damage(str(digest), tuple(map(int, levels)), tuple(map(float, each)))
                for name, (digest, levels, each) in found["damage"].items()
            }
            return Gathered(str(found["model"]), str(found["select"]), grams, damage, dict(found["about"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Damaged(str(error)) from error

    @staticmethod
    def read(path: Path) -> Gathered:
        """Read a file that `save` wrote.

        Raises:
            InputError: it is no such file, a damaged one, or one of another version.
        """
        where = f"statistics {path}"
        try:
            about, arrays = archive.read(path)
            if about.get("format") != FORMAT:
                raise Damaged("another kind of file")
            version = about.get("version")
            if version != VERSION:
                raise InputError(
                    f"{where}: expected version {VERSION}, found {version}; collect again with this onnxprune"
                )
            found = Gathered.unpack(about, arrays)
            if missing := {"data", "seed", "sizes", "warnings"} - set(found.about):
                raise Damaged(f"nothing said of {min(missing)}")
            return found
        except FileNotFoundError:
            raise InputError(f"{where}: no such file; onnxprune collect makes one") from None
        except IsADirectoryError:
            raise InputError(f"{where}: a folder; expected a file that onnxprune collect wrote") from None
        except Damaged as error:
            raise InputError(
                f"{where}: expected a whole file that onnxprune collect wrote, found {error}; collect again"
            ) from error


def identity(info: GroupInfo, biases: Collection[str] = ()) -> str:
    """SHA-256 of the positions that a group's units hold, but for those of biases that were added for a fit.

    Where nothing will be fitted none are added, and the group is the same.
    """
    found = hashlib.sha256()
    for axis in sorted((a for a in info.group.axes if a.tensor not in biases), key=lambda a: (a.tensor, a.axis)):
        found.update(f"{axis.tensor} {axis.axis} {axis.positions.shape}".encode())
        found.update(np.ascontiguousarray(axis.positions, dtype="<i8").tobytes())
    return found.hexdigest()


def _other(where: str, what: str) -> InputError:
    return InputError(
        f"{where} holds nothing for {what}; collect again with the same --only, --exclude, --approximate and"
        " --no-samplers (which budgets in latency and memory imply), or prune with those that it was collected with"
    )


def _packed(grams: Sequence[np.ndarray], exact: bool) -> np.ndarray:
    """The upper halves of k symmetric matrices (p, p), row by row: (k, p (p + 1) / 2)."""
    found = np.stack([np.concatenate([gram[i, i:] for i in range(len(gram))]) for gram in grams])
    return found if exact or np.abs(found).max() > np.finfo(np.float32).max else found.astype(np.float32)


def _unpacked(packed: np.ndarray, shape: tuple[int, ...]) -> list[np.ndarray]:
    count, size, _ = shape
    if not count or packed.shape != (count, size * (size + 1) // 2) or packed.dtype.kind != "f":
        raise ValueError(f"{packed.dtype} {packed.shape} for {shape}")
    grams = []
    for values in packed:
        gram, start = np.empty((size, size)), 0
        for i in range(size):
            row = values[start : start + size - i]
            gram[i, i:], gram[i:, i] = row, row
            start += size - i
        grams.append(gram)
    return grams
