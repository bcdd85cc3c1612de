"""Data: what items say they come from, the hub, and files that change."""

import json
import os

import pytest

from engine.data import TASKS, load_task
from engine.errors import UserError
from tests.tables import ROWS, one_sentence, write, write_parquet

pytestmark = pytest.mark.usefixtures("private_cache")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_items_say_what_they_come_from(tmp_path, suffix, monkeypatch):
    def put(path, rows):
        path.parent.mkdir(exist_ok=True)
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        return write(path, *rows) if suffix == "jsonl" else write_parquet(path, **columns)

    rows = [{**row, "why": 300_000 * "w"} for row in ROWS] if suffix == "jsonl" else ROWS
    path = put(tmp_path / f"a.{suffix}", rows)
    origin = load_task("jsonl", "train", source=path).origin
    assert origin == json.loads(json.dumps(origin)) == load_task("jsonl", "train", source=path).origin
    assert origin == {
        "path": path,
        "size": os.path.getsize(path),
        "digest": origin["digest"],
        "rows": 5,
        "columns": ["prompt", None, "answer"],
        "system_prompt": None,
    }
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for arguments, other in [
        ({"limit": 2}, {"rows": 2}),
        ({"trace_column": "why"}, {"columns": ["prompt", "why", "answer"]}),
        ({"answer_column": "extra"}, {"columns": ["prompt", None, "extra"]}),
        ({"prompt_column": "why", "answers": False}, {"columns": ["why", None, None]}),
        ({"system_prompt": "Be brief."}, {"system_prompt": "Be brief."}),
        ({"system_prompt": ""}, {}),
        ({"source": f".//./a.{suffix}"}, {}),
        ({"source": f"~/a.{suffix}"}, {}),
        ({"source": f"../{tmp_path.name}/a.{suffix}"}, {}),
    ]:
        assert load_task("jsonl", "train", **{"source": path, **arguments}).origin == origin | other
    digests = {origin["digest"]}
    for n, place in enumerate((0, 4), 2):  # at either end
        put(
            tmp_path / f"a.{suffix}",
            [{**row, "answer": "9" if i == place else row["answer"]} for i, row in enumerate(rows)],
        )
        digests.add(load_task("jsonl", "train", source=path).origin["digest"])
        assert len(digests) == n


def test_items_of_a_folder_come_from_all_its_files(tmp_path):
    write(tmp_path / "train-0.jsonl", *ROWS[:2])
    write(tmp_path / "train-1.jsonl", *ROWS[2:4])
    origin = load_task("jsonl", "train", source=str(tmp_path)).origin
    assert origin["size"] == sum(path.stat().st_size for path in tmp_path.iterdir()) and origin["rows"] == 4
    assert origin["files"] == ["train-0.jsonl", "train-1.jsonl"]
    write(tmp_path / "train-1.jsonl", ROWS[3], ROWS[2])
    other = load_task("jsonl", "train", source=str(tmp_path)).origin
    assert other == origin | {"digest": other["digest"]} != origin
    (tmp_path / "test").mkdir()
    for n in range(12):
        write(tmp_path / "test" / f"{n:02}.jsonl", ROWS[n % 5])
    files = [os.path.join("test", f"{n:02}.jsonl") for n in range(9)]
    assert load_task("jsonl", "test", source=f"{tmp_path}/").origin["files"] == [*files, "3 more"]


def test_items_of_the_hub_and_generated_ones_say_what_they_come_from(monkeypatch):
    import datasets

    def origin(*answers):
        rows = datasets.Dataset.from_list([{"question": "Q", "answer": f"#### {answer}"} for answer in answers])
        monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: rows)
        return load_task("gsm8k", "train").origin

    first = origin(1, 2, 3)
    assert (
        first
        == origin(1, 2, 3)
        == {
            "path": "openai/gsm8k",
            "digest": first["digest"],
            "rows": 3,
            "columns": ["question", None, "answer"],
            "system_prompt": TASKS["gsm8k"].system_prompt,
        }
    )
    assert len({origin(*answers)["digest"] for answers in ((1, 2, 3), (0, 2, 3), (1, 2, 0))}) == 3
    one, two = (load_task("arithmetic", "train", limit=5, seed=seed).origin for seed in (1, 2))
    assert (one["path"], one["rows"]) == ("arithmetic", 5) and one != two
    told = load_task("arithmetic", "train", limit=5, seed=1, system_prompt="Be brief.").origin
    assert told == one | {"system_prompt": "Be brief."} != one


def test_a_file_that_changes_under_the_run_is_not_read_as_something_else(tmp_path):
    path = write(tmp_path / "a.jsonl", *ROWS)
    items = load_task("jsonl", "train", source=path)
    write(tmp_path / "a.jsonl", "x" * 2000)
    with pytest.raises(UserError, match="a.jsonl, row 3 has changed") as error:
        items[2]
    one_sentence(error)


def test_a_changed_parquet_file_is_read_anew_whatever_its_date(tmp_path):
    for answer in ("1", "2"):
        path = write_parquet(tmp_path / "a.parquet", prompt=["Q"], answer=[answer])
        os.utime(path, (1e9, 1e9))
        assert load_task("jsonl", "train", source=path)[0].answer == answer


def test_an_unreachable_hub_is_one_sentence(monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match="openai/gsm8k.*could not be had from the hub") as error:
        load_task("gsm8k", "train")
    one_sentence(error)


def test_the_hub_is_asked_for_the_task_s_own_configuration(monkeypatch):
    import datasets

    asked = []
    rows = datasets.Dataset.from_list([{"question": "Q", "answer": "#### 1"}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or rows)
    load_task("gsm8k", "test")
    load_task("gsm8k", "test", source="someone/else")
    assert asked == [(("openai/gsm8k", "main"), {"split": "test"}), (("someone/else", None), {"split": "test"})]
