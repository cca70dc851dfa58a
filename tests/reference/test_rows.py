"""Which rows of weights and tensors are whose."""

from __future__ import annotations

import pytest
import torch
from models import Subject, plan_of
from models import subject as subject_named
from torch import nn

from pxcompress.layout.rows import complement, list_removed_rows, members_by_module, rows_first, unit_view, unit_weights


@pytest.mark.parametrize(
    ("module", "shape", "rows", "positions"),
    [
        (nn.Linear(6, 2), (3, 6), 6, 1),
        (nn.Linear(6, 2), (3, 5, 6), 6, 5),
        (nn.Linear(6, 2), (3, 4, 5, 6), 6, 20),
        (nn.Conv1d(6, 2, 1), (3, 6, 7), 6, 7),
        (nn.Conv2d(6, 2, 1), (3, 6, 4, 5), 6, 20),
        (nn.Conv3d(6, 2, 1), (3, 6, 2, 3, 4), 6, 24),
    ],
)
def test_rows_come_first_and_units_own_theirs(
    module: nn.Module, shape: tuple[int, ...], rows: int, positions: int
) -> None:
    value = torch.randn(shape)
    result = rows_first(value, module)
    assert result.shape == (3, rows, positions)
    for row in range(rows):
        expected = value[..., row] if isinstance(module, nn.Linear) else value[:, row]
        assert torch.equal(result[:, row].flatten(), expected.flatten())
    for index in (torch.arange(rows).reshape(3, 2), torch.tensor([[5, 0], [2, 3]]), torch.tensor([[4]])):
        view = unit_view(value, module, index)
        assert view.shape == (3, len(index), index.shape[1] * positions)
        for unit, owned in enumerate(index):
            assert torch.equal(view[:, unit], result[:, owned].flatten(1))


def test_units_weights(small: Subject) -> None:
    """The weights whose removal a unit's removal causes: zero them and the layer does not see the unit any more."""
    for group in small.groups:
        for member in group.members:
            module = small.model.get_submodule(member.module)
            result = unit_weights(small.model, member)
            if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
                assert result is None
                continue
            groups = getattr(module, "groups", 1)
            for unit, rows in enumerate(member.index.tolist()):
                if member.axis == "out":
                    expected = module.weight[rows]
                else:
                    width, outputs = module.weight.shape[1], module.weight.shape[0] // groups
                    expected = torch.cat(
                        [
                            module.weight[
                                (row // width) * outputs : (row // width + 1) * outputs, row % width
                            ].flatten()
                            for row in rows
                        ]
                    )
                assert torch.equal(result[unit].sort().values, expected.detach().flatten().sort().values)


def test_members_by_module_and_removed_rows() -> None:
    subject = subject_named("densenet")
    readers = members_by_module(subject.groups, "in")
    name = "features.transition1.conv"
    first, second = readers[name][0], readers[name][1]
    plan = plan_of({first[0].name: (1, 3), second[0].name: (0,)})
    expected = sorted([*first[1].index[[1, 3]].flatten().tolist(), *second[1].index[0].tolist()])
    assert list_removed_rows(readers[name], plan).tolist() == expected
    assert list_removed_rows((), plan).tolist() == []
    assert list_removed_rows(readers[name], plan_of({})).tolist() == []


@pytest.mark.parametrize(("rows", "expected"), [([], [0, 1, 2, 3]), ([0, 2], [1, 3]), ([3, 0, 1, 2], [])])
def test_others(rows: list[int], expected: list[int]) -> None:
    assert complement(4, torch.tensor(rows, dtype=torch.int64)).tolist() == expected
