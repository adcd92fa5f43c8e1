"""`run.export`: the forms in which a run leaves its adapter to other tools, and which make sense for a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from ortho_cli.recipe.section import Rejection

if TYPE_CHECKING:
    from ortho_cli.recipe.train import TrainRecipe

__all__ = ["ADAPTERS", "DIFFUSION", "ExportForm", "export_problems"]

ExportForm = Literal["peft", "kohya-lora", "diffusers-lora", "merged", "merged-ldm", "merged-diffusers"]
ADAPTERS = ("hra", "lora", "peft")  # methods that leave an adapter
DIFFUSION = "diffusion"  # the kind of Stable Diffusion
OF_DIFFUSION = ("kohya-lora", "diffusers-lora", "merged-ldm", "merged-diffusers")
AS_LORA = ("kohya-lora", "diffusers-lora")
# PEFT's types, and how far they go: as a LoRA, or folded into the weights.
LORA_TYPES = ("HRA", "LORA", "LOHA", "LOKR")
MERGED_TYPES = (*LORA_TYPES, "OFT", "BOFT")


def export_problems(recipe: TrainRecipe) -> Iterator[Rejection]:
    """What of `run.export` this recipe's adapter can never be; the rest is seen when the adapter is there."""
    methods = [method for method in recipe.methods if method.name in ADAPTERS]
    if recipe.run.export and not methods:
        yield ("run", "export"), f"is of adapters, and no method is one of {', '.join(ADAPTERS)}"
        return
    for index, form in enumerate(recipe.run.export):
        reason = _reason(recipe, form) or next(filter(None, (_of_method(recipe, form, each) for each in methods)), "")
        if reason:
            yield ("run", "export", index), reason


def _reason(recipe: TrainRecipe, form: str) -> str:
    """Why a model has no such form."""
    diffusion = recipe.model.kind == DIFFUSION
    if form in OF_DIFFUSION and not diffusion:
        return f"{form} is for Stable Diffusion, and the model is {recipe.model.name}; there are peft and merged"
    if form == "merged" and diffusion:
        return "write merged-ldm (one file) or merged-diffusers (a folder)"
    if form != "peft" and recipe.model.base is None:
        return f"{form} is made of the weights of model.base, and there is none"
    return ""


def _of_method(recipe: TrainRecipe, form: str, method: Any) -> str:
    """Why an adapter has no such form."""
    kind, keys = method.name.upper(), {}
    if method.name == "peft":
        kind, keys = str(method.config.get("peft_type", "")).upper(), dict(method.config)
    whole = keys.get("modules_to_save") or getattr(method, "modules_to_save", ())
    whole = whole or keys.get("bias", getattr(method, "bias", "none")) != "none"
    names = f"methods.{method.name}"
    if form in AS_LORA and (kind not in LORA_TYPES or keys.get("use_dora")):
        return f"{names} is {'DoRA' if keys.get('use_dora') else kind}, which has no exact form as a LoRA"
    if form.startswith("merged") and kind not in MERGED_TYPES:
        return f"{names} is {kind}, which ortho cannot fold into weights"
    if form == "peft" and recipe.model.kind == DIFFUSION and kind not in ("HRA", "LORA"):
        return f"{names} is {kind}; its own folder, export/peft, is what PEFT loads"
    if whole and (form in AS_LORA or (form == "peft" and recipe.model.kind == DIFFUSION)):
        return f"{names} trains biases or whole modules, which {form} has no place for; merged forms have"
    return ""
