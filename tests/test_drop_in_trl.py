"""kernels.drop_in.install_in_trl: the GRPOTrainer of the pinned TRL with and without it, on the same batches."""

import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kernels import drop_in
from tests.kernel_cases import assert_close_as_eager, head_of

trl = pytest.importorskip("trl", reason="needs TRL: pip install --no-deps -r requirements-bench.txt")
utils = pytest.importorskip("trl.trainer.utils")
datasets = pytest.importorskip("datasets")

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "configs" / "models" / "tiny"
THEIRS = utils._ChunkedLogProbFunction
PROMPTS = ["1+2=", "what is 12 times 3?", "7-9=", "a longer one: 3+3+3+3="]
PLAIN = {
    "num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 12, "max_steps": 3,
    "learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant", "use_cpu": True, "bf16": False, "seed": 0,
    "gradient_checkpointing": False, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
    "disable_tqdm": True,
}  # fmt: skip
DATASET = datasets.Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS])
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "kernels" / "README.md").read_text(), re.DOTALL)
SETTINGS = {
    "grpo": {"loss_type": "grpo"},
    "bnpo, reference": {"loss_type": "bnpo", "beta": 0.1},
    "dr_grpo, two iterations": {"loss_type": "dr_grpo", "num_iterations": 2},
    "dapo, temperature": {"loss_type": "dapo", "temperature": 0.7, "beta": 0.1, "num_iterations": 2},
    "high entropy": {"top_entropy_quantile": 0.5},
    "entropy bonus": {"entropy_coef": 0.1},
    "fp32 head": {"cast_lm_head_to_fp32": True, "beta": 0.1},
    "sequences": {"importance_sampling_level": "sequence", "loss_type": "grpo", "num_iterations": 2},
}


def reward(completion_ids, **columns):
    return [sum(ids) % 7 / 7 for ids in completion_ids]


def make_model(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(TINY)
    for name, value in changes.items():
        setattr(config, name, value)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def saved(model, folder):
    """The model with a folder of its own, from where TRL takes tokenizer and reference."""
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder / "model")
    model.config._name_or_path = str(folder / "model")
    return model


def make_trainer(folder, settings, model=None):
    config = trl.GRPOConfig(output_dir=str(folder), **{**PLAIN, **settings})
    return trl.GRPOTrainer(saved(model or make_model(), folder), reward, args=config, train_dataset=DATASET)


@contextmanager
def head(install):
    """-> {"ours", "theirs"}: calls of each head; TRL's own is back afterwards."""
    calls = {"ours": 0, "theirs": 0}

    def counted(name, cls):
        def apply(*arguments):
            calls[name] += 1
            return cls.apply(*arguments)

        return type("Counted", (), {"apply": staticmethod(apply)})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "_use_triton", utils._use_triton)
        patch.setattr(utils, "_ChunkedLogProbFunction", counted("theirs", THEIRS))
        patch.setattr(drop_in, "_TRLHead", counted("ours", drop_in._TRLHead))
        if install:
            drop_in.install_in_trl()
        yield calls


def both(run, times):
    """-> run() of TRL's own head, then of ours, each called so many times and the other never."""
    found = []
    for install in (False, True):
        with head(install) as calls:
            found.append(run())
        assert calls == ({"ours": times, "theirs": 0} if install else {"ours": 0, "theirs": times})
    return found


def assert_near(ours, theirs, limit=1e-5):
    """In the norm; against 0.1 where theirs is less, as sums over tokens of opposite signs are."""
    ours, theirs = (torch.as_tensor(x).double() for x in (ours, theirs))
    assert ours.shape == theirs.shape
    assert (ours - theirs).norm() <= limit * max(theirs.norm(), 0.1)


def sample(trainer):
    """A scored batch as TRL keeps it, with the old and the reference's log-probabilities where its losses want them."""
    torch.manual_seed(1)
    return trainer._generate_and_score_completions([{"prompt": prompt} for prompt in PROMPTS[:2] for _ in range(4)])


def update(trainer, inputs):
    """-> loss, mean entropy, gradients by name, off the policy that sampled."""
    trainer.model.train().zero_grad()
    trainer._metrics["train"].clear()
    trainer.current_gradient_accumulation_steps = 1
    kept = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    torch.manual_seed(2)
    with torch.no_grad():
        for p in trainer.model.parameters():
            p += 0.1 * p.std() * torch.randn(p.shape) if p.dim() > 1 else 0.0
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    grads = {name: p.grad for name, p in trainer.model.named_parameters()}
    trainer.model.load_state_dict(kept, strict=False)
    return loss.item(), trainer._metrics["train"]["entropy"][0], grads


