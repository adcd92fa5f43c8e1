"""What OIALR changed, as a LoRA on the weights the run began with.

A layer that trained at full rank, as all do until they convert, has changed in every direction: its change has no small
rank. Keeping a few components leaves something out, and what it leaves out is measured and said.
"""

from __future__ import annotations

import copy
import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path

import torch
from torch import Tensor, nn

from ortho_cli import __version__
from ortho_cli.checkpoints.writer import write_file
from ortho_cli.errors import TargetError
from ortho_cli.linalg.spectral import frobenius_norm, spectral_factors

from .adapter_files import check_savable
from .adapter_folder import tensor_piece, write_adapter
from .adapter_layer import AdapterLayer, geometry, whole
from .factorized_select import Candidate
from .inject import inner_model
from .lora_layer import LoRALayer

__all__ = ["REST", "TABLE", "LoRASince", "Truncated"]

TABLE, REST = "layers.csv", "rest.safetensors"


@dataclass(frozen=True)
class Truncated:
    """A layer's change by its leading components.

    Attributes:
        rank: components kept.
        change: `||W - W0||_F`.
        left_out: the norm of what they do not hold.
        size: `||W||_F`.
    """

    rank: int
    change: float
    left_out: float
    size: float

    @property
    def error(self) -> float:
        """What is left out over the change; 0 where nothing changed."""
        return self.left_out / self.change if self.change else 0.0


class LoRASince:
    """The weights of some layers as they are now, to say later what became of them.

    Args:
        model: as it begins.
        chosen: layers of it, still dense; their weights are copied, and stay in memory for the whole run.
        rank: of the LoRA, or a rule that reads it from the singular values of a change.

    Raises:
        TargetError: a layer on which no LoRA stands for a change of the weight; with the reason.
    """

    def __init__(self, model: nn.Module, chosen: Sequence[Candidate], rank: int | Callable[[Tensor], int]) -> None:
        self.rank = rank
        names = {id(module): name for name, module in inner_model(model).named_modules()}
        self._names = {each.name: names[id(each.module)] for each in chosen}  # as files have them
        self._start = {each.name: copy.deepcopy(each.module) for each in chosen}
        check_savable({self._names[each.name]: _nothing_added(each) for each in chosen})

    @torch.no_grad()
    def write(self, model: nn.Module, now: Mapping[str, nn.Module], folder: Path) -> list[str]:
        """Write the PEFT folder; of a sharded model every process must ask.

        Beside the LoRA it holds what else trained: biases and whole modules as PEFT has them, and in `rest.safetensors`
        tensors of modules that are made of others, for which PEFT has no place.

        Args:
            model: as it ended.
            now: what stands in the place of the chosen layers, by their names.
            folder: to write.

        Returns:
            What was left out, and what a reader of the folder has to know.
        """
        adapted: dict[str, AdapterLayer] = {}
        cuts: dict[str, Truncated] = {}
        for name, module in now.items():
            adapted[self._names[name]], cuts[self._names[name]] = self._truncate(self._start[name], module)
        skeleton = _Skeleton({id(module): adapted[self._names[name]] for name, module in now.items()})
        notes, total = _summary(cuts)
        twin = skeleton.of(inner_model(model))
        if skeleton.rest:
            notes.append(
                f"{len(skeleton.rest)} tensors that PEFT has no place for, first {next(iter(skeleton.rest))}, are in "
                f'{REST}: model.load_state_dict(safetensors.torch.load_file("THIS_FOLDER/{REST}"), strict=False)'
            )
        said = {"base_bound": True, "from": "oialr", "relative_error": round(total.error, 6)}
        notes += write_adapter(twin, adapted, folder, command="ortho train", extra=said, notes=notes)
        if skeleton.rest:
            pieces = [tensor_piece(name, whole(value).detach()) for name, value in skeleton.rest.items()]
            described = {"format": "pt", "ortho.version": __version__, "ortho.command": "ortho train"}
            write_file(folder / REST, pieces, described)
        with (folder / TABLE).open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(("layer", "rank", "change", "left_out", "relative_error", "weight_norm"))
            table.writerows((name, c.rank, c.change, c.left_out, c.error, c.size) for name, c in cuts.items())
        return notes

    def _truncate(self, start: nn.Module, now: nn.Module) -> tuple[LoRALayer, Truncated]:
        base, weight = _frozen(start), whole(_weight(now)).detach()
        base._parameters["bias"] = now._parameters.get("bias")
        matrix = _matrix(base, weight)
        change = matrix - _matrix(base, _weight(base).to(weight.device))
        found = spectral_factors(change, self.rank)
        norm = float(frobenius_norm(change))
        cut = Truncated(len(found.values), norm, norm * float(found.error), float(frobenius_norm(matrix)))
        return LoRALayer(base, found.u, found.vt), cut


