"""Preferences: the loss of a pair against closed forms and TRL's own, its reference asked in three ways, whole runs."""

import dataclasses
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from bench.step import one_rank
from engine import adapters, known
from engine.algos import ALGOS
from engine.algos.loss import LogProbs
from engine.attention import Padded
from engine.config import load_config
from engine.errors import UserError
from engine.folder import LOCKS
from engine.inputs import load_inputs
from engine.layout import lay_out, make_rows
from engine.learner import Learner
from engine.policy import Policy
from engine.run import Run
from engine.samples import Sample
from kernels import chunked, eager
from tests.tables import one_sentence, write
from tests.test_adapters import base_of
from tests.test_train import rows
from tests.test_train import run as launch

V, D = 17, 6
LENGTHS = (1, 3, 8, 5, 2, 9, 4, 4)
FORMS = {
    "sigmoid": "",
    "cDPO": "--label_smoothing 0.1",
    "ipo": "--preference ipo",
    "sigmoid, by the token": "--length_normalised true",
    "cDPO, by the token": "--label_smoothing 0.2 --length_normalised true --beta 0.5",
    "ipo, by the token": "--preference ipo --length_normalised true --beta 0.3",
    "beside the likelihood of the chosen": "--nll_coef 0.7",
    "all at once": "--nll_coef 1.5 --label_smoothing 0.1 --length_normalised true",
}


def config_of(argv: str):
    return load_config(["--algo", "dpo", "--model", "none", *argv.split()])


def draw_pairs() -> list[Sample]:
    """4 pairs, two of one prompt, with their weights and what the reference says of them."""
    g = torch.Generator().manual_seed(3)
    ids = lambda n: torch.randint(0, V, (n,), generator=g).tolist()  # noqa: E731
    prompts = [prompt for prompt in (ids(4), ids(2), ids(3)) for _ in range(2)]
    prompts = [*prompts, *prompts[-2:]]
    weights = ALGOS["dpo"].weight(LENGTHS, lambda values: values, 99)
    logp = lambda n: {"logp_ref": torch.randn(n, generator=g, dtype=torch.float64) - 3}  # noqa: E731
    return [
        Sample(prompt, ids(n), weight=weight, values=logp(n), group=i // 2)
        for i, (prompt, n, weight) in enumerate(zip(prompts, LENGTHS, weights, strict=True))
    ]


def on_a_head(samples: list[Sample]):
    """(hidden, head, rows) in fp64; all that is asked of a body is to be given."""
    [micro] = lay_out(samples, 10**6)
    laid, g = make_rows(micro, Padded.plan), torch.Generator().manual_seed(4)
    draw = lambda n: torch.randn(n, D, generator=g, dtype=torch.float64, requires_grad=True)  # noqa: E731
    return draw(len(laid.ids_T)), draw(V), laid


def logps_by_hand(hidden, weight, laid):
    """[N], in the order of the row, and the lengths."""
    logp_M = (hidden[laid.source_M] @ weight.T).log_softmax(-1).gather(1, laid.ids_M[:, None])[:, 0]
    ends = [*laid.first_N.tolist()[1:], len(laid.ids_M)]
    cut = lambda x_M: torch.stack([x_M[i:j].sum() for i, j in zip(laid.first_N.tolist(), ends)])  # noqa: E731
    return cut(logp_M), cut(laid.values["logp_ref"]), cut(torch.ones_like(logp_M))


def losses_by_hand(config, logp_N, ref_N, length_N):
    """A mean over pairs of arXiv 2305.18290 eq. 7, or 2310.12036 eq. 17, told without a library's functions."""
    ratio_N = (logp_N - ref_N) / (length_N if config.length_normalised else 1)
    h_P = ratio_N[::2] - ratio_N[1::2]
    if config.preference == "ipo":
        loss_P = (h_P - 1 / (2 * config.beta)) ** 2
    else:
        right_P = 1 / (1 + (-config.beta * h_P).exp())
        loss_P = -(1 - config.label_smoothing) * right_P.log() - config.label_smoothing * (1 - right_P).log()
    return (loss_P - config.nll_coef * logp_N[::2] / length_N[::2]).mean()


@pytest.mark.parametrize("ops", [eager, chunked], ids=["eager", "chunked"])
@pytest.mark.parametrize("form", FORMS)
def test_loss_and_gradient_equal_the_closed_form(form, ops):
    config = config_of(FORMS[form])
    hidden, weight, laid = on_a_head(draw_pairs())
    loss, _ = ALGOS["dpo"].loss(config, ops)(hidden, weight, None, laid)
    truth = losses_by_hand(config, *logps_by_hand(hidden, weight, laid))
    ours, theirs = ((x, *torch.autograd.grad(x, (hidden, weight))) for x in (loss, truth))
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).abs().max() <= 1e-6 * other.abs().max()
    assert theirs[1].abs().max() > 1e-3


