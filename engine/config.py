"""Config: defaults <- configs/<algo>.yaml (and configs/models/<model>/) <- further files <- command line.

Not tyro (1.0.17, tried): it groups nested classes only, knows no ranges, refuses 1e3, none, .inf and one of --flag and
--flag true, and answers in a frame; the layers, text as written and names of other trainers would all stay ours.
"""

import dataclasses
import datetime
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NoReturn, TypeVar

import yaml

from engine.errors import UserError
from engine.hints import OURS, nearest, setting_meant
from engine.settings import check, convert, explain, groups_of, setting
from kernels.spec import SurrogateSpec

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
ALGORITHMS = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


@dataclass(frozen=True)
class Config:
    """Every setting of a run. Counts are global (all ranks together) unless the meaning says otherwise."""

    RUN: ClassVar = "The run"
    algo: str = setting("grpo", " | ".join(ALGORITHMS))
    name: str = setting("", "folder under `out`; empty: <algo>-<model>-seed<seed>")
    out: str = setting("runs", "folder of the runs")
    steps: int = setting(100, "rollouts (rl) or optimizer steps (sft)", above=0)
    init_from: str = setting("", "folder with the first weights; empty: the model's own, or as warm_start says")
    warm_start: str = setting("", "algorithm whose run makes the first weights, once, unless init_from names some")
    resume: str = setting("", "empty: start anew | auto: go on with the newest checkpoint | a checkpoint folder")
    new_data: bool = setting(False, "a resume may go on with other training data")
    dry_run: bool = setting(False, "only print the settings, tokens per step, estimated memory, and whether it fits")

    MODEL: ClassVar = "The model, and what computes it"
    model: str = setting("tiny", "a folder of configs/models, as tiny | a Hugging Face folder | a hub id")
    enable_thinking: bool | None = setting(None, "passed to the chat template where set (Qwen3)")
    date: str = setting("", "YYYY-MM-DD, what a chat template takes for today; empty: the day the run began")
    seed: int = setting(0, "of weights, data, answers and dropout", least=0, below=2**32)
    device: str = setting("auto", "auto: a GPU where there is one", choices=("auto", "cpu", "cuda"))
    kernels: str = setting("auto", "auto: fused on a GPU, else chunked", choices=("auto", "eager", "chunked", "fused"))

    DATA: ClassVar = "Problems and rewards"
    task: str = setting("arithmetic", "arithmetic | gsm8k | math500 | math | jsonl (your own, by named columns)")
    train_data: str = setting("", "hub id, folder or file; empty: the task's own")
    test_data: str = setting("", "the same for held-out problems")
    prompt_column: str = setting("", "column of the prompts, a.b where nested; empty: the task's own")
    answer_column: str = setting("", "column of the right answers")
    trace_column: str = setting("", "column of the traces that sft imitates")
    chosen_column: str = setting("", "column of the better answers (dpo), text, messages or whole chats")
    rejected_column: str = setting("", "column of the worse ones")
    system_prompt: str | None = setting(None, "none: the task's own")
    train_limit: int = setting(0, "training problems taken; 0: all", least=0)
    eval_size: int = setting(512, "held-out problems; 0: no evaluation", least=0)
    max_prompt_tokens: int = setting(512, "longer prompts are dropped and counted", above=0)
    rewards: tuple[str, ...] = setting((), "name[:weight] or file.py:function[:weight], several; else the task's own")
    reward_on_error: str = setting("raise", "zero: a reward that fails is 0, and counted", choices=("raise", "zero"))

    ANSWERS: ClassVar = "Drawing answers"
    rollout: str = setting("native", "the back-end: native")
    max_new_tokens: int = setting(512, "longest answer", above=0)
    temperature: float = setting(1.0, "0: the likeliest token", also=0, least=0.01, most=100)
    top_p: float = setting(1.0, "draw from the likeliest tokens of this mass; 1: from all", above=0, most=1)
    top_k: int = setting(0, "draw from so many likeliest tokens; 0: from all", least=0)
    stop: tuple[str, ...] = setting((), "texts that end an answer, and are part of it")
    rollout_batch: int = setting(0, "sequences decoded at once per rank (KV cache slots); 0: a step's", least=0)
    kv_memory_gib: float = setting(0.0, "limit of the KV cache per rank, with fewer slots to fit; 0: none", least=0)

    ROLLOUT: ClassVar = "The rollout of a step (rl)"
    prompts_per_step: int = setting(16, "prompts of a step", above=0)
    group_size: int = setting(8, "answers to each prompt", above=0)
    lag: int = setting(0, "0: strictly on-policy; 1: a rollout beside the update, one version behind", choices=(0, 1))
    dynamic_sampling: bool = setting(False, "drop groups of equal correctness and refill")
    max_refills: int = setting(4, "further draws per step before training on what there is", least=0)
    overlong_penalty: bool = setting(False, "-0.5 at the length limit without a valid answer")
    overlong_buffer: int = setting(0, "0 to -1 over the last so many tokens of max_new_tokens; 0: none", least=0)

    LORA: ClassVar = "Adapters (LoRA): thin factors, trained beside a frozen base"
    lora_rank: int | None = setting(
        None,
        "their width, as 16, with about ten times the lr of all weights; none: all weights learn, or an adapter's own",
        above=0,
    )
    lora_alpha: float | None = setting(None, "what they add is times this / lora_rank; none: 32, or its own", above=0)
    lora_dropout: float = setting(0.0, "of what goes into them (sft)", least=0, below=1)
    lora_targets: tuple[str, ...] = setting(
        (), "ends of linears' names, spaces between, as q_proj mlp.*_proj; none: all"
    )
    lora_base: str = setting(
        "replicated",
        "the base, on each rank once for policy, reference and rollout; or sharded over ranks, and another copy of it "
        "for the rollout, if there is one",
        choices=("replicated", "sharded"),
    )
    export: str = setting("adapter", "merged: the base with them in it", choices=("adapter", "merged"))

    LOSS: ClassVar = "The loss (rl)"
    beta: float = setting(
        0.0,
        "weight of the KL to the frozen reference, 0 loads no reference; in dpo what log-ratios are multiplied with",
        least=0,
    )
    reference: str = setting(
        "live",
        "what is compared with: live, the model as it was at the start, beside the policy; adapters_off, the policy "
        "without its adapters; precomputed, what the start says of all pairs, asked once and kept in the run's folder",
        choices=("live", "adapters_off", "precomputed"),
    )
    clip_low: float = setting(0.2, "the ratio is clipped at 1 less this (0 to 1; 1: never)")
    clip_high: float = setting(0.2, "and at 1 plus this (at least 0; inf, in YAML .inf: never)", infinite=True)
    dual_clip: float | None = setting(None, "bound on a bad answer's loss, in advantages (above 1; 3 is usual)")
    entropy_coef: float = setting(0.0, "weight of the entropy bonus", least=0)
    tau_pos: float = setting(1.0, "how steeply sapo's gate closes on a good answer's tokens", above=0)
    tau_neg: float = setting(1.05, "and on a bad one's", above=0)
    importance_cap: float | None = setting(None, "cap of the importance weight, policy / sampler (above 0; 2 is usual)")
    importance_mask: tuple[float, float] = setting(
        (), "its bounds, outside of which a token teaches nothing (IcePop; 0.5 5 is usual); empty: none", infinite=True
    )
    sequence_mask: tuple[float, float] = setting(
        (), "bounds of its geometric mean over an answer, which is left out beyond them, as 0.9 1.1; empty: none",
        infinite=True,
    )  # fmt: skip
    adv_eps: float = setting(1e-4, "added to the std that advantages are divided by", least=0)
    adv_unbiased: bool = setting(True, "that std with n - 1")
    logp_old: str = setting(
        "auto",
        "what the ratio is taken against: on_policy (1), recompute (before the first update), sampler (the rollout's "
        "own); auto: recompute with sequence_mask, sampler at lag 1 without importance_cap or importance_mask, else "
        "on_policy for one update, recompute for several",
        choices=("auto", "on_policy", "recompute", "sampler"),
    )
    updates_per_rollout: int = setting(1, "parts that a rollout is cut into, an optimizer step each", above=0)
    epochs: int = setting(1, "times that a rollout is learned from", above=0)

    OPTIMIZER: ClassVar = "The optimizer (AdamW)"
    lr: float = setting(1e-6, "learning rate, at its highest", least=0)
    betas: tuple[float, float] = setting((0.9, 0.95), "decay of both moments", least=0, below=1)
    eps: float = setting(1e-8, "added to the root of the second moment", least=0)
    weight_decay: float = setting(0.0, "AdamW's, of matrices only", least=0)
    schedule: str = setting("constant", "after the warm-up", choices=("constant", "cosine"))
    warmup_steps: int = setting(0, "optimizer steps of linear growth to lr", least=0)
    min_lr_ratio: float = setting(0.0, "where cosine ends, as a share of lr", least=0, most=1)
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm; inf: never", above=0, infinite=True)

    SFT: ClassVar = "Traces (sft, distill)"
    step_tokens: int = setting(4096, "tokens of an optimizer step, at most; a trace has max_new_tokens", above=0)

    PAIRS: ClassVar = "Preferences (dpo)"
    pairs_per_step: int = setting(16, "pairs of an optimizer step", above=0)
    preference: str = setting("sigmoid", "loss of a pair's margin", choices=("sigmoid", "ipo"))
    label_smoothing: float = setting(
        0.0, "share of pairs that may be the wrong way round (sigmoid)", least=0, below=0.5
    )
    length_normalised: bool = setting(False, "log-ratios by the token, not by the answer")
    nll_coef: float = setting(0.0, "weight of the chosen answer's negative log-likelihood by the token", least=0)

    TEACHER: ClassVar = "A teacher (distill, opd)"
    teacher: str = setting("", "a model with the same vocabulary, a folder | a hub id; empty: the student at the start")
    context: str = setting(
        "zeroshot",
        "what a teacher sees before a question: nothing, solved examples, or these with each other's answers",
        choices=("zeroshot", "fewshot", "shuffled_answers"),
    )
    shots: int = setting(4, "solved examples, from the training data, other ones for each question", above=0)
    max_context_tokens: int = setting(2048, "longest question with its examples", above=0)
    match: str = setting(
        "mse",
        "how logits are matched: squared error of the teacher's likeliest tokens, or their kl and that of the rest",
        choices=("mse", "kl"),
    )
    match_coef: float = setting(1.0, "weight of that match beside the likelihood of the trace (lambda)", least=0)
    match_top_k: int = setting(32, "the teacher's likeliest tokens that are matched", above=0)
    reward_coef: float = setting(0.0, "weight of the rewards' advantage beside the teacher's (opd)", least=0)

    ENGINE: ClassVar = "Memory and speed"
    share_prompts: bool | None = setting(None, "compute a prompt once for all its answers; none: where it saves")
    micro_tokens: int = setting(8192, "tokens per forward, per rank, at most; a longer sample goes alone", above=0)
    grad_sync: str = setting("auto", "the micro-batch to reduce at; auto: by memory", choices=("auto", "every", "last"))
    reshard_after_forward: bool | None = setting(None, "gather weights anew for the backward; none: as a GPU fits it")
    activation_checkpointing: bool = setting(False, "compute activations again in the backward")
    cpu_offload: bool = setting(False, "master weights and optimizer on the host")
    memory_gib: float = setting(
        0.0, "GiB of a GPU for --dry-run, reshard_after_forward, grad_sync; 0: its own", least=0
    )
    compile: bool = setting(False, "torch.compile the layers")
    threads: int = setting(0, "CPU threads per rank, at lag 1 of rollout and update each; 0: its share", least=0)

    LOG: ClassVar = "Seeing it, keeping it"
    eval_every: int = setting(0, "steps; 0: only before and after", least=0)
    save_every: int = setting(0, "steps; 0: only at the end", least=0)
    keep: int = setting(2, "checkpoints kept besides the best", above=0)
    tensorboard: bool = setting(True, "curves for TensorBoard in the run's folder")
    wandb: str = setting("off", "Weights & Biases", choices=("off", "offline", "online"))
    num_samples: int = setting(2, "answers written to samples.jsonl each step", least=0)
    profile_steps: str = setting("", "3:6 records steps 3 to 5 and ends: no accuracies, no checkpoint, no export")
    profile_trace: str = setting("", "file for torch.profiler's trace of these steps; empty: a range for nsys")
    grace_seconds: float = setting(25.0, "after SIGTERM, time to reach the end of a step", above=0)

    @property
    def title(self) -> str:
        """For people and fingerprints; what an algorithm does differently is in its row."""
        return self.algo

    @property
    def rolls_out(self) -> bool:
        """Whether it learns from answers of its own."""
        return self.algo not in FROM_DATA

    @property
    def corrections(self) -> list[str]:
        """The settings given of those that correct for a sampler that is not the policy."""
        return [x for x in ("importance_cap", "importance_mask", "sequence_mask") if getattr(self, x) not in (None, ())]

    @property
    def lora_scale(self) -> float:
        """What the product of an adapter's factors is multiplied with."""
        return (self.lora_alpha or 32.0) / self.lora_rank

    @property
    def shares_base(self) -> bool:
        """Whether policy, reference and rollout have one frozen base between them."""
        return self.lora_rank is not None and self.lora_base == "replicated"

    @property
    def taught(self) -> bool:
        """Whether by a teacher."""
        return self.algo in TAUGHT

    @property
    def grades(self) -> bool:
        """Whether answers are graded: all but those for a teacher alone, of data that names no right ones."""
        rewarded = self.reward_coef or self.rewards or self.answer_column or self.task != "jsonl"
        return self.algo != "opd" or bool(rewarded)

    @property
    def own_context(self) -> bool:
        """Whether the student is its own teacher, and sees more as such: then it is examined so before it learns."""
        return self.context != "zeroshot" and not self.teacher

    @property
    def longest_prompt(self) -> int:
        """Tokens of what a rollout may be asked."""
        return max(self.max_prompt_tokens, self.max_context_tokens if self.own_context and self.eval_size else 0)

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
        """A recording's is none that a resume looks at, unless it is named."""
        lora = "" if self.lora_rank is None else f"-lora{self.lora_rank}"
        name = self.name or f"{self.algo}-{Path(self.model).name}{lora}-seed{self.seed}"
        return Path(os.path.expanduser(self.out)) / (f"{name}-profile" if self.profile_steps else name)

    @property
    def window(self) -> tuple[int, int]:
        """(first, end) of the steps that are recorded, none without `profile_steps`; at `end` the run ends."""
        first, end = parse_window(self.profile_steps) if self.profile_steps else (self.steps, self.steps)
        return first, min(end, self.steps)


