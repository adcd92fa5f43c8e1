r"""Products of Householder reflections in compact WY form: `D = H_1 ... H_r = I - V T V^T`.

`V (d, r)` holds the unit directions, `T = (I/2 + striu(V^T V))^-1` is upper triangular. Activations and weights are
reflected at the cost of a rank-r update; the d x d matrix is never formed. `D^T` is the same with `T^T`. The operator
that merges and exports such a chain is in `householder.py`, first values in `starts.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ortho_cli.errors import NumericsError, TargetError
from ortho_cli.linalg.precision import at_least_float32

__all__ = ["normalize", "orthonormalize", "reflect_activations", "reflect_weight", "wy_apply", "wy_factor"]

SIDES = ("input", "output")

# A unit column whose part outside the span of those before it is shorter than this holds float32 rounding noise only.
DEPENDENT = 1e-6


def normalize(vectors: Tensor, eps: float = 0.0) -> Tensor:
    r"""Scale the columns to unit length, the directions of the reflections.

    `eps > 0` gives the soft form :math:`u / \sqrt{\|u\|^2 + \epsilon}` of the first HRA code: shorter than 1, so that
    :math:`I - 2 v v^\top` is close to the identity for a short `u` but not orthogonal. Lengths are measured in
    float64, so that tiny columns of float32 keep their direction.

    Args:
        vectors: `(d, r)`, `1 <= r <= d`, any float type.
        eps: at least 0.

    Returns:
        `(d, r)` in at least float32.

    Raises:
        NumericsError: a column is zero (with `eps = 0`: a reflection needs a direction) or not finite.
        TargetError: more columns than rows, or none.

    Reference: HRA, arXiv:2405.17484, eq. (1); `eps` as in its repository's LLaMA variant.

    >>> normalize(torch.tensor([[3.0], [4.0]])).flatten().tolist()
    [0.6000000238418579, 0.800000011920929]
    """
    if vectors.dim() != 2 or not 1 <= vectors.shape[1] <= vectors.shape[0]:
        raise TargetError(
            f"reflection vectors of shape {tuple(vectors.shape)}, expected (width, rank) with 1 <= rank <= width",
            hint="lower the rank, or leave this layer out",
        )
    if eps < 0:
        raise ValueError(f"eps is at least 0, found {eps}")
    vectors = at_least_float32(vectors, "reflection vectors")
    wide = vectors.to(torch.float64)
    lengths = torch.linalg.vector_norm(wide, dim=0)
    bad = ~torch.isfinite(lengths) if eps else ~(torch.isfinite(lengths) & (lengths > 0))
    if bool(bad.any()):
        index = int(bad.nonzero()[0])
        found = "zero" if float(lengths.detach()[index]) == 0 else "not finite"
        raise NumericsError(
            f"reflection vector {index} of {vectors.shape[1]} is {found}: a reflection needs a direction",
            hint="the adapter was never initialised or its training diverged",
        )
    if eps:
        lengths = torch.sqrt(lengths.square() + eps)
    unit: Tensor = (wide / lengths).to(vectors.dtype)
    return unit


def orthonormalize(vectors: Tensor) -> Tensor:
    r"""Replace the columns by an orthonormal basis `Q` of their span, for the Gram-Schmidt variant of HRA.

    :math:`D = I - 2 Q Q^\top` depends on the span only; it is symmetric, its own inverse, and its reflections commute.
    Computed by QR in float64, so that it is orthogonal where the sequential form of PEFT amplifies rounding noise.

    Args:
        vectors: `(d, r)`, any float type.

    Returns:
        `(d, r)` with orthonormal columns, in at least float32.

    Raises:
        NumericsError: the columns are linearly dependent; above all the paired start of plain HRA is.

    Cost: `O(d r^2)`.
    Reference: HRA, arXiv:2405.17484, section 3.3 (strength lambda = infinity).

    >>> q = orthonormalize(torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]]))
    >>> torch.allclose(q.T @ q, torch.eye(2))
    True
    """
    unit = normalize(vectors).to(torch.float64)
    basis: Tensor
    basis, upper = torch.linalg.qr(unit)
    if float(upper.detach().diagonal().abs().min()) < DEPENDENT:
        span = int(torch.linalg.matrix_rank(unit.detach(), tol=DEPENDENT))
        raise NumericsError(
            f"{unit.shape[1]} reflection vectors span {span} directions: Gram-Schmidt needs them independent",
            hint="equal pairs are the identity start of plain HRA: start this variant from an orthonormal basis",
        )
    return basis.to(at_least_float32(vectors).dtype)


def wy_factor(columns: Tensor) -> Tensor:
    r"""Compute the triangular factor `T` with :math:`\prod_i (I - 2 v_i v_i^\top) = I - V T V^\top`.

    The closed form :math:`T^{-1} = I/2 + \mathrm{striu}(V^\top V)` holds for columns of any length, so it serves the
    soft form of :func:`normalize` too. Solved in float64, always invertible (the diagonal is 1/2).

    Args:
        columns: `V (d, r)`, as :func:`normalize` returns it.

    Returns:
        `T (r, r)`, upper triangular, in the dtype of `columns`.

    Cost: `O(d r^2 + r^3)`.
    Reference: Schreiber and Van Loan 1989; Joffrain et al. 2006 (the inverse form).

    >>> v = torch.tensor([[1.0, 1.0], [0.0, 0.0]])   # an equal pair: the product is the identity
    >>> wy_factor(v).tolist()
    [[2.0, -4.0], [0.0, 2.0]]
    """
    wide = columns.to(torch.float64)
    eye = torch.eye(columns.shape[1], dtype=torch.float64, device=columns.device)
    inverse = torch.triu(wide.T @ wide, diagonal=1) + eye / 2
    factor: Tensor = torch.linalg.solve_triangular(inverse, eye, upper=True)
    return factor.to(columns.dtype)


def wy_apply(weight: Tensor, columns: Tensor, factor: Tensor, side: str = "input") -> Tensor:
    r"""Compute `W D` (input side) or `D^T W` (output side) from `V` and `T`; pass `T.T` for the inverse.

    Args:
        weight: `(out, in)`, same dtype as `columns`.
        columns: `V (in, r)` or, on the output side, `(out, r)`.
        factor: `T (r, r)` of :func:`wy_factor`.
        side: "input" or "output".

    Returns:
        `(out, in)`, a new tensor.

    Cost: `O(out in r)`.

    >>> v = torch.tensor([[1.0], [0.0]])
    >>> wy_apply(torch.eye(2), v, wy_factor(v)).diagonal().tolist()
    [-1.0, 1.0]
    """
    if side == "input":
        return torch.addmm(weight, (weight @ columns) @ factor, columns.T, alpha=-1)
    return torch.addmm(weight, columns, factor.T @ (columns.T @ weight), alpha=-1)


def reflect_weight(
    weight: Tensor, vectors: Tensor, *, side: str = "input", transpose: bool = False, eps: float = 0.0
) -> Tensor:
    r"""Rotate one side of a weight by a chain of Householder reflections.

    With :math:`D = H_1 \cdots H_r`, :math:`H_i = I - 2 u_i u_i^\top / \|u_i\|^2`: input side :math:`W D`, output side
    :math:`D^\top W`. `D` is orthogonal of determinant :math:`(-1)^r`, so singular values are kept; equal neighbouring
    columns cancel.

    Args:
        weight: `(out, in)`, any float type; computed in at least float32.
        vectors: `(in, r)`, on the output side `(out, r)`; lengths are ignored (unless `eps`), zero columns refused.
        side: "input" or "output".
        transpose: apply `D^T` in place of `D`: the inverse.
        eps: the soft form, see :func:`normalize`.

    Returns:
        `(out, in)` in the dtype of `weight`.

    Raises:
        NumericsError: a zero or non-finite column.
        TargetError: more reflections than the side is wide, or another width.

    Cost: `O(out in r)`; no `in x in` matrix is formed.
    Use instead: :class:`~ortho_cli.linalg.householder.Householder` to merge block by block.
    Reference: HRA, arXiv:2405.17484, eq. (1)-(4).

    >>> v = torch.tensor([[1.0], [0.0], [0.0]])
    >>> reflect_weight(torch.eye(3), v).diagonal().tolist()
    [-1.0, 1.0, 1.0]
    """
    if side not in SIDES:
        raise ValueError(f"side is 'input' or 'output', found {side!r}")
    columns = normalize(vectors, eps)
    _check_width(weight.shape[1 if side == "input" else 0], columns)
    wide = at_least_float32(weight, "weight")
    columns = columns.to(wide.dtype)
    factor = wy_factor(columns)
    return wy_apply(wide, columns, factor.T if transpose else factor, side).to(weight.dtype)


def reflect_activations(x: Tensor, vectors: Tensor, *, transpose: bool = False, eps: float = 0.0) -> Tensor:
    r"""Reflect layer inputs: `x D^T`, so that `base(reflect_activations(x, U))` is the layer with weight `W D`.

    Args:
        x: `(..., in)`, any float type; computed in at least float32.
        vectors: `U (in, r)`.
        transpose: `x D` instead.
        eps: the soft form, see :func:`normalize`.

    Returns:
        `(..., in)` in the dtype of `x`; lengths of rows are kept (`eps = 0`).

    Raises:
        NumericsError: a zero or non-finite column.
        TargetError: more reflections than `in`, or another width.

    Cost: `O(rows in r)`; differentiable in both arguments.
    Reference: HRA, arXiv:2405.17484, eq. (2).

    >>> reflect_activations(torch.tensor([1.0, 2.0]), torch.tensor([[0.0], [5.0]])).tolist()
    [1.0, -2.0]
    """
    columns = normalize(vectors, eps)
    _check_width(x.shape[-1], columns)
    wide = at_least_float32(x, "activations")
    columns = columns.to(wide.dtype)
    factor = wy_factor(columns)
    inner = (wide @ columns) @ (factor if transpose else factor.T)
    return (wide - inner @ columns.T).to(x.dtype)


def _check_width(width: int, columns: Tensor) -> None:
    if columns.shape[0] != width:
        raise TargetError(
            f"reflection vectors of length {columns.shape[0]} on a side of width {width}",
            hint="the adapter was made for another layer, or for the other side of this one",
        )
