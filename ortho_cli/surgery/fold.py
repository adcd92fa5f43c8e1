"""What happens to one tensor of the base when adapters are folded in: a few steps, applied to blocks of rows.

Only the block is in memory. A step says how tall its blocks must be; one that needs the whole matrix gets it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import lcm, prod, sqrt
from typing import TYPE_CHECKING, Any, Protocol

from ortho_cli.checkpoints.adapters import Adapter, Addition
from ortho_cli.checkpoints.reading import BLOCK_BYTES, TensorReader, row_blocks, tensor_bytes
from ortho_cli.checkpoints.tensors import TORCH_DTYPES, TensorInfo
from ortho_cli.errors import NumericsError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["AddTo", "Fold", "Operate", "Replace", "ReplaceRows", "Step", "cast_blocks"]


class Step(Protocol):
    """One change of a tensor, seen as a matrix ``(rows, rest)``."""

    def prepare(self, compute: torch.dtype) -> int:
        """Read what the step needs; returns the multiple of rows its blocks must have (0: the whole tensor)."""

    def apply(self, block: Tensor, first_row: int) -> Tensor:
        """The block after the step."""


@dataclass
class Operate:
    """Let an adapter's layer act."""

    adapter: Adapter
    layer: str

    def prepare(self, compute: torch.dtype) -> int:
        self.operator = self.adapter.operator(self.layer, str(compute).removeprefix("torch."))
        return self.operator.row_multiple

    def apply(self, block: Tensor, first_row: int) -> Tensor:
        return self.operator.apply(block, first_row)


@dataclass
class Replace:
    """Take another tensor's values instead (`modules_to_save`, saved biases, resized embeddings)."""

    value: TensorInfo

    def prepare(self, compute: torch.dtype) -> int:
        with TensorReader() as reader:
            self.rows = _matrix(reader.read(self.value)).to(compute, copy=True)
        return 1

    def apply(self, block: Tensor, first_row: int) -> Tensor:
        return self.rows[first_row : first_row + len(block)]


@dataclass
class ReplaceRows:
    """Take some rows from elsewhere (trained tokens)."""

    indices: Sequence[int]
    value: TensorInfo

    def prepare(self, compute: torch.dtype) -> int:
        with TensorReader() as reader:
            self.rows = _matrix(reader.read(self.value)).to(compute, copy=True)
        return 1

    def apply(self, block: Tensor, first_row: int) -> Tensor:
        changed = block.clone()
        for row, index in enumerate(self.indices):
            if first_row <= index < first_row + len(block):
                changed[index - first_row] = self.rows[row]
        return changed


@dataclass
class AddTo:
    """Add a tensor (a full difference, a bias difference)."""

    addition: Addition

    def prepare(self, compute: torch.dtype) -> int:
        with TensorReader() as reader:
            self.rows = _matrix(reader.read(self.addition.tensor)).to(compute) * self.addition.scale
        return 1

    def apply(self, block: Tensor, first_row: int) -> Tensor:
        return block + self.rows[first_row : first_row + len(block)].reshape(block.shape)


@dataclass
class Fold:
    """All steps of one tensor, in order; `produce` yields the bytes of the result.

    Attributes:
        info: the base's tensor.
        steps: in the order they act.
        dtype: safetensors dtype of the result.
        exact: compute in float64 instead of float32.
        detail: completed while running: the relative change, and the largest rotation angle where there is one.
    """

    info: TensorInfo
    steps: list[Step]
    dtype: str
    exact: bool
    detail: dict[str, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result: the base's, or the last replacement's."""
        return next((step.value.shape for step in reversed(self.steps) if isinstance(step, Replace)), self.info.shape)

    def produce(self) -> Iterator[Any]:
        """Yield the folded tensor block by block.

        Raises:
            NumericsError: a value of the result is not finite.
        """
        import torch

        compute = torch.float64 if self.exact else torch.float32
        target = getattr(torch, TORCH_DTYPES[self.dtype])
        multiples = [step.prepare(compute) for step in self.steps]
        source = self.info
        if self.shape != source.shape:  # resized: the replacement is all there is
            source = next(step.value for step in reversed(self.steps) if isinstance(step, Replace))
        changed = norm = 0.0
        with TensorReader() as reader:
            for rows in row_blocks(source, 0 if 0 in multiples else lcm(*multiples), BLOCK_BYTES):
                before = _matrix(reader.read(source, rows)).to(compute)
                after = before
                for step in self.steps:
                    after = step.apply(after, rows.start)
                changed += _square(after - before)
                norm += _square(before)
                result = after.to(target)
                if not bool(torch.isfinite(result).all()):
                    raise NumericsError(
                        f"tensor {self.info.name} is not finite after merging ({self.dtype})",
                        hint="check the adapter with ortho inspect; fp16 overflows at 65,504: try --dtype bf16 or fp32",
                        where=str(self.info.path),
                    )
                yield tensor_bytes(result)
        self.detail["relative_change"] = sqrt(changed / norm) if norm else 0.0
        angles = [step.operator.angles() for step in self.steps if isinstance(step, Operate)]
        largest = [float(angle.max()) for angle in angles if angle is not None and len(angle)]
        if largest:
            self.detail["largest_angle"] = max(largest)


def cast_blocks(info: TensorInfo, dtype: str) -> Iterator[Any]:
    """The bytes of a tensor in another float type, block by block."""
    import torch

    target = getattr(torch, TORCH_DTYPES[dtype])
    with TensorReader() as reader:
        for rows in row_blocks(info) if info.shape else [None]:
            stored = reader.read(info, rows)
            result = stored.to(target)
            if not bool(torch.isfinite(result).all()) and bool(torch.isfinite(stored).all()):
                raise NumericsError(
                    f"tensor {info.name} does not fit {dtype}", hint="use --dtype bf16 or keep", where=str(info.path)
                )
            yield tensor_bytes(result)


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.reshape(tensor.shape[0], prod(tensor.shape[1:])) if tensor.dim() else tensor.reshape(1, 1)


def _square(block: Tensor) -> float:
    import torch

    return float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2