SETTINGS = {field.name: field for field in dataclasses.fields(Config)}
TYPES = {name: field.type for name, field in SETTINGS.items()}
FROM_DATA = ("sft", "dpo", "distill")
"""Algorithms that learn from what is given, not from answers of their own."""
TAUGHT = ("distill", "opd")
"""Those with a teacher."""
ALONE = (*FROM_DATA, "reinforce", "opd")
"""Those that compare an answer with no others to its prompt."""
DASHES = ("-", "\N{EN DASH}", "\N{EM DASH}", "\N{MINUS SIGN}")  # as documents have them
ANSWERING = (Config.MODEL, Config.DATA, Config.ANSWERS)  # what is read where nothing is trained
LAUNCH = ("resume", "new_data", "dry_run")  # settings of one launch, not of the run
Options = TypeVar("Options")
"""A frozen dataclass of settings that a command has beside those of `Config`."""
HELP = """\
Settings are written --key value, --key=value or, for true, --key; in the files of --config FILE ... as `key: value`.
Later wins: the default, configs/<algo>.yaml, the YAML for it in a model's folder in configs/models, the files in their
order, the command line."""


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
        values[key] = convert(key, text_of(key, node), TYPES[key]) if key in TYPES else None
    return values


def parse_args(argv: list[str], known: Mapping[str, type] = TYPES) -> tuple[list[str], dict[str, str | list[str]]]:
    """(config files, settings) from `--config A B --key value --key=value --flag`; `known`: types by key."""
    files, settings, i = [], {}, 0
    while i < len(argv):
        if not argv[i].startswith("--"):
            raise UserError(misspelt(argv[i], known))
        key, equals, value = argv[i][2:].partition("=")
        key, i = key.replace("-", "_"), i + 1
        if key != "config" and key not in known:
            raise UserError(unknown(key, known))
        values = [value] if equals else []
        while not equals and i < len(argv) and not argv[i].startswith("--"):
            if argv[i].startswith(DASHES) and option_of(argv[i])[0] in known:
                raise UserError(misspelt(argv[i], known))
            values.append(argv[i])
            i += 1
        if not values and known.get(key) is not bool:
            raise UserError(f"--{key} needs a value; one that begins with -- is written --{key}=VALUE.")
        if key == "config":
            files += values
        else:
            settings[key] = values if len(values) > 1 else values[0] if values else "true"
    return files, settings


