"""Records from one array for each input, cut by the rules of `onnxprune.data`."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from onnxprune.errors import InputError
from onnxprune.images import (
    NO_SHAPE,
    Array,
    InputSpec,
    Preprocessing,
    check_values,
    convert_values,
    fits,
    shape_text,
    takes_images,
)
from onnxprune.records import Calibration, Request, count_text, key_text, unused_options


@dataclass(frozen=True)
class _Column:
    """The array that feeds one input, cut into records by the rules above."""

    spec: InputSpec
    values: Array
    batch: int  # samples per record; 0 where a record is a whole feed
    constant: bool
    preprocessing: Preprocessing
    where: str

    @property
    def records(self) -> int:
        return len(self.values) // (self.batch or 1)

    def raw(self, record: int) -> Array:
        if self.constant:
            return self.values
        part = self.values[slice(record * self.batch, (record + 1) * self.batch) if self.batch else record]
        mapped: Any = getattr(self.values, "_mmap", None)
        if not hasattr(mapped, "madvise"):
            return np.asarray(part)
        found = np.array(part)  # what is mapped would count as the process' own memory from now on
        mapped.madvise(mmap.MADV_DONTNEED)
        return found

    def read(self, record: int) -> Array:
        first = record * (self.batch or 1)
        last = f" to {first + self.batch - 1}" if self.batch > 1 else ""
        where = self.where if self.constant else f"{self.where}, sample {first}{last}"
        return convert_values(self.spec, self.raw(record), self.preprocessing, where)


def _column(spec: InputSpec, values: Array, request: Request, where: str) -> _Column:
    """Find the rule that applies to an array, and refuse what does not suit the input."""
    rank = len(spec.shape)
    dynamic = rank > 0 and spec.shape[0] is None
    batch = (spec.shape[0] or 1) if rank else 0
    if not spec.stacks and values.ndim == rank:
        values = values[None]  # one record
    if dynamic and spec.stacks and values.ndim == rank + 1 and values.shape[1] == 1:
        values = values[:, 0]  # feeds of one sample each are samples
    constant = not dynamic and fits(spec.shape, values.shape)
    if constant or values.ndim == rank + 1:
        wanted, found, batch = spec, values.shape[0 if constant else 1 :], 0
    elif rank and batch in (1, request.batch):
        wanted, found = replace(spec, shape=(None, *spec.shape[1:])), values.shape
    else:
        raise InputError(
            f"{where}: expected shape {shape_text(spec.shape)} for every record, or that with one leading axis more, "
            f"for input '{spec.name}', found {list(values.shape)}; "
            f"try {'numpy.stack over the records' if spec.shape else NO_SHAPE}"
        )
    if not constant and values.ndim and len(values) < max(batch, 1):
        raise InputError(
            f"{where}: expected at least {max(batch, 1)} sample(s), as many as a batch of input '{spec.name}' "
            f"{shape_text(spec.shape)}, found {len(values)}; try more data"
        )
    check_values(wanted, found, values.dtype, request.preprocessing, where)
    return _Column(spec, values, batch, constant, request.preprocessing, where)


def from_arrays(
    arrays: Mapping[str, Array],
    keys: Mapping[str, str],
    where: str,
    name: str,
    request: Request,
    warnings: Sequence[str] = (),
) -> Calibration:
    """Feed each input from one array; ``keys`` says under which key of the source it was found."""
    columns = [
        _column(spec, arrays[spec.name], request, f"{where}, key '{keys[spec.name]}'" if keys else where)
        for spec in request.inputs
    ]
    counts = {column.spec.name: column.records for column in columns if not column.constant}
    if len(set(counts.values())) > 1:
        text = ", ".join(f"{count} for '{name}'" for name, count in counts.items())
        raise InputError(f"{where}: expected as many records for every input, found {text}; try arrays of equal length")
    total = next(iter(counts.values()), 1)
    order = request.choose(total, request.samples)

    digest = hashlib.sha256(name.encode())
    for column in columns:
        digest.update(f"{column.where.removeprefix(where)} {column.values.dtype} {column.values.shape[1:]}".encode())
        for record in [0] if column.constant else sorted(order):
            digest.update(column.raw(record).tobytes())
            if not takes_images(column.spec, column.values.dtype):
                column.read(record)  # refuses NaN and what the input's type cannot hold

    batch = max(column.batch for column in columns)
    return Calibration(
        source=f"{name}{key_text(keys)}, {count_text(len(order), total, batch)}",
        is_random=False,
        batchable=request.dynamic_batch and all(column.batch for column in columns),
        digest=digest.hexdigest(),
        warnings=(*warnings, *unused_options(request, [c.values.dtype for c in columns])),
        _readers={column.spec.name: column.read for column in columns},
        _order=order,
    )
