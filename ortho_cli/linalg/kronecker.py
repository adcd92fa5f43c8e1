"""Additive adapters whose delta is an entrywise (LoHa) or a Kronecker (LoKr) product of small matrices.

Rows of the delta are computed when asked for; the whole is never formed. Where the factors are thin the delta has an
exact low-rank form: products of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ortho_cli.errors import TargetError
from ortho_cli.linalg.lowrank import Additive, fold_core
from ortho_cli.linalg.precision import adapter_tensors

__all__ = ["Hadamard", "Kronecker"]

Pair = tuple[Tensor, Tensor]


class Hadamard(Additive):
    r"""Add the entrywise product of two low-rank matrices (LoHa): :math:`W' = W + s\,(A_1 B_1) \circ (A_2 B_2)`.

    Of rank up to :math:`r^2`, and exactly `B A` with rows of `B` the products of rows of `A_1` and `A_2`.

    Args:
        w1_a: `A_1 (out, r)`; with a core `(r, out)`, as stored.
        w1_b: `B_1 (r, in)`; a conv without core `(r, in kh kw)`.
        w2_a: `A_2`, like `w1_a`.
        w2_b: `B_2`, like `w1_b`.
        scale: `s = alpha / r`.
        t1: Tucker core `(r, r, kh, kw)` of a conv (`hada_t1`); both cores or none.
        t2: the other one (`hada_t2`).

    Raises:
        TargetError: shapes that do not fit together.
        NumericsError: a non-finite value.

    Cost: a merge is `O(out in r)`.
    Reference: FedPara, arXiv:2108.06098; LyCORIS `functional/loha.py`; PEFT `tuners/loha/layer.py`.

    >>> ones = torch.ones(2, 1)
    >>> Hadamard(ones, ones.T, 2 * ones, ones.T, scale=0.5).apply(torch.zeros(2, 2)).tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    """

    kind = "loha"

    def __init__(
        self,
        w1_a: Tensor,
        w1_b: Tensor,
        w2_a: Tensor,
        w2_b: Tensor,
        scale: float = 1.0,
        *,
        t1: Tensor | None = None,
        t2: Tensor | None = None,
    ) -> None:
        if (t1 is None) != (t2 is None):
            raise TargetError("a LoHa adapter has one Tucker core of two")
        cores = () if t1 is None or t2 is None else (t1, t2)
        self._stored = adapter_tensors("LoHa factors", w1_a, w1_b, w2_a, w2_b, *cores)
        a1, b1, a2, b2, *cores_read = self._stored
        self.first = _chain((a1, b1), cores_read[:1], "LoHa factors w1")
        self.second = _chain((a2, b2), cores_read[1:], "LoHa factors w2")
        shapes = {(a.shape[0], b.shape[1]) for a, b in (self.first, self.second)}
        if len(shapes) > 1:
            raise TargetError(f"the two halves of a LoHa adapter differ in shape: {' and '.join(map(str, shapes))}")
        (self.shape,) = shapes
        self.scale = scale

    @property
    def rank(self) -> int | None:
        """The product of the halves' ranks, if below both sides of the weight."""
        rank = self.first[1].shape[0] * self.second[1].shape[0]
        return rank if rank < min(self.shape) else None

    @property
    def dtype(self) -> torch.dtype:
        """What the factors are stored in."""
        return self.first[0].dtype

    def rebuilt(self, dtype: torch.dtype, scale: float) -> Hadamard:
        """The same factors in another dtype, at another scale."""
        a1, b1, a2, b2, *cores = [tensor.to(dtype) for tensor in self._stored]
        t1, t2 = cores or (None, None)
        return Hadamard(a1, b1, a2, b2, scale, t1=t1, t2=t2)

    def add(self, weight: Tensor, rows: slice) -> Tensor:
        """`weight` plus these rows of the entrywise product."""
        (a1, b1), (a2, b2) = self.first, self.second
        return torch.addcmul(weight, a1[rows] @ b1, a2[rows] @ b2, value=self.scale)

    def factors(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Row-wise Kronecker products of the `A`, column-wise ones of the `B`."""
        (a1, b1), (a2, b2) = self.first, self.second
        up = torch.einsum("pi,pj->pij", a1[rows], a2[rows]).flatten(1)
        down = torch.einsum("iq,jq->ijq", b1, b2).flatten(0, 1)
        return up * self.scale, down


class Kronecker(Additive):
    r"""Add a Kronecker product of two small matrices (LoKr): :math:`W' = W + s\,(w_1 \otimes w_2)`.

    Each factor is given whole or as a pair whose product it is. With pairs the delta is exactly of low rank,
    :math:`(a_1 b_1) \otimes (a_2 b_2) = (a_1 \otimes a_2)(b_1 \otimes b_2)`.

    Args:
        w1: `(p, q)` or `(a (p, r), b (r, q))`.
        w2: `(m, n)`, a conv `(m, n, kh, kw)`, or a pair `(a (m, r), b (r, n))`, a conv's `b (r, n kh kw)`.
        scale: `s`. PEFT: always `alpha / r`; LyCORIS: `alpha / r`, but 1 where both factors are whole.
        t2: Tucker core `(r, r, kh, kw)` of a conv (`lokr_t2`): `w2` is then the pair `(a (r, m), b (r, n))` as stored.

    Raises:
        TargetError: factors that do not chain, a core without a pair.
        NumericsError: a non-finite value.

    Cost: a merge is `O(out in)`, plus the small products.
    Reference: KronA, arXiv:2212.10650; LyCORIS `modules/lokr.py`; PEFT `tuners/lokr/layer.py`.

    >>> Kronecker(torch.tensor([[1.0, 2.0]]), torch.eye(2)).apply(torch.zeros(2, 4)).tolist()
    [[1.0, 0.0, 2.0, 0.0], [0.0, 1.0, 0.0, 2.0]]
    """

    kind = "lokr"

    def __init__(self, w1: Tensor | Pair, w2: Tensor | Pair, scale: float = 1.0, *, t2: Tensor | None = None) -> None:
        if t2 is not None and isinstance(w2, Tensor):
            raise TargetError("a LoKr adapter has a Tucker core but its w2 is whole")
        self._given = (w1, w2, t2)
        stored1, stored2 = (w1,) if isinstance(w1, Tensor) else w1, (w2,) if isinstance(w2, Tensor) else w2
        core = () if t2 is None else (t2,)
        read = adapter_tensors("LoKr factors", *stored1, *stored2, *core)
        end1, end2 = len(stored1), len(stored1) + len(stored2)
        self.first = _as_pair(read[:end1], [], "LoKr factors w1")
        self.second = _as_pair(read[end1:end2], read[end2:], "LoKr factors w2")
        self.scale = scale
        self._product1, self._product2 = self.first[0] @ self.first[1], self.second[0] @ self.second[1]
        (p, q), (m, n) = self._product1.shape, self._product2.shape
        self.shape = (p * m, q * n)

    @property
    def rank(self) -> int | None:
        """The product of the factors' ranks (bounded by their shapes), if below both sides of the weight."""
        rank = self.first[1].shape[0] * self.second[1].shape[0]
        return rank if rank < min(self.shape) else None

    @property
    def dtype(self) -> torch.dtype:
        """What the factors are stored in."""
        return self._product1.dtype

    def rebuilt(self, dtype: torch.dtype, scale: float) -> Kronecker:
        """The same factors in another dtype, at another scale."""
        w1, w2, t2 = self._given

        def cast(factor: Tensor | Pair) -> Tensor | Pair:
            return factor.to(dtype) if isinstance(factor, Tensor) else (factor[0].to(dtype), factor[1].to(dtype))

        return Kronecker(cast(w1), cast(w2), scale, t2=None if t2 is None else t2.to(dtype))

    def add(self, weight: Tensor, rows: slice) -> Tensor:
        """`weight` plus these rows of the Kronecker product."""
        return weight + _kron_rows(self._product1 * self.scale, self._product2, rows)

    def factors(self, rows: slice) -> tuple[Tensor, Tensor]:
        """`(a_1 kron a_2)[rows]` and `b_1 kron b_2`."""
        (a1, b1), (a2, b2) = self.first, self.second
        return _kron_rows(a1 * self.scale, a2, rows), torch.kron(b1, b2)


def _matrix(factor: Tensor) -> Tensor:
    """A factor as a matrix; a conv kernel's dimensions join its columns."""
    return factor.reshape(factor.shape[0], -1)


def _chain(pair: Pair, core: Sequence[Tensor], what: str) -> Pair:
    """Two matrices whose product is the factor; a core is folded into the right one (the left is stored transposed)."""
    left, right = _matrix(pair[0]), _matrix(pair[1])
    if core:
        left, right = left.T, fold_core(core[0], right)
    if left.shape[1] != right.shape[0]:
        raise TargetError(f"{what} of shapes {tuple(pair[0].shape)} and {tuple(pair[1].shape)} do not chain")
    return left, right


def _as_pair(stored: Sequence[Tensor], core: Sequence[Tensor], what: str) -> Pair:
    """One LoKr factor as a product of the least inner dimension its shapes allow; a whole one times an identity."""
    if len(stored) == 2:
        left, right = _chain((stored[0], stored[1]), core, what)
        if left.shape[1] <= min(left.shape[0], right.shape[1]):
            return left, right
        whole = left @ right
    else:
        whole = _matrix(stored[0])
    rows, columns = whole.shape
    eye = torch.eye(min(rows, columns), dtype=whole.dtype, device=whole.device)
    return (eye, whole) if rows <= columns else (whole, eye)


def _kron_rows(left: Tensor, right: Tensor, rows: slice) -> Tensor:
    """Rows of `left kron right`: row i is row `i // m` of `left` times row `i % m` of `right`, `m` rows in `right`."""
    index = torch.arange(rows.start, rows.stop, device=left.device)
    height = right.shape[0]
    return torch.einsum("pq,pn->pqn", left[index // height], right[index % height]).flatten(1)
