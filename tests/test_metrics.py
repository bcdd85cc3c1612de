"""Metrics: how parts and ranks are put together, and that no number can vanish or pass for a setting."""

import json

import pytest
import torch

from engine.config import TYPES
from engine.log import numbers, plot_curves
from engine.metrics import METRICS, DeviceStats, Tally, metric_of
from tests.test_dist import launch

REDUCED = """
import json, os
from engine import dist
from engine.metrics import Tally, reduce

def main():
    world, tally = dist.start("cpu"), Tally()
    tally.add(correct=1 + world.rank, graded=4)
    if world.rank:
        tally.add({"rewards/mine": 3.0}, prompts_dropped=2, empty_updates=0)
        tally.top(ratio_max=1.5)
    else:
        tally.add(loss=0.5, updates=1)
        tally.top(nll_max=-2.0)
    os.write(1, (json.dumps(reduce(tally.sums, tally.tops)) + "\\n").encode())

dist.run(main)
"""


def test_names_that_only_one_rank_reports_are_reduced(tmp_path):
    code, output, _ = launch(tmp_path, REDUCED, ranks=2)
    wanted = (
        '{"rewards/mine": 0.375, "accuracy": 0.375, "loss": 0.5, "prompts_dropped": 2.0, "nll_max": -2.0, '
        '"ratio_max": 1.5}'
    )
    assert code == 0 and output.count(wanted) == 2, output


@pytest.mark.parametrize("name", ["acuracy", "reward", "mine/reward", "ratio_max"])
def test_a_sum_that_no_metric_is_made_of_is_refused(name):
    with pytest.raises((AssertionError, KeyError), match=name.partition("/")[0]):
        Tally().add({name: 1.0})


@pytest.mark.parametrize("name", ["most", "reward", "correct"])
def test_a_maximum_that_is_none_is_refused(name):
    with pytest.raises((AssertionError, KeyError), match=name):
        Tally().top(**{name: 1.0})


def test_statistics_of_a_loss_are_summed_or_the_largest_kept_and_unknown_ones_refused():
    stats, tally = DeviceStats(), Tally()
    for nll, top in ((1.0, -7.0), (2.0, -3.0), (4.0, -5.0)):
        stats.add(("nll", None, "nll_max"), torch.tensor([nll, torch.nan, top]))
    stats.read(tally)
    assert tally.sums == {"nll": 7.0} and tally.tops == {"nll_max": -3.0} and not stats.held
    stats.add(("surprise",), torch.ones(1))
    with pytest.raises(AssertionError, match="surprise"):
        stats.read(tally)


def test_no_metric_has_the_name_of_a_setting():
    assert not METRICS.keys() & TYPES.keys()


def test_every_number_of_a_row_has_its_group():
    row = {"step": 3, "accuracy": 0.5, "rewards/format": 1.0, "seconds/update": 2.0, "kl": 0.1}
    assert numbers(row) == {
        "reward/accuracy": 0.5, "rewards/format": 1.0, "seconds/update": 2.0, "policy/kl": 0.1,
    }  # fmt: skip
    assert numbers({"step": 3, "eval": "greedy", "accuracy": 0.5}) == {"eval_greedy/accuracy": 0.5}
    assert metric_of("seconds/anything") is METRICS["seconds/*"]
    with pytest.raises(KeyError, match="surprise"):
        numbers({"surprise": 1.0})


def test_a_picture_has_no_empty_panels_but_the_accuracies(tmp_path, monkeypatch):
    rows = [{"step": i, "grad_norm": 1.0, "margin": 0.1} for i in range(3)]
    rows += [{"step": i, "eval": "pairs", "accuracy": 0.5} for i in (0, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *args, **more: drawn.append(figure))
    plot_curves(tmp_path)
    seen = [[line.get_label() for line in axis.lines] for axis in drawn[0].axes]
    assert seen == [["held-out, pairs"], ["margin"], ["grad_norm"], []]
