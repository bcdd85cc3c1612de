"""Our fused kernel of one benchmark, once, inside an NVTX range of the benchmark's name: what ncu is pointed at.

python -m bench.once NAME     the first CUDA size, bf16; the call before the range compiles and tunes

The range is torch's own, in NVTX's default domain, so that the package nvtx is not needed.
"""

import sys

import torch

from . import BENCHES
from .harness import DTYPES

RIVAL = "ours fused"


def main(name):
    bench = BENCHES[name]
    inputs = bench.inputs(bench.sizes["cuda"][0], DTYPES["bf16"], "cuda")
    run = bench.rivals[RIVAL].build(inputs)
    run()
    torch.cuda.synchronize()
    with torch.cuda.nvtx.range(name):
        run()
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1])
