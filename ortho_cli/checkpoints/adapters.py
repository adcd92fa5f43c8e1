"""An adapter, whatever wrote it: for each layer one operator, and the tensors that go straight into the base.

The types every verb works with, and `read_adapter`, which asks `dialects` what a file is. Reading looks at headers
only; values are read when `Adapter.operator` builds what a layer does to its weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ortho_cli.errors import CheckpointError

from .tensors import TensorInfo

if TYPE_CHECKING:
    from ortho_cli.linalg.operator import Operator

    from .checkpoint import Checkpoint

__all__ = ["Adapter", "AdapterLayer", "Addition", "adapter_of", "base_bound", "is_adapter", "read_adapter"]


@dataclass(frozen=True)
class AdapterLayer:
    """One adapted layer: where its tensors lie, by role, and the numbers that say how they act.

    `kind` is one of `hra lora loha lokr oft boft diag-oft`. Roles and options of each kind: `dialects/kinds.py`.
    """

    kind: str
    tensors: Mapping[str, TensorInfo]
    options: Mapping[str, object] = field(default_factory=dict)

    @property
    def rank(self) -> int | None:
        """The rank parameter: reflections, or columns of the factors; None for rotations in blocks and full factors."""
        from .dialects.kinds import rank_of

        return rank_of(self)

    @property
    def parameters(self) -> int:
        """Trained numbers of this layer (a stored `alpha` is a constant, not one of them)."""
        return sum(info.numel for role, info in self.tensors.items() if role != "alpha")

    def expects(self, weight_shape: Sequence[int]) -> str | None:
        """Why a weight of this shape, as the base stores it, cannot take the layer; None when it can."""
        from .dialects.kinds import misfit

        return misfit(self, weight_shape)


@dataclass(frozen=True)
class Addition:
    """A tensor that is added to the base's, times `scale`."""

    tensor: TensorInfo
    scale: float = 1.0


@dataclass(frozen=True)
class Adapter:
    """A whole adapter, as its dialect reads.

    Layer and tensor names are canonical (``unet.…``, ``text_encoder.text_model.…``) where the file says so much, else
    the adapted model's own. On merging, `replacements` come first, then `row_replacements`, then the operators, then
    `additions`: an embedding that was resized *and* adapted has both a replacement and a layer.

    Attributes:
        source: what the user named.
        path: the file or folder it was read from.
        dialect: ``peft``, ``kohya``, ``diffusers``, ``hra-repo``, ``hra-llama`` or ``ortho``.
        kind: the kind of its layers, joined by ``+`` where there are several.
        layers: layer name -> what is known of it.
        replacements: full tensor name -> the tensor that takes the base's place.
        additions: full tensor name -> what is added to the base's tensor.
        row_replacements: full tensor name -> (row indices, rows) of trained tokens.
        config: ``adapter_config.json``, or one for each component.
        metadata: the safetensors metadata.
        notes: what a report should tell.
        bound: right only on the base it was made for, as its configuration says; see `base_bound`.
    """

    source: str
    path: Path
    dialect: str
    kind: str
    layers: dict[str, AdapterLayer]
    replacements: dict[str, TensorInfo] = field(default_factory=dict)
    additions: dict[str, Addition] = field(default_factory=dict)
    row_replacements: dict[str, tuple[tuple[int, ...], TensorInfo]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    bound: bool = False

    @property
    def method(self) -> dict[str, Any]:
        """What `ortho` wrote of the method into the metadata (`ortho.method`), else empty."""
        from .dialects.contents import ortho_method

        return ortho_method(self.metadata, str(self.path))

    def operator(self, layer: str, dtype: str = "float32") -> Operator:
        """What one layer of the adapter does to its weight.

        Args:
            layer: a name in `layers`.
            dtype: the float type to compute in, by its torch name (``float32``, or ``float64`` for an exact merge).

        Returns:
            An operator on the weight as ``(out, in)``; a convolution is seen as ``(out, in/groups * kh * kw)``, an
            embedding as ``(tokens, width)``, a ``fan_in_fan_out`` weight as it is stored, ``(in, out)``.

        Raises:
            CheckpointError: a value that no operator can be made of (NaN, a zero reflection).
            TargetError: a kind that exists but has no exact operator.

        Cost: reads the layer's own tensors, kilobytes to a few megabytes.
        """
        from .dialects.operators import build

        return build(layer, self.layers[layer], dtype)


def read_adapter(source: str | Path) -> Adapter:
    """Read an adapter of any dialect, headers only.

    Args:
        source: a PEFT folder; a folder ``unet/`` + ``text_encoder/`` of PEFT folders; a ``.safetensors`` in kohya,
            LyCORIS or diffusers naming; a checkpoint that holds HRA (``X.hra_u``); a hub id of one of these.

    Returns:
        The adapter; the dialect is told by the tensors' names and the configuration, never by the file's name.

    Raises:
        CheckpointError: no adapter, one of an unknown type, a tensor that no rule accounts for, or factors that do not
            fit each other; the message names the tensor and the nearest name that would have been understood.

    Cost: one read of each header.
    """
    from .store import open_checkpoint

    return adapter_of(open_checkpoint(source))


def adapter_of(checkpoint: Checkpoint) -> Adapter:
    """The adapter that an opened checkpoint is or holds, from the very files that were opened.

    Raises:
        CheckpointError: as `read_adapter`.
    """
    from .dialects import read

    dialect, contents, config, metadata = read(checkpoint)
    if contents.empty:
        raise CheckpointError("the adapter holds no tensors", where=str(checkpoint.root))
    return Adapter(
        source=checkpoint.source,
        path=checkpoint.root,
        dialect=dialect,
        kind="+".join(sorted({layer.kind for layer in contents.layers.values()})) or "full",
        layers=contents.layers,
        replacements=contents.replacements,
        additions=contents.additions,
        row_replacements=contents.row_replacements,
        config=config,
        metadata=metadata,
        notes=(*checkpoint.notes, *contents.notes),
        bound=contents.bound,
    )


def is_adapter(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is an adapter, or holds one beside its weights."""
    from .dialects import detect

    if checkpoint.kind == "adapter":
        return True
    try:
        detect(checkpoint.tensors, checkpoint.config, checkpoint.metadata)
    except CheckpointError:  # how `detect` says that no dialect claims the names
        return False
    return True


def base_bound(adapter: Adapter) -> bool:
    """Whether an adapter is only right on the very base it was made for.

    True for a LoRA that was exported from HRA (``B = -W V T`` holds the base's weights), for what `ortho` marked so
    (``"base_bound": true`` in ``ortho.method``: residual forms, undo files), and for LoRA whose initialisation took a
    part out of the base (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ). A rotation is valid on any fine-tune: False.
    """
    method = adapter.method
    exported = adapter.kind == "lora" and method.get("name") == "hra"
    return adapter.bound or exported or method.get("base_bound") is True
