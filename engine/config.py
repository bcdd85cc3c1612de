"""Config: defaults <- configs/<algo>.yaml (and, for the embedded model, its own) <- further files <- command line."""

import dataclasses
import datetime
import math
import types
import typing
from dataclasses import dataclass
from pathlib import Path

import yaml

from engine.errors import UserError
from engine.hints import OURS, nearest, setting_meant

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@dataclass(frozen=True)
class Config:
    """Every setting of a run. Counts are global (all ranks together) unless the comment says otherwise."""

    algo: str = "grpo"  # sft | grpo | dr_grpo | dapo
    name: str = ""  # folder under `out`; empty: <algo>-<model>-seed<seed>
    out: str = "runs"
    seed: int = 0
    steps: int = 100  # rollouts (rl) or optimizer steps (sft)
    resume: str = ""  # "" starts anew | auto | a checkpoint folder
    new_data: bool = False  # a resume may go on with other training data
    dry_run: bool = False
    device: str = "auto"  # auto | cpu | cuda

    # model
    model: str = "tiny"  # tiny (embedded) | a Hugging Face folder | a hub id
    init_from: str = ""  # folder with the first weights; empty: the model's own (rl on tiny: its SFT export)
    enable_thinking: bool | None = None  # passed to the chat template when set (Qwen3)
    date: str = ""  # YYYY-MM-DD, what a chat template takes for today; empty: the day the run began
    kernels: str = "auto"  # auto | eager | chunked | fused

    # data
    task: str = "arithmetic"
    train_data: str = ""  # hub id or file; empty: the task's own
    test_data: str = ""
    prompt_column: str = ""
    answer_column: str = ""
    trace_column: str = ""
    system_prompt: str | None = None  # None: the task's own
    train_limit: int = 0  # 0: all rows
    eval_size: int = 512  # held-out problems; 0: no evaluation
    max_prompt_tokens: int = 512  # longer prompts are dropped and counted
    rewards: tuple[str, ...] = ()  # name[:weight] or file.py:function[:weight]; empty: the task's own
    reward_on_error: str = "raise"  # raise | zero (counted)

    # rollout
    rollout: str = "native"
    prompts_per_step: int = 16
    group_size: int = 8
    max_new_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    rollout_batch: int = 0  # sequences decoded at once per rank (slots of the KV cache); 0: all of a step
    kv_memory_gib: float = 0.0  # the KV cache's limit per rank, with fewer slots where they do not fit; 0: none
    lag: int = 0  # versions a rollout's weights may be behind: 0 strictly on-policy | 1 rollout beside the update
    dynamic_sampling: bool = False  # drop groups of equal correctness and refill
    max_refills: int = 4  # further draws per step before training on what there is
    overlong_penalty: bool = False  # -0.5 at the length limit without a valid answer

    # loss
    beta: float = 0.0  # KL to the frozen reference; 0 loads no reference
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    entropy_coef: float = 0.0
    importance_cap: float | None = None
    adv_eps: float = 1e-4
    adv_unbiased: bool = True  # std with n - 1
    # what the ratio is taken against: on_policy (1) | recompute (before the first update) | sampler (the rollout's own)
    logp_old: str = "auto"  # auto: on_policy for one update of lag 0 or with importance_cap, else sampler | recompute
    updates_per_rollout: int = 1
    epochs: int = 1

    # optimizer
    lr: float = 1e-6
    betas: tuple[float, ...] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: str = "constant"  # constant | cosine
    warmup_steps: int = 0
    min_lr_ratio: float = 0.0
    max_grad_norm: float = 1.0

    # sft
    pack_length: int = 512  # tokens per packed row
    rows_per_step: int = 8  # packed rows per optimizer step

    # engine
    share_prompts: bool | None = None  # a prompt goes through the update once for all its answers; None: where it saves
    micro_batch: int = 16  # sequences (rl) or packed rows (sft) per forward, per rank
    grad_sync: str = "auto"  # every | last: when gradients are reduced under accumulation; auto: as a GPU fits it
    reshard_after_forward: bool | None = None  # gather weights anew for the backward; None: as a GPU fits it
    activation_checkpointing: bool = False
    cpu_offload: bool = False
    compile: bool = False
    threads: int = 0  # CPU threads per rank, at lag 1 of rollout and update each; 0: the cores shared out

    # seeing it
    eval_every: int = 0  # steps; 0: only before and after
    save_every: int = 0  # steps; 0: only at the end
    keep: int = 2  # checkpoints kept besides the best
    tensorboard: bool = True
    wandb: str = "off"  # off | offline | online
    num_samples: int = 2  # completions written to samples.jsonl each step
    profile_steps: str = ""  # "3:6" starts the CUDA profiler at step 3 and stops it before step 6
    profile_trace: str = ""  # file for a torch.profiler trace of profile_steps; empty: the CUDA profiler's range (nsys)
    grace_seconds: float = 25.0  # after SIGTERM, time to reach the end of a step

    @property
    def start(self) -> str:
        """Where the first weights come from."""
        return self.init_from or self.model

    @property
    def today(self) -> datetime.date | None:
        """What a chat template takes for today; None: the day it is."""
        return parse_date(self.date) if self.date else None

    @property
    def run_dir(self) -> Path:
        return Path(self.out) / (self.name or f"{self.algo}-{Path(self.model).name}-seed{self.seed}")


