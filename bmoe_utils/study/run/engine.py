"""Processes, GPUs and machines to spread calls over: processes of this machine, or a running dask scheduler's workers.

A local call runs in a process of its own (:mod:`bmoe_utils.study.run.worker`) that is told what to do as JSON through a pipe. Nothing
listens on a port, nothing is unpickled, and the caller's own script is not imported by the process.
"""
from __future__ import annotations

import ipaddress
import json
import math
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from urllib.parse import urlsplit

PACKAGE = Path(__file__).resolve().parents[2]
LIBRARIES = ("OMP", "MKL", "OPENBLAS")                 # each has its <name>_NUM_THREADS
STOPPING_S = 20                                        # for a kernel to be shut down before its process is killed


class UsageError(Exception):
    """A request that cannot be meant; the command line exits with 2."""


# ---------------------------------------------------------------------------------------------- what there is
def cores() -> int:
    """Processors this process may use, a container's limit included."""
    count = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):               # not on macOS and Windows
        count = len(os.sched_getaffinity(0))
    return max(1, math.ceil(min(count, _quota(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")))))


def _quota(root: Path, groups: Path) -> float:
    """Processors that the control groups allow, as their files below ``root`` say; infinite where they say nothing.

    ``groups``: the file that names the process's own group; a limit of a group above it holds too.
    """
    limits = [math.inf]

    def add(quota: str, period: str):
        if int(quota) > 0 and int(period) > 0:         # "max", or -1: none
            limits.append(int(quota) / int(period))
    places = [root]
    try:                                               # version 2: "0::/the/group"
        group = next(line[3:] for line in groups.read_text().splitlines() if line.startswith("0::"))
        own = root / group.strip("/")
        places = [own, *(place for place in own.parents if place.is_relative_to(root))]
    except (OSError, StopIteration):
        pass
    for place in places:
        try:
            add(*(place / "cpu.max").read_text().split())
        except (OSError, ValueError, TypeError):
            continue
    for place in (root / "cpu,cpuacct", root / "cpuacct,cpu", root / "cpu"):     # version 1
        try:
            add(*((place / f"cpu.cfs_{what}_us").read_text() for what in ("quota", "period")))
        except (OSError, ValueError):
            continue
    return min(limits)


def gpus() -> list[str]:
    """The GPUs this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if named := [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]:
        return named
    import torch
    return [str(i) for i in range(torch.cuda.device_count())]


def workers_for(embedded: bool, *, most: int = 4) -> int:
    """How many runs fit side by side: embedded models take one core each (and about 1 GiB), others a GPU each."""
    return min(cores(), most) if embedded else max(1, len(gpus()))


# ---------------------------------------------------------------------------------------------- spreading calls
@contextmanager
def spread(function: Callable, calls: Sequence[tuple], *, jobs: int, scheduler: str | None = None, **options) -> Iterator[Iterator[tuple]]:
    """``function(*call, **options)`` of every call, begun in order on ``jobs`` local processes, or on the workers of a running
    ``scheduler`` (its address). Within the block, an iterator of ``(index, result)`` as they finish; where the process died or
    the function raised, the result is an exception. Leaving the block ends what still runs here.

    The function is one of a module's own, by name; arguments and results are JSON values. Local processes share the GPUs out
    among themselves; a scheduler's workers keep what they were started with.
    """
    described = [{"function": name_of(function), "call": list(call), "options": options} for call in calls]
    with _on_scheduler(described, scheduler) if scheduler else _on_processes(described, jobs) as results:
        yield results


def name_of(function: Callable) -> str:
    """``module:name``, from which :func:`called` finds the function again."""
    module, name = function.__module__, function.__qualname__
    if module in (None, "__main__") or "." in name or "<" in name:
        raise ValueError(f"{name!r} of {module}: only a function of a module that can be imported is called elsewhere")
    return f"{module}:{name}"


def called(function: str, call: list, options: dict):
    """``function(*call, **options)`` of a function's :func:`name_of`."""
    module, _, name = function.partition(":")
    return getattr(import_module(module), name)(*call, **options)


def _environments(jobs: int) -> list[dict]:
    """One for each of ``jobs`` processes: what is here, its share of the threads (unless a number is set), its GPU."""
    threads, cards = str(max(1, cores() // jobs)), gpus()
    shared = {f"{library}_NUM_THREADS": threads for library in LIBRARIES} | dict(os.environ)
    shared["PYTHONPATH"] = package_path()
    return [shared | ({"CUDA_VISIBLE_DEVICES": cards[i % len(cards)]} if cards else {}) for i in range(jobs)]


def package_path() -> str:
    """PYTHONPATH with which another process imports this package, installed or not."""
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(dict.fromkeys([str(PACKAGE.parent), *filter(None, before)]))


@contextmanager
def _on_processes(described: list[dict], jobs: int):
    waiting, results = iter(enumerate(described)), queue.SimpleQueue()
    running: set[subprocess.Popen] = set()
    lock, stopped = threading.Lock(), threading.Event()

    def serve(environment: dict):
        """One slot: call after call, until none is left or the block is left."""
        while True:
            with lock:
                if stopped.is_set() or (begun := next(waiting, None)) is None:
                    return
                index, job = begun
                try:
                    process, answer = _begin(job, folder, f"{index}.json", environment)
                except OSError as error:               # no more processes, no more memory
                    results.put((index, error))
                    continue
                running.add(process)
            status = process.wait()
            with lock:
                running.discard(process)
                _close(process)
            results.put((index, _answer(answer, status)))

    with tempfile.TemporaryDirectory(prefix="bmoe-", ignore_cleanup_errors=True) as folder:
        slots = [threading.Thread(target=serve, args=[environment], daemon=True)
                 for environment in _environments(jobs)]
        try:
            for slot in slots:
                slot.start()
            yield (results.get() for _ in described)
        finally:
            stopped.set()
            with lock:
                left = list(running)
            _end(left)


def _begin(job: dict, folder: str, name: str, environment: dict) -> tuple[subprocess.Popen, Path]:
    """A process that does the job, and the file its answer will be in."""
    answer = Path(folder, name)
    # A session of its own: Ctrl-C reaches the caller alone, who then ends every process in the same way. Not from the working
    # directory (-P): a file there that is called like a module of Python's would be taken for it.
    process = subprocess.Popen([sys.executable, "-P", "-m", "bmoe_utils.study.run.worker"], stdin=subprocess.PIPE, env=environment,
                               start_new_session=True)
    try:
        process.stdin.write(json.dumps(job | {"answer": str(answer)}).encode() + b"\n")
        process.stdin.flush()                          # and left open: its end tells the process to stop
    except OSError:
        pass                                           # it died at once: its status will say so
    return process, answer


def _answer(path: Path, status: int):
    """What the process wrote, or the exception that stands for it."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        killed = " (killed, as for want of memory)" if status in (-9, 137) else ""
        return RuntimeError(f"its process died with status {status}{killed} before it had a result")
    return RuntimeError(said["error"]) if "error" in said else said["result"]


def _close(process: subprocess.Popen):
    """Its standard input, by which it knows that it is wanted."""
    try:
        process.stdin.close()
    except OSError:
        pass                                           # it was gone before it read all


def _end(processes: list[subprocess.Popen]):
    """Interrupt, so that each shuts its kernel down; kill what takes too long, or at once at a second Ctrl-C."""
    try:
        for process in processes:
            _close(process)
        limit = time.monotonic() + STOPPING_S
        for process in processes:
            process.wait(max(0.1, limit - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        pass
    finally:
        for process in processes:
            process.kill()
            process.wait()


# ---------------------------------------------------------------------------------------------- a scheduler's workers
def exposed(scheduler: str) -> bool:
    """Whether an address is neither of this machine alone nor protected by TLS."""
    try:
        parts = urlsplit(scheduler if "://" in scheduler else f"tcp://{scheduler}")
        if parts.scheme in ("tls", "wss"):
            return False
        return parts.hostname != "localhost" and not ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return True                                    # a name: of some machine


@contextmanager
def _on_scheduler(described: list[dict], scheduler: str):
    """TLS is dask's to configure: ``distributed.comm.tls`` in its configuration, or the environment's DASK_DISTRIBUTED__COMM__TLS__..."""
    try:
        import dask
        from distributed import Client, as_completed
    except ImportError as error:
        raise UsageError(f"--scheduler needs dask and distributed, which are not installed ({error})") from None
    settings = {"distributed.scheduler.allowed-failures": 0,             # a run that kills its worker is not tried again
                "distributed.scheduler.worker-saturation": 1.0,          # none waits at a busy worker while another is idle
                "distributed.comm.timeouts.connect": "60s"}
    with dask.config.set(settings):
        try:
            client = Client(scheduler)
        except Exception as error:                     # addresses, certificates, time-outs: each library has its own
            raise UsageError(f"no dask scheduler at {scheduler}: {type(error).__name__}: {error}") from None
        try:
            # all at once, named in order: one by one, the first few would be dealt out to workers before the rest is known
            named = [f"{job['function']}-{uuid.uuid4().hex[:8]}-{i:05d}" for i, job in enumerate(described)]
            futures = client.map(called, *zip(*(job.values() for job in described), strict=True), key=named, pure=False)
            index = {future.key: i for i, future in enumerate(futures)}
            yield ((index[future.key], future.exception() or future.result()) for future in as_completed(futures))
        finally:
            client.cancel(list(futures))
            client.close()
