"""`ortho demo`: the tour for a newcomer, offline, under a minute; every command is printed as one would type it.

First checkpoints, then training: the tour's checkpoint is too small a likeness to be trained, so a fixed nudge stands
in for that there, and what is trained at the end are two small networks on digits.
"""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ortho_cli.errors import OutputError

if TYPE_CHECKING:
    from torch import Tensor

    from ortho_cli.checkpoints.tensors import TensorInfo

__all__ = ["demo"]

NUDGED = "nudge"  # no command
# What each step shows, and the command; {x} are file names in the demo's folder.
STEPS = (
    ("What is in this checkpoint? Only its header is read.", "inspect {base}"),
    ("Householder adapters beside it, as a PEFT folder. They start as the identity.", "add-hra {base} -o {adapter}"),
    ("Training would now turn the reflections; here a fixed nudge stands in for it.", NUDGED),
    ("Does this adapter belong to this base?", "inspect {trained} --base {base}"),
    ("Fold it into the weights: orthogonal maps, so every singular value stays.", "merge {base} {trained} -o {merged}"),
    ("The same adapter as an exact LoRA that every image tool loads.",
     "convert {trained} --to kohya-lora --base {base} -o {lora}"),
    ("The LoRA says the same as the adapter.", "merge {base} {lora} -o {merged_lora} --quiet"),
    ("Here is the proof, tensor by tensor.", "inspect {merged} --diff {merged_lora} --fail-above 1e-5"),
    ("Or the adapter inside the checkpoint, as its authors keep it ...", "add-hra {base} -o {inside} --quiet"),
    ("... and out again:", "convert {inside} --to base -o {restored} --quiet"),
    ("not a byte differs.", "inspect {base} --diff {restored} --fail-above 0"),
    ("Half the parameters: low-rank factors where they cost least, from the SVD of each weight.",
     "factorize {base} -o {factors} --budget 0.5"),
    ("Now train: handwritten digits, with filters that become orthonormal in groups (GOR).",
     "train quickstart --set run.dir={run} --set train.epochs=5"),
    ("Or a transformer that trains only small cores of its weights once their bases have settled (OIALR).",
     "train digits-vit-oialr-quick --set run.dir={oialr}"),
    ("When did each basis settle, and what did freezing it save?",
     "analyze stability {oialr}/export/track_stability/stability.csv -o {stability} --threshold 0.995"),
    ("What it left behind: thin factors in place of weights.", "inspect {oialr}/export/oialr/factors"),
)  # fmt: skip
FILES = {
    "base": "v1-5-small.safetensors",
    "adapter": "hra-adapter",
    "trained": "hra-trained",
    "merged": "merged.safetensors",
    "lora": "hra-as-lora.safetensors",
    "merged_lora": "merged-from-lora.safetensors",
    "inside": "v1-5-small-hra.safetensors",
    "restored": "v1-5-small-restored.safetensors",
    "factors": "factors.safetensors",
    "report": "factors-report",
    "run": "quickstart",
    "oialr": "oialr",
    "stability": "oialr-stability",
}
# What is worth a look inside.
RUN = {
    "recipe.yaml": "every setting, defaults too",
    "metrics.jsonl": "losses, accuracies and penalties, a line a report",
    "checkpoints": "the best state and the last ones, to go on from with --resume",
    "report.html": "curves to look at",
}
INSIDE = {
    "run": RUN,
    "oialr": {
        "report.html": RUN["report.html"],
        "export/oialr/factors": "the low-rank network, for ortho.load_factorized",
        "export/oialr/dense": "the same multiplied out, a drop-in",
        "export/oialr/layers.csv": "ranks, and when each layer converted",
        "export/track_stability/stability.csv": "how far each basis moved, recorded in training",
    },
    "stability": {"stability.html": "heatmaps of layers by steps, advice"},
}


def demo(
    folder: Annotated[Path, typer.Argument(help="Where to work; it must not exist yet.")] = Path("ortho-demo"),
    force: Annotated[bool, typer.Option("-f", "--force", help="Replace an earlier demo.")] = False,
) -> None:
    """Take the tour: every verb on a small checkpoint with Stable Diffusion's names, and two short trainings.

    Example: ortho demo
    """
    from ortho_cli.surgery.small_sd15 import small_sd15

    _prepare(folder, force)
    paths = {key: str(folder / name) for key, name in FILES.items()}
    _say("First, a small checkpoint with the names of Stable Diffusion 1.5 and random weights.")
    small_sd15(paths["base"])
    for title, command in STEPS:
        _say(title)
        if command is NUDGED:
            _nudge(Path(paths["adapter"]), Path(paths["trained"]))
        else:
            _run(command.format(**paths))
    typer.echo()
    _say(f"Done. It is all in {folder}/:")
    for key, name in FILES.items():
        typer.echo(f"  {name:40} {_PURPOSE[key]}")
        for inside, purpose in INSIDE.get(key, {}).items():
            typer.echo(f"    {inside:38} {purpose}")
    typer.echo("\nNext: ortho recipe list, ortho --help, or the README on your own checkpoint.")


_PURPOSE = {
    "base": "the checkpoint",
    "adapter": "the adapter as it starts, a PEFT folder",
    "trained": "the adapter after the nudge",
    "merged": "the checkpoint with the adapter folded in",
    "lora": "the adapter as a kohya LoRA",
    "merged_lora": "the checkpoint with that LoRA folded in: the same weights",
    "inside": "the checkpoint with adapters inside it",
    "restored": "the checkpoint with those taken out again",
    "factors": "the checkpoint as low-rank factors",
    "report": "what the factors keep, with spectra to look at",
    "run": "the training run with GOR:",
    "oialr": "the training run with OIALR:",
    "stability": "the report on its bases:",
}
NUDGE = 0.05  # radians or so by which each reflection turns: visible, and far from random


def _prepare(folder: Path, force: bool) -> None:
    """Make the folder; with `force`, remove what an earlier demo left there and nothing else."""
    import shutil

    if folder.exists() and not force:
        raise OutputError(f"{folder} exists", hint=f"ortho demo OTHER-FOLDER, or ortho demo {folder} --force")
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES.values():
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _nudge(adapter: Path, trained: Path) -> None:
    """Copy the adapter with its column pairs turned apart, as training would."""
    from ortho_cli.checkpoints.store import open_checkpoint
    from ortho_cli.surgery.adapter_folder import Factor
    from ortho_cli.surgery.plan import OutputFile, Plan, run

    opened = open_checkpoint(adapter)

    pieces = [
        Factor(info.shape, partial(_turned, info, seed)).piece(name)
        for seed, (name, info) in enumerate(opened.tensors.items())
    ]
    copies = [(adapter / name, name) for name in ("adapter_config.json", "README.md")]
    file = OutputFile("adapter_model.safetensors", pieces, dict(opened.metadata))
    run(Plan("demo", [opened.files[0].path], trained, [file], copies=copies))


def _turned(info: TensorInfo, seed: int) -> Tensor:
    import torch

    from ortho_cli.checkpoints.reading import TensorReader

    with TensorReader() as reader:
        vectors = reader.read_copy(info)
    noise = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(seed))
    turned: Tensor = vectors + NUDGE * noise * vectors.norm(dim=0) / vectors.shape[0] ** 0.5
    return turned


def _say(text: str) -> None:
    typer.secho(f"\n{text}", bold=True)


def _run(command: str) -> None:
    from ortho_cli.cli.app import app

    typer.secho(f"$ ortho {command}", fg="green")
    app(shlex.split(command), standalone_mode=False)
