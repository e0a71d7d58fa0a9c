"""The collecting pass on the workers of a Dask cluster: the same sums, over shards of the data.

Workers get the analysed network once, and with every shard the inputs themselves, so that they need no access to the
data. Sums are added up in pairs on the workers. What a lost worker had is computed again by others.
"""

from __future__ import annotations

import copyreg
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx

from onnxprune import blas
from onnxprune.analysis import Analysis
from onnxprune.batches import Batches
from onnxprune.collecting import collect
from onnxprune.errors import InputError
from onnxprune.memory import frugal
from onnxprune.progress import Progress
from onnxprune.readers import Reader
from onnxprune.runtime import Runtime
from onnxprune.statistics import Statistics

_SHARDS = 1  # per worker and round, as each begins with sessions and memory of its own
_SENT = 256 << 20  # bytes of inputs that are on the way at once
_SECONDS = 30  # to wait for a scheduler

# what the view of a graph holds of a Constant node; protobuf leaves it to us
copyreg.pickle(type(onnx.TensorProto().dims), lambda dims: (list, (list(dims),)))

Sums = list[list[Statistics]]
Common = tuple[Analysis, tuple[Reader, ...], Runtime]


def collect_on(
    address: str,
    analysis: Analysis,
    readers: Sequence[Reader],
    batches: Batches,
    runtime: Runtime,
    progress: Progress,
) -> Sums:
    """What `onnxprune.collecting.collect` gives, up to the order of the sums.

    Args:
        address: of the scheduler, such as tcp://host:8786; ``local`` or ``local:N`` is a cluster of processes here.
        analysis: of the original.
        readers: to sum up.
        batches: the data.
        runtime: how workers run the network.
        progress: advanced by the number of samples.

    Raises:
        InputError: Dask is not installed, or there is no such cluster, or its workers cannot do it.
    """
    with _client(address) as client, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sending large graph", UserWarning)  # inputs are sent on purpose
        common = client.submit(_held, (analysis, tuple(readers), runtime), pure=False)
        total: Sums | None = None
        workers = list(client.nthreads()) or [None]  # which may be lost for the moment
        for shards in _rounds(batches, len(workers)):
            futures = []
            for k, shard in enumerate(shards):  # neighbours, which are added up first, on one worker, if there are more
                there = workers[k * len(workers) // len(shards)]
                rule = {"workers": there, "allow_other_workers": there is not None, "pure": False}
                futures.append(client.submit(_sums, common, batches.loaded(shard), **rule))
            while len(futures) > 1:
                pairs = [futures[k : k + 2] for k in range(0, len(futures), 2)]
                futures = [client.submit(_add, *p, pure=False) if len(p) > 1 else p[0] for p in pairs]
            try:
                found = futures[0].result()
            except InputError:
                raise
            except Exception as error:  # whatever happens on another machine
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
                raise InputError(
                    f"dask {address}: expected workers that can run onnxprune, found {type(error).__name__}: {reason};"
                    " try the same versions of it everywhere"
                ) from error
            total = found if total is None else _add(total, found)
            progress.advance(sum(len(batches.parts[k]) for shard in shards for k in shard))
        return total or []


def _rounds(batches: Batches, workers: int) -> Iterator[list[list[int]]]:
    """Shards, as lists of batches, that are sent together."""
    each = max(sum(array.nbytes for array in batches.feeds(0).values()), 1)
    everything = np.arange(len(batches))
    for part in np.array_split(everything, -(-len(batches) // max(_SENT // each, 1))):
        shards = min(_SHARDS * max(workers, 1), len(part))
        yield [shard.tolist() for shard in np.array_split(part, shards)]


def _held(common: Common) -> Common:
    """Given back as it is: unlike data that were sent, the result of a task outlives its worker."""
    return common


def _sums(common: Common, batches: Batches) -> Sums:
    analysis, readers, runtime = common
    # workers of Dask give back what goes at once, and to ask for it anew takes a seventh of the time
    with blas.threads(max(r.width for r in readers), runtime.threads), frugal():
        return collect(analysis, readers, batches, runtime, Progress())


def _add(one: Sums, two: Sums) -> Sums:
    return [[a + b for a, b in zip(*parts, strict=True)] for parts in zip(one, two, strict=True)]


@contextmanager
def _client(address: str) -> Iterator[Any]:
    try:
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise InputError(
            "dask: expected the package dask.distributed, found none; try pip install 'onnxprune[dask]'"
        ) from error
    name, _, count = address.partition(":")
    if name == "local":
        if count and not (count.isdecimal() and int(count)):
            raise InputError(f"dask: expected local:N with a number of workers of at least 1, found {address!r}")
        workers = int(count) if count else os.cpu_count() or 1
        with (
            LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None) as cluster,
            Client(cluster) as client,
        ):
            yield client
        return
    try:
        client = Client(address, timeout=_SECONDS)
    except (OSError, ValueError) as error:
        raise InputError(
            f"dask: expected the address of a scheduler, such as tcp://host:8786, or local:2, found {address!r}"
            f" ({(str(error).splitlines() or [''])[0][:150]})"
        ) from error
    with client:
        if not client.nthreads():
            raise InputError(f"dask {address}: expected workers, found none; try dask worker {address}")
        yield client
