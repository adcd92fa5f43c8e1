"""The methods that condition chosen layers: their gradients, their rates, their weights (arXiv:2207.02119)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ortho_cli.recipe.method_section import Exclude, MethodSection
from ortho_cli.recipe.section import Count, NotNegative, Patterns, Share

__all__ = ["NOG", "OLR", "SOC", "OrthogonalLoss", "SpectralNorm"]

Targets = Annotated[
    Patterns,
    Field(
        min_length=1,
        description="Patterns of layer names, as in every method also of their ends; ^conv1 is a network's own conv1, "
        "without those of its blocks.",
    ),
]


class NOG(MethodSection):
    """Nearest orthogonal gradients: steps as long in every direction (arXiv:2207.02119)."""

    name: Literal["nog"] = Field(description="The method.")
    targets: Targets
    exclude: Exclude = ()
    order: Literal["before", "after"] = Field(
        default="before",
        description="before: the gradient is made orthogonal, momentum and decay come after (the paper); after: the "
        "optimizer's whole update is, but for decoupled weight decay.",
    )
    polar: Literal["auto", "svd", "gram", "polar-express"] = Field(
        default="auto", description="How the nearest orthogonal matrix is found; auto: the fastest exact way."
    )


class OLR(MethodSection):
    """The optimal learning rate, which keeps a weight's length (arXiv:2207.02119); list it after nog."""

    name: Literal["olr"] = Field(description="The method.")
    targets: Targets
    exclude: Exclude = ()
    floor: Share = Field(default=0.0, description="The least rate, as a share of the optimizer's; 0 is the paper's.")


class SOC(MethodSection):
    """Skew orthogonal convolutions in place of plain ones (arXiv:2105.11417)."""

    name: Literal["soc"] = Field(description="The method.")
    targets: Targets
    exclude: Exclude = ()
    terms: Count = Field(default=5, description="Convolutions of each layer in training; the paper's number.")
    eval_terms: Count = Field(default=10, description="Convolutions of each layer in evaluation.")


class SpectralNorm(MethodSection):
    """Weights divided by their largest singular value (arXiv:1802.05957), to compare with."""

    name: Literal["spectral_norm"] = Field(description="The method.")
    targets: Targets
    exclude: Exclude = ()
    iterations: Count = Field(default=1, description="Power iterations in each training pass.")


class OrthogonalLoss(MethodSection):
    """A penalty on weights whose rows are not orthonormal, to compare with."""

    name: Literal["orthogonal_loss"] = Field(description="The method.")
    targets: Targets
    exclude: Exclude = ()
    penalty: NotNegative = Field(default=1.0, description="Weight of the penalty; the paper's GANs: mean, 100.")
    penalty_form: Literal["norm", "squared", "mean"] = Field(
        default="norm",
        description="||W W' - I||, its square, or the mean square of its entries and over layers (the paper's GANs).",
    )
