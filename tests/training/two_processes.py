"""What `test_processes.py` starts with torchrun: shapes that change in the middle of a run, and opposed phases.

torchrun --nproc_per_node N two_processes.py shapes|phases FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from training_runs import write

from ortho_cli.recipe.train import load_train
from ortho_cli.registry import TABLES
from ortho_cli.training.keeper import Keeper
from ortho_cli.training.loop import fit
from ortho_cli.training.processes import leave
from ortho_cli.training.session import open_session, prepare_training

SECTIONS = {
    "shapes": {"train": "{steps: 4, clip: 1.0}", "data": "{name: digits, batch: 64}"},
    "phases": {"train": "{steps: 4, clip: 1.0}", "data": "{name: digits, batch: 14}", "methods": "[]"},
}


def main(what: str, folder: Path) -> None:
    """Train, and leave the weights of each process."""
    if what == "shapes":
        TABLES["methods"]["gor"] = "toy_methods:Halving"
    else:
        TABLES["tasks"]["classify"] = "toy_tasks:OpposedTask"
    session = open_session(load_train(write(folder, "run", optimizer="{name: adam, lr: 0.01}", **SECTIONS[what])))
    prepare_training(session)
    session.folder.mkdir(exist_ok=True)
    keeper = Keeper(session)
    wrappers = {session.wrapped}

    def after_step() -> bool:
        wrappers.add(session.wrapped)
        return keeper.after_step()

    with keeper.open_logs():
        fit(session, keeper.counters, keeper.window, after_step)
    many = session.accelerator.num_processes > 1
    assert all(isinstance(each, DistributedDataParallel) is many for each in wrappers)
    weights = {name: value.detach() for name, value in session.model.named_parameters()}
    moments = {f"{phase}/{number}": state["exp_avg"] for phase, optimizer in session.optimizers.items()
               for number, state in enumerate(optimizer.state.values())}  # fmt: skip
    torch.save((weights, moments, len(wrappers)), folder / f"rank{session.accelerator.process_index}.pt")
    leave()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
