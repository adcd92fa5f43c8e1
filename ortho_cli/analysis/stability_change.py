"""One comparison of a layer in two checkpoints: the row that every table of stability is made of."""

from __future__ import annotations

from dataclasses import dataclass

from ortho_cli.linalg.polar import RESOLVED

__all__ = ["COLUMNS", "Change"]


@dataclass(frozen=True)
class Change:
    """A layer in a checkpoint, compared with an earlier one: a row of `stability.csv`.

    Attributes:
        layer: its name.
        kind: `linear`, `conv`, ...
        step: of the checkpoint.
        reference_step: of the one it is compared with; None for a file that tells none.
        lag: how many checkpoints lie from the reference to it; None for a reference outside the series.
        rows, cols: of the matrix.
        stability: mean cosine of the directions of both bases.
        noise_floor: standard deviation of the stability of independent weights.
        sigma_min, sigma_max: the smallest and largest singular value at `step`.
        r_distance, r_similarity: of R, with a positive diagonal.
        mixing_similarity: cosine of the polar factors H.
        rank_90, rank_99: components that hold that share of `||W||_F^2` at `step`.
        top_stability, top_overlap: of the leading `--top-rank` directions alone.
        rank, reference_rank: directions that are resolved at `step` and in the reference; None in tables without them.
    """

    layer: str
    kind: str
    step: int
    reference_step: int | None
    lag: int | None
    rows: int
    cols: int
    stability: float
    noise_floor: float
    sigma_min: float
    sigma_max: float
    r_distance: float
    r_similarity: float
    mixing_similarity: float
    rank_90: int
    rank_99: int
    top_stability: float | None = None
    top_overlap: float | None = None
    rank: int | None = None
    reference_rank: int | None = None

    @property
    def parameters(self) -> int:
        """Entries of the weight."""
        return self.rows * self.cols

    @property
    def is_resolved(self) -> bool:
        """Whether both weights have full rank; if not, the stability is that of the directions that are there."""
        if self.rank is None or self.reference_rank is None:
            return not self.sigma_min <= RESOLVED * self.sigma_max  # of a table without these nothing is known
        return min(self.rank, self.reference_rank) == min(self.rows, self.cols)


COLUMNS = tuple(name for name in Change.__dataclass_fields__ if not name.startswith("top_"))
