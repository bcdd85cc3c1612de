"""CUDA graphs: a function on fixed buffers, recorded once per number of rows, then launched as one.

On a CPU the function is simply called.
"""

from collections.abc import Callable, Hashable

import torch

from engine.streams import side_stream


class Graphs:
    """Runs a `step(rows, key)` that reads and writes fixed buffers only, allocates nothing that lives on, never syncs.

    A replay runs what was recorded, so everything that may change between steps has to stand in a buffer; `key` is
    the rest, and each (rows, key) has a graph of its own. Recording runs `step` a few times: harmless when the
    buffers mark every row as ended. The step is not kept: the owner of its buffers would own itself.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.graphs: dict[tuple[int, Hashable], torch.cuda.CUDAGraph] = {}
        self.pool = None

    def run(self, step: Callable[[int, Hashable], None], rows: int, key: Hashable) -> None:
        if self.device.type == "cpu":
            step(rows, key)
            return
        self.graphs[rows, key].replay()

    def record(self, step: Callable[[int, Hashable], None], rows: int, key: Hashable) -> None:
        """Records the graph unless it is there. Other threads may go on launching and allocating meanwhile.

        One stream for all, since a pool's memory is shared within one stream only; the side stream, since the kernels
        of a replay keep the priority of the stream they were recorded on.
        """
        if self.device.type == "cpu" or (rows, key) in self.graphs:
            return
        caller, stream = torch.cuda.current_stream(), side_stream(self.device)
        stream.wait_stream(caller)
        with torch.cuda.stream(stream):
            for _ in range(2):  # lets kernels compile and libraries make their workspaces outside of the recording
                step(rows, key)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"):
            step(rows, key)
        self.pool = self.pool or graph.pool()
        caller.wait_stream(stream)
        self.graphs[rows, key] = graph
