"""What calibration records are: every input of the model gets an array of each, whatever they came from."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from onnxprune.errors import InputError, InternalError
from onnxprune.images import Array, InputSpec, Preprocessing, takes_images

_LABELS = frozenset(
    ("label", "labels", "target", "targets", "y", "y_train", "y_test", "class", "classes", "names", "filenames", "ids")
)
DEFAULT = Preprocessing()


@dataclass(frozen=True, eq=False)
class Calibration:
    """Records to feed the model with, shuffled by the seed and read on demand.

    ``batchable`` says that a record is one sample and that several may be fed at once; otherwise each is
    fed by itself. ``digest`` is the SHA-256 of what the records were made from (names, types and content of
    the used part); both halves of a `split` keep the source and digest of the whole.
    """

    source: str
    is_random: bool
    batchable: bool
    digest: str
    warnings: tuple[str, ...]
    _readers: Mapping[str, Callable[[int], Array]] = field(repr=False)
    _order: tuple[int, ...] = field(repr=False)

    def __len__(self) -> int:
        """Count the records."""
        return len(self._order)

    def feeds(self, indices: Sequence[int]) -> dict[str, Array]:
        """Read the records of these positions: every input's name, with its type, concatenated on axis 0."""
        if len(indices) != 1 and not (self.batchable and len(indices)):
            raise InternalError(f"calibration: expected one record at a time of {self.source}, found {len(indices)}")
        chosen = [self._order[index] for index in indices]
        feeds = {}
        for name, read in self._readers.items():
            parts = [read(record) for record in chosen]
            feeds[name] = np.asarray(parts[0] if len(parts) == 1 else np.concatenate(parts), order="C")
        return feeds

    def mirrored(self, axes: Mapping[str, int], period: int) -> Calibration:
        """The records, and again with inputs turned round along an axis each.

        Args:
            axes: by the names of these inputs.
            period: a record and its mirror image are a multiple of so many places apart: parts that are judged on each
                other share neither. What is left over has no mirror image.
        """
        turned = {name: _either_way(read, axes.get(name)) for name, read in self._readers.items()}
        first = self._order[: len(self) - len(self) % period]
        order = (*first, *(~record for record in first), *self._order[len(first) :])
        return replace(self, _readers=turned, _order=order)

    def joined(self, others: Calibration) -> Calibration:
        """These records and, behind them, others that the same source had before any were mirrored."""
        return replace(self, _order=(*self._order, *others._order))

    def split(self, held_out: int) -> tuple[Calibration, Calibration]:
        """Part the records into those to fit and, the last ones, those held out."""
        if not 0 <= held_out < len(self):
            raise InputError(
                f"calibration data {self.source}: expected more than the {held_out} records to hold out, found "
                f"{len(self)}; try more data"
            )
        cut = len(self) - held_out
        return replace(self, _order=self._order[:cut]), replace(self, _order=self._order[cut:])


def _either_way(read: Callable[[int], Array], axis: int | None) -> Callable[[int], Array]:
    """Reads a record, or by its complement the same one turned round."""

    def found(record: int) -> Array:
        array = read(max(record, ~record))
        return array if record >= 0 or axis is None else np.flip(array, axis)

    return found


@dataclass(frozen=True)
class Request:
    """What the user wants, apart from the source."""

    inputs: tuple[InputSpec, ...]
    samples: int | None
    seed: int
    preprocessing: Preprocessing

    def choose(self, count: int, limit: int | None) -> tuple[int, ...]:
        """Numbers of the records to use, of so many, in the order of use."""
        return tuple(int(i) for i in np.random.default_rng(self.seed).permutation(count)[:limit])

    @property
    def batch(self) -> int:
        """The batch size that the model insists on; 1 where it does not, or where inputs disagree."""
        sizes = {spec.shape[0] for spec in self.inputs if spec.shape}
        return (sizes.pop() or 1) if len(sizes) == 1 else 1

    @property
    def dynamic_batch(self) -> bool:
        """Whether every input takes batches of any size."""
        return all(spec.shape and spec.shape[0] is None and spec.stacks for spec in self.inputs)

    def only_input(self, where: str, what: str) -> InputSpec:
        """The model's only input.

        Raises:
            InputError: there are more.
        """
        if len(self.inputs) > 1:
            raise InputError(
                f"{where}: expected data for the {len(self.inputs)} inputs {quoted(s.name for s in self.inputs)}, "
                f"found {what}, which feeds one; try an .npz file with an array for each, or dicts from a callable"
            )
        return self.inputs[0]


