"""Adapters from one dialect to another: names through the tables, factors through the operators.

A Householder adapter is exactly a LoRA of rank r on its own base: ``A = V^T``, ``B = -W V T``. Nothing is approximated
here; what has no exact form in the other dialect is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ortho_cli.checkpoints import layouts
from ortho_cli.checkpoints.adapters import Adapter, AdapterLayer
from ortho_cli.checkpoints.dialects.kinds import dimensions
from ortho_cli.checkpoints.dialects.writing import diffusers_metadata, kohya_metadata, lora_tensor_names
from ortho_cli.checkpoints.fingerprint import base_fingerprint
from ortho_cli.checkpoints.reading import TensorReader, row_blocks
from ortho_cli.checkpoints.store import Checkpoint
from ortho_cli.checkpoints.tensors import TensorInfo
from ortho_cli.checkpoints.writer import Piece
from ortho_cli.errors import CheckpointError, TargetError, UsageError
from .adapter_folder import AdapterFiles, Factor, hra_folder, lora_configs, lora_folder
from .merge import check_base, input_files
from .plan import OutputFile, Plan, provenance

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ADAPTER_DIALECTS", "named_layers", "plan_convert_adapter", "reflection_factor"]

ADAPTER_DIALECTS = ("peft-hra", "peft-lora", "kohya-lora", "diffusers-lora")
LORA_KINDS = ("hra", "lora", "loha", "lokr")


@dataclass(frozen=True)
class _Layer:
    """One layer under way: its canonical name, what acts on it, and its weight where a base is given."""

    name: str
    canonical: str
    layer: AdapterLayer
    weight: TensorInfo | None


def plan_convert_adapter(
    adapter: Adapter, output: Path, to: str, base: Checkpoint | None, *, force_base: bool = False
) -> Plan:
    """Plan the conversion of an adapter to another dialect.

    Args:
        adapter: any readable adapter.
        output: a folder for PEFT, ``X.safetensors`` for kohya, either for diffusers.
        to: one of `ADAPTER_DIALECTS`.
        base: needed where values of the weights enter (HRA to LoRA); otherwise only its names are used.
        force_base: convert although the fingerprint says another base.

    Raises:
        TargetError: the adapter has no exact form in `to`.
        UsageError: a base is needed and was not given, or the output's name does not suit the dialect.
    """
    _check_output(output, to)
    _check_kinds(adapter, to)
    notes = list(adapter.notes)
    layers = named_layers(adapter, base, notes.append, force_base=force_base)
    _refuse_leftovers(adapter, to)
    native = [layer.weight.name.removesuffix(".weight").removesuffix(".fixed_linear") for layer in layers if layer.weight]
    metadata = _metadata(adapter, to, base, base_fingerprint(base, native) if base is not None else None)
    files = _written(adapter, layers, to, base, metadata, output)
    plan = Plan("convert", input_files(base, [adapter]) if base else input_files_of(adapter), output, files.files)
    plan.texts, plan.notes = files.texts, notes + files.notes
    plan.layers = len(layers)
    plan.parameters = sum(piece.nbytes // 4 for file in files.files for piece in file.pieces if piece.shape)
    plan.details = [
        {
            "name": layer.canonical,
            "shape": list(layer.weight.shape) if layer.weight else list(dimensions(layer.layer)),
            "dtype": "F32",
            "kind": layer.layer.kind,
            "rank": layer.layer.rank,
            "parameters": layer.layer.parameters,
        }
        for layer in layers
    ]
    plan.totals = {"from": f"{adapter.dialect} ({adapter.kind})", "to": to}
    return plan


def input_files_of(adapter: Adapter) -> list[Path]:
    """Every file an adapter is read from."""
    return sorted({info.path for layer in adapter.layers.values() for info in layer.tensors.values()})


def _check_output(output: Path, to: str) -> None:
    if to.startswith("peft") and output.suffix == ".safetensors":
        raise UsageError("a PEFT adapter is a folder", hint=f"use -o {output.with_suffix('').name}")
    if to == "kohya-lora" and output.suffix != ".safetensors":
        raise UsageError("a kohya LoRA is one file", hint=f"use -o {output.name}.safetensors")


def _check_kinds(adapter: Adapter, to: str) -> None:
    """Refuse what has no exact counterpart."""
    for name, layer in adapter.layers.items():
        if to == "peft-hra" and layer.kind != "hra":
            raise TargetError(
                f"layer {name} is {layer.kind}: not a product of reflections, so there is no exact HRA form",
                hint="to peft-lora, kohya-lora or diffusers-lora it converts exactly",
            )
        if layer.options.get("dora"):
            raise TargetError(
                f"layer {name} is DoRA: its magnitudes depend on the base and have no LoRA form",
                hint="merge it instead: ortho merge BASE ADAPTER -o OUT",
            )
        if to != "peft-hra" and layer.kind not in LORA_KINDS:
            raise TargetError(
                f"layer {name} is {layer.kind}: a rotation of full rank has no exact LoRA form",
                hint="merge it instead: ortho merge BASE ADAPTER -o OUT",
            )
        if layer.options.get("transposed"):
            raise TargetError(f"layer {name} acts on a transposed weight (fan_in_fan_out), which no other dialect knows")
        if to == "peft-hra" and (layer.options.get("side") == "output" or layer.options.get("eps")):
            raise TargetError(
                f"layer {name} reflects the output side, or softly (eps > 0); PEFT's HRA does neither",
                hint="its exact form is a LoRA on its base: --to peft-lora --base BASE",
            )


def _refuse_leftovers(adapter: Adapter, to: str) -> None:
    left = [*adapter.replacements, *adapter.row_replacements, *adapter.additions]
    if left:
        raise CheckpointError(
            f"{len(left)} whole tensors of the adapter (first {left[0]}) have no place in {to}",
            hint="merge it instead: ortho merge BASE ADAPTER -o OUT",
            where=str(adapter.path),
        )


def named_layers(
    adapter: Adapter, base: Checkpoint | None, note: Callable[[str], None], *, force_base: bool = False
) -> list[_Layer]:
    """The adapter's layers under canonical names: resolved in the base, else in the SD1.5 tables, else as they are."""
    if base is not None:
        index = layouts.LayerIndex(base.layers(), base.layout)
        native = index.resolve_all(list(adapter.layers))
        check_base(base, adapter, native, force_base, note)
        return [
            _Layer(name, index.canonical(native[name]), layer, base.weight(native[name]))
            for name, layer in adapter.layers.items()
        ]
    table = layouts.LayerIndex(layouts.sd15_layers(), "sd15-diffusers")
    found = {name: table.resolve(name) for name in adapter.layers}
    if all(found.values()):
        return [_Layer(name, found[name] or name, layer, None) for name, layer in adapter.layers.items()]
    return [_Layer(name, name, layer, None) for name, layer in adapter.layers.items()]