TYPES = typing.get_type_hints(Config)
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
BOOLS = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)
DASHES = ("-", "\N{EN DASH}", "\N{EM DASH}", "\N{MINUS SIGN}")  # as documents have them
LAUNCH = ("resume", "new_data", "dry_run")  # settings of one launch, not of the run
CHOICES = {
    "device": ("auto", "cpu", "cuda"),
    "kernels": ("auto", "eager", "chunked", "fused"),
    "logp_old": ("auto", "on_policy", "recompute", "sampler"),
    "schedule": ("constant", "cosine"),
    "grad_sync": ("auto", "every", "last"),
    "wandb": ("off", "offline", "online"),
    "reward_on_error": ("raise", "zero"),
    "lag": (0, 1),
}
POSITIVE = ("steps", "prompts_per_step", "max_new_tokens", "updates_per_rollout", "epochs", "micro_batch",
            "pack_length", "rows_per_step", "keep", "max_prompt_tokens", "max_grad_norm", "grace_seconds")  # fmt: skip
NOT_NEGATIVE = ("beta", "clip_low", "clip_high", "weight_decay", "warmup_steps", "eval_size", "eval_every",
                "save_every", "max_refills", "temperature", "top_k", "train_limit", "num_samples", "seed",
                "threads", "rollout_batch", "kv_memory_gib", "adv_eps", "entropy_coef", "eps", "lr")  # fmt: skip


def convert(key: str, value, kind=None):
    """`value` (from YAML or the command line) as the field's type; UserError when it is not one."""
    kind = kind or TYPES[key]
    if typing.get_origin(kind) is types.UnionType:
        if value is None or str(value).lower() in ("none", "null"):
            return None
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if typing.get_origin(kind) is tuple:
        if value is None:
            return ()
        part = typing.get_args(kind)[0]
        parts = value if isinstance(value, list | tuple) else [value] if part is str else str(value).split(",")
        return tuple(convert(key, v, part) for v in parts)
    if isinstance(value, list):
        raise UserError(f"{key} takes one value, not {' '.join(map(str, value))!r}.")
    if value is None and kind is not str:
        raise UserError(f"{key} needs a value.")
    try:
        if kind is bool:
            return BOOLS[str(value).lower()]
        if kind is int and float(value) != int(float(value)):
            raise ValueError
        if kind is float:
            return float(str(value).lower().replace(".inf", "inf"))  # as YAML writes it
        return int(float(value)) if kind is int else "" if value is None else kind(value)
    except (ValueError, KeyError, OverflowError):
        raise UserError(f"{key} must be {KINDS[kind]}, not {value!r}.") from None


def text_of(key: str, node: yaml.Node) -> str | list[str] | None:
    """What a YAML file says for `key`, as written: YAML would take off for a boolean, 3:6 for sixties, 010 for eights.

    None for null, ~ or nothing, unless quoted.
    """
    if isinstance(node, yaml.ScalarNode):
        return None if node.style is None and node.value in ("", "~", "null", "Null", "NULL") else node.value
    if isinstance(node, yaml.SequenceNode) and all(isinstance(part, yaml.ScalarNode) for part in node.value):
        return [part.value for part in node.value]
    raise UserError(f"{key} must be one value or a list of them, not what line {node.start_mark.line + 1} says.")


