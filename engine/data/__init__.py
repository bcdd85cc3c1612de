"""Tasks: where prompts, answers and traces come from. A new one is a row of `TASKS`."""

import dataclasses
import difflib

from engine.data.arithmetic import load_arithmetic
from engine.data.cells import read_plain, read_rationale
from engine.data.item import Item, Items, Task, count_shared
from engine.data.table import load_table
from engine.errors import UserError

_TAGGED = "Think step by step inside <think> </think>, then give the final number alone inside <answer> </answer>."
_BOXED = r"Work through the problem step by step and end with the final answer inside \boxed{}."

TASKS = {
    "arithmetic": Task(load_arithmetic),
    "gsm8k": Task(
        load_table,
        "openai/gsm8k",
        "main",
        prompt_column="question",
        answer_column="answer",
        read=read_rationale,
        system_prompt=_TAGGED,
    ),
    "math500": Task(
        load_table,
        "HuggingFaceH4/MATH-500",
        splits=("test",),
        prompt_column="problem",
        answer_column="answer",
        read=read_plain,
        rewards=("answer",),
        system_prompt=_BOXED,
    ),
    "math": Task(
        load_table,
        prompt_column="problem",
        answer_column="answer",
        read=read_plain,
        rewards=("answer",),
        system_prompt=_BOXED,
    ),
    "jsonl": Task(
        load_table,
        prompt_column="prompt",
        answer_column="answer",
        chosen_column="chosen",
        rejected_column="rejected",
        read=read_plain,
        rewards=("answer",),
    ),
}


def load_task(
    name: str,
    split: str,
    *,
    source: str | None = None,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    trace_column: str | None = None,
    chosen_column: str | None = None,
    rejected_column: str | None = None,
    system_prompt: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    answers: bool = True,
    traces: bool = True,
    pairs: bool = False,
    sample: bool = False,
) -> Items:
    """The items of one split of a task, made one by one as they are asked for.

    `source`: a hub id, or a local .jsonl, .json or .parquet file (taken whole, whatever the split) or a folder of
    them (the split's files, as `datasets.load_dataset` tells them apart by name); the task's own if None.
    Columns and system prompt replace the task's if given ("" for no system prompt); `reward_model.ground_truth` is a
    field of a nested column. A chat column that is prompt and trace gives its last turn as the trace.
    `limit`: the first so many, or with `sample` as many drawn from all rows, the same ones every time.
    `answers`, `traces`: whether they are needed; if not, their column is read only where it holds the traces, or the
    prompts, too. `pairs`: items of a chosen and a rejected answer, in the forms of engine.data.cells; where a file has
    no column "prompt", the task's own, the prompts are `conversations`, or else the chats in the chosen column hold
    them, as they do where `prompt_column` names that one.
    `seed`: what a generated task draws. Raises UserError, in one sentence, for anything that cannot be loaded.
    """
    if name not in TASKS:
        nearest = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.0)[0]
        raise UserError(f"There is no task {name!r}; the nearest is {nearest!r}, all are {', '.join(TASKS)}.")
    if limit is not None and limit < 1:
        option = "--eval_size" if split == "test" else "--train_limit"
        raise UserError(f"{option} is {limit}; give at least 1, or leave it out.")
    task = TASKS[name]
    columns = {
        "prompt_column": prompt_column,
        "answer_column": answer_column,
        "trace_column": trace_column,
        "chosen_column": chosen_column,
        "rejected_column": rejected_column,
    }
    task = dataclasses.replace(task, **{key: column for key, column in columns.items() if column})
    if pairs and not task.generated and not (task.chosen_column and task.rejected_column):
        raise UserError(f"The task {name} has no pairs; name a file of them: --task jsonl --train_data FILE.")
    system_prompt = task.system_prompt if system_prompt is None else system_prompt
    return task.load(
        task,
        split,
        source=source,
        system_prompt=system_prompt,
        limit=limit,
        seed=seed,
        answers=answers,
        traces=traces,
        pairs=pairs,
        sample=sample,
    )
