"""Ranks: one process or many, the same calls, and one way to end.

`run(main)` wraps a program, `start()` makes its `World`; from then on `engine.watch` looks after this rank and
the next. A rank that fails writes on the board, and the others end naming it.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import torch
import torch.distributed as c10d
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule

from engine import watch
from engine.errors import UserError

MALLOC = {-3: 32 << 20, -1: 512 << 20, -2: 64 << 20}
"""malloc.h: M_MMAP_THRESHOLD at its largest, M_TRIM_THRESHOLD, M_TOP_PAD; bytes."""
ALLOCATOR_SETTINGS = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
SIZES = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")  # what says that there are other processes
ECHO_SECONDS = 4.0  # for the watch to find the dead rank behind a broken connection

Values = TypeVar("Values", list[float], Tensor)


@dataclass(frozen=True)
class World:
    """This process among the others; `mesh` is 1-D over all ranks, on the type of `device`."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    mesh: DeviceMesh


_world: World | None = None
_watch: watch.Watch | None = None


def start(device: str = "auto", grace_seconds: float = 25.0) -> World:
    """Join the other ranks and begin to watch over them; a second call returns the same `World`.

    Reads torchrun's environment; without it the group has one process. Call it from the main thread.
    `device`: auto (cuda if there is one) | cpu | cuda. `grace_seconds` stays under the 30 s after which
    torchrun kills. Raises UserError: unknown or absent device, more local ranks than GPUs, half an environment.
    """
    global _world, _watch
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device {device!r} is unknown: use auto, cpu or cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but no CUDA device is visible here: use device cpu or auto.")
    kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if _world is not None:
        assert _world.device.type == kind, f"started on {_world.device}, asked for {kind}"
        return _world
    rank, world_size = launch()
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    local_size = max(local_size, local_rank + 1)
    if kind == "cuda" and local_size > torch.cuda.device_count():
        raise UserError(
            f"{local_size} processes were started on a machine with {torch.cuda.device_count()} GPUs: "
            f"use --nproc_per_node={torch.cuda.device_count()}, or device cpu."
        )
    if kind == "cuda":
        if not ALLOCATOR_SETTINGS & os.environ.keys():  # read when CUDA is first used; a user's own stay
            os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
        torch.cuda.set_device(local_rank)
    group_store, board = watch.stores()
    _watch = watch.Watch(board, rank, world_size, grace_seconds)
    _watch.start()
    c10d.init_process_group(
        "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", store=group_store, rank=rank, world_size=world_size
    )
    where = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    _world = World(rank, world_size, local_rank, where, init_device_mesh(kind, (world_size,)))
    watch.started.set()
    return _world


def launch() -> tuple[int, int]:
    """(rank, number of ranks) by torchrun's environment; (0, 1) without one.

    UserError where it is of another launcher or a half of one: ranks would wait for each other, or each train alone.
    """
    torchrun = "start with torchrun, which sets all of it"
    if "RANK" not in os.environ:
        for name in SIZES:
            if number(name, 1) > 1:
                raise UserError(
                    f"{name} is {os.environ[name]}, but RANK is not set, so this process would train alone: "
                    f"{torchrun}, or unset {name}."
                )
        return 0, 1
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if not missing and number("WORLD_SIZE") > 1 and "LOCAL_RANK" not in os.environ:
        missing = ["LOCAL_RANK"]
    if missing:
        raise UserError(f"RANK is set, but not {', '.join(missing)}: {torchrun}, or unset RANK for a single process.")
    for name, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if number(name, 0) >= number(size, sys.maxsize):
            raise UserError(f"{name} {os.environ.get(name, 0)} is not below {size} {os.environ[size]}: {torchrun}.")
    if not 0 < number("MASTER_PORT") < 2**16:
        raise UserError(f"MASTER_PORT must be in 1 to 65535, not {os.environ['MASTER_PORT']}: {torchrun}.")
    return number("RANK"), number("WORLD_SIZE")