def option_of(word: str) -> tuple[str, str]:
    """(setting, value) of `--key=value`, with whatever dashes."""
    key, _, value = word.lstrip("".join(DASHES)).partition("=")
    return key.replace("-", "_"), value


def misspelt(word: str, known: Mapping[str, type]) -> str:
    """What is wrong with a word that stands where an option should."""
    key, value = option_of(word)
    near = setting_meant(key, known) if key.rpartition(".")[2] in OURS.keys() | known.keys() else ""
    if key in known:
        near = f" Did you mean --{key} {value or '...'}?"
    if word.endswith((".yaml", ".yml")):
        near = f" Did you mean --config {word}?"
    return f"{word!r} is not an option: settings are written --key value.{near}"


def unknown(key: str, known: Iterable[str] = TYPES) -> str:
    return f"There is no setting {key!r}.{setting_meant(key, known)}"


def load_config(argv: list[str], about: str = "") -> Config:
    """The resolved config for a command line (without the program's name); UserError on anything unknown.

    `--help` prints what the program is `about`, and the settings.
    """
    if asks_help(argv):
        print_help(about, groups_of(Config))
    return resolve(*parse_args(argv))


def own_model(name: str) -> Path | None:
    """The folder of configs/models with this name: a model that comes with the settings for it. None: not one."""
    folder = CONFIGS / "models" / name
    return folder if name == folder.name and (folder / "config.json").exists() else None


