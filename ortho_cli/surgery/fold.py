"""What happens to one tensor of the base when adapters are folded in: a few steps, applied to blocks of rows.

Only the block is in memory. A step says how tall its blocks must be; one that needs the whole matrix gets it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite, lcm, pi, prod, sqrt
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ortho_cli.checkpoints.adapters import Adapter, Addition
from ortho_cli.checkpoints.reading import BLOCK_BYTES, TensorReader, row_blocks, tensor_bytes
from ortho_cli.checkpoints.tensors import TORCH_DTYPES, TensorInfo
from ortho_cli.errors import NumericsError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ortho_cli.linalg.operator import Operator

__all__ = ["AddTo", "Fold", "Operate", "Replace", "ReplaceRows", "Step", "cast_blocks"]


class Acting(NamedTuple):
    """A step with what it needs in memory: how it changes a block, and the multiple of rows its blocks must have.

    `rows` 0 means the whole tensor; `operator` is what the report asks for angles; `split` that half turns were taken
    in part.
    """

    rows: int
    apply: Callable[[Tensor, int], Tensor]
    operator: Operator | None = None
    split: bool = False


class Step(Protocol):
    """One change of a tensor, seen as a matrix ``(rows, rest)``, or with `undo` the way back.

    `strength` is the share of it that is taken, `brings` the tensor it takes values from, where it is one.
    """

    @property
    def strength(self) -> float: ...

    @property
    def brings(self) -> TensorInfo | None: ...

    def prepare(self, compute: torch.dtype) -> Acting:
        """Read what the step needs; `apply` of the result takes a block and its first row."""


@dataclass(frozen=True)
class Operate:
    """Let an adapter's layer act."""

    adapter: Adapter
    layer: str
    strength: float = 1.0
    undo: bool = False
    brings: None = None

    def prepare(self, compute: torch.dtype) -> Acting:
        from ortho_cli.linalg.planes import HALF_TURN

        whole = self.adapter.operator(self.layer, str(compute).removeprefix("torch."))
        operator = whole if self.strength == 1 else whole.power(self.strength)
        operator = operator.inverse() if self.undo else operator
        angles = whole.angles() if self.strength % 1 else None
        split = angles is not None and bool((angles > pi - HALF_TURN).any())
        return Acting(operator.row_multiple, operator.apply, operator, split)


@dataclass(frozen=True)
class Replace:
    """Take another tensor's values instead (`modules_to_save`, saved biases, resized embeddings)."""

    value: TensorInfo
    strength: float = 1.0

    @property
    def brings(self) -> TensorInfo:
        return self.value

    def prepare(self, compute: torch.dtype) -> Acting:
        if self.strength == 1:
            return Acting(1, lambda block, first_row: _rows(self.value, first_row, block))
        return Acting(1, lambda block, first_row: block.lerp(_rows(self.value, first_row, block), self.strength))


@dataclass(frozen=True)
class ReplaceRows:
    """Take some rows from elsewhere (trained tokens)."""

    indices: Sequence[int]
    value: TensorInfo
    strength: float = 1.0

    @property
    def brings(self) -> TensorInfo:
        return self.value

    def prepare(self, compute: torch.dtype) -> Acting:
        with TensorReader() as reader:
            rows = _matrix(reader.read(self.value)).to(compute, copy=True)

        def apply(block: Tensor, first_row: int) -> Tensor:
            changed = block.clone()
            for row, index in enumerate(self.indices):
                if first_row <= index < first_row + len(block):
                    here = index - first_row
                    changed[here] = rows[row] if self.strength == 1 else block[here].lerp(rows[row], self.strength)
            return changed

        return Acting(1, apply)


@dataclass(frozen=True)
class AddTo:
    """Add a tensor (a full difference, a bias difference)."""

    addition: Addition
    strength: float = 1.0
    undo: bool = False

    @property
    def brings(self) -> TensorInfo:
        return self.addition.tensor

    def prepare(self, compute: torch.dtype) -> Acting:
        tensor, scale = self.addition.tensor, self.addition.scale * self.strength * (-1 if self.undo else 1)
        return Acting(1, lambda block, first_row: block + scale * _rows(tensor, first_row, block))


