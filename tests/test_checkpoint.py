"""Checkpoints come back bit for bit, or not at all and say why; the sharded half runs in two real processes."""

import errno
import json
import os
import random
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as c10d

from engine import checkpoint, dist
from engine.errors import UserError
from tests.test_dist import launch

FINGERPRINT = {"model": "tiny", "seed": 1, "shapes": {"a": [2]}}
META = {"fingerprint": FINGERPRINT, "cursor": 7}
SHARDED = """
import errno, os, random, sys
from pathlib import Path
import numpy, torch
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from engine import checkpoint, dist

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.randn(5))  # owned by the root, which stays unsharded after a forward
        self.layers = torch.nn.ModuleList([torch.nn.Linear(3, 5), torch.nn.Linear(5, 1)])  # 1 row: rank 1 has none
        self.register_buffer("count", torch.randn(2))

    def forward(self, x):
        return self.layers[1](torch.relu(self.layers[0](x)) * self.scale)

def make(world, offload):
    model, policy = Model(), CPUOffloadPolicy(pin_memory=False) if offload else OffloadPolicy()
    for module in [*model.layers, model]:
        fully_shard(module, mesh=world.mesh, offload_policy=policy)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

def steps(model, optimizer, number):
    for _ in range(number):
        noise = random.random() + numpy.random.randn()
        loss = model(torch.randn(4, 3) + noise).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

def state(model, optimizer):
    return {name: tensor.clone() for name, tensor in checkpoint.training_tensors(model, optimizer).items()}

def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)

def roundtrip(world, root, offload, trained):
    model, optimizer = make(world, offload)
    steps(model, optimizer, trained)
    with torch.no_grad():
        model(torch.randn(1, 3))
    tensors = checkpoint.training_tensors(model, optimizer)
    assert tensors["model/layers.1.weight"].shape == (1 - world.rank, 5), "not the shard"
    assert any("exp_avg_sq" in name for name in tensors) == (trained > 0)
    saved = state(model, optimizer)
    folder = checkpoint.save(root, trained, {**tensors, **checkpoint.rng_tensors()}, {"fingerprint": {}}, world, keep=9)
    steps(model, optimizer, 2)
    expected = state(model, optimizer)
    other_model, other = make(world, offload)
    if not trained:
        steps(other_model, other, 1)  # state that must go
    tensors, meta = checkpoint.load(folder, world, {})
    checkpoint.restore_training_tensors(other_model, other, tensors)
    checkpoint.restore_rng(tensors)
    assert meta["step"] == trained and same(saved, state(other_model, other))
    steps(other_model, other, 2)
    assert same(expected, state(other_model, other)), "the next steps differ"

def main():
    world, root = dist.start("cpu"), Path(sys.argv[1])
    torch.manual_seed(world.rank)
    for offload in (False, True):
        for trained in (0, 3):
            roundtrip(world, root / f"offload_{offload}", offload, trained)
    real = checkpoint.save_file
    if world.rank == 1:
        def full(tensors, path):
            real(tensors, path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        checkpoint.save_file = full
    try:
        checkpoint.save(root / "offload_True", 5, {"w": torch.ones(2)}, {"fingerprint": {}}, world, keep=1)
    except checkpoint.CheckpointError as error:
        assert "No space left" in str(error) and "needs 16 bytes" in str(error) and "step_000003" in str(error)
        assert sorted(os.listdir(root / "offload_True")) == ["step_000000", "step_000003"]
        assert len(set(dist.gather(str(error)))) == 1
        os.write(1, b"all told\\n")

dist.run(main)
"""
KILLED = """
import os, sys
from pathlib import Path
import torch
from engine import checkpoint, dist

root, where = Path(sys.argv[1]), sys.argv[2]
real = {"_write_tensors": checkpoint._write_tensors, "_write_text": checkpoint._write_text, "rename": os.rename}[where]

def killed(*args):
    if where != "rename":
        real(*args)
    os.kill(os.getpid(), 9)

def main():
    world = dist.start("cpu")
    checkpoint.save(root, 1, {"w": torch.ones(2)}, {"fingerprint": {}}, world, keep=1)
    setattr(os if where == "rename" else checkpoint, where, killed)
    checkpoint.save(root, 2, {"w": torch.zeros(2)}, {"fingerprint": {}}, world, keep=1)

dist.run(main)
"""


