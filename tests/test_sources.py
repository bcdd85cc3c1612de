"""Folders: which files are of a split, by datasets itself."""

import pytest

from engine.data import load_task
from engine.errors import UserError
from tests.tables import ROWS, one_sentence, write, write_parquet

pytestmark = pytest.mark.usefixtures("private_cache")

FOLDERS = [
    ["gsm8k_train.jsonl", "gsm8k_test.jsonl"],
    ["train.jsonl", "valid.jsonl", "dev.jsonl", "my test 1.jsonl"],
    ["training.json", "testing.jsonl", "evaluation.json", "contest.jsonl", "latest.json"],
    ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl", "a.jsonl"],
    ["data/train/a.jsonl", "data/train/test.jsonl", "data/eval/a.jsonl"],
    ["train1.jsonl", "train10.jsonl", "train2.jsonl", "sub/x-test-x.jsonl"],
    ["a.jsonl", "b.jsonl", ".cache/train.jsonl", "__pycache__/test.jsonl", ".test.jsonl"],
    ["train/train-1/a.jsonl", "dev/a.jsonl"],
    ["README.md", "train.jsonl", "test.jsonl", "dataset_info.json", "dataset_infos.json", "config.json"],
]


@pytest.mark.parametrize("names", FOLDERS, ids=lambda names: names[0])
@pytest.mark.parametrize("name", ["plain", ".hidden [v1] test"])
def test_files_are_of_the_split_that_datasets_takes_them_for(tmp_path, names, name):
    import datasets

    folder = tmp_path / name
    for file in names:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        write(folder / file, {"prompt": file, "answer": "1"} if "info" not in file and "README" not in file else "{}")
    plain = tmp_path / "plain"
    if plain != folder:  # datasets itself does not find what lies below brackets
        folder.rename(plain)
    truth = datasets.load_dataset(str(plain))
    if plain != folder:
        plain.rename(folder)
    for split in ("train", "validation", "test"):
        if split in truth:
            ours = [item.prompt[0]["content"] for item in load_task("jsonl", split, source=str(folder))]
            assert ours == list(dict.fromkeys(truth[split]["prompt"]))
        else:
            with pytest.raises(UserError, match=f"has no file for split '{split}', only .*name one file") as error:
                load_task("jsonl", split, source=str(folder))
            one_sentence(error)


def test_other_files_beside_the_data_are_not_data(tmp_path):
    for name in (
        "train.csv",
        "train.txt",
        "test.csv",
        "README.json",
        "state.json",
        "train.jsonl.gz",
        "train.jsonl.lock",
    ):
        (tmp_path / name).write_text("{}")
    write(tmp_path / "some.jsonl", ROWS[0])
    assert len(load_task("jsonl", "train", source=str(tmp_path))) == 1
    with pytest.raises(UserError, match=r"no file for split 'test', only some.jsonl \(train\)"):
        load_task("jsonl", "test", source=str(tmp_path))


def write_card(folder, **configs):
    """README.md as a clone has it; a config is {split: path}."""
    lines = ["---", "configs:"]
    for name, files in configs.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        lines += [line for split, path in files.items() for line in (f"  - split: {split}", f"    path: {path!r}")]
    (folder / "README.md").write_text("\n".join([*lines, "---", "# Rows", ""]))


def test_a_clone_s_card_says_which_file_is_which(tmp_path):
    write(tmp_path / "a.jsonl", ROWS[0])
    write(tmp_path / "train.jsonl", ROWS[1])
    write_card(tmp_path, any={"train": "a.jsonl", "test": "train.jsonl"})
    assert [load_task("jsonl", s, source=str(tmp_path))[0].answer for s in ("train", "test")] == ["0", "1"]


def test_of_a_clone_with_several_data_sets_the_task_s_own_is_taken(tmp_path):
    configs = ("main", "socratic")
    for config in configs:
        (tmp_path / config).mkdir()
        for split in ("train", "test"):
            row = {"question": f"{config} {split}", "answer": "So.\n#### 1"}
            write_parquet(tmp_path / config / f"{split}-0.parquet", **{name: [cell] for name, cell in row.items()})
    write_card(tmp_path, **{name: {s: f"{name}/{s}-*" for s in ("train", "test")} for name in configs})
    for split in ("train", "test"):
        items = load_task("gsm8k", split, source=str(tmp_path))
        assert [item.row["question"] for item in items] == [f"main {split}"]
        other = load_task("gsm8k", split, source=str(tmp_path / "socratic"))
        assert [item.row["question"] for item in other] == [f"socratic {split}"]
    with pytest.raises(
        UserError, match="2 data sets: main, socratic.; name .* one folder of it, with --test_data"
    ) as error:
        load_task("jsonl", "test", source=str(tmp_path))
    one_sentence(error)


def test_a_card_that_puts_a_file_into_two_splits_is_what_is_to_correct(tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", ROWS[0])
    write_card(tmp_path, default={"train": "*.jsonl", "test": "b.jsonl"})
    with pytest.raises(UserError, match="By README.md .*b.jsonl is of split 'train' and of split 'test'") as error:
        load_task("jsonl", "train", source=str(tmp_path))
    one_sentence(error)


@pytest.mark.parametrize(
    "names, split, message",
    [
        (["train_test.jsonl"], "train", "By its name .*train_test.jsonl is of split 'train' and of split 'test'"),
        (["train.jsonl", "dev-test.jsonl"], "test", "dev-test.jsonl is of split 'test' and of split 'validation'"),
        (["train-0.jsonl", "train-1.parquet"], "train", "mixes formats .train-0.jsonl, train-1.parquet"),
        (["train.csv"], "train", "not a .jsonl, .json, .parquet file or a folder of them"),
    ],
)
def test_a_folder_that_is_unclear_is_refused(tmp_path, names, split, message):
    for name in names:
        write(tmp_path / name, ROWS[0])
    with pytest.raises(UserError, match=message) as error:
        load_task("jsonl", split, source=str(tmp_path))
    one_sentence(error)


@pytest.mark.parametrize("as_dict", [False, True])
def test_what_save_to_disk_wrote_is_named(tmp_path, as_dict):
    import datasets

    rows = datasets.Dataset.from_list(ROWS)
    (datasets.DatasetDict(train=rows) if as_dict else rows).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match="saved was written by Dataset.save_to_disk; write it with to_parquet") as error:
        load_task("jsonl", "train", source=str(tmp_path / "saved"))
    one_sentence(error)
