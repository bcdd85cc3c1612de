"""One decode step of the rollout engine, and its parts: forward, head, drawing a token; and what placing rows costs.

The engine's own slots hold `rows` rows of `context` tokens, and every turn starts from there; no row ends. On a GPU
whatever the engine records as a CUDA graph is timed as a replay, on a CPU as a call. Before anything is timed, the
logits after three drawn tokens, and the log-probabilities of those, are compared with a forward of the plain model
over the same tokens: both in the same dtype, against a wider one.
  body     ids and cache to hidden states;  head: to logits;  sampler: logits to a token, noted in the slots
  place    prefilled rows into slots, with their first token: by the host's clock, since the device waits for it
  share    of the step's time;  floor: bytes that must be read (weights once, keys and values of each row once, of the
           sampler the logits) at the read-only rate of the same run;  roof: the floor's share of the time
"""

import contextlib
import copy
import functools
from typing import NamedTuple

import torch

from .clocks import CLOCKS, measure_roofs, wall_clock
from .decoding import load, make_ours
from .harness import Experiment, Wrong, fail_with, outcome, summarize, take_turns
from .table import remarks, seconds, share, shown, spread

FEW = "place 4"
RIVALS = {"step": "temperature 1", "step, greedy": "", "step, top-p": "0.95"}
RIVALS |= dict.fromkeys(("body", "head", "sampler", FEW, "place all"), "")
ROOM = 64  # columns behind the context: a turn takes at most a dozen
CALLS = 5  # of a turn, at least
DRAWN = 3  # tokens before the check
PROMPTS = 8  # different ones; rows share them as the answers to a prompt do
COMPARED = 4  # rows
TOLERANCE = 4.0  # times the error of the plain forward


class Size(NamedTuple):
    """A model of bench.stand_in, rows decoded at once, tokens of each in the cache."""

    model: str
    rows: int
    context: int


class Step:
    """An engine full of rows: `calls` by rival, with the clock of each."""

    def __init__(self, lm, size, device):
        from engine.rollouts.graphs import Graphs
        from engine.rollouts.sampling import Sampling

        self.size, self.device = size, device
        self.rollout = make_ours(lm, size.rows, size.context, ROOM)
        self.slots, self.lm = self.rollout.slots, self.rollout.lm
        self.samplings = {"step": Sampling(ROOM), "step, greedy": Sampling(ROOM, temperature=0.0)}
        self.samplings["step, top-p"] = Sampling(ROOM, top_p=0.95)
        self.graphs, weight = Graphs(self.rollout.replica.device), self.lm.lm_head.weight
        self.hidden_MD = weight.new_zeros(size.rows, weight.shape[1])
        self.logits_MV = self.slots.logits(self.hidden_MD)
        self.parts = {"body": self.body, "head": self.head, "sampler": self.draw}

    def body(self, rows, key=None):
        return self.slots._forward(self.slots.next_S[:rows, None], self.slots.cache.length_S[:rows, None])[:, 0]

    def head(self, rows, key=None):
        return self.slots.logits(self.hidden_MD)

    def draw(self, rows, key=None):
        self.slots._take(self.logits_MV, self.slots.cache.slot_S[:rows], self.samplings["step"])

    @contextlib.contextmanager
    def running(self):
        """Where the model's layers are the engine's."""
        from engine.model import attention_of
        from engine.rollouts.slots import attend

        with self.rollout.replica.reading(), attention_of(self.lm, attend):
            yield

    def fill(self):
        """Records all graphs, fills the slots, draws three tokens -> what the engine says of them, and the tokens."""
        size, slots = self.size, self.slots
        slots.start()
        for sampling in self.samplings.values():
            slots.record(size.rows, sampling)
        for name, part in self.parts.items():
            self.graphs.record(part, size.rows, name)
        draw = torch.Generator().manual_seed(0)
        shape = min(PROMPTS, size.rows), size.context
        self.prompts = torch.randint(5, self.lm.config.vocab_size, shape, generator=draw).tolist()
        self.prefill = slots.prefill(self.prompts, 0)
        self.placing(size.rows)()
        for _ in range(DRAWN - 1):
            slots.decode(size.rows, self.samplings["step"])
        self.hidden_MD.copy_(self.body(size.rows))
        self.logits_MV.copy_(self.head(size.rows))
        few = min(COMPARED, size.rows)
        ids, logp = slots.read(slots.cache.slot_S[:few], DRAWN)
        tokens = [self.prompts[m % len(self.prompts)] + ids[m] for m in range(few)]
        return {"logits": self.logits_MV[:few], "logp": torch.tensor(logp, device=self.device)}, tokens

    def placing(self, count):
        """A call that puts `count` of the prefilled rows into the first slots."""
        from engine.rollouts.sampling import philox_uniform

        slot_N = self.slots.cache.slot_S[:count]
        noise_NT = philox_uniform(0, slot_N[:, None], torch.arange(ROOM, device=self.device))
        limit_N, prompt_N, sampling = torch.full_like(slot_N, ROOM), slot_N % len(self.prompts), self.samplings["step"]
        return functools.partial(self.slots.place, self.prefill, prompt_N, slot_N, limit_N, noise_NT, sampling)

    def calls(self):
        rows = self.size.rows
        replay, run = self.slots.decode, self.graphs.run
        found = {name: functools.partial(replay, rows, sampling) for name, sampling in self.samplings.items()}
        found |= {name: functools.partial(run, part, rows, name) for name, part in self.parts.items()}
        return found | {FEW: self.placing(min(4, rows)), "place all": self.placing(rows)}

    def timed(self, name, call):
        """Seconds of each call of a turn, which begins at the context's end; Wrong if a row ended meanwhile."""
        rows = self.size.rows
        self.slots.cache.length_S[:rows], self.slots.taken_S[:rows] = self.size.context, 1
        found = (wall_clock if name.startswith("place") else CLOCKS[self.device])([call] * CALLS)
        if not all(self.slots.look(rows)[0]):
            raise Wrong("a row ended while it was timed")
        return found


