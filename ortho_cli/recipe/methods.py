"""The `methods` section: what is done to the model while it trains, in this order.

One class a method; its keys and defaults are CONTRACTS.md 4. What depends on the model (does a pattern match, is a rank
too large) is the method's to say.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from ortho_cli.recipe.method_section import AutoTargets, Exclude, MethodSection, OwnRate
from ortho_cli.recipe.methods_conditioning import TrackConditioning, Whiten
from ortho_cli.recipe.methods_gan import VP, Hessian, OroJaR
from ortho_cli.recipe.methods_gradient import NOG, OLR, SOC, OrthogonalLoss, SpectralNorm
from ortho_cli.recipe.methods_oialr import OIALR, TrackStability
from ortho_cli.recipe.models import Model
from ortho_cli.recipe.section import Count, NotNegative, Patterns, Positive, Rejection, Share, Text

__all__ = [
    "GOR",
    "HRA",
    "NOG",
    "OIALR",
    "OLR",
    "PEFT",
    "SOC",
    "Distill",
    "Factorized",
    "FrobeniusDecay",
    "LoRA",
    "Method",
    "MethodSection",
    "Normalize",
    "OrthogonalLoss",
    "SpectralNorm",
    "TrackConditioning",
    "TrackStability",
    "Whiten",
]


class _Adapter(MethodSection):
    """A method that puts an adapter into layers, a new one or one to go on with."""

    name: str
    rank: Count
    targets: AutoTargets = "auto"
    exclude: Exclude = ()
    adapter: Text | None = Field(
        default=None, description="An adapter to go on with; what shapes it (rank, targets ...) is then its own."
    )
    lr: OwnRate = None
    rates: dict[Text, Positive] = Field(
        default={}, description="Learning rates at the peak by pattern of layers, e.g. {text_encoder.**: 1e-5}."
    )
    modules_to_save: Patterns = Field(
        default=(), description="Patterns of modules that train too and are saved whole, e.g. a new head."
    )
    shape: ClassVar[frozenset[str]] = frozenset({"rank", "targets", "exclude"})
    """Keys that an adapter to go on with brings along: a given one must agree, one left out says nothing."""

    @model_serializer(mode="wrap")
    def _only_what_holds(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """All keys; without the defaults of those that the adapter decides."""
        dumped: dict[str, Any] = handler(self)
        unsaid = self.shape - self.model_fields_set if self.adapter is not None else frozenset()
        return {key: value for key, value in dumped.items() if key not in unsaid}


class HRA(_Adapter):
    """Householder reflection adaptation (arXiv:2405.17484)."""

    name: Literal["hra"] = Field(description="The method.")
    rank: Count = Field(default=8, description="Reflections a layer, even unless gram_schmidt.")
    side: Literal["input", "output"] = Field(default="input", description="The side of a weight that is turned.")
    gram_schmidt: bool = Field(default=False, description="Orthonormal reflections (the paper's lambda = inf).")
    start: Literal["identity", "reflection"] = Field(
        default="identity", description="With gram_schmidt: leave the model as it is, or the paper's reflected start."
    )
    penalty: NotNegative = Field(
        default=0.0, description="Weight of the penalty on reflections that are not orthogonal (lambda)."
    )
    penalty_form: Literal["squared", "norm"] = Field(
        default="squared", description="The paper's squared Frobenius norm, or its code's unsquared one."
    )
    bias: Literal["none", "all", "hra_only"] = Field(
        default="none", description="Which biases train too: none, all of the model, or the adapted layers'."
    )
    eps: NotNegative = Field(
        default=0.0, description="Softens reflections as the authors' LLaMA code does; above 0 not orthogonal."
    )
    compat: Literal["llama"] | None = Field(
        default=None,
        description="llama: with side: output and eps, start as HRA's LLaMA runs do: short columns, no identity.",
    )
    shape: ClassVar[frozenset[str]] = _Adapter.shape | {"side", "gram_schmidt", "start", "eps"}

    def problems(self) -> Iterator[Rejection]:
        """What can start as the identity, and what Gram-Schmidt rules out."""
        if self.compat is not None and not (self.side == "output" and self.eps):
            yield ("compat",), "llama goes with side: output and eps: 1e-4, which those experiments had"
        if self.adapter is None and not self.gram_schmidt:
            if self.rank % 2 and self.compat is None:
                near = f"{self.rank - 1} or {self.rank + 1}" if self.rank > 1 else "2"
                yield ("rank",), f"must be even to start as the identity, found {self.rank}; take {near}"
            if self.start == "reflection":
                yield ("start",), "reflection is the start of gram_schmidt: true; plain HRA starts as the identity"
        if self.gram_schmidt and self.eps:
            yield ("eps",), f"gram_schmidt has no soft form: eps must be 0, found {self.eps:g}"


class LoRA(_Adapter):
    """Low-rank adaptation (arXiv:2106.09685), the reference to compare with."""

    name: Literal["lora"] = Field(description="The method.")
    rank: Count = Field(default=8, description="Rank of the update.")
    alpha: Positive | None = Field(default=None, description="Scale times rank; null: the rank, for scale 1.")
    rslora: bool = Field(default=False, description="Divide alpha by the square root of the rank instead of the rank.")
    dropout: Share = Field(default=0.0, description="Share of an adapted layer's input that is dropped.")
    shape: ClassVar[frozenset[str]] = _Adapter.shape | {"alpha", "rslora"}


class GOR(MethodSection):
    """Group orthogonalization regularization (arXiv:2306.10001)."""

    once: ClassVar[bool] = False  # convolutions and linear layers may want other groups

    name: Literal["gor"] = Field(description="The method.")
    mode: Literal["inter", "intra"] = Field(
        default="inter", description="Consecutive filters, or those of equal place in all groups, become orthonormal."
    )
    groups: Count = Field(default=32, description="Groups a layer at most; 1 is full soft orthogonality.")
    min_filters: Count = Field(default=4, description="Filters a group at least, which limits the groups.")
    penalty: NotNegative = Field(default=1e-2, description="Weight of the penalty (lambda).")
    targets: Literal["auto", "conv", "linear", "all", "decoder-up"] | Annotated[Patterns, Field(min_length=1)] = Field(
        default="auto",
        description="Which layers: a kind, or patterns of their names; decoder-up: the outer factors of a LoRA in a "
        "UNet's decoder; auto: these where there are any, else conv.",
    )
    normalize: bool = Field(default=False, description="The scale-free variant: filters are compared at length 1.")


class PEFT(MethodSection):
    """Any adapter of the installed PEFT library."""

    name: Literal["peft"] = Field(description="The method.")
    config: dict[str, Any] = Field(description="Keys of the PEFT config, with peft_type: OFT, BOFT, ...")

    def problems(self) -> Iterator[Rejection]:
        """PEFT tells its configs by `peft_type`."""
        if not isinstance(self.config.get("peft_type"), str):
            yield ("config",), "needs peft_type: NAME, e.g. OFT"


class Factorized(MethodSection):
    """Layers by factors of low rank, or of high rank to train overcomplete (FNL, arXiv:2105.01029)."""

    name: Literal["factorized"] = Field(description="The method.")
    rank: Count | None = Field(default=None, description="Components of every layer; or rank_scale, or target_ratio.")
    rank_scale: Positive | None = Field(
        default=None, description="Rank as a share of the full one; above 1 is overcomplete (wide)."
    )
    target_ratio: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="Parameters of the whole model after, over before."
    )
    targets: Annotated[
        Literal["auto"] | Annotated[Patterns, Field(min_length=1)],
        Field(description="Patterns of layer names; auto: all but first convolution, embeddings and output head."),
    ] = "auto"
    exclude: Exclude = ()
    spectral: bool = Field(default=True, description="Start from the SVD of the weights; false draws factors anew.")
    attention: bool = Field(
        default=False,
        description="Factor attention's products of query and key, of output and value too, by smaller heads.",
    )
    square: bool = Field(default=False, description="A square matrix between the two factors (deep).")
    form: Literal["factors", "tensor-train", "tucker"] = Field(
        default="factors", description="Two factors, or tensor forms, where convolutions become separable ones."
    )
    plain_start: Literal["kaiming", "fan-in", "fan-out", "uniform"] | None = Field(
        default=None, description="How factors are drawn without spectral; null: as the paper did for the model."
    )
    compat: Literal["paper"] | None = Field(
        default=None, description="paper: its code's search for a ratio, and its reading of convolutions."
    )

    def problems(self) -> Iterator[Rejection]:
        """One rule for the ranks, and nothing that has no effect."""
        rules = ("rank", "rank_scale", "target_ratio")
        given = [rule for rule in rules if getattr(self, rule) is not None]
        if len(given) != 1:
            where = (given[1],) if given else ()
            yield where, f"give exactly one of {', '.join(rules)}; found {' and '.join(given) or 'none'}"
        if self.form != "factors":
            for key in ("rank", "square", "compat"):
                if getattr(self, key):
                    yield (key,), f"is for form: factors; a {self.form} takes rank_scale or target_ratio"
            if self.plain_start in ("kaiming", "fan-in"):
                yield ("plain_start",), f"a {self.form} starts from fan-out or uniform draws"
        if self.spectral and self.plain_start is not None:
            yield ("plain_start",), "is for spectral: false; a spectral start draws nothing"
        if self.attention and (self.rank_scale is None or self.rank_scale >= 1):
            yield ("attention",), "takes rank_scale: X below 1, which heads shrink by"


class FrobeniusDecay(MethodSection):
    """Decay of the products of factored layers, in place of weight decay on their factors (arXiv:2105.01029)."""

    name: Literal["frobenius_decay"] = Field(description="The method.")
    penalty: NotNegative = Field(default=1e-4, description="What weight decay would be for a dense layer.")
    targets: Annotated[Patterns, Field(min_length=1)] = Field(
        default=("**",), description="Patterns of factored layers to decay; the others keep weight decay."
    )
    exclude: Exclude = ()
    attention: bool = Field(
        default=False, description="Decay attention too, as products of query and key, of output and value, by head."
    )
    of: Literal["product", "factors"] = Field(
        default="product", description="What is decayed; factors is plain weight decay on them, to compare with."
    )
    form: Literal["auto", "coupled", "decoupled"] = Field(
        default="auto",
        description="Through the gradient, or beside the step with the learning rate; auto: as the optimizer decays.",
    )


class Normalize(MethodSection):
    """The norms of factored products, recorded in one run and imposed on another (arXiv:2105.01029, section 3)."""

    name: Literal["normalize"] = Field(description="The method.")
    mode: Literal["record", "replay", "off"] = Field(
        description="record: note the norms after every step; replay: scale the factors to noted ones; off: neither."
    )
    source: Text | None = Field(
        default=None, description="For replay: the run that recorded, or its file; {seed} stands for this run's seed."
    )

    def problems(self) -> Iterator[Rejection]:
        """What is replayed was recorded somewhere."""
        if self.mode == "replay" and self.source is None:
            yield ("source",), "replay needs source: RUN, the folder of the run that recorded"


class Distill(MethodSection):
    """Learn from a teacher beside the labels (arXiv:1503.02531), and from where it is active (arXiv:1612.03928)."""

    name: Literal["distill"] = Field(description="The method.")
    teacher: Text = Field(description="A run, a checkpoint or a hub id.")
    model: Model | None = Field(default=None, description="The teacher's architecture; null: what its run says.")
    temperature: Positive = Field(default=4.0, description="Softens both outputs.")
    alpha: Share = Field(default=0.9, description="Share of the loss that is the teacher's; the labels' is the rest.")
    attention: Patterns = Field(
        default=(), description="Modules, by the name they have in both, whose attention maps are compared."
    )
    beta: NotNegative = Field(default=1e3, description="Weight of the attention maps' distance.")

    def problems(self) -> Iterator[Rejection]:
        """Something to learn."""
        if not self.alpha and not (self.attention and self.beta):
            yield ("alpha",), "is 0 and no attention is compared: there is nothing to learn from the teacher"


Method = Annotated[
    HRA | LoRA | GOR | PEFT | Factorized | FrobeniusDecay | Normalize | Distill | OIALR | TrackStability
    | NOG | OLR | SOC | SpectralNorm | OrthogonalLoss
    | Whiten | TrackConditioning | Hessian | OroJaR | VP,
    Field(discriminator="name"),
]  # fmt: skip