def load_command(argv: list[str], options: type[Options], about: str) -> tuple[Options, Config]:
    """As `load_config` for a command that only answers, with options of its own."""
    own, groups = {field.name: field for field in dataclasses.fields(options)}, groups_of(Config)
    if asks_help(argv):
        read = {heading: [field for field in groups[heading] if field.name not in own] for heading in ANSWERING}
        print_help(about, {"This command": list(own.values())} | read)
    files, given = parse_args(argv, TYPES | {key: field.type for key, field in own.items()})
    values = {key: convert(key, given.pop(key), field.type) for key, field in own.items() if key in given}
    for key, value in values.items():
        check(SETTINGS.get(key, own[key]), value)
    return options(**values), resolve(files, given)


def asks_help(argv: list[str]) -> bool:
    return "--help" in argv or "-h" in argv


def print_help(about: str, groups: dict[str, list[dataclasses.Field]]) -> NoReturn:
    """Ends the program."""
    tables = ["\n".join([heading, *map(explain, fields)]) for heading, fields in groups.items()]
    print("\n\n".join([about.strip(), HELP, *tables]).strip())
    raise SystemExit(0)


def resolve(files: list[str], settings: dict[str, str | list[str]]) -> Config:
    """The config of all layers, checked."""
    values: dict = {}
    for layer in map(read_yaml, files):
        for key in layer:
            if key not in TYPES:
                raise UserError(unknown(key))
        values |= layer
    values |= {key: convert(key, value, TYPES[key]) for key, value in settings.items()}
    algo = values.get("algo", Config.algo)
    if algo not in ALGORITHMS:
        near = nearest(algo, ALGORITHMS)
        raise UserError(
            f"There is no algorithm {algo!r}, for there is no configs/{algo}.yaml; known: "
            f"{', '.join(ALGORITHMS)}.{near}"
        )
    defaults = read_yaml(CONFIGS / f"{algo}.yaml")
    if own := own_model(str(values.get("model", Config.model))):
        one, kind = own / f"{algo}.yaml", own / ("sft.yaml" if algo in FROM_DATA else "rl.yaml")
        defaults |= read_yaml(one if one.exists() else kind)
    config = Config(**defaults | values)
    validate(config)
    return dataclasses.replace(config, eval_size=0) if config.profile_steps else config