def plain(lm, tokens):
    """The same as the engine says of the last tokens, by one forward of the plain model."""
    ids_NT = torch.tensor(tokens, device=lm.device)
    hidden_NTD = lm.model(input_ids=ids_NT, use_cache=False).last_hidden_state[:, -DRAWN - 1 :]
    logits_NTV = lm.lm_head(hidden_NTD)
    logp_NTV = logits_NTV[:, :-1].to(torch.promote_types(logits_NTV.dtype, torch.float32)).log_softmax(-1)
    logp_NT = logp_NTV.gather(2, ids_NT[:, -DRAWN:, None])[:, :, 0]
    return {"logits": logits_NTV[:, -1], "logp": logp_NT}


def check(row, found, lm, tokens):
    """Wrong unless the engine is as close to a wider forward as a plain one in its own dtype, by the mean square."""
    from engine.model import cast_parameters

    wider = {torch.float32: torch.float64, torch.bfloat16: torch.float32}[lm.dtype]
    near, exact = plain(lm, tokens), plain(cast_parameters(copy.deepcopy(lm), wider), tokens)
    size = lambda x: x.double().square().mean().sqrt().item()
    row["plain_error"] = size(near["logits"] - exact["logits"])
    ulps = torch.finfo(torch.float32).eps * (size(exact["logits"]) + size(exact["logp"]))
    for what in exact:
        error = row[f"{what}_error"] = size(found[what] - exact[what])
        if not error <= TOLERANCE * (row["plain_error"] + ulps):
            raise Wrong(f"{what} of a step is off by {error:.1e}, a plain forward by {row['plain_error']:.1e}")


def least_bytes(lm, size, logits_itemsize):
    """{rival: bytes that any implementation reads}."""
    from engine.rollouts.cache import slot_bytes

    head, cache = lm.lm_head.weight.nbytes, lambda rows: rows * slot_bytes(lm.config, size.context, lm.dtype)
    layers = sum(p.nbytes for p in lm.model.parameters()) - lm.model.embed_tokens.weight.nbytes
    body = layers + cache(size.rows)
    return {
        **{name: body + head for name in RIVALS if name.startswith("step")},
        "body": body,
        "head": head,
        "sampler": size.rows * len(lm.lm_head.weight) * logits_itemsize,
        FEW: cache(4),
        "place all": cache(size.rows),
    }


@torch.inference_mode()
def run(rows, device, size, rounds, threads, tick):
    tick("check")
    with outcome(rows["step"]):
        lm = load(size.model, device)
        step = Step(lm, size, device)
        with step.running():
            found, tokens = step.fill()
        check(rows["step"], found, lm, tokens)
    if rows["step"]["status"] != "ok":
        return fail_with(rows, rows["step"])
    if size.rows < 4:
        rows[FEW]["status"], rows[FEW]["why"] = "skipped", f"the rows are {size.rows}"
    calls = {name: (name, call) for name, call in step.calls().items() if rows[name]["status"] == "ok"}
    with step.running():
        take_turns(calls, rows, rounds, lambda call: step.timed(*call), tick)
    for name, least in least_bytes(lm, size, step.logits_MV.itemsize).items():
        rows[name].update(flops=0, bytes=least, roof="sum")
    describe(rows, size, measure_roofs(device, lm.dtype, size in SIZES["small"]))


def describe(rows, size, roofs):
    summarize(rows, roofs, base="step")
    for name, row in rows.items():
        row.pop("within_spread", None)  # of a part
        if "median" in row and "median" in rows["step"]:
            row["share"] = row["median"] / rows["step"]["median"]
        if "median" in row and name.startswith("step"):
            row["tokens_per_second"] = size.rows / row["median"]


SIZES = {
    "small": [Size("tiny", 4, 12)],
    "cpu": [Size("tiny", rows, 300) for rows in (8, 64)],
    "cuda": [Size(model, rows, 400) for model in ("qwen2.5-0.5b", "qwen2.5-3b") for rows in (1, 8, 32, 128)],
}
COLUMNS = (
    ("part", shown("rival")),
    ("time", shown("median", seconds)),
    ("p20-p80", spread),
    ("share", shown("share", share)),
    ("tokens/s", shown("tokens_per_second", "{:,.0f}".format)),
    ("floor", shown("floor", seconds)),
    ("roof", shown("roof_share", share)),
    ("", remarks),
)
BENCH = Experiment(SIZES, run, RIVALS, COLUMNS)
