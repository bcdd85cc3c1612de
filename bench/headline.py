"""The table of README.md: a line a figure, those of one results file together, and a sentence on what has none.

A figure is told of a case in which its rivals ran, in words that a function makes of the case's size and rows by rival,
or None where the case is not what it is about. Of such cases those with the newest fields and the most rows count.
"""

from collections.abc import Callable
from typing import NamedTuple

from .records import by_algo
from .table import cell, markdown, ratio, seconds, share, span
from .trl import rate

PEERS = ("Liger", "TRL", "verl", "CCE", "QuACK", "torch chunked")
"""How the names of rivals from other projects begin."""
UNMEASURABLE = "more than one GPU"
"""That no benchmark here measures."""
KINDS = {"cpu": "CPU", "cuda": "GPU"}
DTYPES = {"cpu": "fp32", "cuda": "bf16"}
"""That the engine computes in."""


class Figure(NamedTuple):
    what: str
    kind: str  # of device
    bench: str
    rivals: tuple
    words: Callable  # (size, rows) -> text or None
    most: str = ""  # the field of a size of which only the largest counts

    def told(self, case):
        rows = {row["rival"]: row for row in case["rows"] if row["status"] == "ok"}
        ran = rows.keys() >= set(self.rivals) and case["dtype"] == DTYPES[self.kind]
        return self.words(case["size"], rows) if ran else None


def beside(row, base):
    return f"{ratio(row['median'] / base['median'])}x the time of {base['rival']}"


def rate_beside_trl(size, rows):
    return f"{size['loss']} {rate(rows['ours'])}" if size["reward"] == "alternate" else None


def speed_of_lag(size, rows):
    speed, bound = (cell(rows["lag 1"], key, ratio) for key in ("speed", "bound"))
    return f"{size['model']} {speed}x; sharing the machine allows {bound}x"


def rollout_speed(size, rows):
    speed, tokens = cell(rows["ours"], "speed", ratio), cell(rows["ours"], "tokens_per_second", "{:,.0f}".format)
    lengths = " to ".join(dict.fromkeys(str(size[key]) for key in ("shortest", "longest")))
    return f"{size['model']}, answers of {lengths} tokens: {speed}x, {tokens} tokens/s"


def decode_speed(size, rows):
    tokens, of_roof = cell(rows["step"], "tokens_per_second", "{:,.0f}".format), cell(rows["step"], "roof_share", share)
    return f"{size['model']}, {size['rows']} rows: {tokens} tokens/s, {of_roof} of the roof"


def share_of_roof(size, rows):
    ours = rows["ours fused"]
    return f"{cell(ours, 'roof_share', share)} of the {ours['roof']} roof, {beside(ours, rows['eager'])}"


def share_of_products(size, rows):
    ours, products = rows["ours fused"], rows["GEMMs alone"]
    least = f"its matrix products alone take {share(products['median'] / ours['median'])} of the time"
    return f"{least}; {beside(ours, rows['eager'])}, {cell(ours, 'extra_ratio', ratio)}x its memory"


def beside_peers(size, rows):
    peers = [row for name, row in rows.items() if name.startswith(PEERS)]
    return beside(rows["ours fused"], min(peers, key=lambda row: row["median"])) if peers else None


def packed_attention(size, rows):
    varlen, padded, dense = (seconds(rows[name]["median"]) for name in ("varlen", "padded", "default"))
    return f"{size['H']} heads of {size['D']}: varlen {varlen}, padded {padded}, dense mask {dense}"


def update_of(model):
    def words(size, rows):
        if size["model"].endswith(model) and not size["zero_advantage"] and is_of_grpo(size):
            some = [row for name, row in rows.items() if name.startswith(FUSED) and "LoRA" not in name]
            times = [f"{seconds(row['median'])} {row['rival'].replace(', ', ' and ')}" for row in some]
            return ", ".join(times) + " (timed once)" * all(len(row.get("seconds", ())) == 1 for row in some)

    return words


def adapters(size, rows):
    kernels = "ours fused" if "ours fused, LoRA" in rows else "ours chunked"
    full, lora = rows[kernels], rows[f"{kernels}, LoRA"]
    if not size["zero_advantage"] and "all_bytes" in lora and is_of_grpo(size):
        times, memory = (ratio(lora[key] / full[key]) for key in ("median", "all_bytes"))
        return f"{size['model']} {times}x the time, {memory}x the memory in all"


def is_of_grpo(size):
    """Older files are of nothing else."""
    return size.get("algo", "grpo") == "grpo"


