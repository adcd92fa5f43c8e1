"""The mathematics: pure functions and operators on tensors. Imports torch, and of ours only `errors`.

| module | the idea |
|---|---|
| `operator.py` | what an adapter does to one weight: the `Operator` interface, `Chain`, `Transposed` |
| `reflections.py` | Householder chains in compact WY form, on weights and activations |
| `householder.py`, `starts.py` | HRA: the operator, and first values for new adapters |
| `lowrank.py`, `kronecker.py`, `dora.py` | LoRA and LoCon, LoHa and LoKr, DoRA |
| `cayley.py`, `rotation.py` | OFT: blocks from stored parameters, block rotations, angles |
| `group.py` | group orthogonality (GOR): penalties on small sets of filters, with their gradients |
| `precision.py` | which dtypes are computed in and which are refused |
"""

from __future__ import annotations

from ortho_cli.linalg.cayley import cayley, cayley_neumann, diag_oft, limit_skew, skew_from_upper, skew_part
from ortho_cli.linalg.dora import Dora
from ortho_cli.linalg.group import group_penalty
from ortho_cli.linalg.householder import Householder
from ortho_cli.linalg.kronecker import Hadamard, Kronecker
from ortho_cli.linalg.lowrank import LowRank, fold_core
from ortho_cli.linalg.operator import Chain, Operator, Transposed
from ortho_cli.linalg.reflections import normalize, orthonormalize, reflect_activations, reflect_weight, wy_factor
from ortho_cli.linalg.rotation import BlockRotation, Rescale, orthogonality_defect, plane_angles
from ortho_cli.linalg.starts import orthonormal_start, pad_pairs, paired_start

__all__ = [
    "BlockRotation",
    "Chain",
    "Dora",
    "Hadamard",
    "Householder",
    "Kronecker",
    "LowRank",
    "Operator",
    "Rescale",
    "Transposed",
    "cayley",
    "cayley_neumann",
    "diag_oft",
    "fold_core",
    "group_penalty",
    "limit_skew",
    "normalize",
    "orthogonality_defect",
    "orthonormal_start",
    "orthonormalize",
    "pad_pairs",
    "paired_start",
    "plane_angles",
    "reflect_activations",
    "reflect_weight",
    "skew_from_upper",
    "skew_part",
    "wy_factor",
]