def _summary(cuts: dict[str, Truncated]) -> tuple[list[str], Truncated]:
    """All layers as one, and in words."""
    ranks = [cut.rank for cut in cuts.values()]
    norms = ((cut.change, cut.left_out, cut.size) for cut in cuts.values())
    total = Truncated(max(ranks), *(sqrt(sum(norm**2 for norm in each)) for each in zip(*norms, strict=True)))
    worst = max(cuts, key=lambda name: cuts[name].error)
    named = f"rank {min(ranks)}" if len(set(ranks)) == 1 else f"ranks {min(ranks)} to {max(ranks)}"
    share = total.left_out / total.size if total.size else 0.0
    return [
        f"a LoRA of {named} on {len(cuts)} layers, right on this base only; it leaves out {total.error:.1%} of what "
        f"training changed (relative Frobenius error; {cuts[worst].error:.1%} in {worst}), {share:.2%} of the weights"
    ], total


def _nothing_added(layer: Candidate) -> LoRALayer:
    try:
        shape = geometry(layer.module)
        weight = _weight(layer.module)
        return LoRALayer(_frozen(layer.module), weight.new_zeros(shape.out, 1), weight.new_zeros(1, shape.width))
    except TargetError as error:
        raise TargetError(f"no LoRA for layer {layer.name}: {error.message}", hint="leave it out of targets") from error


def _frozen(module: nn.Module) -> nn.Module:
    """The same layer and weight, which does not train."""
    twin = copy.copy(module)
    twin._parameters = {**module._parameters, "weight": nn.Parameter(_weight(module).detach(), requires_grad=False)}
    return twin


def _weight(module: nn.Module) -> Tensor:
    """Of a layer, or the product that a factored one has for it."""
    found = module.weight
    assert isinstance(found, Tensor)
    return found


def _matrix(layer: nn.Module, weight: Tensor) -> Tensor:
    """The weight of a layer as `(out, width)`, in at least float32."""
    matrix = weight.T if geometry(layer).kind == "transposed" else weight.flatten(1)
    return matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))


@dataclass
class _Skeleton:
    """The tree of a model's modules with its parameters and nothing else, some modules replaced.

    Attributes:
        new: by the `id` of the module that each stands for.
        rest: what trained, and statistics, in modules that are made of others or hold nothing else that trains.
    """

    new: dict[int, AdapterLayer]
    rest: dict[str, Tensor] = field(default_factory=dict)

    def of(self, model: nn.Module) -> nn.Module:
        """The tree of a model."""
        return self._of(model, "", {})

    def _of(self, module: nn.Module, prefix: str, done: dict[int, nn.Module]) -> nn.Module:
        if id(module) in self.new or id(module) in done:
            return self.new.get(id(module)) or done[id(module)]
        twin = done[id(module)] = nn.Module()
        for name, child in module._modules.items():
            twin.add_module(name, None if child is None else self._of(child, f"{prefix}{name}.", done))
        twin._parameters.update(module._parameters)
        twin._buffers.update(module._buffers)
        trained = [name for name, value in module._parameters.items() if value is not None and value.requires_grad]
        if twin._modules or not trained:
            kept = [*trained, *_statistics(module)]
            self.rest |= {f"{prefix}{name}": getattr(module, name) for name in kept}
            for name in trained:
                del twin._parameters[name]
        return twin


def _statistics(module: nn.Module) -> list[str]:
    """Buffers that are saved and that training may move, by name."""
    saved = {name: value for name, value in module._buffers.items() if name not in module._non_persistent_buffers_set}
    return [name for name, value in saved.items() if value is not None and value.is_floating_point()]
