"""What an adapter does to one weight, as one small interface.

Adapter files of every dialect are read into `{layer: Operator}`; the verbs then know operators only. A weight is
always `(out, in)`; a convolution arrives viewed as `(out, in/groups * kh * kw)` in C order. `Chain` applies several
operators in order, `Transposed` serves layers that store their weight as `(in, out)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm
from typing import Protocol

import torch
from torch import Tensor

from ortho_cli.errors import TargetError
from ortho_cli.linalg.precision import require_working_dtype

__all__ = ["Chain", "Operator", "Shape", "Transposed", "check_block", "no_low_rank"]

# (out, in) of the weights an operator takes; None where any number will do.
Shape = tuple[int | None, int | None]


class Operator(Protocol):
    """What every adapter can say and do about one weight `W (out, in)`; `W'` is the adapted weight."""

    @property
    def kind(self) -> str:
        """The family, as reports name it: "hra", "lora", "dora", "loha", "lokr", "oft", "rescale", "chain"."""

    @property
    def rank(self) -> int | None:
        """The rank (at most) of `W' - W` where it is known and small, else None."""

    @property
    def row_multiple(self) -> int:
        """`apply` takes blocks of whole rows whose first row and height are multiples of this; 0: only all rows."""

    @property
    def shape(self) -> Shape:
        """`(out, in)` of the weights it takes; None where any number will do. Lets a plan check headers only."""

    def to(self, dtype: torch.dtype) -> Operator:
        """The same operator in float32 or float64; itself where nothing changes. Call once before a loop of blocks."""

    def apply(self, weight: Tensor, first_row: int = 0) -> Tensor:
        """Rows of `W'` from the same rows of `W`, computed in the weight's dtype (float32 or float64).

        Raises:
            TargetError: the weight's shape does not fit.
            ValueError: a half-precision weight, or a block that is not one of `row_multiple`.
        """

    def inverse(self) -> Operator:
        """The operator that takes `W'` back to `W`; `TargetError` with the reason where there is none."""

    def power(self, alpha: float) -> Operator:
        """The operator at strength `alpha`: 0 changes nothing, 1 is itself.

        Rotations turn by a share of their angles (geodesic), sums add a share of their delta (linear).
        `TargetError` with the reason where there is nothing in between.
        """

    def as_low_rank(self, weight: Tensor, first_row: int = 0) -> tuple[Tensor, Tensor]:
        """`B (rows, k)` and `A (k, in)` with `W' = W + B A` exactly; `TargetError` where k would not be small."""

    def angles(self) -> Tensor | None:
        """Rotation angles in radians, float64, descending, one per plane; pi for a bare reflection.

        None for what is no rotation.
        """


def check_block(operator: Operator, weight: Tensor, first_row: int) -> None:
    """Refuse a block of rows that `operator` cannot take: dtype, shape, position.

    Raises:
        TargetError: wrong width or height: the adapter was made for another layer.
        ValueError: a caller's mistake (half precision, not two-dimensional, not a block of `row_multiple`).
    """
    require_working_dtype(weight.dtype)
    if weight.dim() != 2:
        raise ValueError(f"a weight is (out, in), found shape {tuple(weight.shape)}: view it as a matrix first")
    rows, columns = weight.shape
    out, width = operator.shape
    multiple = operator.row_multiple
    if first_row < 0 or (multiple and (first_row % multiple or rows % multiple)) or (not multiple and first_row):
        whole = "all rows at once" if not multiple else f"blocks of {multiple} rows"
        raise ValueError(f"{operator.kind} takes {whole}, found rows {first_row} to {first_row + rows}")
    too_high = out is not None and (first_row + rows > out or (not multiple and rows != out))
    if too_high or (width is not None and columns != width):
        expected = f"({'any' if out is None else out}, {'any' if width is None else width})"
        raise TargetError(
            f"a {operator.kind} adapter for a weight of shape {expected} does not fit rows {first_row} to "
            f"{first_row + rows} of width {columns}",
            hint="it was made for another layer or another base",
        )


def no_low_rank(operator: Operator) -> TargetError:
    """The error of an operator whose change of the weight has no small rank."""
    return TargetError(
        f"a {operator.kind} adapter changes a weight at full rank: no exact low-rank form exists",
        hint="merge it into the base instead: ortho merge BASE ADAPTER -o OUT",
    )


class Chain:
    """Apply several operators in order: the first sees the base weight, each next one the result so far.

    Its inverse undoes them in the reverse order; its low-rank form is exact, of the summed rank.

    Args:
        operators: at least one; nested chains are flattened.

    Raises:
        TargetError: two of them take weights of different shapes.

    >>> from ortho_cli.linalg.lowrank import LowRank
    >>> one = LowRank(torch.ones(2, 1), torch.ones(1, 3), scale=0.5)
    >>> Chain((one, one)).apply(torch.zeros(2, 3)).tolist()
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """

    kind = "chain"
    operators: tuple[Operator, ...]

    def __init__(self, operators: Sequence[Operator]) -> None:
        flat: list[Operator] = []
        for operator in operators:
            flat.extend(operator.operators if isinstance(operator, Chain) else [operator])
        if not flat:
            raise ValueError("a chain needs at least one operator")
        self.operators = tuple(flat)
        self.shape: Shape = (_common("rows", [o.shape[0] for o in flat]), _common("width", [o.shape[1] for o in flat]))

    @property
    def rank(self) -> int | None:
        """The sum of the parts' ranks: a bound, reached in general."""
        ranks = [operator.rank for operator in self.operators]
        return None if None in ranks else sum(rank for rank in ranks if rank is not None)

    @property
    def row_multiple(self) -> int:
        """The least block that suits every part; 0 where one of them needs all rows."""
        multiples = [operator.row_multiple for operator in self.operators]
        return lcm(*multiples)  # lcm with a 0 is 0: one that needs the whole matrix decides

    def to(self, dtype: torch.dtype) -> Chain:
        """Each part in `dtype`."""
        return Chain([operator.to(dtype) for operator in self.operators])

    def apply(self, weight: Tensor, first_row: int = 0) -> Tensor:
        """Rows of `W'` from the same rows of `W`."""
        check_block(self, weight, first_row)
        for operator in self.operators:
            weight = operator.apply(weight, first_row)
        return weight

    def inverse(self) -> Chain:
        """The inverses in reverse order."""
        return Chain([operator.inverse() for operator in reversed(self.operators)])

    def power(self, alpha: float) -> Chain:
        """Each part at that strength, still one after the other."""
        return Chain([operator.power(alpha) for operator in self.operators])

    def as_low_rank(self, weight: Tensor, first_row: int = 0) -> tuple[Tensor, Tensor]:
        """Factors side by side, each taken at the weight its operator sees."""
        check_block(self, weight, first_row)
        ups, downs = [], []
        for index, operator in enumerate(self.operators):
            if index:
                weight = self.operators[index - 1].apply(weight, first_row)
            up, down = operator.as_low_rank(weight, first_row)
            ups.append(up)
            downs.append(down)
        return torch.cat(ups, dim=1), torch.cat(downs, dim=0)

    def angles(self) -> Tensor | None:
        """Those of a single part; None for several, whose planes mix (ask each part)."""
        return self.operators[0].angles() if len(self.operators) == 1 else None


