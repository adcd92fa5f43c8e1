"""FNL's normalisation experiment: record the norms of all products in one run, hold another run to them.

With a norm behind it a layer's scale does nothing but set its effective step size. If the second run, without any
decay, does as well as the first, then setting step sizes is what the first run's decay did.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ortho_cli.checkpoints.output import atomic
from ortho_cli.checkpoints.reading import TensorReader
from ortho_cli.checkpoints.store import open_checkpoint
from ortho_cli.checkpoints.writer import write_file
from ortho_cli.errors import CheckpointError, TargetError

from .adapter_folder import tensor_piece
from .adapter_layer import whole
from .factored_module import FactoredModule
from .method import Context, Method

if TYPE_CHECKING:
    from ortho_cli.recipe.methods import Normalize

__all__ = ["FILE", "NormalizeMethod"]

FILE = "norms.safetensors"
SEED = "{seed}"


class NormalizeMethod(Method):
    """The recipe's `normalize`: record norms, or replay them."""

    name = "normalize"

    def __init__(self, config: Normalize) -> None:
        super().__init__(config)
        self.layers: dict[str, FactoredModule] = {}
        self._norms = torch.empty(0, 0)  # (steps, layers): recorded so far, or to be replayed
        self._done = 0

    def prepare(self, model: nn.Module, context: Context) -> None:
        """Find the factored layers, and read what is to be replayed.

        Raises:
            TargetError: no factored layers.
            CheckpointError: no recording, or one of other layers or of fewer steps.
        """
        self.layers = {name: module for name, module in model.named_modules() if isinstance(module, FactoredModule)}
        if not self.layers:
            raise TargetError("the model has no factored layers to normalize", hint="put method factorized before it")
        if self.config.mode == "replay" and context.build is not None:  # a dry run reads nothing
            self._norms = self._read(Path(self.config.source.replace(SEED, str(context.seed))), context.total_steps)
        else:
            self._norms = torch.zeros(context.total_steps, len(self.layers))

    def _read(self, source: Path, steps: int) -> Tensor:
        path = source / "export" / self.name / FILE if source.is_dir() else source
        if not path.is_file():
            raise CheckpointError(
                f"no recorded norms at {path}", hint="first train the recipe with mode: record", where=str(source)
            )
        with TensorReader() as reader:
            found = {name: reader.read_copy(info) for name, info in open_checkpoint(path).tensors.items()}
        if found.keys() != self.layers.keys():
            differ = sorted(found.keys() ^ self.layers.keys())
            raise CheckpointError(f"the recording is of other layers: {', '.join(differ[:3])}", where=str(path))
        norms = torch.stack([found[name] for name in self.layers], 1)
        if len(norms) < steps:
            raise CheckpointError(f"the recording has {len(norms)} steps, this run {steps}", where=str(path))
        return norms

    @torch.no_grad()
    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, phase: str) -> bool:
        """Note the norms after this step, or scale the factors to the recorded ones."""
        if self.config.mode == "off":
            return False
        for index, layer in enumerate(self.layers.values()):
            norm = layer.squared_norm(*map(whole, layer.factor_parameters())).sqrt()
            if self.config.mode == "record":
                self._norms[step, index] = norm
            elif norm > 0:
                layer.scale_(self._norms[step, index].to(norm) / norm)
        self._done = step + 1
        return False

    def export(self, model: nn.Module, path: Path) -> None:
        """Write the recording, a tensor of steps for each layer."""
        if self.config.mode != "record":
            return
        pieces = [tensor_piece(name, column.contiguous()) for name, column in self._columns().items()]
        with atomic(path) as partial:
            partial.mkdir()
            write_file(partial / FILE, pieces, {"format": "pt"})

    def _columns(self) -> dict[str, Tensor]:
        return dict(zip(self.layers, self._norms[: self._done].unbind(1), strict=True))

    def state(self) -> dict[str, Any]:
        """The recording so far."""
        return {"done": self._done, "tensors": self._columns() if self.config.mode == "record" else {}}

    def load_state(self, state: dict[str, Any]) -> None:
        """Put it back."""
        self._done = state["done"]
        if self.config.mode == "record":
            for index, name in enumerate(self.layers):
                self._norms[: self._done, index] = state["tensors"][name]
