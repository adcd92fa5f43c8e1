"""Judge a folder of pictures by another: any two folders, whoever made them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState

from ortho_cli.analysis.evaluation import Evaluation
from ortho_cli.analysis.picture_features import INCEPTION, load_network
from ortho_cli.analysis.picture_folder import open_folder
from ortho_cli.analysis.picture_metrics import Network, PictureOptions, chosen_metrics, measure_pictures, read_settings
from ortho_cli.analysis.run_folder import is_run
from ortho_cli.errors import UsageError

from .base import gone_base
from .run_features import RunNetwork

__all__ = ["evaluate_pictures", "network_loader"]


def evaluate_pictures(
    generated: Path,
    reference: Path,
    *,
    metrics: Sequence[str] | None = None,
    sets: Sequence[str] = (),
    features: str = INCEPTION,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> Evaluation:
    """Compare a folder of generated pictures with one of references.

    Args:
        generated: a folder of pictures.
        reference: another.
        metrics: names in the registry's `picture_metrics`; None: all.
        sets: settings of metrics, `METRIC.KEY=VALUE`.
        features: the network of fid and kid: `inception`, a run that classifies, a hub id or a folder of transformers.
        seed: of what metrics draw.
        say: takes lines of progress.

    Raises:
        UsageError: no pictures, an unknown metric or setting, or several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "folders of pictures are judged by one process",
            hint="ortho evaluate --generated DIR --reference DIR, without accelerate launch",
        )
    wanted = chosen_metrics(metrics)
    settings = read_settings(sets, wanted)
    made, real = open_folder(generated), open_folder(reference)
    device = PartialState().device
    options = PictureOptions(network_loader(features, device), device, seed=seed, say=say)
    values, skipped = measure_pictures(made, real, wanted, options, settings)
    judged = {
        "generated": str(generated), "reference": str(reference), "pictures": len(made), "references": len(real),
        "features": options.used,
    }  # fmt: skip
    where = f"{len(made):,} pictures against {len(real):,} of {reference.name}"
    notes = [f"fid and kid are by the features of {options.used}"] if options.used else []
    return Evaluation(generated.resolve().name, where, judged, tuple(sets), values, skipped, notes)


def network_loader(name: str, device: torch.device, accelerator: Accelerator | None = None) -> Callable[[], Network]:
    """What loads a network of features when it is needed.

    Args:
        name: `inception`, a run that classifies, a hub id or a folder that `AutoModel` reads.
        device: where it works.
        accelerator: of the processes that are met already.

    Raises:
        UsageError: a folder that is not there.
    """
    folder = Path(name).expanduser()
    if gone := gone_base(name):
        raise UsageError(f"--features: {gone}", hint="name a run that classifies, or a hub id")
    place = str(folder) if folder.is_dir() else name
    return lambda: RunNetwork(folder, accelerator) if is_run(folder) else load_network(place, device)