def test_what_is_counted_of_pairs():
    config = config_of("--beta 0.5")
    hidden, weight, laid = on_a_head(draw_pairs())
    loss = ALGOS["dpo"].loss(config, eager)
    stats = dict(zip(loss.stats, loss(hidden, weight, None, laid)[1].tolist(), strict=True))
    logp_N, ref_N, length_N = (x.detach() for x in logps_by_hand(hidden, weight, laid))
    reward_N = 0.5 * (logp_N - ref_N)
    margin_P = reward_N[::2] - reward_N[1::2]
    assert stats["pairs"] == 4 and stats["tokens"] == sum(LENGTHS) and 0 < stats["preferred"] < 4
    assert stats["preferred"] == (margin_P > 0).sum() and stats["margin"] == pytest.approx(margin_P.sum().item())
    for name, x_N in {"reward": reward_N, "logp": logp_N, "length": length_N}.items():
        for i, side in enumerate(("chosen", "rejected")):
            assert stats[f"{side}_{name}"] == pytest.approx(x_N[i::2].sum().item())


def test_a_pair_that_is_even_is_half_preferred():
    pair = [Sample([1, 2], [3, 4], weight=1.0, values={"logp_ref": torch.zeros(2)}, group=0)] * 2
    hidden = torch.ones(64, D)
    [micro] = lay_out(pair, 99, False)
    loss = ALGOS["dpo"].loss(config_of(""), eager)
    value, stats = loss(hidden, torch.ones(V, D), None, make_rows(micro, Padded.plan))
    assert stats[loss.stats.index("preferred")] == 0.5 and value.item() == pytest.approx(math.log(2))


