"""Functions under the names and signatures that TRL and verl call, so that one import replaces theirs.

Triton on a GPU, plain torch on a CPU. They return fp32 whatever the logits, and keep no second [.., V] tensor: the one
they make is the gradient. But rows need one stride: a slice such as logits[:, :-1] is copied, so slice the result.
"""

from . import chunked, fused


def _logprob(logits, ids):
    if ids.shape != logits.shape[:-1]:
        raise ValueError(f"ids must have shape {list(logits.shape[:-1])}, got {list(ids.shape)}")
    kernels = fused if logits.is_cuda else chunked
    return kernels.logprob(logits.reshape(-1, logits.shape[-1]), ids.reshape(-1)).view(ids.shape)


def selective_log_softmax(logits, index):
    """TRL's: logits [.., V] float, index [..] int64 -> log-probabilities [..] fp32."""
    return _logprob(logits, index)


def logprobs_from_logits(logits, labels, inplace_backward=True):
    """verl's: logits [.., V] float, labels [..] int64 -> log-probabilities [..] fp32.

    inplace_backward is accepted and has no effect: the gradient is a new tensor, the logits stay whole.
    """
    return _logprob(logits, labels)