@pytest.mark.parametrize("name", SETTINGS)
def test_losses_and_gradients_of_an_update_are_trls(tmp_path, name):
    trainer = make_trainer(tmp_path, SETTINGS[name])
    wanted = {"num_iterations": "old_per_token_logps", "beta": "ref_per_token_logps"}
    logps = [key for setting, key in wanted.items() if setting in SETTINGS[name]]
    samples = both(lambda: sample(trainer), len(logps))
    for key in ("completion_ids", "advantages", *logps):
        assert_near(*[found[key] for found in samples])
    theirs, ours = both(lambda: update(trainer, samples[0]), 1)
    assert abs(theirs[0]) > 1e-4 or not logps  # where all ratios are 1 and advantages add up to 0, so does the loss
    assert_near(ours[0], theirs[0])
    assert_near(ours[1], theirs[1])
    for parameter, grad in theirs[2].items():
        assert grad.norm() > 0, parameter
        assert_near(ours[2][parameter] / grad.norm(), grad / grad.norm())


def flat(grads):
    return torch.cat([grad.double().flatten() for grad in grads.values()])


@pytest.mark.parametrize("settings, dtype", [({"bf16": True}, torch.float32), ({}, torch.bfloat16)], ids=str)
def test_bf16_costs_a_gradient_no_more_than_it_does_in_trl(tmp_path, settings, dtype):
    name, size = SETTINGS["bnpo, reference"], {"vocab_size": 4096}  # beyond the vocabularies of exact logits
    exact = make_trainer(tmp_path / "exact", name, make_model(**size))
    inputs = sample(exact)
    truth = flat(update(exact, inputs)[2])
    model = make_model(**size).to(dtype)
    theirs, ours = both(lambda: update(make_trainer(tmp_path / "bf16", {**name, **settings}, model), inputs), 1)
    error = lambda found: (flat(found[2]) - truth).norm()
    assert 1e-3 * truth.norm() < error(theirs) < 0.1 * truth.norm()
    assert error(ours) <= 1.1 * error(theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "autocast"], ids=str)
def test_the_head_errs_no_more_than_trls(dtype):
    """Called with all that a model may bring: a bias, a scale of its logits, a temperature."""
    stored = torch.float32 if dtype == "autocast" else dtype
    hidden, weight, ids = head_of(48, 4096, 64, stored, "cpu")
    bias = torch.randn(len(weight), generator=torch.Generator().manual_seed(1)).to(weight.dtype)
    g_NK = torch.randn(len(ids), 2, generator=torch.Generator().manual_seed(2))

    def run(head, autocast, *leaves):
        leaves = [x.detach().clone().requires_grad_() for x in leaves]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = head(*leaves, ids, 0.7, 1024, None, 1.5, ("log_probs", "entropy"))
        assert found[2:] == (None, None, None)
        torch.autograd.backward(found[:2], [g.to(x.dtype) for g, x in zip(g_NK.unbind(1), found)])
        return [x.detach() for x in found[:2]] + [x.grad for x in leaves]

    truth = run(plain_head, False, *(x.double() for x in (hidden, weight, bias)))
    theirs, ours = (run(cls.apply, dtype != stored, hidden, weight, bias) for cls in (THEIRS, drop_in._TRLHead))
    assert [x.dtype for x in ours] == [x.dtype for x in theirs]
    assert_close_as_eager("logp entropy dhidden dweight dbias", truth, theirs, ours)


def plain_head(hidden, weight, bias, ids, temperature, _, softcap, logit_scale, outputs):
    logp = (torch.nn.functional.linear(hidden, weight, bias) * logit_scale / temperature).log_softmax(1)
    return logp.gather(1, ids[:, None])[:, 0], -(logp.exp() * logp).sum(1), None, None, None


@pytest.mark.parametrize("name, times", [("dapo, temperature", 14), ("entropy bonus", 6)])
def test_a_training_run_is_trls(tmp_path, name, times):
    """Of 6 micro-batches; of 2 batches of samples, each in 2 parts, the old and the reference's log-probabilities."""

    def run():
        trainer = make_trainer(tmp_path, {**SETTINGS[name], "gradient_accumulation_steps": 2})
        trainer.train()
        return [row for row in trainer.state.log_history if "grad_norm" in row]

    theirs, ours = both(run, times)
    assert len(theirs) == PLAIN["max_steps"] and all(row["grad_norm"] > 0 for row in theirs)
    for mine, their in zip(ours, theirs, strict=True):
        del mine["step_time"], their["step_time"]
        assert mine == pytest.approx(their, rel=1e-5, abs=1e-6)


def test_the_readmes_call_reaches_models_that_are_already_wrapped(tmp_path):
    """Under mixed precision the reference's forward is, once its trainer stands; the policy's, when it trains."""
    (snippet,) = [text for text in SNIPPETS if "install_in_trl" in text]
    settings = {**PLAIN, "bf16": True, "beta": 0.1, "max_steps": 1, "output_dir": str(tmp_path)}
    names = {"model": saved(make_model(), tmp_path), "reward": reward, "prompts": DATASET}
    with head(install=False) as calls:
        exec(snippet, {**names, "config": trl.GRPOConfig(**settings)})
    assert calls["ours"] and not calls["theirs"]
