"""Load a factored checkpoint into any module, `ortho.load_factorized`: nobody has to repeat ranks or targets."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from ortho_cli.checkpoints import layouts
from ortho_cli.checkpoints.checkpoint import Checkpoint
from ortho_cli.checkpoints.factored import FactoredLayer, factored_layers, read_factors
from ortho_cli.checkpoints.reading import TensorReader
from ortho_cli.checkpoints.store import open_checkpoint
from ortho_cli.checkpoints.tensors import FLOAT_DTYPES
from ortho_cli.errors import CheckpointError, TargetError
from ortho_cli.linalg.matricize import Matricization

from .factorized_layers import FactorizedLayer, factorized_layer
from .inject import named_layers, replace_modules
from .projected_attention import PROJECTIONS, open_attention

__all__ = ["load_factorized"]


@torch.no_grad()
def load_factorized(model: nn.Module, path: str | Path) -> nn.Module:
    """Put factored layers where a checkpoint has factors, and load everything that it holds.

    Args:
        model: the dense architecture, with any weights (its own are overwritten); names may differ by a wrapper
            (``bert.``) and, for Stable Diffusion, by layout. Changed in place.
        path: what ``ortho factorize`` wrote, or the ``factors`` folder of a training run.

    Returns:
        The model, in its own float type; every parameter came from the checkpoint.

    Raises:
        CheckpointError: no factors, a parameter that the checkpoint lacks, or a float tensor that the model lacks.
        TargetError: a factored layer that the model lacks, or that is of another kind or shape there.

    Cost: the checkpoint is read once, a tensor at a time.

    >>> import tempfile
    >>> from safetensors.torch import save_file
    >>> import ortho_cli as ortho
    >>> folder = tempfile.mkdtemp()
    >>> save_file({"0.weight": torch.randn(64, 128), "0.bias": torch.zeros(64)}, folder + "/dense.safetensors")
    >>> _ = ortho.factorize(folder + "/dense.safetensors", folder + "/small.safetensors", rank=8)
    >>> ortho.load_factorized(nn.Sequential(nn.Linear(128, 64)), folder + "/small.safetensors")
    Sequential(
      (0): FactorizedLinear(linear (64, 128), rank=8, bias=True)
    )
    """
    checkpoint = open_checkpoint(path)
    factored = factored_layers(checkpoint)
    if not factored:
        raise CheckpointError(
            f"{checkpoint.root.name} holds no factors",
            hint="make some: ortho factorize CKPT -o OUT --rank-scale 0.25",
            where=str(checkpoint.root),
        )
    _open_factored_attention(model, factored)
    places = _module_names(model, checkpoint)
    made: dict[str, FactorizedLayer] = {}
    for name, layer in factored.items():
        if name not in places:
            raise TargetError(
                f"layer {name} of {checkpoint.root.name} is not in the {type(model).__name__}",
                hint="is it the architecture that was factored? compare: ortho inspect CKPT --layers",
            )
        made[places[name]] = _layer(model, places[name], layer)
    replace_modules(model, {id(model.get_submodule(name)): layer for name, layer in made.items()})
    _load_rest(model, checkpoint, factored, places, made)
    return model


def _open_factored_attention(model: nn.Module, factored: Iterable[str]) -> None:
    """Give attention of torch layers for its projections where the checkpoint has factors of them."""
    inside = [name.rpartition(".") for name in factored]
    owners = [owner for owner, _, last in inside if last in PROJECTIONS]
    if owners:  # the checkpoint's names may have a wrapper's in front, or lack the model's
        names = {name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}
        pairs = [(name, f".{name}", f".{owner}") for name in names for owner in owners]
        open_attention(model, {name for name, own, theirs in pairs if own.endswith(theirs) or theirs.endswith(own)})


def _module_names(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """Modules as the checkpoint calls them -> as the model does, for those that the model has."""
    index = layouts.LayerIndex(
        [name for name, _ in model.named_modules(remove_duplicate=False) if name], named_layers(model).layout
    )
    found = {"": ""}
    for module in dict.fromkeys(name.rpartition(".")[0] for name in checkpoint.tensors):
        place = index.resolve(layouts.to_canonical(module, checkpoint.layout)) if module else None
        if place is not None:
            found[module] = place
    return found


def _layer(model: nn.Module, name: str, stored: FactoredLayer) -> FactorizedLayer:
    """The factored form of one of the model's layers, filled.

    Raises:
        TargetError: a layer of another kind or shape, or one without a factored form.
    """
    base = model.get_submodule(name)
    try:
        made = (
            base if isinstance(base, FactorizedLayer)
            else factorized_layer(base, stored.rank, row_axes=stored.view.row_axes)
        )  # fmt: skip
    except TargetError as error:
        raise TargetError(f"layer {name}: {error.message}", hint=error.hint) from error
    u, vt = _as_form(stored, made.form, read_factors(stored), name)
    if (made.U.shape, made.VT.shape) != (u.shape, vt.shape):
        raise TargetError(f"layer {name} of the model is factored already, with rank {made.rank}, not {stored.rank}")
    made.U.copy_(u)
    made.VT.copy_(vt)
    return made


def _as_form(
    stored: FactoredLayer, form: Matricization, factors: tuple[Tensor, Tensor], name: str
) -> tuple[Tensor, Tensor]:
    """The factors of a stored weight as those of the layer that the model has.

    A header tells neither a transposed nor a grouped convolution from an ordinary one, so that a checkpoint's factors
    may be those of the weight as it lies there.
    """
    u, vt = factors
    view = stored.view
    if view == form or (_is_matrix(view) and _is_matrix(form) and view.matrix_shape == form.matrix_shape):
        return u, vt
    if {view.kind, form.kind} == {"linear", "conv1d"} and view.shape == form.shape:  # the one's transpose
        return vt.T, u.T
    if view.kind == form.kind == "conv" and view.shape == form.shape and view.groups == 1:
        return u, vt.repeat(form.groups, 1)  # every group reads its inputs through the same VT
    raise TargetError(
        f"layer {name} is a {form.kind} {form.shape} with {form.groups} groups in the model, the checkpoint has "
        f"factors of a {view.kind} {view.shape} with {view.groups}",
        hint="another architecture? If not, load the dense form: ortho convert CKPT --to dense -o DENSE",
    )


def _is_matrix(view: Matricization) -> bool:
    """Whether a weight is its own matrix: that of a Linear, an embedding, or a convolution of one tap."""
    pointwise = view.kind == "conv" and view.groups == 1 and set(view.kernel) == {1}
    return pointwise or view.kind in ("linear", "embedding")


def _load_rest(
    model: nn.Module,
    checkpoint: Checkpoint,
    factored: dict[str, FactoredLayer],
    places: dict[str, str],
    made: dict[str, FactorizedLayer],
) -> None:
    """Copy every other tensor, and account for all of them.

    Raises:
        CheckpointError: a parameter without a tensor, a tensor without a place, or another shape.
    """
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    filled = {id(part) for layer in made.values() for part in (layer.U, layer.VT)}
    taken = {f"{name}.{part}" for name in factored for part in ("U", "VT")}
    strange = []
    with TensorReader() as reader:
        for name, info in checkpoint.tensors.items():
            module, _, last = name.rpartition(".")
            target = own.get(f"{places[module]}.{last}".lstrip(".")) if module in places else None
            if name in taken:
                continue
            if target is None:
                strange += [name] if info.dtype in FLOAT_DTYPES else []  # counters and position numbers are made anew
                continue
            if _sides(target.shape) != _sides(info.shape):
                raise CheckpointError(
                    f"tensor {name} has shape {info.shape}, the model wants {tuple(target.shape)}", where=str(info.path)
                )
            target.copy_(reader.read(info).reshape(target.shape))
            filled.add(id(target))
    missing = [name for name, parameter in model.named_parameters() if id(parameter) not in filled]
    if missing:
        raise CheckpointError(
            f"{checkpoint.root.name} lacks {len(missing)} parameters of the {type(model).__name__}, first {missing[0]}"
        )
    component = {_component(name, checkpoint) for name in factored}
    left = [name for name in strange if _component(name, checkpoint) in component]
    if left:
        raise CheckpointError(
            f"{len(left)} tensors of {checkpoint.root.name} have no place in the model, first {left[0]}",
            hint="build the architecture that was factored, heads included",
        )


def _sides(shape: Iterable[int]) -> list[int]:
    """A shape without sides of one, in which a Linear and a convolution of one tap are alike."""
    return [size for size in shape if size != 1]


def _component(name: str, checkpoint: Checkpoint) -> str:
    """The part of a pipeline that a tensor belongs to."""
    return layouts.component_name(layouts.to_canonical(name, checkpoint.layout))[0]