def number(name: str, default: int | None = None) -> int:
    """The environment's whole number of this name."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"{name} must be a whole number, not {text!r}: start with torchrun, or unset it.")
    return int(text)


def take_cores(threads: int | None, parts: int) -> None:
    """Threads of an operation on a CPU: `threads`, or this rank's share of the cores, which `parts` of it use at once.

    Memory that is freed stays with the process (glibc; below 32 MiB), or each large tensor would be page faults anew.
    """
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(threads or max(len(os.sched_getaffinity(0)) // (ranks_here * parts), 1))
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        for setting, size in MALLOC.items():
            mallopt(setting, size)


def world_size() -> int:
    """Number of ranks; 1 before `start`."""
    return _world.world_size if _world is not None else 1


def stop_requested(seconds: float = 0.0) -> bool:
    """Whether SIGTERM or SIGINT reached this rank, at least so long ago; the ranks agree on it by summing, at a step
    boundary."""
    return watch.stop.is_set() and time.monotonic() >= watch.stopped_at + seconds


def all_sum(values: Values) -> Values:
    """Sum over all ranks of a list of floats, or of a float64 CPU tensor; bitwise the same on every rank."""
    return _all_reduce(values, c10d.ReduceOp.SUM)


def all_max(values: Values) -> Values:
    """Maximum over all ranks of a list of floats, or of a float64 CPU tensor."""
    return _all_reduce(values, c10d.ReduceOp.MAX)


def gather(value: object) -> list:
    """`value` of every rank, in rank order, on every rank: of JSON's types, for it travels as text, over gloo.

    torch's own gathering of objects unpickles what comes: a program of whoever reaches the port."""
    text = json.dumps(value).encode()
    text = text.ljust(int(all_max([float(len(text))])[0]))
    parts = [torch.empty(len(text), dtype=torch.uint8) for _ in range(c10d.get_world_size())]
    c10d.all_gather(parts, torch.frombuffer(bytearray(text), dtype=torch.uint8))
    return [json.loads(part.numpy().tobytes()) for part in parts]


def free_gathered(model: nn.Module) -> None:
    """Frees what FSDP2 has gathered, as a backward does and a forward alone does not: only the shards are left."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def barrier() -> None:
    """Wait until every rank is here; over gloo, so that no GPU is touched."""
    all_sum([0.0])


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call `main` and end the process; never returns, and works when `start` was never reached.

    Exit code: what `main` returns (None is 0); 2 after a UserError, printed as one sentence, once, not by
    every rank; 130 after ^C before `start`; 1 after anything else, with the traceback and the rank on
    stderr and the other ranks told. A fatal signal ends it with all threads' stacks on stderr. `atexit`
    handlers do not run.
    """
    try:
        launch()
    except UserError as error:  # there is no board to agree on
        watch.put(f"error: {error}")
        watch.leave(2)
    watch.trace_crashes()
    try:
        watch.stores()
        _finish(main() or 0)
    except UserError as error:
        _refuse(str(error))
    except KeyboardInterrupt:
        watch.leave(130, "interrupted")
    except SystemExit as request:
        if _world is not None:
            _fail(request)
        watch.leave(*((1, request.code) if isinstance(request.code, str) else (request.code or 0,)))
    except BaseException as error:  # noqa: BLE001 - everything ends here, and says why
        _fail(error)


def _all_reduce(values: Values, op: c10d.ReduceOp) -> Values:
    is_list = isinstance(values, list)
    assert is_list or (values.dtype == torch.float64 and values.device.type == "cpu"), (values.dtype, values.device)
    total = torch.tensor(values, dtype=torch.float64) if is_list else values.clone()
    c10d.all_reduce(total, op)
    return total.tolist() if is_list else total


def _finish(code: int) -> NoReturn:
    gc.collect()
    if _world is not None:
        watch.ending.set()
        barrier()
        faulthandler.dump_traceback_later(20, exit=True)  # destroying an NCCL group can hang
        _watch.end()  # it would beat over the last word
        with contextlib.suppress(c10d.DistError):
            _watch.board.set(f"alive/{watch.rank()}", "done")
        c10d.destroy_process_group()
    watch.leave(code)


def _refuse(sentence: str) -> NoReturn:
    """End on a UserError: rank 0 speaks for all ranks that have the same sentence, others for themselves."""
    if watch.rank() == 0:
        watch.put(f"error: {sentence}")
        watch.post("said", sentence)
    elif watch.wait_for("said", watch.LAST_WORDS_SECONDS) != sentence:
        watch.say(f"error: {sentence}")
    watch.post("failure", f"rank {watch.rank()} refused: {sentence}")
    watch.leave(2)


def _fail(error: BaseException) -> NoReturn:
    """End on any other exception. A RuntimeError may be the echo of a lost peer: the watch names it first."""
    watch.say("".join(traceback.format_exception(error)).rstrip())
    if _world is not None and _world.world_size > 1 and isinstance(error, RuntimeError):
        watch.wait_for("failure", ECHO_SECONDS)
    mine = f"rank {watch.rank()} failed: {traceback.format_exception_only(error)[-1].strip()}"
    first = watch.post("failure", mine)
    watch.leave(1, "" if first == mine else f"leaving because {first}")
