"""The recipe's `peft`: any tuner of the installed PEFT by its own configuration, so that OFT and BOFT stand beside HRA.

The tuner is injected into the model as it is, without PEFT's wrapper around it, and saved as PEFT saves it.
"""

from __future__ import annotations

import difflib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ortho_cli import __version__
from ortho_cli.checkpoints.dialects.peft import PREFIX
from ortho_cli.checkpoints.output import atomic, check_output
from ortho_cli.checkpoints.writer import file_bytes, write_file
from ortho_cli.errors import CheckpointError, RecipeError, TargetError, UsageError

from .adapter_folder import tensor_piece
from .adapter_layer import AdapterLayer
from .inject import inner_model, own_head
from .method import Context, Method

if TYPE_CHECKING:
    from ortho_cli.recipe.methods import PEFT

__all__ = ["PEFTMethod"]


class PEFTMethod(Method):
    """The recipe's `peft`."""

    name = "peft"

    def __init__(self, config: PEFT) -> None:
        super().__init__(config)
        self.notes: list[str] = []
        self._names: list[str] = []

    def prepare(self, model: nn.Module, context: Context) -> None:
        """Let PEFT put its layers in and freeze the rest.

        Raises:
            UsageError: PEFT is not installed.
            RecipeError: a type or a key that the installed PEFT does not have.
            TargetError: PEFT finds no layer, or refuses one.
        """
        peft, head, model = _installed(), own_head(model), inner_model(model)
        keys = dict(self.config.config)
        if head:  # as PEFT's own wrappers for a task do
            keys["modules_to_save"] = list(dict.fromkeys([*(keys.get("modules_to_save") or ()), *head]))
        config = _peft_config(peft, keys)
        before = {name for name, _ in model.named_parameters()}
        ours = [p for m in model.modules() if isinstance(m, AdapterLayer) for p in m.adapter_parameters()]
        with torch.random.fork_rng(devices=[]), _noted(self.notes):
            torch.manual_seed(context.seed)  # what PEFT draws depends on nothing that came before
            try:
                peft.inject_adapter_in_model(config, model)
            except (ValueError, TypeError, NotImplementedError) as error:
                raise TargetError(
                    f"PEFT refuses this adapter: {error}", hint="see target_modules in methods.peft.config"
                ) from error
        for parameter in ours:
            parameter.requires_grad_(True)
        self._names = sorted(
            name for name, value in model.named_parameters() if value.requires_grad and name not in before
        )

    def export(self, model: nn.Module, path: Path) -> None:
        """Write the folder that `PeftModel.from_pretrained` loads: PEFT's tensors and PEFT's configuration."""
        peft = _installed()
        tuned: Any = inner_model(model)
        tensors = {
            (key if key.startswith(PREFIX) else PREFIX + key): value.detach()
            for key, value in peft.get_peft_model_state_dict(tuned).items()
        }
        method = {"name": "peft", "peft_type": self.config.config["peft_type"]}
        metadata = {"format": "pt", "ortho.version": __version__, "ortho.command": "ortho train"}
        metadata["ortho.method"] = json.dumps(method, sort_keys=True)
        pieces = [tensor_piece(name, tensor) for name, tensor in tensors.items()]
        check_output(path, [], file_bytes(pieces, metadata), force=False)
        config = tuned.peft_config["default"]
        inference, config.inference_mode = config.inference_mode, True
        with atomic(path) as partial:
            partial.mkdir()
            config.save_pretrained(str(partial))
            write_file(partial / "adapter_model.safetensors", pieces, metadata)
        config.inference_mode = inference

    def state(self) -> dict[str, Any]:
        """What PEFT added; the values are in the model."""
        return {"parameters": list(self._names)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Refuse to go on where PEFT now adds something else."""
        other = sorted(set(state["parameters"]) ^ set(self._names))
        if other:
            raise CheckpointError(
                f"PEFT adds other parameters than when the run was started: {len(other)}, first {other[0]}",
                hint="resume with the same recipe and the same version of peft",
            )


def _installed() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UsageError("methods: peft needs the PEFT library", hint="pip install peft") from error
    return peft


def _peft_config(peft: Any, keys: dict[str, Any]) -> Any:
    """PEFT's configuration object."""
    kind = str(keys.pop("peft_type", ""))
    known = {str(getattr(name, "value", name)): made for name, made in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if kind.upper() not in known:
        near = difflib.get_close_matches(kind.upper(), known, 1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
        raise RecipeError(f"methods.peft.config.peft_type {kind!r} is none of PEFT {peft.__version__}", hint=hint)
    made = known[kind.upper()]
    unknown = sorted(keys.keys() - made.__dataclass_fields__.keys())
    if unknown:
        near = difflib.get_close_matches(unknown[0], made.__dataclass_fields__, 1)
        hint = f"did you mean {near[0]}?" if near else f"{made.__name__} of PEFT {peft.__version__} has no such key"
        raise RecipeError(f"methods.peft.config.{unknown[0]} is no key of {made.__name__}", hint=hint)
    try:
        return made(**keys)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"methods.peft.config: {error}") from error


@contextmanager
def _noted(notes: list[str]) -> Iterator[None]:
    """PEFT's warnings as notes of the run."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    notes += list(dict.fromkeys(str(warning.message) for warning in caught))
