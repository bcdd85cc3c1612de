"""Clocks for each device, and the roofs they measure: matmul flops a second, copy and read-only sum bytes a second."""

from time import perf_counter

import torch

from kernels.products import product

BATCH = 10
"""Calls queued behind one sleep: more would fill the launch queue, and the host would be timed."""
TURN_SECONDS = 0.5
"""A turn on a GPU repeats the calls up to a batch, unless that takes longer than this."""


def cpu_clock(calls):
    """-> seconds of each call."""
    seconds = []
    for call in calls:
        start = perf_counter()
        call()
        seconds.append(perf_counter() - start)
    return seconds


def cuda_batch(calls):
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in calls]
    torch.cuda._sleep(40_000_000)  # about 20 ms, in which the host queues the calls: its pace is not what is timed
    for call, (start, end) in zip(calls, events):
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def cuda_clock(calls):
    """-> seconds of each call by events. `calls` differ in their inputs, so that each finds the cache cold."""
    (first,) = cuda_batch(calls[:1])
    calls = calls * max(1, min(BATCH, int(TURN_SECONDS / first)) // len(calls))
    return [t for start in range(0, len(calls), BATCH) for t in cuda_batch(calls[start : start + BATCH])]


def wall_clock(calls):
    """-> seconds of each call by the host's clock, from an idle device to an idle one."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    return cpu_clock([lambda call=call: (call(), wait()) for call in calls])


CLOCKS = {"cpu": cpu_clock, "cuda": cuda_clock}
SIDES = {"cpu": 2048, "cuda": 8192}
BUFFER_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}


def measure_roofs(device, dtype, small=False):
    """-> {"matmul": flops/s, "copy": bytes/s read plus written, "sum": bytes/s read}, the best of five each."""
    clock = CLOCKS[device]
    side, num_bytes = (512, 16 << 20) if small else (SIDES[device], BUFFER_BYTES[device])
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    best = lambda call: min(clock([call] * 5))
    return {
        "matmul": 2 * side**3 / best(lambda: product(a, b)),
        "copy": 2 * num_bytes / best(lambda: target.copy_(source)),
        "sum": num_bytes / best(source.sum),
    }