def keys_of(found: Sequence[str], request: Request, where: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """Find the key of every input, and warn of keys left over; labels are passed over in silence."""
    names = [spec.name for spec in request.inputs]
    keys = {name: name for name in names if name in found}
    others = [key for key in found if key not in names and key.lower() not in _LABELS]
    if len(names) == 1 and not keys:
        if "images" in others:
            keys = {names[0]: "images"}
        elif len(others) == 1:
            keys = {names[0]: others[0]}
    if missing := [name for name in names if name not in keys]:
        raise InputError(
            f"{where}: expected arrays named {quoted(names)}, as the model's inputs, found {quoted(found) or 'none'}"
            f"; try {_remedy(missing, others)}"
        )
    ignored = [key for key in others if key not in keys.values()]
    return keys, (f"{where}: {quoted(ignored)} ignored: no input has that name",) if ignored else ()


def matched(
    found: Mapping[Any, object], request: Request, where: str
) -> tuple[dict[str, Array], dict[str, str], tuple[str, ...]]:
    """The array of every input, its key, and warnings."""
    values = {str(key): value for key, value in found.items()}
    keys, warnings = keys_of(list(values), request, where)
    return {name: as_array(values[key], f"{where}, key '{key}'") for name, key in keys.items()}, keys, warnings


def _remedy(missing: Sequence[str], candidates: Sequence[str]) -> str:
    for name in missing:
        if close := difflib.get_close_matches(name, candidates, n=1):
            return f"to rename '{close[0]}' to '{name}'"
    return "the names of the inputs"


def quoted(names: Iterable[str]) -> str:
    """Names for a message."""
    return ", ".join(f"'{name}'" for name in names)


def as_array(value: object, where: str) -> Array:
    """What another library gave, as an array.

    Raises:
        InputError: it cannot be one.
    """
    try:
        if not (hasattr(value, "__array__") or isinstance(value, int | float)):
            raise TypeError(f"an object of type {type(value).__name__}")
        return np.asarray(value)
    except Exception as error:  # __array__ of other libraries: a tensor on a GPU, one that needs detach()
        raise InputError(f"{where}: expected a NumPy array, found {error}; try numpy.asarray first") from error


def key_text(keys: Mapping[str, str]) -> str:
    """The keys that arrays were found under, for a source's name."""
    return f", key{'s' if len(keys) > 1 else ''} {quoted(keys.values())}" if keys else ""


def count_text(used: int, total: int, batch: int, what: str = "samples") -> str:
    """How many were used of how many, for a source's name."""
    unit = (what if batch == 1 else "records").removesuffix("s" if total == 1 else "")
    unit += f" of {batch} {what}" if batch > 1 else ""
    return f"{used} {unit}" if used == total else f"{used} of {total} {unit}"


def unused_options(request: Request, dtypes: Iterable[np.dtype[Any]]) -> Iterator[str]:
    """Tell of preprocessing that was asked for and has nothing to act on."""
    options = request.preprocessing
    images = [spec for spec, dtype in zip(request.inputs, dtypes, strict=True) if takes_images(spec, dtype)]
    if not images and options != DEFAULT:
        yield "the preprocessing options are not applied: the data are not uint8 images"
        return
    yield from unused_in_images(request, images)
    if options.resize or options.crop:
        yield "resize and crop are not applied: the data are arrays, not a folder of image files"


def unused_in_images(request: Request, inputs: Iterable[InputSpec]) -> Iterator[str]:
    """The same of images, for the inputs that take them."""
    options = request.preprocessing
    levels = (options.scale, options.mean, options.std) != (DEFAULT.scale, DEFAULT.mean, DEFAULT.std)
    if levels and any(not spec.is_float for spec in inputs):
        yield "scale, mean and std are not applied: the model takes the pixels of images as they are, in uint8"