def beside_frozen(size, rows):
    if not is_of_grpo(size):
        ours = rows["ours fused" if "ours fused" in rows else "ours chunked"]
        memory = cell(ours, "extra_ratio", ratio)
        return f"{size['algo']} of {size['model']} {beside(ours, rows['eager'])}, {memory}x its memory"


def gain(size, rows):
    before, after = (cell(rows[name], "greedy", share) for name in ("before", "after"))
    return f"greedy {before}, then {after} after {cell(rows['after'], 'steps', str)} steps"


HEAD, FUSED = "linear_clipped_surrogate", ("eager", "ours fused")
ADAPTERS = "an update of adapters beside one of all weights"
FIGURES = (
    Figure("steps of GRPO a second beside TRL's", "cpu", "trl", ("TRL", "ours"), rate_beside_trl),
    Figure("steps a second at lag 1 beside lag 0", "cpu", "overlap", ("lag 0", "lag 1"), speed_of_lag),
    Figure("rollouts beside `generate`", "cpu", "decoding", ("generate", "ours"), rollout_speed, "longest"),
    Figure(ADAPTERS, "cpu", "step", ("ours chunked", "ours chunked, LoRA"), adapters),
    Figure("a decode step", "cuda", "decode_step", ("step",), decode_speed, "rows"),
    Figure("log-probabilities from logits", "cuda", "logprob", FUSED, share_of_roof, "N"),
    Figure("head and loss", "cuda", HEAD, (*FUSED, "GEMMs alone"), share_of_products, "N"),
    Figure("attention of packed rows", "cuda", "attention", ("varlen", "padded", "default"), packed_attention, "H"),
    Figure("an update of a 0.5B model", "cuda", "step", FUSED, update_of("0.5b")),
    Figure("an update of a 3B model", "cuda", "step", FUSED, update_of("3b")),
    Figure(ADAPTERS, "cuda", "step", ("ours fused", "ours fused, LoRA"), adapters),
    Figure("an update beside a frozen model", "cuda", "step", FUSED, beside_frozen),
    Figure("head and loss beside the fastest peer", "cuda", HEAD, ("ours fused",), beside_peers, "N"),
    Figure("rollouts beside `generate`", "cuda", "decoding", ("generate", "ours"), rollout_speed),
    Figure("steps a second at lag 1 beside lag 0", "cuda", "overlap", ("lag 0", "lag 1"), speed_of_lag),
    Figure("GSM8K with real weights", "cuda", "gsm8k", ("before", "after"), gain),
)


def learned(results):
    """[(file, what, text)]: what a verifier adds to imitation."""
    if "learning" not in results.files:
        return []
    *rl, (_, control) = by_algo(results.files["learning"]["rows"]).items()
    after = [f"{span(rows, 'accuracy_after_sampled')} after {algo}" for algo, rows in rl]
    on = f"{span(control, 'accuracy_after_sampled')} where it goes on for as long"
    text = f"{span(control, 'accuracy_before_sampled')} from imitation, {', '.join(after)}; {on}"
    return [("learning", f"sampled answers that are right, {len(control)} seeds", text)]


def tell(results, figure):
    """[(file, what, text)] of a figure; nothing where nothing was measured."""
    texts = {}
    for card in results.cards(figure.kind):
        groups = results.by_fields(results.cases(figure.bench, figure.kind, card))
        telling = [[(case, file) for case, file in group if figure.told(case)] for group in groups]
        newest, rows = next(filter(None, telling), []), lambda case: case["size"].get(figure.most, 0)
        for case, file in newest:
            if rows(case) == max(rows(other) for other, _ in newest):
                texts.setdefault(file, []).append(figure.told(case))
    return [(file, figure.what, "; ".join(some)) for file, some in texts.items()]


def headline(results):
    found = {figure: tell(results, figure) for figure in FIGURES}
    by_place = {}
    for file, *line in [*learned(results), *(line for lines in found.values() for line in lines)]:
        machine, commit = results.where(file)
        by_place.setdefault(machine, {}).setdefault(commit, []).append(line)
    cells = []
    for machine, by_commit in by_place.items():
        cells += [[f"**{machine}**", "", ""]]
        cells += [[*line, "" if i else commit] for commit, some in by_commit.items() for i, line in enumerate(some)]
    lacking = [f"{figure.what} ({KINDS[figure.kind]})" for figure in FIGURES if not found[figure]]
    said = f"Not measured: {', '.join([*lacking, UNMEASURABLE])}."
    return f"{said}\n\n{markdown(['', 'measured', 'on'], cells)}" if cells else said
