"""Teachers: what they see, what they say of which tokens, and whole runs of distillation off and on policy."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import transformers

from engine import model, parts
from engine.algos import ALGOS, needs
from engine.algos.loss import TopLogProbs
from engine.chat import encode_trace
from engine.config import load_config
from engine.errors import UserError
from engine.inputs import load_inputs, load_items
from engine.layout import make_rows
from engine.log import Log
from engine.samples import Sample
from engine.sources.context import Context
from kernels import chunked, eager
from tests.tables import one_sentence, write
from tests.test_adapters import base_of
from tests.test_preferences import assert_goes_on_bit_for_bit, start, world  # noqa: F401
from tests.test_train import rows

REWARD = "def none(text, row):\n    return 0.0\n"


def row_of(n: int) -> dict:
    return {"prompt": f"Mia has {n} pens.", "why": f"She has {n}.", "answer": str(n)}


@pytest.fixture
def data(tmp_path) -> str:
    (tmp_path / "mine.py").write_text(REWARD)
    return write(tmp_path / "rows.jsonl", *map(row_of, range(6)))


def settings_of(algo, start, data, tmp_path, *argv) -> list[str]:  # noqa: F811
    return [
        "--algo", algo, "--task", "jsonl", f"--train_data={data}", "--trace_column=why", f"--model={start}/model",
        f"--rewards={tmp_path}/mine.py:none", f"--out={tmp_path}", "--lr=1e-2", "--schedule=constant",
        "--warmup_steps=0", "--steps=3", "--step_tokens=150", "--prompts_per_step=2", "--group_size=2",
        "--max_new_tokens=24", "--max_prompt_tokens=128", "--max_context_tokens=400", "--shots=2", "--match_top_k=8",
        "--eval_size=0", "--tensorboard=false", "--threads=1", *map(str, argv),
    ]  # fmt: skip


def context_of(argv) -> tuple[Context, list]:
    config = load_config(argv)
    items = load_items(config, "train")
    return Context(items, model.load_tokenizer(config.model), config), list(items)


def test_examples_are_those_of_a_row_in_every_run_and_order_and_never_the_question(start, data, tmp_path):  # noqa: F811
    argv = settings_of("distill", start, data, tmp_path)
    context, items = context_of(argv)
    shown = {item.prompt[-1]["content"]: context.extend(item.prompt, item.row["row_index"]) for item in items}
    again, _ = context_of(argv)
    for item in reversed(items):
        question = item.prompt[-1]["content"]
        messages = again.extend(item.prompt, item.row["row_index"])
        assert messages == shown[question] and [m["content"] for m in messages].count(question) == 1
        assert [m["role"] for m in messages] == ["user", "assistant"] * 2 + ["user"]
    other, _ = context_of([*argv, "--seed=1"])
    assert any(other.extend(x.prompt, x.row["row_index"]) != shown[x.prompt[-1]["content"]] for x in items)
    assert len({messages[0]["content"] for messages in shown.values()}) > 1, "not the same ones for all"


@pytest.mark.parametrize("kind", ["fewshot", "shuffled_answers"])
def test_shuffled_answers_are_never_at_their_own_question(start, data, tmp_path, kind):  # noqa: F811
    context, items = context_of(settings_of("distill", start, data, tmp_path, f"--context={kind}", "--shots=3"))
    own = {item.prompt[-1]["content"]: item.trace for item in items}
    for item in items:
        said = [m["content"] for m in context.extend(item.prompt, item.row["row_index"])][:-1]
        assert all((own[question] == answer) == (kind == "fewshot") for question, answer in zip(said[::2], said[1::2]))
        assert sorted(own[question] for question in said[::2]) == sorted(said[1::2])


def test_a_question_too_long_behind_its_examples_is_named(start, data, tmp_path):  # noqa: F811
    write(tmp_path / "rows.jsonl", row_of(0), row_of(1) | {"prompt": "pens " * 60}, row_of(2))
    argv = settings_of("distill", start, data, tmp_path, "--shots=1")
    context, items = context_of([*argv, "--max_context_tokens=100000"])
    lengths = [len(context.encode(item)) for item in items]
    most = max(lengths) - 1
    with pytest.raises(
        UserError, match=f"row {lengths.index(most + 1) + 1}: .* has {most + 1} tokens with its 1 exam"
    ) as e:
        load_inputs(load_config([*argv, f"--max_context_tokens={most}"]))
    one_sentence(e)


OTHERWISE = "{% if add_generation_prompt and messages | length > 2 %}<think>\n{% endif %}"
REFUSED = {
    "too few rows": (["--shots=6"], "shots 6 asks for more than the 5 other rows"),
    "too few questions": (["--shots=3"], "row 1: shots 3 needs as many other questions"),
    "no solutions": (["--algo=opd", "--context=fewshot", "--trace_column="], "has no worked solutions to show"),
    "too many of the likeliest": (["--match_top_k=513"], "match_top_k 513 is above the vocabulary of 512"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_data_or_the_model_cannot_give_is_refused(start, data, tmp_path, name):  # noqa: F811
    argv, words = REFUSED[name]
    if name == "too few questions":
        write(tmp_path / "rows.jsonl", *[row_of(i % 2) for i in range(6)])
    given = settings_of("distill", start, data, tmp_path)
    given = given[2:] if argv[0].startswith("--algo") else given
    with pytest.raises(UserError, match=words) as error:
        load_inputs(load_config([*given, *argv]))
    one_sentence(error)


def test_a_template_that_begins_an_answer_otherwise_behind_examples_is_refused(start, data, tmp_path):  # noqa: F811
    base_of(tmp_path / "model")
    template = tmp_path / "model/chat_template.jinja"
    template.write_text(template.read_text() + OTHERWISE)
    argv = settings_of("distill", start, data, tmp_path, f"--model={tmp_path}/model")
    with pytest.raises(UserError, match="row 1: .* begins an answer in another way behind examples") as error:
        load_inputs(load_config(argv))
    one_sentence(error)
    load_inputs(load_config([*argv, "--context=zeroshot"]))


def test_a_teacher_of_another_vocabulary_is_refused(start, data, tmp_path):  # noqa: F811
    teacher = base_of(tmp_path / "teacher", seed=1)
    argv = settings_of("distill", start, data, tmp_path, f"--teacher={teacher}")
    load_inputs(load_config(argv))
    tokenizer = model.load_tokenizer("tiny")
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(teacher)
    with pytest.raises(UserError, match=f"The teacher {teacher} has another vocabulary than") as error:
        load_inputs(load_config(argv))
    one_sentence(error)


@pytest.mark.parametrize("ops", [eager, chunked], ids=["eager", "chunked"])
def test_rows_that_fill_up_a_teachers_embedding_mean_nothing(ops):
    V, K, g = 20, 4, torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*n, generator=g, dtype=torch.float64) for n in ((6, 5), (V + 8, 5), (V + 8,)))
    bias[V:] += 50
    source_M = torch.tensor([0, 2, 5])
    laid = SimpleNamespace(source_M=source_M)
    top = TopLogProbs(load_config(["--algo", "distill", f"--match_top_k={K}"]), ops, V)
    ids_MK, logp_MK = top(hidden, weight, bias, laid)
    truth = (hidden @ weight.T + bias)[source_M, :V].log_softmax(-1).topk(K)
    assert torch.equal(ids_MK, truth.indices) and (logp_MK - truth.values).abs().max() < 1e-6


def taught(world, argv):  # noqa: F811
    """(learner, inputs) of a run before its first step."""
    config = load_config(argv)
    inputs = load_inputs(config)
    made = parts.build(config, world, parts.load(config, world), inputs)
    return made.learner(Log(made.config, None, 0, False), None), inputs


def logps_of(folder, sample: Sample, prompt: list[int]) -> torch.Tensor:
    """[A, V] by transformers, of the tokens of the answer behind a prompt."""
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits_TV = lm(torch.tensor([prompt + sample.answer])).logits[0]
    return logits_TV[len(prompt) - 1 : -1].double().log_softmax(-1)


def with_context(inputs, config) -> list[Sample]:
    """Two answers to one question, and one to each of two others."""
    context = Context(inputs.items, inputs.tokenizer, config)
    found = []
    for index, text in ((0, None), (0, "No."), (1, None), (2, None)):
        item = inputs.items[index]
        prompt = [*context.tokenizer.encode(item.prompt[-1]["content"], add_special_tokens=False), 1]
        answer = encode_trace(inputs.tokenizer, item.prompt, text or item.trace)
        behaviour = torch.linspace(-6, -3, len(answer))
        values = {"logp_behaviour": behaviour} if config.rolls_out else {}
        found.append(Sample(prompt, answer, 0.0, 0, 0.1, values, context=context.encode(item)))
    return found


@pytest.mark.parametrize("share", ["true", "false"])
def test_what_a_teacher_says_behind_its_examples_is_of_the_answers_tokens(world, start, data, tmp_path, share):  # noqa: F811
    teacher = base_of(tmp_path / "teacher", seed=1)
    argv = settings_of("distill", start, data, tmp_path, f"--teacher={teacher}", f"--share_prompts={share}")
    learner, inputs = taught(world, argv)
    samples = with_context(inputs, learner.config)
    for s, given in zip(needs.teacher_top(learner, samples, 0), samples, strict=True):
        truth = logps_of(teacher, s, s.context)
        assert (s.prompt, s.answer, s.context) == (given.prompt, given.answer, given.context)
        assert len(s.context) > 3 * len(s.prompt) and s.values["top_logp"].shape == (len(s.answer), 8)
        assert (s.values["top_logp"] - truth.topk(8).values).abs().max() < 1e-5
        assert (truth.gather(1, s.values["top_ids"]) - s.values["top_logp"]).abs().max() < 1e-5


def test_an_advantage_is_the_teachers_log_probability_less_the_students(world, start, data, tmp_path):  # noqa: F811
    """And the gradient is that of minus their product with the log-probabilities, by the weights."""
    teacher = base_of(tmp_path / "teacher", seed=1)
    argv = settings_of(
        "opd", start, data, tmp_path, f"--teacher={teacher}", "--context=fewshot", "--logp_old=recompute"
    )
    learner, inputs = taught(world, argv)
    samples = learner.with_needs(with_context(inputs, learner.config), [True] * 4, 0)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(start / "model", dtype=torch.float32)
    truth = 0.0
    for s in samples:
        pick = lambda logp_AV: logp_AV.gather(1, torch.tensor(s.answer)[:, None])[:, 0]  # noqa: B023, E731
        own = pick(logps_of(start / "model", s, s.prompt))
        gain = pick(logps_of(teacher, s, s.context)) - own
        assert s.adv == 0 and (s.values["adv"] - gain).abs().max() < 1e-5 and gain.abs().max() > 0.1
        logits_TV = oracle(torch.tensor([s.prompt + s.answer])).logits[0]
        truth = truth - (s.weight * gain * pick(logits_TV[len(s.prompt) - 1 : -1].log_softmax(-1))).sum()
    truth.backward()
    [micro] = learner.micros(samples)
    loss, _ = learner.policy(make_rows(micro, learner.policy.plan), learner.loss)
    loss.backward()
    grads = {name: p.grad for name, p in oracle.named_parameters()}
    largest = max(grad.abs().max() for grad in grads.values())
    for name, p in learner.policy.lm.named_parameters():
        assert (p.grad.full_tensor() - grads[name]).abs().max() <= 1e-4 * largest
    assert largest > 1e-3


def test_a_student_that_is_its_own_teacher_learns_nothing(world, start, data, tmp_path):  # noqa: F811
    learner, inputs = taught(world, settings_of("opd", start, data, tmp_path, "--logp_old=recompute"))
    samples = [dataclasses.replace(s, context=[]) for s in with_context(inputs, learner.config)]
    assert all(s.values["adv"].eq(0).all() for s in learner.with_needs(samples, [True] * 4, 0))
    learner.learn(samples, 0)
    assert learner.log.sums["grad_norm"] == 0 and learner.log.sums["updates"] == 1


RUNS = {
    "distill, own context": ("distill", "--context=fewshot"),
    "distill, adapter": ("distill", "--context=shuffled_answers", "--lora_rank=4", "--reference=adapters_off"),
    "distill, kl of another teacher": ("distill", "--teacher={teacher}", "--context=zeroshot", "--match=kl"),
    "opd": ("opd", "--teacher={teacher}"),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_resumes_bit_for_bit(world, start, data, tmp_path, name):  # noqa: F811
    algo, *argv = RUNS[name]
    teacher = base_of(tmp_path / "teacher", seed=1)
    argv = [word.format(teacher=teacher) for word in argv]
    folder = assert_goes_on_bit_for_bit(world, settings_of(algo, start, data, tmp_path, *argv))
    first, _, last = rows(folder)
    assert first["grad_norm"] > 0 and last["grad_norm"] > 0
    assert "match" not in first or last["match"] < first["match"]
    assert {"distill": "teacher_mass", "opd": "kl"}[algo] in first


def test_every_row_with_a_teacher_has_its_frozen_model():
    own = {name for name, algo in ALGOS.items() if {needs.teacher_top, needs.adv_teacher} & {*algo.needs}}
    assert own == {name for name in ALGOS if load_config(["--algo", name]).taught}