def check_ranges(values) -> None:
    """UserError for a field of a dataclass that is out of the range of the setting of its name."""
    for field in dataclasses.fields(values):
        if field.name in SETTINGS:
            check(SETTINGS[field.name], getattr(values, field.name))


def surrogate_of(config: Config, form: str = "clip") -> SurrogateSpec:
    """The coefficients of the loss in rl, which know their ranges; UserError for one out of it."""
    low, high = config.importance_mask or (0.0, float("inf"))
    try:
        return SurrogateSpec(
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
            kl_coef=config.beta,
            entropy_coef=config.entropy_coef,
            importance_cap=config.importance_cap,
            mask_low=low,
            mask_high=high,
            tau_pos=config.tau_pos,
            tau_neg=config.tau_neg,
            form=form,
        )
    except ValueError as error:
        raise UserError(f"{error}.") from None


def validate(config: Config) -> None:
    """UserError for a value out of range, or settings at odds; what depends on the number of ranks is `check_batch`."""
    check_ranges(config)
    check_corrections(config)
    surrogate_of(config)
    if config.algo not in ALONE and config.group_size < 2:
        raise UserError(f"group_size {config.group_size} gives every answer advantage 0; use at least 2 (8 is usual).")
    if config.rolls_out and config.temperature == 0:
        raise UserError("temperature 0 samples the same answer every time, so nothing can be learned; use 1.0.")
    if config.algo != "sft" and config.lora_dropout:
        raise UserError("lora_dropout is for sft: elsewhere what learns is compared with what it was; leave it out.")
    check_frozen(config)
    if config.cpu_offload and config.shares_base:
        raise UserError("cpu_offload has nothing to move beside a replicated base; leave it out, or lora_base sharded.")
    if config.updates_per_rollout * config.epochs > 1 and config.logp_old == "on_policy":
        raise UserError("logp_old on_policy holds for a single update only; use auto, recompute or sampler.")
    if config.overlong_penalty and config.overlong_buffer:
        raise UserError(
            "overlong_buffer goes without overlong_penalty, which fines long answers too: set that to false."
        )
    if config.overlong_buffer >= config.max_new_tokens:
        raise UserError(
            f"overlong_buffer {config.overlong_buffer} must be less than max_new_tokens {config.max_new_tokens}, "
            "the end of which it is."
        )
    if config.dynamic_sampling and (config.group_size < 2 or not config.grades):
        raise UserError(
            "dynamic_sampling keeps groups of mixed correctness, which one alone or not graded is not; leave it out."
        )
    if config.name in (".", "..") or set(config.name) & set("/\\"):
        raise UserError(f"name must be the name of a folder, not {config.name!r}; where that lies is --out.")
    if config.memory_gib and config.device == "cpu":
        raise UserError(f"memory_gib {config.memory_gib:g} is of a GPU, and device is cpu; leave one of them out.")
    if config.date:
        parse_date(config.date)
    if config.window[0] >= config.steps and config.profile_steps:
        raise UserError(f"profile_steps {config.profile_steps} begins after the last step, {config.steps - 1}.")
    if config.profile_steps and config.resume:
        raise UserError("profile_steps goes without resume: a recording begins anew, or from --init_from EXPORT.")
    if config.profile_trace and not config.profile_steps:
        raise UserError("profile_trace needs profile_steps FIRST:END, the steps to record.")
    if config.profile_trace and not config.profile_trace.endswith((".json", ".json.gz")):
        raise UserError(f"profile_trace must end in .json or .json.gz, as {config.profile_trace!r} does not.")


