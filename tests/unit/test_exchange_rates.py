"""What one group's scores are worth beside another's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from models import batches_of, subject
from torch import Tensor, nn

from pxcompress import compress_module
from pxcompress.exchange_rates import LARGEST_SPREAD, at_rates, with_measured_rates
from pxcompress.graph import find_groups
from pxcompress.passes.moments import MomentCache
from pxcompress.passes.parts import HeldOut, spread_samples
from pxcompress.recipe import scoring
from pxcompress.repair.fold import Fold
from pxcompress.scorers import SCORERS
from pxcompress.state import seeded
from pxcompress.types import Batch, Price, ScoredModel


class _Branches(nn.Module):
    """Two hidden layers beside each other, of which the second hardly counts."""

    def __init__(self) -> None:
        super().__init__()
        self.loud, self.faint = nn.Linear(12, 16), nn.Linear(12, 16)
        self.loud_head, self.faint_head = nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return 3 * self.loud_head(self.loud(x).relu()) + 0.3 * self.faint_head(self.faint(x).relu())


def _scored() -> tuple[ScoredModel, Tensor]:
    with seeded(0):
        model, inputs = _Branches().eval(), torch.randn(96, 12)
    structure = find_groups(model, inputs[:1], ["loud_head", "faint_head"])
    scores = {
        group.name: torch.rand(group.units, generator=torch.Generator().manual_seed(1)) for group in structure.groups
    }
    price = Price("channels", "units", lambda widths: float(sum(widths.values())))
    return ScoredModel(model, inputs[:1], structure, scores, price, 0.5), inputs


def test_a_group_is_worth_what_its_loss_changes() -> None:
    """The outputs' divergence goes with the square of the change, which is ten times larger in one branch."""
    scored, inputs = _scored()
    batches = batches_of(inputs, 16)
    (rated,) = with_measured_rates([scored], [Fold()], batches, batches, None)
    rates = {name: rated.scores[name] / scored.scores[name] for name in scored.scores}
    assert all(torch.allclose(rate, rate[:1].expand(len(rate))) for rate in rates.values()), "one rate a group"
    assert 10 < float(rates["loud"][0] / rates["faint"][0]) < 1000


def test_groups_that_cannot_be_measured_get_the_middle_rate() -> None:
    scored, inputs = _scored()
    scored.scores["faint"].zero_()
    (rated,) = with_measured_rates([scored], [], batches_of(inputs, 16), batches_of(inputs, 16), None)
    assert not rated.scores["faint"].any()
    assert rated.scores["loud"].any()


def test_no_rate_is_far_from_the_others() -> None:
    scored, inputs = _scored()
    scored.scores["faint"].mul_(1e-9)
    batches = batches_of(inputs, 16)
    (rated,) = with_measured_rates([scored], [], batches, batches, None)
    rates = [float(rated.scores[name].sum() / scored.scores[name].sum()) for name in scored.scores]
    assert max(rates) / min(rates) <= LARGEST_SPREAD**2 * 1.01


@pytest.mark.parametrize("size", [1, 5, 7, 30])
def test_samples_are_spread_evenly(size: int) -> None:
    inputs = torch.arange(30.0)[:, None]
    chosen = torch.cat([part for part, _ in spread_samples(batches_of(inputs, size), 10)]).flatten()
    assert chosen.tolist() == list(range(0, 30, 3))
    assert len(torch.cat([part for part, _ in spread_samples(batches_of(inputs, size), 500)])) == 30


def test_moments_to_fit_to_are_taken_once_for_all_groups() -> None:
    scored, inputs = _scored()
    passes: list[int] = []

    class Counted(list):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[Batch]:
            passes.append(1)
            return super().__iter__()

    fit = MomentCache(Counted(batches_of(inputs, 16)), scored.model)
    with_measured_rates([scored], [Fold()], fit, batches_of(inputs, 16), None)
    assert len(passes) == 1


@pytest.mark.parametrize("scorers", [("random", "lrp:composite=gamma"), ("lrp:composite=gamma", "random")])
def test_a_result_names_the_scorer_that_was_chosen_and_its_rates(
    scorers: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "AUTO_SCORERS", scorers)
    net = subject("flatten_cnn")
    with seeded(0):
        batches = batches_of(torch.randn(96, *net.inputs.shape[1:]), 16)
    slim = compress_module(net.model, net.inputs[:1], batches, 0.5, round_to=1, repair=("fold",))
    (choice,) = slim.run.clock.notes
    assert slim.scorer == "lrp:composite=gamma"
    assert choice.startswith(f"the score is {slim.scorer} {'with measured rates' if slim.rates else 'as it is'}:")
    fit = list(HeldOut(batches, others=True))
    for name, values in SCORERS.build(slim.scorer)(net.model, net.groups, fit).items():
        torch.testing.assert_close(slim.scores[name], values * slim.rates.get(name, 1.0))


def test_rates_are_kept_for_scores_that_are_taken_again() -> None:
    scored, inputs = _scored()
    batches = batches_of(inputs, 16)
    (rated,) = with_measured_rates([scored], [Fold()], batches, batches, None)
    assert set(rated.rates) == set(scored.scores)
    for name, values in at_rates(scored.scores, rated.rates).items():
        assert torch.equal(values, rated.scores[name])