def _common(what: str, numbers: list[int | None]) -> int | None:
    """The one number that all agree on, None where none names one."""
    named = sorted({number for number in numbers if number is not None})
    if len(named) > 1:
        raise TargetError(f"adapters for weights of different {what} ({' and '.join(map(str, named))}) on one layer")
    return named[0] if named else None


class Transposed:
    """Adapt a weight that is stored as `(in, out)`, as GPT-2's Conv1D does (`fan_in_fan_out`).

    `operator` acts on the layer's true weight `(out, in)`; this one takes and gives the stored transpose. Rows of
    the stored weight are columns of the true one, so it always takes the whole matrix.

    >>> from ortho_cli.linalg.lowrank import LowRank
    >>> inner = LowRank(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, 0.0, 0.0]]))
    >>> Transposed(inner).apply(torch.zeros(3, 2)).tolist()
    [[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]]
    """

    row_multiple = 0

    def __init__(self, operator: Operator) -> None:
        self.operator = operator
        self.kind = operator.kind
        self.rank = operator.rank
        self.shape: Shape = (operator.shape[1], operator.shape[0])

    def to(self, dtype: torch.dtype) -> Transposed:
        """The inner operator in `dtype`."""
        return Transposed(self.operator.to(dtype))

    def apply(self, weight: Tensor, first_row: int = 0) -> Tensor:
        """The stored `W'` from the stored `W (in, out)`."""
        check_block(self, weight, first_row)
        return self.operator.apply(weight.T).T.contiguous()

    def inverse(self) -> Transposed:
        """The inner operator's inverse, on the stored form."""
        return Transposed(self.operator.inverse())

    def power(self, alpha: float) -> Transposed:
        """The inner operator at that strength, on the stored form."""
        return Transposed(self.operator.power(alpha))

    def as_low_rank(self, weight: Tensor, first_row: int = 0) -> tuple[Tensor, Tensor]:
        """`(A^T, B^T)` of the inner operator: factors of the change of the stored weight."""
        check_block(self, weight, first_row)
        up, down = self.operator.as_low_rank(weight.T)
        return down.T.contiguous(), up.T.contiguous()

    def angles(self) -> Tensor | None:
        """Those of the inner operator: a transpose turns nothing."""
        return self.operator.angles()
