"""Processes, GPUs and machines to spread runs over, by dask.distributed: local by default, or a running scheduler's."""
from __future__ import annotations

import logging, os, uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager


def cores() -> int:
    """Processors this process may use, a container's limit included."""
    from dask.system import CPU_COUNT
    return CPU_COUNT


def gpus() -> list[str]:
    """The GPUs this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named or [str(i) for i in range(torch.cuda.device_count())]


def workers_for(embedded: bool, *, most: int = 4) -> int:
    """How many runs fit side by side: embedded models take one core each (and about 1 GiB), others a GPU each."""
    return min(cores(), most) if embedded else max(1, len(gpus()))


@contextmanager
def spread(function: Callable, calls: Sequence[tuple], *, jobs: int, scheduler: str | None = None, **options) -> Iterator[Iterator[tuple]]:
    """``function(*call, **options)`` of every call, begun in order on ``jobs`` local processes, or on the workers of a running
    ``scheduler`` (its address). Within the block, an iterator of ``(index, result)`` as they finish; where the worker died or
    the function raised, the result is the exception. Leaving the block ends what still runs here.

    Local workers share the GPUs out among themselves; a scheduler's workers keep what they were started with.
    """
    import dask
    from distributed import Client, LocalCluster, as_completed
    threads = max(1, cores() // jobs)
    settings = {"distributed.scheduler.allowed-failures": 0,             # a run that kills its worker is not tried again
                "distributed.scheduler.worker-saturation": 1.0,          # none waits at a busy worker while another is idle
                "distributed.comm.timeouts.connect": "60s",
                # no statistics of what runs here, which would take a tenth of a core
                "distributed.worker.profile.enabled": False, "distributed.admin.tick.interval": "1s", "distributed.admin.system-monitor.interval": "5s",
                # in place of dask's own, which also make glibc give back the memory of every larger tensor at once: runs would
                # then spend a third of their time on getting it again
                "distributed.nanny.pre-spawn-environ": {f"{library}_NUM_THREADS": threads for library in ("OMP", "MKL", "OPENBLAS")}}
    with dask.config.set(settings):
        cluster = scheduler or LocalCluster(n_workers=jobs, threads_per_worker=1, processes=True, memory_limit=None,
                                            dashboard_address="127.0.0.1:0", silence_logs=logging.CRITICAL)
        client = Client(cluster)
        try:
            cards = [] if scheduler else gpus()
            # all at once, named in order: one by one, the first few would be dealt out to workers before the rest is known
            named = [f"{function.__name__}-{uuid.uuid4().hex[:8]}-{i:05d}" for i in range(len(calls))]
            futures = client.map(_on_worker, *zip(*((function, call, options, cards) for call in calls), strict=True), key=named, pure=False)
            index = {future.key: i for i, future in enumerate(futures)}
            yield ((index[future.key], future.exception() or future.result()) for future in as_completed(futures))
        finally:
            if scheduler:
                client.cancel(list(futures))
            client.close()
            if not scheduler:
                cluster.close()


def _on_worker(function: Callable, call: tuple, options: dict, cards: list[str]):
    if cards:
        from distributed import get_worker
        os.environ["CUDA_VISIBLE_DEVICES"] = cards[int(get_worker().name) % len(cards)]
    return function(*call, **options)
