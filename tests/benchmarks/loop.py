"""What the loop costs: `ortho train` against a loop written by hand, the same ResNet-20 on digits, round about.

    python tests/benchmarks/loop.py [ROUNDS]

Both train the same model from the same weights on the same batches with the same optimizer, and note their loss every
ten steps; a round is one epoch of each, and who goes first changes. The hand-written loop has nothing else.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from ortho_cli.recipe.train import TrainRecipe, load_train
from ortho_cli.training.keeper import Keeper
from ortho_cli.training.loop import fit
from ortho_cli.training.session import open_session, prepare_training

LOG_EVERY = 10
RECIPE = """
version: 1
task: {{name: classify}}
model: {{name: resnet20, norm: group}}
data: {{name: digits, batch: 64, augment: [crop]}}
optimizer: {{name: sgd, lr: 0.01, momentum: 0.9, weight_decay: 1e-4}}
train: {{epochs: 1000000, eval_every: 1000000, threads: 2}}
run: {{dir: {folder}/run, log_every: {log_every}}}
"""


def ours(recipe: TrainRecipe, cleanup: ExitStack) -> tuple[Callable[[], None], torch.nn.Module]:
    """One epoch of a run, its logs written, as a function."""
    session = open_session(recipe)
    prepare_training(session)
    keeper = Keeper(session)
    session.folder.mkdir(parents=True)
    cleanup.enter_context(keeper.open_logs())

    def epoch() -> None:
        fit(session, keeper.counters, keeper.window, lambda: keeper.after_step() or keeper.counters.batch == 0)

    return epoch, session.model


def by_hand(recipe: TrainRecipe) -> tuple[Callable[[], None], torch.nn.Module]:
    """The same with nothing but torch around model, data and loss."""
    torch.manual_seed(recipe.train.seed)
    task = open_session(recipe).task
    torch.manual_seed(recipe.train.seed)
    model = task.build_model(recipe.model)
    decayed = [value for value in model.parameters() if value.dim() > 1]
    groups = [
        {"params": decayed, "weight_decay": recipe.optimizer.weight_decay},
        {"params": [value for value in model.parameters() if value.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=recipe.optimizer.lr, momentum=recipe.optimizer.momentum)
    done, losses, said = 0, [], []

    def epoch() -> None:
        nonlocal done
        model.train()
        for step, batch in enumerate(task.batches("train", done, batch=recipe.data.batch), 1):
            optimizer.zero_grad()
            loss, _, _ = task.loss(model, batch, "train")
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if step % LOG_EVERY == 0:
                said.append(sum(losses) / len(losses))
                losses.clear()
        done += 1

    return epoch, model


def main(rounds: int) -> None:
    """Print the medians, and that both loops did the same."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as cleanup:
        path = Path(folder) / "loop.yaml"
        path.write_text(RECIPE.format(folder=folder, log_every=LOG_EVERY), "utf-8")
        recipe = load_train(path)
        loops = {"ortho": ours(recipe, cleanup), "by hand": by_hand(recipe)}
        seconds: dict[str, list[float]] = {name: [] for name in loops}
        for number in range(rounds + 1):
            order = list(loops) if number % 2 else list(reversed(loops))
            for name in order:
                started = time.perf_counter()
                loops[name][0]()
                if number:  # the first round warms up
                    seconds[name].append(time.perf_counter() - started)
    models = [model.state_dict() for _, model in loops.values()]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0]), "the loops differ"
    ratios = [mine / theirs for mine, theirs in zip(seconds["ortho"], seconds["by hand"], strict=True)]
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    quartiles = statistics.quantiles(ratios, n=4)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {rounds} rounds, equal weights after them")
    print(f"ortho / by hand: median of ratios {quartiles[1]:.3f} (quartiles {quartiles[0]:.3f} to {quartiles[2]:.3f})")
    print(f"                 ratio of medians {middle['ortho'] / middle['by hand']:.3f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 40)
