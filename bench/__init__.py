"""Table of benchmarks. `python -m bench.run` runs them; harness.py says how they are measured."""

from . import (
    attention,
    clipped_surrogate,
    decode_attention,
    decode_step,
    decoding,
    linear,
    linear_clipped_surrogate,
    linear_logprob,
    linear_match,
    linear_topk,
    logprob,
    overlap,
    step,
    trl,
    trl_drop_in,
)

BENCHES = {
    "logprob": logprob.BENCH,
    "logprob_forward": logprob.FORWARD,
    "linear_logprob": linear_logprob.BENCH,
    "clipped_surrogate": clipped_surrogate.BENCH,
    "linear_clipped_surrogate": linear_clipped_surrogate.BENCH,
    "linear_topk": linear_topk.BENCH,
    "linear_match": linear_match.BENCH,
    "decode_attention": decode_attention.BENCH,
    "linear": linear.BENCH,
    "attention": attention.BENCH,
    "decode_step": decode_step.BENCH,
    "decoding": decoding.BENCH,
    "decoding_pretrained": decoding.PRETRAINED_BENCH,
    "overlap": overlap.BENCH,
    "step": step.BENCH,
    "trl": trl.BENCH,
    "trl_drop_in": trl_drop_in.BENCH,
}