def _metadata(adapter: Adapter, to: str, base: Checkpoint | None, fingerprint: str | None) -> dict[str, str]:
    method: dict[str, object] = dict(adapter.method) or {"name": adapter.kind}
    recorded = adapter.metadata.get("ortho.base_fingerprint")
    if to != "peft-hra" and "hra" in adapter.kind:
        method |= {"name": "hra", "form": "lora", "base_bound": True}
    inputs = [adapter.source.rstrip("/")]
    options = {"to": to, "base": Path(base.source.rstrip("/")) if base is not None else None}
    return provenance("convert", inputs, options, method=method, fingerprint=fingerprint or recorded)


def _written(
    adapter: Adapter,
    layers: list[_Layer],
    to: str,
    base: Checkpoint | None,
    metadata: dict[str, str],
    output: Path,
) -> AdapterFiles:
    if to == "peft-hra":
        graham = {bool(layer.layer.options.get("gram_schmidt")) for layer in layers}
        if len(graham) > 1:
            raise TargetError("some layers are Gram-Schmidt and some are not; PEFT has one setting for all")
        vectors = {layer.canonical: reflection_factor(layer.layer) for layer in layers}
        return hra_folder(vectors, base, metadata, gram_schmidt=graham.pop())
    factors = {layer.canonical: _lora_factors(adapter, layer) for layer in layers}
    if to == "peft-lora":
        return lora_folder(factors, base, metadata)
    pieces = _lora_pieces(to, factors)
    ranks = {name: down.shape[0] for name, (_, down) in factors.items()}
    if to == "kohya-lora":
        common = next(iter(ranks.values())) if len(set(ranks.values())) == 1 else None
        extra = kohya_metadata(common, common)
    else:
        extra = diffusers_metadata(lora_configs(ranks, base))
    name = "pytorch_lora_weights.safetensors" if output.suffix != ".safetensors" else ""
    return AdapterFiles([OutputFile(name, pieces, {"format": "pt", **extra, **metadata})])


