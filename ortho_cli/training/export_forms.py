"""The forms of `run.export`: a run's adapter for other tools, made by the functions behind `ortho convert` and `merge`.

An adapter on a base that holds reflections itself takes their place.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from typing_extensions import Self

from ortho_cli.checkpoints.adapters import Adapter, read_adapter
from ortho_cli.checkpoints.checkpoint import Checkpoint
from ortho_cli.checkpoints.store import open_checkpoint, read_json
from ortho_cli.errors import RecipeError
from ortho_cli.recipe.exports import DIFFUSION
from ortho_cli.surgery.convert_adapter import plan_convert_adapter, without_hint_encoder
from ortho_cli.surgery.convert_checkpoint import plan_diffusers, plan_ldm
from ortho_cli.surgery.hra_repo import has_hra, is_sd15_ldm, without_reflections
from ortho_cli.surgery.merge import plan_merge
from ortho_cli.surgery.plan import Plan, run

from .base import open_base

__all__ = ["PLACES", "ExportSource", "write_form"]

# Where each form goes, below the run's `export`.
PLACES = {
    "peft": "peft-adapter",
    "kohya-lora": "kohya-lora.safetensors",
    "diffusers-lora": "diffusers-lora",
    "merged": "merged",
    "merged-ldm": "merged-ldm.safetensors",
    "merged-diffusers": "merged-diffusers",
}
PEFT_CONFIG = "adapter_config.json"


class ExportSource:
    """What forms are made of: the adapter that a run wrote, and its base, without reflections of its own.

    Args:
        recipe: of the run.
        folders: the adapters that its methods wrote; several act on different layers, and are one.
        scratch: an existing folder for what is only needed on the way.
    """

    def __init__(self, recipe: Any, folders: Sequence[Path], scratch: Path) -> None:
        self.recipe, self.folders, self.scratch = recipe, folders, scratch
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def is_diffusion(self) -> bool:
        """Whether it is of Stable Diffusion."""
        return bool(self.recipe.model.kind == DIFFUSION)

    @property
    def config(self) -> str | None:
        """Where the tokenizer of a bare file is."""
        return getattr(self.recipe.model, "config", None)

    @property
    def base_id(self) -> str | None:
        """The base's hub id; where a base lies on this disk is nobody else's business."""
        base = self.recipe.model.base
        return None if base is None or Path(base).expanduser().exists() else str(base).partition("@")[0]

    @cached_property
    def adapter(self) -> Adapter:
        """All that the run's methods wrote, as one adapter; its base is known, so that no fingerprint is asked for."""
        first, *others = map(read_adapter, self.folders)
        for other in others:
            if other.kind != first.kind or first.layers.keys() & other.layers.keys():
                raise RecipeError(
                    f"run.export: {first.path.name} and {other.path.name} are no one adapter: they are of different "
                    "kinds, or act on the same layers",
                    hint="leave run.export out, and use ortho convert and ortho merge on each",
                )
            first = replace(
                first, layers=first.layers | other.layers, replacements=first.replacements | other.replacements
            )
        metadata = {key: text for key, text in first.metadata.items() if key != "ortho.base_fingerprint"}
        return replace(first, metadata=metadata)

    @cached_property
    def base(self) -> Checkpoint | None:
        """The weights that the adapter acts on; None where they were random."""
        if self.recipe.model.base is None:
            return None
        checkpoint, tensors = open_base(self.recipe.model.base)
        checkpoint = replace(checkpoint, tensors=tensors)
        return without_reflections(checkpoint) if has_hra(checkpoint) else checkpoint

    def room(self) -> Path:
        """A new folder that is gone when the forms are made."""
        return Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix=".forms-", dir=self.scratch)))


def written(plan: Plan) -> Checkpoint:
    """Carry a plan out and open what it wrote."""
    run(plan)
    return open_checkpoint(plan.output)


def write_form(source: ExportSource, form: str, output: Path, *, dry_run: bool = False) -> list[str]:
    """Make one form of a run's adapter.

    Args:
        source: adapter and base.
        form: a key of `PLACES`.
        output: to write.
        dry_run: see that it can be made, and write nothing to `output`.

    Returns:
        What the user should know of it.

    Raises:
        OrthoError: there is no such exact form of this adapter, or of this base: a run has neither the names of an LDM
            file nor the configurations of a pipeline.
    """
    if form == "peft" and not source.is_diffusion:
        return _peft_folder(source, output, dry_run=dry_run)
    if form in ("peft", "kohya-lora", "diffusers-lora"):
        adapter = source.adapter
        to = f"peft-{_peft_kind(adapter)}" if form == "peft" else form
        plan = plan_convert_adapter(adapter, output, to, source.base)
    else:
        plan = _merged(source, form, output, dry_run=dry_run)
    run(plan, dry_run=dry_run)
    return list(plan.notes)


def _peft_kind(adapter: Adapter) -> str:
    """Whether PEFT's own HRA says all, or the exact LoRA is needed."""
    plain = all(
        layer.kind == "hra" and layer.options.get("side", "input") == "input" and not layer.options.get("eps")
        for layer in adapter.layers.values()
    )
    return "hra" if plain else "lora"


def _merged(source: ExportSource, form: str, output: Path, *, dry_run: bool) -> Plan:
    """The base with the adapter folded in, in the form that is asked for, whatever the base's own."""
    base = source.base
    assert base is not None, "the recipe was refused"
    is_file = is_sd15_ldm(base)
    if form != "merged" and not is_file and base.kind != "pipeline":
        raise RecipeError(
            f"model.base {source.recipe.model.base} is neither an LDM file nor a diffusers folder",
            hint="export the adapter: peft, kohya-lora; pictures are drawn from the run itself: ortho generate RUN",
        )
    alone = without_hint_encoder(source.adapter)  # an LDM file has a place for it
    adapter = source.adapter if form == "merged" or (form == "merged-ldm" and is_file) else alone
    if form == "merged" or (form == "merged-ldm" and is_file) or (form == "merged-diffusers" and not is_file):
        return plan_merge(base, [adapter], output)
    room = source.room()
    first = plan_merge(base, [alone], room / "merged.safetensors" if is_file else room / "merged")
    merged = base if dry_run else written(first)  # the names are the base's, folded or not
    plan = plan_ldm(merged, output) if form == "merged-ldm" else plan_diffusers(merged, output, source.config)
    plan.notes = list(dict.fromkeys([*first.notes, *plan.notes]))
    return plan


def _peft_folder(source: ExportSource, output: Path, *, dry_run: bool) -> list[str]:
    """The folder that the method wrote, which is PEFT's already, with the name of its base where the hub has it."""
    if len(source.folders) > 1:
        raise RecipeError(
            "run.export: peft: the recipe trains several adapters, and a folder of PEFT holds one",
            hint="leave it out: each method's own folder below export is what PEFT loads",
        )
    if not dry_run:
        shutil.copytree(source.folders[0], output)
        config = read_json(output / PEFT_CONFIG)
        config["base_model_name_or_path"] = source.base_id
        (output / PEFT_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    return []
