"""`track_stability` on torch's attention, whose projections are parameters, and on layers without full rank."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from torch import nn

from ortho_cli.analysis.stability_report import read_changes
from ortho_cli.methods.method import Context
from ortho_cli.methods.track_stability import COLUMNS, FILE, TrackStabilityMethod
from ortho_cli.recipe.methods import TrackStability


def tracked(model: nn.Module, folder: Path, change: str) -> Path:
    """Two checks with the parameter of one name drawn anew in between."""
    method = TrackStabilityMethod(TrackStability(name="track_stability", every=1))
    method.prepare(model, Context(seed=0, total_steps=2, task="classify", base=None))
    optimizer = torch.optim.SGD(model.parameters())
    for step in range(2):
        method.after_step(model, optimizer, step, "main")
        nn.init.normal_(model.get_parameter(change))
    method.export(model, folder)
    return folder / FILE


def test_projections_of_attention_that_lie_apart(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.MultiheadAttention(8, 2, kdim=6, vdim=10), nn.MultiheadAttention(8, 2))
    found = {each.layer: each for each in read_changes(tracked(model, tmp_path / "out", "0.k_proj_weight"))}
    assert list(found) == ["0.q_proj", "0.k_proj", "0.v_proj", "0.out_proj", "1.in_proj", "1.out_proj"]
    assert [(each.rows, each.cols) for each in found.values()] == [(8, 8), (8, 6), (10, 8), (8, 8), (24, 8), (8, 8)]
    assert [name for name, each in found.items() if each.stability < 0.999] == ["0.k_proj"]


def test_a_reference_of_zeros_is_recorded_as_one(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6))
    nn.init.zeros_(model[0].weight)
    file = tracked(model, tmp_path / "out", "0.weight")
    with file.open(encoding="utf-8", newline="") as table:
        assert tuple(next(csv.reader(table))) == COLUMNS
    first, second = read_changes(file)
    assert (first.rank, first.reference_rank, first.is_resolved) == (4, 0, False)
    assert (second.rank, second.reference_rank, second.is_resolved) == (6, 6, True)