TRL_FORMS = {
    "sigmoid": ("", {"loss_type": ["sigmoid"]}),
    "sigmoid_norm": ("--length_normalised true", {"loss_type": ["sigmoid_norm"]}),
    "ipo": ("--preference ipo --length_normalised true", {"loss_type": ["ipo"]}),
    "sigmoid and sft": ("--nll_coef 0.5", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
}


@pytest.mark.parametrize("form", TRL_FORMS)
def test_loss_and_gradients_of_a_model_equal_trls_own_trainer(form, tmp_path):
    """Chosen answers are of one length, for TRL's sft term is a mean over the tokens of a batch."""
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    datasets, transformers = pytest.importorskip("datasets"), pytest.importorskip("transformers")
    argv, settings = TRL_FORMS[form]
    load = lambda folder: transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # noqa: E731
    folders = [base_of(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    trained, frozen = (Policy(load(folder), torch.device("cpu")) for folder in folders)
    rejected = ([8, 9], [12, 13, 14, 15, 16, 17], [30])
    pairs = [([5, 6, 7], [8, 10, 11, 9]), ([20, 21], [22, 23, 24, 25]), ([20, 21, 5], [40, 41, 42, 43])]
    config = config_of(argv)
    samples = [
        Sample(prompt, answer, weight=1 / 3, group=i)
        for i, ((prompt, chosen), other) in enumerate(zip(pairs, rejected, strict=True))
        for answer in (chosen, other)
    ]
    [micro] = lay_out(samples, 999)
    laid = make_rows(micro, trained.plan)
    with torch.no_grad():
        laid.values["logp_ref"] = frozen(laid, LogProbs(config, eager))
    loss, _ = trained(laid, ALGOS["dpo"].loss(config, chunked))
    loss.backward()

    args = trl.DPOConfig(output_dir=str(tmp_path / "out"), beta=config.beta, report_to="none", use_cpu=True, bf16=False,
                         gradient_checkpointing=False, disable_dropout=True, **settings)  # fmt: skip
    rows_of_text = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    theirs = trl.DPOTrainer(
        load(folders[0]), load(folders[1]), args=args, train_dataset=rows_of_text,
        processing_class=transformers.AutoTokenizer.from_pretrained(folders[0]),
    )  # fmt: skip
    inputs = theirs.data_collator([
        {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": other}
        for (prompt, chosen), other in zip(pairs, rejected, strict=True)
    ])  # fmt: skip
    truth = theirs.compute_loss(theirs.model, inputs)
    truth.backward()
    grads = {name: p.grad for name, p in theirs.model.named_parameters()}
    largest = max(grad.abs().max().item() for grad in grads.values())
    error = max((p.grad - grads[name]).abs().max().item() for name, p in trained.lm.named_parameters())
    print(f"\n{form}: loss {loss.item():.8f}, TRL {truth.item():.8f}; gradients differ by {error / largest:.1e}")
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5) and largest > 1e-3 and error <= 1e-5 * largest


@pytest.fixture(scope="module")
def world():
    with one_rank("cpu") as world:
        yield world


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A small model with random weights in `model`, and pairs to learn from and to hold out."""
    folder = tmp_path_factory.mktemp("start")
    base_of(folder / "model")
    write(folder / "train.jsonl", *map(row_of, range(7)))
    write(folder / "test.jsonl", *map(row_of, range(7, 10)))
    return folder


def row_of(n: int) -> dict:
    return {"prompt": f"Mia has {n} pens.", "chosen": f"She has {n}.", "rejected": f"{n + 1}" * (1 + n % 3)}


def settings_of(start: Path, out: Path, *argv) -> list[str]:
    return [
        "--algo", "dpo", "--task", "jsonl", f"--train_data={start}/train.jsonl", f"--test_data={start}/test.jsonl",
        f"--model={start}/model", f"--out={out}", "--lr=1e-2", "--schedule=constant", "--warmup_steps=0", "--steps=3",
        "--pairs_per_step=3", "--tensorboard=false", "--threads=1", *map(str, argv),
    ]  # fmt: skip


def end_process() -> None:
    """What holds folders for a process lets go of them."""
    while LOCKS:
        LOCKS.pop().close()


def finish(world, argv: list[str]) -> Path:
    """The folder of a run, as if in a process of its own."""
    end_process()
    config = adapters.follow(load_config(argv))
    train.train(config, world, load_inputs(config))
    return config.run_dir


def begin(world, argv: list[str]) -> Run:
    end_process()
    config = adapters.follow(load_config(argv))
    run = Run(config, world, load_inputs(config))
    run.begin()
    return run


def kill_after(monkeypatch, step: int) -> None:
    """A run dies when so many steps are done and saved."""
    end_step = Run.end_step

    def dies(self, number):
        end_step(self, number)
        if number + 1 == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "end_step", dies)


def assert_near(folder: Path, other: Path) -> None:
    """Runs that should have learned the same, but for the order of sums; which decides pairs that are even."""
    for ours, theirs in zip(rows(folder), rows(other), strict=True):
        assert ours.pop("eval", "") == theirs.pop("eval", "")
        for row in (ours, theirs) if abs(theirs["margin"]) < 1e-5 else ():
            row.pop("preferred")
            row.pop("accuracy", None)
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    [path] = folder.glob("export/*model.safetensors")
    return load_file(path)


def assert_goes_on_bit_for_bit(world, argv: list[str]) -> Path:
    """A run that is killed behind its first step, against one that is not."""
    whole = finish(world, [*argv, "--name", "whole"])
    cut = [*argv, "--name", "cut", "--save_every", "1"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_after(patch, 1)
        finish(world, cut)
    folder = finish(world, [*cut, "--resume", "auto"])
    assert rows(folder) == rows(whole) and len([row for row in rows(whole) if "eval" not in row]) == 3
    one, other = weights_of(whole), weights_of(folder)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    return folder


LORA = ["--lora_rank", "4"]
REFERENCES = {
    "live": (),
    "precomputed": ("--reference", "precomputed"),
    "live, adapter": LORA,
    "adapters_off, adapter": (*LORA, "--reference", "adapters_off"),
    "precomputed, adapter": (*LORA, "--reference", "precomputed"),
    "adapters_off, sharded adapter": (*LORA, "--lora_base", "sharded", "--reference", "adapters_off"),
}


@pytest.fixture(scope="module")
def referred(world, start, tmp_path_factory) -> dict:
    """(folder, the reference's log-probabilities that its updates have seen) of a run by each reference."""
    out, found, update = tmp_path_factory.mktemp("referred"), {}, Learner.update

    def noted(self, samples, step):
        seen.append(torch.cat([s.values["logp_ref"] for s in samples]))
        update(self, samples, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "update", noted)
        for name, argv in REFERENCES.items():
            seen: list[torch.Tensor] = []
            found[name] = finish(world, settings_of(start, out, *argv, "--name", name.replace(", ", "-"))), seen
    return found


@pytest.mark.parametrize("name", [name for name in REFERENCES if not name.startswith("live")])
def test_however_the_reference_is_asked_it_says_the_same_and_a_run_learns_the_same(referred, name):
    """Also when the policy, which is asked without its adapters or was asked before, has moved."""
    folder, seen = referred[name]
    live, truth = referred["live, adapter" if "adapter" in name.partition(", ")[2] else "live"]
    assert len(seen) == len(truth) == 3
    for ours, theirs in zip(seen, truth, strict=True):
        assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()
    assert_near(folder, live)
    first, *_, last = [row for row in rows(live) if "eval" not in row]
    assert first["margin"] == pytest.approx(0, abs=1e-5) and abs(last["margin"]) > 1e-3


def test_the_held_out_pairs_are_an_exam(referred):
    for folder, _ in referred.values():
        before, after = [row for row in rows(folder) if "eval" in row]
        assert before["eval"] == after["eval"] == "pairs" and before["problems"] == 3
        assert before["accuracy"] == 0.5 and after["accuracy"] in (0, 1 / 3, 2 / 3, 1), "even, then not"
        assert before["margin"] == pytest.approx(0, abs=1e-5) and after["margin"] != 0


def test_asking_the_reference_before_draws_no_number_and_moves_no_order(world, start, tmp_path):
    batches = []
    for reference in ("live", "precomputed"):
        config = adapters.follow(load_config(settings_of(start, tmp_path, "--reference", reference)))
        run = Run(config, world, load_inputs(config))
        state, cursor = torch.get_rng_state(), run.stream.cursor
        run.begin()
        assert torch.equal(torch.get_rng_state(), state) and run.stream.cursor == cursor
        batches.append([run.source(step).samples for step in range(3)])
    assert batches[0] == batches[1]


def test_what_a_reference_has_said_is_kept_under_a_hash_of_all_that_it_depends_on(world, start, tmp_path, monkeypatch):
    def kept(name: str, *argv) -> tuple[str, bytes]:
        run = begin(world, settings_of(tmp_path, tmp_path, "--reference=precomputed", "--name", name, *argv))
        [path] = run.folder.glob("reference-*")
        return path.name, load_file(path)["keys"].numpy().tobytes()

    shutil.copytree(start, tmp_path, dirs_exist_ok=True)
    found = {"as it is": kept("one")}
    assert kept("again") == found["as it is"]
    base_of(tmp_path / "other", seed=5)
    found["other weights"] = kept("weights", f"--model={tmp_path}/other")
    assert found["other weights"][0] != found["as it is"][0]
    found["fewer rows"] = kept("fewer", "--steps=1")
    write(tmp_path / "train.jsonl", *map(row_of, range(1, 8)))
    found["other rows"] = kept("rows")
    template = tmp_path / "model/chat_template.jinja"
    template.write_text("Now: " + template.read_text())
    found["another template"] = kept("template")
    assert len(set(found.values())) == len(found), found


def test_a_run_goes_on_with_what_its_reference_has_said_and_not_without(world, start, tmp_path, monkeypatch):
    argv = settings_of(start, tmp_path, "--reference=precomputed", "--name=r", "--save_every=1")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_after(patch, 1)
        finish(world, argv)
    [path] = (tmp_path / "r").glob("reference-*")
    path.rename(tmp_path / "aside")
    with pytest.raises(UserError, match="cannot be asked again") as error:
        begin(world, [*argv, "--resume=auto"])
    assert str(path) in one_sentence(error)
    (tmp_path / "aside").rename(path)
    monkeypatch.setattr(known, "_ask", None)
    begin(world, [*argv, "--resume=auto"])


@pytest.mark.parametrize("reference", ["live", "precomputed"])
def test_a_killed_run_resumes_bit_for_bit(world, start, tmp_path, reference):
    assert_goes_on_bit_for_bit(world, settings_of(start, tmp_path, "--reference", reference))


def test_two_ranks_read_ask_and_learn_what_one_does(start, referred, tmp_path):
    """3 pairs of a step, and 3 held out, are 2 of one rank and 1 of the other."""
    launch(*settings_of(start, tmp_path, "--reference=precomputed", "--name=two"), ranks=2)
    assert_near(tmp_path / "two", referred["precomputed"][0])


BAD = {
    "a missing column": ({"prompt": "2+2?", "chosen": "4"}, "the rejected in column 'rejected' is empty"),
    "an empty answer": ({"prompt": "2+2?", "chosen": " ", "rejected": "5"}, "the chosen in column 'chosen' is empty"),
    "equal answers": ({"prompt": "2+2?", "chosen": "4", "rejected": "4"}, "are the same answer"),
    "prompts that differ": (
        {
            "prompt": "2+2?",
            "chosen": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}],
            "rejected": [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}],
        },
        "the prompts of chosen and rejected differ",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_row_that_is_no_pair_is_named_before_a_model_is_loaded(start, tmp_path, name):
    bad, words = BAD[name]
    path = write(tmp_path / "bad.jsonl", row_of(1), bad)
    with pytest.raises(UserError, match=f"bad.jsonl, row 2: .*{words}") as error:
        load_inputs(load_config(settings_of(start, tmp_path, f"--train_data={path}")))
    one_sentence(error)


def test_pairs_that_are_too_long_are_dropped_and_counted(world, start, tmp_path):
    write(tmp_path / "train.jsonl", *map(row_of, range(4)), row_of(4) | {"rejected": "5 " * 60})
    argv = settings_of(start, tmp_path, f"--train_data={tmp_path}/train.jsonl", "--max_new_tokens=40", "--steps=2")
    run = begin(world, argv)
    batches = [run.source(step) for step in range(2)]
    assert [len(batch.samples) for batch in batches] == [6, 6]
    assert sum(batch.tally.sums["prompts_dropped"] for batch in batches) == run.stream.cursor - 6 > 0
    for chosen, rejected in zip(batches[0].samples[::2], batches[0].samples[1::2], strict=True):
        assert chosen.prompt == rejected.prompt and chosen.group == rejected.group and chosen.answer != rejected.answer
    assert len({s.group for batch in batches for s in batch.samples}) == 6
    assert dataclasses.replace(chosen, answer=rejected.answer) == rejected
