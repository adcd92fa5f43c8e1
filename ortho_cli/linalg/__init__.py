"""The mathematics: pure functions and operators on tensors. Imports torch, and of ours only `errors`.

| module | the idea |
|---|---|
| `operator.py` | what an adapter does to one weight: the `Operator` interface, `Chain`, `Transposed` |
| `reflections.py` | Householder chains in compact WY form, on weights and activations |
| `householder.py`, `starts.py` | HRA: the operator, and first values for new adapters |
| `lowrank.py`, `kronecker.py`, `dora.py` | LoRA and LoCon, LoHa and LoKr, DoRA |
| `cayley.py`, `block_rotation.py` | OFT: blocks from stored parameters, block rotations |
| `planes.py`, `rotation.py` | a rotation of a few directions: its planes and angles, powers, reflections |
| `joint_rotation.py`, `joint_low_rank.py` | several adapters in the span of all: products, means, TIES, DARE |
| `procrustes.py` | the rotation that best takes one weight to another |
| `group.py` | group orthogonality (GOR): penalties on small sets of filters, with their gradients |
| `coherence.py`, `intruders.py` | how far vectors are from orthonormal; new leading directions of a weight |
| `matricize.py`, `spectral.py`, `subspace_iteration.py` | weights as matrices; their best low-rank factors |
| `ranks.py`, `budget.py` | which rank a layer gets; the ranks of all layers for one budget |
| `product.py`, `frobenius.py`, `heads.py` | factored products: measured, balanced, decayed; those of attention |
| `tensor.py`, `tensor_train.py` | a weight as a tensor train or a Tucker form, and computing with it |
| `polar.py`, `polar_express.py`, `subspace.py` | the basis of a weight (its polar factor), and how far it moved |
| `nog.py`, `olr.py` | nearest orthogonal gradients; the rate that keeps a weight's length |
| `skew_conv.py`, `orthogonal_loss.py` | orthogonal convolutions; soft orthogonality of one matrix |
| `rootm.py`, `conditioning.py` | matrix roots and inverse roots, for whitening; how well conditioned a covariance is |
| `precision.py` | which dtypes are computed in and which are refused |
"""

from __future__ import annotations

from ortho_cli.linalg.block_rotation import BlockRotation, Rescale
from ortho_cli.linalg.budget import budget_ranks
from ortho_cli.linalg.cayley import cayley, cayley_neumann, diag_oft, limit_skew, skew_from_upper, skew_part
from ortho_cli.linalg.dora import Dora
from ortho_cli.linalg.frobenius import add_decay_gradients_, decay_gradients
from ortho_cli.linalg.group import group_penalty
from ortho_cli.linalg.householder import Householder
from ortho_cli.linalg.kronecker import Hadamard, Kronecker
from ortho_cli.linalg.lowrank import LowRank, fold_core
from ortho_cli.linalg.matricize import Matricization
from ortho_cli.linalg.operator import Chain, Operator, Transposed
from ortho_cli.linalg.planes import find_planes, orthogonality_defect, plane_angles, rotation_logs
from ortho_cli.linalg.polar import Polar, polar_factor
from ortho_cli.linalg.product import non_orthogonality, nuclear_norm, product_norm, rebalance
from ortho_cli.linalg.ranks import LayerSize, energy_rank, error_rank, scale_for_parameters, scaled_rank
from ortho_cli.linalg.reflections import normalize, orthonormalize, reflect_activations, reflect_weight, wy_factor
from ortho_cli.linalg.rootm import inverse_sqrtm, sqrtm
from ortho_cli.linalg.rotation import LowRankRotation
from ortho_cli.linalg.spectral import relative_error, singular_values, spectral_factors
from ortho_cli.linalg.starts import orthonormal_start, pad_pairs, paired_start
from ortho_cli.linalg.subspace import Basis, basis, factor_stability, principal_angles, stability, truncated_stability

__all__ = [
    "Basis",
    "BlockRotation",
    "Chain",
    "Dora",
    "Hadamard",
    "Householder",
    "Kronecker",
    "LayerSize",
    "LowRank",
    "LowRankRotation",
    "Matricization",
    "Operator",
    "Polar",
    "Rescale",
    "Transposed",
    "add_decay_gradients_",
    "basis",
    "budget_ranks",
    "cayley",
    "cayley_neumann",
    "decay_gradients",
    "diag_oft",
    "energy_rank",
    "error_rank",
    "factor_stability",
    "find_planes",
    "fold_core",
    "group_penalty",
    "inverse_sqrtm",
    "limit_skew",
    "non_orthogonality",
    "normalize",
    "nuclear_norm",
    "orthogonality_defect",
    "orthonormal_start",
    "orthonormalize",
    "pad_pairs",
    "paired_start",
    "plane_angles",
    "polar_factor",
    "principal_angles",
    "product_norm",
    "rebalance",
    "reflect_activations",
    "reflect_weight",
    "relative_error",
    "rotation_logs",
    "scale_for_parameters",
    "scaled_rank",
    "singular_values",
    "skew_from_upper",
    "skew_part",
    "spectral_factors",
    "sqrtm",
    "stability",
    "truncated_stability",
    "wy_factor",
]