def read_yaml(path: str | Path) -> dict:
    """The settings of a file by their types; what is no setting is None. UserError for what cannot be read."""
    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except FileNotFoundError:
        near = nearest(str(path), [str(p.relative_to(CONFIGS.parent)) for p in CONFIGS.rglob("*.yaml")])
        raise UserError(f"There is no config file {path}.{near}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"The config file {path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    pairs = root.value if isinstance(root, yaml.MappingNode) else [(root, None)] if root else []
    if not all(isinstance(key, yaml.ScalarNode) and node for key, node in pairs):
        raise UserError(f"The config file {path} must hold `key: value` lines.")
    values = {}
    for key_node, node in pairs:
        key, line = key_node.value.replace("-", "_"), key_node.start_mark.line + 1
        if key in values:
            raise UserError(f"The config file {path} sets {key} once more in line {line}; keep one of them.")
        values[key] = convert(key, text_of(key, node)) if key in TYPES else None
    return values


def parse_args(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """(config files, settings) from `--config A B --key value --key=value --flag`."""
    files, settings, i = [], {}, 0
    if "--help" in argv or "-h" in argv:
        print("\n".join(f"--{f.name}  {f.default!r}" for f in dataclasses.fields(Config)))
        raise SystemExit(0)
    while i < len(argv):
        if not argv[i].startswith("--"):
            raise UserError(misspelt(argv[i]))
        key, equals, value = argv[i][2:].partition("=")
        key, i = key.replace("-", "_"), i + 1
        values = [value] if equals else []
        while not equals and i < len(argv) and not argv[i].startswith("--"):
            if argv[i].startswith(DASHES) and option_of(argv[i])[0] in TYPES:
                raise UserError(misspelt(argv[i]))
            values.append(argv[i])
            i += 1
        if key == "config" and values:
            files += values
        elif not values and TYPES.get(key) is bool:
            settings[key] = "true"
        elif not values:
            raise UserError(f"--{key} needs a value." if key in TYPES or key == "config" else unknown(key))
        else:
            settings[key] = values[0] if len(values) == 1 else values
    return files, settings


def option_of(word: str) -> tuple[str, str]:
    """(setting, value) of `--key=value`, with whatever dashes."""
    key, _, value = word.lstrip("".join(DASHES)).partition("=")
    return key.replace("-", "_"), value


def misspelt(word: str) -> str:
    """What is wrong with a word that stands where an option should."""
    key, value = option_of(word)
    near = setting_meant(key, TYPES) if key.rpartition(".")[2] in OURS.keys() | TYPES.keys() else ""
    if key in TYPES:
        near = f" Did you mean --{key} {value or '...'}?"
    if word.endswith((".yaml", ".yml")):
        near = f" Did you mean --config {word}?"
    return f"{word!r} is not an option: settings are written --key value.{near}"


def take_option(argv: list[str], option: str, kind: type = str, default=None):
    """Removes `option VALUE` or `option=VALUE`, which is no setting of the config, from the arguments; the value."""
    at = next((i for i, word in enumerate(argv) if word.partition("=")[0] == option), None)
    if at is None:
        return default
    _, equals, value = argv.pop(at).partition("=")
    if not equals and at == len(argv):
        raise UserError(f"{option} needs a value.")
    return convert(option, value if equals else argv.pop(at), kind)


def unknown(key: str) -> str:
    return f"There is no setting {key!r}.{setting_meant(key, TYPES)}"


def load_config(argv: list[str]) -> Config:
    """The resolved config for a command line (without the program's name); UserError on anything unknown."""
    files, settings = parse_args(argv)
    values: dict = {}
    layers = [read_yaml(f) for f in files] + [settings]
    for layer in layers:
        for key in layer:
            if key not in TYPES:
                raise UserError(unknown(key))
        values |= layer
    algo = convert("algo", values.get("algo", Config.algo))
    algos = sorted(p.stem for p in CONFIGS.glob("*.yaml"))
    if algo not in algos:
        raise UserError(f"There is no algorithm {algo!r}; known: {', '.join(algos)}.{nearest(algo, algos)}")
    defaults = read_yaml(CONFIGS / f"{algo}.yaml")
    if values.get("model", Config.model) == "tiny":
        defaults |= read_yaml(CONFIGS / "models" / ("tiny-sft.yaml" if algo == "sft" else "tiny.yaml"))
    values = defaults | values | {"algo": algo}
    config = Config(**{key: convert(key, value) for key, value in values.items()})
    validate(config)
    return config


def validate(config: Config) -> None:
    """UserError for a value out of range; what depends on the number of ranks is `check_batch`."""
    for key, choices in CHOICES.items():
        if getattr(config, key) not in choices:
            raise UserError(f"{key} must be one of {', '.join(map(str, choices))}, not {getattr(config, key)!r}.")
    for key in POSITIVE:
        if not getattr(config, key) > 0:
            raise UserError(f"{key} must be above 0, not {getattr(config, key)}.")
    for key in NOT_NEGATIVE:
        if not getattr(config, key) >= 0:
            raise UserError(f"{key} must not be negative, as {getattr(config, key)} is.")
    for key, value in dataclasses.asdict(config).items():
        if isinstance(value, float) and not math.isfinite(value) and key not in ("clip_high", "max_grad_norm"):
            raise UserError(f"{key} must be a finite number, not {value}.")
    if config.seed >= 2**32:
        raise UserError(f"seed must be below 2**32, as {config.seed} is not.")
    if not 0 <= config.min_lr_ratio <= 1:
        raise UserError(f"min_lr_ratio must be in [0, 1], not {config.min_lr_ratio}.")
    if config.algo != "sft" and config.group_size < 2:
        raise UserError(f"group_size {config.group_size} gives every answer advantage 0; use at least 2 (8 is usual).")
    if not 0 < config.top_p <= 1:
        raise UserError(f"top_p must be in (0, 1], not {config.top_p}.")
    if config.algo != "sft" and config.temperature == 0:
        raise UserError("temperature 0 samples the same answer every time, so nothing can be learned; use 1.0.")
    if config.clip_low > 1:
        raise UserError(f"clip_low must be at most 1, not {config.clip_low}: the ratio cannot fall below 0.")
    if config.dual_clip is not None and not config.dual_clip > 1:
        raise UserError(f"dual_clip must be above 1, not {config.dual_clip}; 3 is usual.")
    if config.importance_cap is not None and not config.importance_cap > 0:
        raise UserError(f"importance_cap must be above 0, not {config.importance_cap}; 2 is usual.")
    if len(config.betas) != 2 or not all(0 <= b < 1 for b in config.betas):
        raise UserError(f"betas must be two numbers in [0, 1), not {config.betas}.")
    if config.updates_per_rollout * config.epochs > 1 and config.logp_old == "on_policy":
        raise UserError("logp_old on_policy holds for a single update only; use auto, recompute or sampler.")
    if config.lag and config.logp_old == "on_policy" and config.importance_cap is None:
        raise UserError("At lag 1 logp_old on_policy needs importance_cap, as 2.0; or use auto.")
    if config.importance_cap is not None and config.logp_old == "sampler":
        raise UserError("importance_cap has no effect with logp_old sampler: the ratio is against the sampler already.")
    if config.date:
        parse_date(config.date)
    if config.profile_steps:
        parse_window(config.profile_steps)
    if config.profile_trace and not config.profile_steps:
        raise UserError("profile_trace needs profile_steps FIRST:END, the steps to record.")
    if config.profile_trace and not config.profile_trace.endswith((".json", ".json.gz")):
        raise UserError(f"profile_trace must end in .json or .json.gz, as {config.profile_trace!r} does not.")


def parse_date(text: str) -> datetime.date:
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        raise UserError(f"date must be written YYYY-MM-DD, as 2026-01-31; not {text!r}.") from None


def parse_window(text: str) -> tuple[int, int]:
    """(first, end) of a step window '3:6', end excluded."""
    first, _, end = text.partition(":")
    if not (first.isdecimal() and end.isdecimal() and int(first) < int(end)):
        raise UserError(f"profile_steps must read FIRST:END with FIRST < END, as 3:6; not {text!r}.")
    return int(first), int(end)


def check_batch(config: Config, world_size: int) -> None:
    """UserError when the global batch cannot be cut evenly over ranks and updates."""
    key = "rows_per_step" if config.algo == "sft" else "prompts_per_step"
    count = getattr(config, key)
    if count % world_size:
        lower = max(count // world_size, 1) * world_size
        raise UserError(f"{key} {count} does not divide over {world_size} ranks; use {lower}.")
    sequences = config.prompts_per_step // world_size * config.group_size
    if config.algo != "sft" and sequences % config.updates_per_rollout:
        raise UserError(
            f"updates_per_rollout {config.updates_per_rollout} does not divide the {sequences} sequences of a rank; "
            f"use a divisor of {sequences}."
        )


def save_config(config: Config, path: Path) -> None:
    """The resolved config as YAML that `--config` reads back, but for what belongs to one launch."""
    values = {
        k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items() if k not in LAUNCH
    }
    path.write_text(yaml.safe_dump(values, sort_keys=False))