def check_frozen(config: Config) -> None:
    """UserError for settings of a reference or a teacher that are at odds with the algorithm."""
    if config.reference == "precomputed" and config.algo != "dpo":
        raise UserError(
            f"reference precomputed is for dpo, whose answers are given, not for {config.algo}; leave it out."
        )
    if config.algo == "dpo" and not config.beta:
        raise UserError("beta 0 makes every margin 0, so dpo learns nothing from them; 0.1 is usual.")
    if config.algo == "dpo" and config.updates_per_rollout > 1:
        raise UserError("updates_per_rollout would cut pairs apart; leave it out, and lower pairs_per_step instead.")
    if config.label_smoothing and config.preference != "sigmoid":
        raise UserError(f"label_smoothing is of preference sigmoid, not of {config.preference}; leave one of them out.")
    if not config.taught:
        for name in ("teacher", "context"):
            if getattr(config, name) != getattr(Config, name):
                raise UserError(f"{name} is for {' and '.join(TAUGHT)}, not for {config.algo}; leave it out.")
    if config.algo == "opd" and config.beta:
        raise UserError("beta weighs a reference, and the frozen model of opd is its teacher; leave it out.")
    if config.reward_coef and (config.algo != "opd" or config.group_size < 2):
        raise UserError(f"reward_coef {config.reward_coef:g} is for opd, and for group_size 2 or more; leave it out.")
    if config.teacher and config.reference != "live":
        raise UserError(f"reference {config.reference} is of the student, and teacher names another; leave one out.")
    if config.context == "shuffled_answers" and config.shots < 2:
        raise UserError("context shuffled_answers needs shots 2 or more, to exchange their answers.")