@pytest.fixture(scope="module")
def world():
    """A group of one without `dist.start`: its signal handlers and its watch are not for pytest's own process."""
    if not c10d.is_initialized():
        c10d.init_process_group("gloo", store=c10d.HashStore(), rank=0, world_size=1)
    yield dist.World(0, 1, 0, torch.device("cpu"), None)
    c10d.destroy_process_group()


def save(root, step, world, tensors=None, **options):
    return checkpoint.save(root, step, tensors or {"w": torch.full((4,), step)}, META, world, **{"keep": 9, **options})


@pytest.mark.parametrize("fused", [True, False])
def test_a_resumed_run_takes_bit_identical_steps(tmp_path, world, fused):
    def make():
        model = torch.nn.Linear(7, 3)
        return model, torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)

    def step(model, optimizer):
        model(torch.randn(4, 7) + random.random() + random.gauss(0, 1) + np.random.randn()).square().sum().backward()
        optimizer.step()
        return torch.cat([p.detach().flatten().clone() for p in model.parameters()])

    first = make()
    step(*first)
    tensors = {**checkpoint.training_tensors(*first), **checkpoint.rng_tensors(), "bf16": torch.ones(3).bfloat16() / 3}
    folder = save(tmp_path, 1, world, tensors)
    first[1].zero_grad()
    expected = step(*first), step(*first)
    second = make()
    loaded, meta = checkpoint.load(folder, world, FINGERPRINT)
    checkpoint.restore_training_tensors(*second, loaded)
    checkpoint.restore_rng(loaded)
    assert meta["cursor"] == 7 and torch.equal(loaded["bf16"], tensors["bf16"])
    assert all(torch.equal(a, b) for a, b in zip(expected, (step(*second), step(*second))))


def test_shards_of_two_ranks_roundtrip_and_a_full_disk_of_one_is_told_to_both(tmp_path):
    code, output, _ = launch(tmp_path, SHARDED, str(tmp_path / "run"), ranks=2)
    assert code == 0 and output.count("all told") == 2, output


@pytest.mark.parametrize("where", ["_write_tensors", "_write_text", "rename"])
def test_a_kill_in_the_middle_of_a_save_leaves_the_one_before(tmp_path, world, where):
    code, output, _ = launch(tmp_path, KILLED, str(tmp_path / "run"), where, ranks=0)
    root = tmp_path / "run"
    assert code == -9 and (root / ".step_000002.partial").is_dir(), output
    assert checkpoint.find(root) == root / "step_000001"
    assert torch.equal(checkpoint.load(checkpoint.find(root), world, {})[0]["w"], torch.ones(2))
    save(root, 3, world)
    assert sorted(os.listdir(root)) == ["step_000001", "step_000003"]


def test_what_does_not_fit_is_refused_by_name_and_the_one_before_offered(tmp_path, world):
    folder, newest = save(tmp_path, 1, world), save(tmp_path, 2, world)

    def refused(pattern, *, world=world, fingerprint=FINGERPRINT):
        assert checkpoint.find(tmp_path) == newest
        with pytest.raises(UserError, match=pattern) as error:
            checkpoint.load(newest, world, fingerprint)
        assert str(newest) in str(error.value) and f"The one before it is {folder}." in str(error.value)

    refused("seed 1 where this one has 2", fingerprint={**FINGERPRINT, "seed": 2})
    refused("lora None where this one has 8", fingerprint={**FINGERPRINT, "lora": 8})
    refused(
        r"with shapes of b None where this one has \[9\]\.", fingerprint={**FINGERPRINT, "shapes": {"a": [2], "b": [9]}}
    )
    refused(
        "saved by 1 ranks, and this run has 2: go on with 1 .torchrun --nproc_per_node=1 ",
        world=replace(world, world_size=2),
    )
    shard = newest / "rank_0.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-8])
    refused("rank_0.safetensors is truncated")
    shard.write_bytes(b"\xff" * len(whole))
    refused("cannot be read")
    shard.unlink()
    refused("rank_0.safetensors is missing")
    for text in ("{", '{"files": []}', "[" * 100_000):
        (newest / "meta.json").write_text(text)
        refused("cannot be read")