def _lora_pieces(to: str, factors: Mapping[str, tuple[Factor, Factor]]) -> list[Piece]:
    pieces = []
    for canonical, (up, down) in factors.items():
        names = lora_tensor_names(to, canonical)
        pieces += [up.piece(names["up"]), down.piece(names["down"])]
        if "alpha" in names:
            pieces.append(Factor((), lambda rank=down.shape[0]: _scalar(rank)).piece(names["alpha"]))
    return pieces


def _scalar(value: int) -> Tensor:
    import torch

    return torch.tensor(float(value))


def reflection_factor(layer: AdapterLayer) -> Factor:
    """The vectors ``(in, r)`` of a Householder layer, as they are stored."""
    info = layer.tensors["vectors"]

    def make() -> Tensor:
        with TensorReader() as reader:
            return reader.read_copy(info)

    return Factor(info.shape, make)


def _lora_factors(adapter: Adapter, layer: _Layer) -> tuple[Factor, Factor]:
    """Up and down of one layer at scale 1, shaped for its Linear or convolution."""
    if layer.weight is None and layer.layer.kind == "hra":
        raise UsageError(
            "a Householder adapter becomes a LoRA only together with its base (B = -W V T)", hint="add --base BASE"
        )
    rows, columns = dimensions(layer.layer)
    if layer.weight is not None:
        rows, columns = layer.weight.shape[0], layer.weight.numel // layer.weight.shape[0]
    assert rows is not None and columns is not None
    rank = layer.layer.rank if layer.layer.kind in ("hra", "lora") else adapter.operator(layer.name).rank
    if rank is None or rank >= min(rows, columns):
        raise TargetError(f"layer {layer.name} ({layer.layer.kind}) has full rank; a LoRA would be no smaller than it")
    kernel = _kernel(layer)
    up_shape = (rows, rank) if not kernel else (rows, rank, 1, 1)
    down_shape = (rank, columns) if not kernel else (rank, columns // (kernel[0] * kernel[1]), *kernel)
    up = Factor(up_shape, lambda: _low_rank(adapter, layer, rows, columns)[0].reshape(up_shape))
    down = Factor(down_shape, lambda: _low_rank(adapter, layer, rows, columns)[1].reshape(down_shape))
    return up, down


def _kernel(layer: _Layer) -> tuple[int, ...]:
    """Kernel size of a convolution, () for a Linear layer."""
    if layer.weight is not None:
        return layer.weight.shape[2:]
    for role in ("mid", "t1", "t2", "down", "w2"):
        info = layer.layer.tensors.get(role)
        if info is not None and len(info.shape) == 4:
            return info.shape[2:]
    return ()


def _low_rank(adapter: Adapter, layer: _Layer, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """B and A in float64, from blocks of the weight's rows where the operator multiplies by it."""
    import torch

    operator = adapter.operator(layer.name, "float64")
    if layer.weight is None:
        return operator.as_low_rank(torch.zeros((), dtype=torch.float64).expand(rows, columns))
    parts, down = [], None
    with TensorReader() as reader:
        for block in row_blocks(layer.weight, operator.row_multiple):
            weight = reader.read(layer.weight, block).to(torch.float64).reshape(block.stop - block.start, columns)
            up, down = operator.as_low_rank(weight, block.start)
            parts.append(up)
    assert down is not None
    return torch.cat(parts), down