def check_corrections(config: Config) -> None:
    """UserError for corrections of the sampler that cannot be had, or have no effect, with this `logp_old`."""
    for name in ("importance_mask", "sequence_mask"):
        bounds = getattr(config, name)
        if bounds and not 0 <= bounds[0] <= 1 <= bounds[1] > bounds[0]:
            raise UserError(f"{name} must be two bounds around 1, as 0.5 2, not {bounds[0]:g} {bounds[1]:g}.")
    given = config.corrections
    if config.sequence_mask and config.logp_old == "on_policy":
        raise UserError("sequence_mask needs the log-probabilities before an update: use logp_old auto or recompute.")
    if config.lag and config.logp_old == "on_policy" and not given:
        raise UserError("At lag 1 logp_old on_policy needs importance_cap, as 2.0, or importance_mask; or use auto.")
    if given and config.logp_old == "sampler":
        raise UserError(f"{given[0]} has no effect with logp_old sampler: the ratio is against the sampler already.")


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
    if not config.rolls_out:
        return
    if config.prompts_per_step % world_size:
        lower = max(config.prompts_per_step // world_size, 1) * world_size
        raise UserError(
            f"prompts_per_step {config.prompts_per_step} does not divide over {world_size} ranks; use {lower}."
        )
    sequences = config.prompts_per_step // world_size * config.group_size
    if sequences % config.updates_per_rollout:
        raise UserError(
            f"updates_per_rollout {config.updates_per_rollout} does not divide the {sequences} sequences of a rank; "
            f"use a divisor of {sequences}."
        )


def first_run(config: Config) -> Config | None:
    """The run whose export this one starts from, if it does (`warm_start`)."""
    if not config.warm_start or config.init_from:
        return None
    shared = {key: getattr(config, key) for key in ("model", "seed", "out", "device", "kernels", "threads")}
    first = load_config(["--algo", config.warm_start, *(f"--{key}={value}" for key, value in shared.items())])
    return dataclasses.replace(first, name=first.run_dir.name, eval_size=0, resume="auto")


def save_config(config: Config, path: Path) -> None:
    """The resolved config as YAML that `--config` reads back, but for what belongs to one launch."""
    values = {
        k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items() if k not in LAUNCH
    }
    write_whole(path, yaml.safe_dump(values, sort_keys=False))


def write_whole(path: Path, text: str) -> None:
    """The file, with this text or, where the disk is full, as it was; a copy that is a hard link keeps its own."""
    aside = path.with_suffix(".aside")
    aside.write_text(text)
    os.replace(aside, path)