@dataclass
class Fold:
    """All steps of one tensor, in order; `produce` yields the bytes of the result.

    Attributes:
        info: the base's tensor.
        steps: in the order they act.
        dtype: safetensors dtype of the result.
        exact: compute in float64 instead of float32.
        detail: completed while running: the relative change (None for a zero tensor that changed), the largest
            rotation angle where there is one, and whether a half turn was split.
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

        compute = torch.float64 if self.exact or self.info.dtype == "F64" else torch.float32
        target = getattr(torch, TORCH_DTYPES[self.dtype])
        acting = [step.prepare(compute) for step in self.steps]
        source = self.info
        if self.shape != source.shape:  # resized: the replacement is all there is
            source = next(step.value for step in reversed(self.steps) if isinstance(step, Replace))
        changed = norm = 0.0
        with TensorReader() as reader, _spare_core():
            multiple = lcm(*(step.rows for step in acting))  # one that needs the whole tensor (0) decides
            for rows in row_blocks(source, multiple, BLOCK_BYTES) if source.shape else [None]:
                before = _matrix(reader.read(source, rows)).to(compute)
                after = before
                for step in acting:
                    after = step.apply(after, rows.start if rows is not None else 0)
                norm += _square(before)
                result = after.to(target)
                if not _finite(result):
                    raise NumericsError(
                        f"tensor {self.info.name} is not finite after merging ({self.dtype})",
                        hint="check the adapter with ortho inspect; fp16 overflows at 65,504: try --dtype bf16 or fp32",
                        where=str(self.info.path),
                    )
                yield tensor_bytes(result)
                changed += _square(before.sub_(after))  # in our own memory, which nothing needs any more
        self.detail["relative_change"] = sqrt(changed / norm) if norm else (None if changed else 0.0)
        angles = [step.operator.angles() for step in acting if step.operator is not None]
        largest = [float(angle.max()) for angle in angles if angle is not None and len(angle)]
        if largest:
            self.detail["largest_angle"] = max(largest)
        if any(step.split for step in acting):
            self.detail["half_turn_split"] = True


def cast_blocks(info: TensorInfo, dtype: str) -> Iterator[Any]:
    """The bytes of a tensor in another float type, block by block."""
    import torch

    target = getattr(torch, TORCH_DTYPES[dtype])
    with TensorReader() as reader, _spare_core():
        for rows in row_blocks(info) if info.shape else [None]:
            stored = reader.read(info, rows)
            result = stored.to(target)
            if not _finite(result) and _finite(stored):
                raise NumericsError(
                    f"tensor {info.name} does not fit {dtype}", hint="use --dtype bf16 or keep", where=str(info.path)
                )
            yield tensor_bytes(result)


@contextmanager
def _spare_core() -> Iterator[None]:
    """Leave a core to the thread that copies meanwhile: torch's threads wait for each other at every step, and one that
    shares its core with a copy makes all of them late (on two cores the arithmetic then takes twice the time)."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _rows(info: TensorInfo, first_row: int, block: Tensor) -> Tensor:
    """The rows of another tensor that stand beside a block, in the block's dtype."""
    with TensorReader() as reader:
        rows = slice(first_row, first_row + len(block)) if info.shape else None
        return _matrix(reader.read(info, rows)).to(block.dtype, copy=True)


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.reshape(tensor.shape[0], prod(tensor.shape[1:])) if tensor.dim() else tensor.reshape(1, 1)


def _square(block: Tensor) -> float:
    """The sum of squares: along rows in the block's own precision, over them in float64, a fifth of all in float64."""
    import torch

    total = float(torch.linalg.vector_norm(block, dim=1).double().square().sum())
    return total if isfinite(total) else float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2


def _finite(block: Tensor) -> bool:
    """Whether every number is finite, in one pass: a NaN is both the least and the largest of its block."""
    import torch

    return not block.numel() or all(isfinite(float(extreme)) for extreme in torch.aminmax(block))
