"""Every command of the READMEs runs as it is printed, in a folder that has this tree, with settings behind it that make
it short; what cannot run here is named with its reason, and what has no rule fails."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import transformers

from tests.warm import command

ROOT = Path(__file__).resolve().parents[1]
READMES = ("README.md", "kernels/README.md", "profiling/README.md", "bench/README.md")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHORT = "--prompts_per_step 2 --group_size 2 --max_new_tokens 8 --tensorboard false --threads 1"
START = "--init_from runs/start/export"

MAIN = "torchrun --nproc_per_node=2 train.py --algo grpo"
RUN = {
    MAIN: f"--steps 1 --eval_size 8 {SHORT} {START}",
    "python -m engine.evaluate": "--eval_size 8 --max_new_tokens 8",
    "python -m engine.generate": "--max_new_tokens 8",
    "torchrun --nproc_per_node=2 train.py --algo grpo --config": "--model SHAPES --memory_gib 24 --dry-run",
    "torchrun train.py --algo grpo --model DIR": f"--steps 1 --eval_size 0 --max_prompt_tokens 96 {SHORT}",
    "python profiling/capture.py --tool torch": f"--steps 8 --eval_size 0 {SHORT} {START}",
    "python profiling/report.py": "",
    "python -m bench.run linear_clipped_surrogate": "--sizes small --dtype fp32 --rounds 1 --brief",
    "python -m bench.gpu --plan": "",
}
"""How a command begins -> what is put behind it. The longest beginning counts."""
OPEN = {"DIR": "runs/start/export"}
"""Words that a reader replaces."""
OPTIONS = ("python -m bench.run", "python -m bench.learning", "python -m bench.teachers", "python -m bench.lag",
           "python -m bench.report", "python -m bench.gpu")  # fmt: skip
"""Take minutes, or write into the tree: that --help knows their options is all that is asked."""
MAKE = {
    "make train": MAIN,
    "make test": "python -m pytest tests",
}
"""What make would run, RANKS being 2; with -n, since both install first."""
SKIPPED = {
    r"export \w+=": "sets the environment of a GPU visit",
    r"git add|mkdir -p|cp |mv |for part|load=|done$": "moves the files of a GPU visit",
    r"pip download|python3 -m pip": "needs a network, or what it has brought",
    r"python3? -m bench\.weights": "needs the weights of a GPU visit, and gguf",
    r"python3 -m bench\.gpu --parts gsm8k": "minutes on a GPU",
}
EXIT_CODES = {"python profiling/report.py": (0, 1)}  # 1: a speed-up that was asked for is not there


def commands(readme: str) -> list[str]:
    """The lines of its fenced blocks, but for Python and the tree, without what is said beside them."""
    text = (ROOT / readme).read_text().partition("## The tree")[0]
    blocks = [body for kind, body in FENCED.findall(text) if kind != "python"]
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(bare.split()) for line in lines if (bare := re.sub(r"\s+#\s.*|\s{2,}\(.*\)$", "", line).strip())]


ALL = [(readme, line) for readme in READMES for line in commands(readme)]


def rule(line: str) -> str | None:
    """The longest beginning of a command that stands in a table; a pattern where it is skipped."""
    known = [begin for begin in (*RUN, *OPTIONS, *MAKE) if (line + " ").startswith(begin + " ")]
    skipped = [pattern for pattern in SKIPPED if re.match(pattern, line)]
    return max(known, key=len, default=None) if not skipped else skipped[0]


@pytest.mark.parametrize("readme, line", ALL)
def test_a_command_has_a_rule(readme, line):
    assert rule(line), f"no rule for {line!r} of {readme}: say in this file how it is run, or why not"


def test_a_rule_has_a_command():
    used = {rule(line) for _, line in ALL}
    assert {*RUN, *OPTIONS, *MAKE, *SKIPPED} - used == {MAIN}  # which make runs


def test_python_is_run_where_it_is_told():
    """kernels/README.md's by test_kernels_elsewhere; README.md's is the loop (test_readme)."""
    kinds = {readme: [kind for kind, _ in FENCED.findall((ROOT / readme).read_text())] for readme in READMES}
    others = [kinds[readme].count("python") for readme in READMES if readme != "kernels/README.md"]
    assert others == [1, 0, 0]
    assert set().union(*kinds.values()) <= {"", "bash", "python"}


def words_of(line: str) -> list[str]:
    """What starts a printed command here: the same Python, already warm."""
    program, *words = [OPEN.get(word, word) for word in shlex.split(line)]
    if program != "torchrun":
        return command(*words)
    ranks = next((word.partition("=")[2] for word in words if word.startswith("--nproc")), "1")
    return command(*(word for word in words if not word.startswith("--nproc")), ranks=int(ranks))


def execute(line: str, folder: Path, codes=(0,)) -> str:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words_of(line), cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode in codes, f"{line}\n{(done.stdout + done.stderr)[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """This tree by links, with what the commands start from: a model, its shapes at 3B, own data and an own reward."""
    folder = tmp_path_factory.mktemp("tree")
    for path in ROOT.iterdir():
        if path.name not in ("runs", "captures", ".git", ".venv"):
            (folder / path.name).symlink_to(path)
    sft = "--algo sft --name start --steps 1 --eval_size 0 --step_tokens 256 --tensorboard false --threads 1"
    execute(f"python train.py {sft}", folder)
    shapes = {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_key_value_heads": 2}
    config = transformers.Qwen2Config(**shapes, num_attention_heads=16, tie_word_embeddings=True)
    config.save_pretrained(folder / "SHAPES")
    rows = [{"question": f"question {i}", "answer": str(i)} for i in range(4)]
    (folder / "my.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "path/to").mkdir(parents=True)
    (folder / "path/to/mine.py").write_text("def my_reward(text, row):\n    return float(len(text) > 3)\n")
    return folder


@pytest.mark.parametrize("readme", READMES)
def test_the_commands_run_as_they_are_printed(tree, readme):
    for line in commands(readme):
        begin = rule(line)
        if begin in MAKE:
            words = ["make", "-n", *line.split()[1:], "RANKS=2"]
            told = subprocess.run(words, cwd=tree, capture_output=True, text=True, check=True).stdout
            assert MAKE[begin] in told, told
            line = begin = MAKE[begin]
        if begin in RUN:
            execute(f"{line} {RUN[begin]}", tree, EXIT_CODES.get(begin, (0,)))
        elif begin in OPTIONS:
            told = execute(f"{begin} --help", tree)
            assert all(word in told for word in line.split() if word.startswith("--")), line