def test_tensors_of_another_model_are_refused_by_name():
    model = torch.nn.Linear(2, 2)
    tensors = checkpoint.training_tensors(model, torch.optim.AdamW(model.parameters()))
    wider = torch.nn.Linear(3, 2)
    with pytest.raises(UserError, match=r"model/weight is \(2, 2\)"):
        checkpoint.restore_training_tensors(wider, torch.optim.AdamW(wider.parameters()), tensors)


def test_a_full_disk_is_one_sentence_and_the_newest_complete_checkpoint_stays(tmp_path, world, monkeypatch):
    kept = save(tmp_path, 1, world)

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(checkpoint.CheckpointError) as error:
        save(tmp_path, 2, world, keep=1)
    assert all(part in str(error.value) for part in ("No space left on device", "32 bytes", str(kept), "step_000002"))
    assert os.listdir(tmp_path) == ["step_000001"]


def test_a_really_full_disk(tmp_path, world):
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mount.stderr.strip()}")
    try:
        kept = save(tmp_path, 1, world)
        with pytest.raises(checkpoint.CheckpointError, match=r"No space left on device.*needs 4,000,000 bytes"):
            save(tmp_path, 2, world, {"w": torch.ones(1_000_000)}, keep=1)
        assert os.listdir(tmp_path) == ["step_000001"] and checkpoint.load(kept, world, FINGERPRINT)
        assert save(tmp_path, 3, world, keep=1).is_dir()
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_the_last_ones_and_the_best_are_kept(tmp_path, world):
    for step in range(1, 7):
        save(tmp_path, step, world, keep=2, best=step in (2, 3))
    assert sorted(os.listdir(tmp_path)) == ["step_000003", "step_000005", "step_000006"]
    assert checkpoint.find(tmp_path).name == "step_000006"
    assert checkpoint.find(tmp_path / "step_000005").name == "step_000005"
    assert checkpoint.find(tmp_path / "nowhere") is None


def test_what_a_user_put_among_checkpoints_stays_and_a_link_is_no_obstacle(tmp_path, world):
    mine, root = tmp_path / "mine/note", tmp_path / "checkpoints"
    notes, text = root / ".step_notes.partial/note", root / ".step_x.old"
    for file in (mine, notes, text):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
    for name in (".step_000001.partial", ".step_000001.old", "step_000001"):
        (root / name).symlink_to(mine.parent)
    for step in (2, 3):
        save(root, step, world, keep=1)
    assert {file.read_text() for file in (mine, notes, text)} == {"mine"}
    assert sorted(path.name for path in root.iterdir()) == [notes.parent.name, text.name, "step_000003"]


def test_saving_again_after_going_back_replaces_and_sets_later_steps_aside(tmp_path, world):
    for step in (1, 2, 3):
        save(tmp_path, step, world, best=step == 2)
    checkpoint.abandon_after(tmp_path, 2, world)
    save(tmp_path, 2, world, {"w": torch.zeros(1)}, keep=1)
    assert sorted(os.listdir(tmp_path)) == ["abandoned_step_000003", "step_000002"]
    assert json.loads((tmp_path / "step_000002/meta.json").read_text())["best"] is True
    assert checkpoint.load(checkpoint.find(tmp_path), world, FINGERPRINT)[0]["w"].shape == (1,)
