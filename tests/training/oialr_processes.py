"""What `test_oialr_runs.py` starts with torchrun: OIALR on processes whose decompositions differ.

torchrun --nproc_per_node N oialr_processes.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from training_runs import write

from ortho_cli.recipe.train import load_train
from ortho_cli.training.keeper import Keeper
from ortho_cli.training.loop import fit
from ortho_cli.training.processes import leave
from ortho_cli.training.session import open_session, prepare_training

SECTIONS = {
    "model": "{name: vit-mini, patch: 4, depth: 2, heads: 2, dim: 24}",
    "methods": "[{name: oialr, every: 2, threshold: 0.6, patience: 1, order: all, beta: 0.2}]",
    "optimizer": "{name: sgd, lr: 0.05, momentum: 0.9}",
    "train": "{steps: 12, clip: 1.0, ema: 0.5, threads: 1}",
    "data": "{name: digits, batch: 64}",
}


def main(folder: Path) -> None:
    """Train, and leave the weights and moments of each process."""
    session = open_session(load_train(write(folder, "run", **SECTIONS)))
    rank = session.accelerator.process_index
    plain = torch.linalg.svd

    def flipped(matrix: torch.Tensor, **options: Any) -> Any:
        """An SVD as good as any, with other signs on each process."""
        u, values, vt = plain(matrix, **options)
        return (-u, values, -vt) if rank else (u, values, vt)

    torch.linalg.svd = flipped
    prepare_training(session)
    session.folder.mkdir(exist_ok=True)
    keeper, wrappers = Keeper(session), set()

    def after_step() -> bool:
        wrappers.add(session.wrapped)
        return keeper.after_step()

    with keeper.open_logs():
        fit(session, keeper.counters, keeper.window, after_step)
    many = session.accelerator.num_processes > 1
    assert all(isinstance(each, DistributedDataParallel) is many for each in wrappers)
    weights = {name: value.detach() for name, value in session.model.named_parameters()}
    dense = {name: layer.weight.detach() for name, layer in session.methods[0].run.converted.items()}
    names = {id(parameter): name for name, parameter in session.model.named_parameters()}
    moments = {names[id(parameter)]: state["momentum_buffer"]
               for parameter, state in next(iter(session.optimizers.values())).state.items()}  # fmt: skip
    assert moments.keys() == {name for name, value in session.model.named_parameters() if value.requires_grad}
    torch.save((weights, moments, dense, len(wrappers)), folder / f"rank{rank}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
