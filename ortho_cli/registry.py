"""What can be named in a recipe or on the command line, and where it lives: name -> "module:attribute".

Nothing is imported until `resolve` is asked, so listing names costs nothing. Adding a thing is one new file and one
line here.
"""

from __future__ import annotations

import difflib
import importlib
from typing import Any

from ortho_cli.errors import UsageError

__all__ = ["TABLES", "names", "resolve"]

TABLES: dict[str, dict[str, str]] = {
    # How adapter files are told and read; the first that claims a file reads it.
    "dialects": {
        "peft": "ortho_cli.checkpoints.dialects.peft:DIALECT",
        "kohya": "ortho_cli.checkpoints.dialects.kohya:DIALECT",
        "diffusers": "ortho_cli.checkpoints.dialects.diffusers_lora:DIALECT",
        "ortho": "ortho_cli.checkpoints.dialects.hra_repo:VECTORS",
        "hra-repo": "ortho_cli.checkpoints.dialects.hra_repo:DIALECT",
    },
    # Architectures: builders that take a recipe's section and what the task knows: of pictures the classes, channels
    # and size, of series the steps seen and forecast. Those of GANs take channels and size, and make two networks.
    "models": {
        "resnet20": "ortho_cli.models.resnet_cifar:build",
        "resnet32": "ortho_cli.models.resnet_cifar:build",
        "resnet44": "ortho_cli.models.resnet_cifar:build",
        "resnet56": "ortho_cli.models.resnet_cifar:build",
        "resnet110": "ortho_cli.models.resnet_cifar:build",
        "resnet32x2": "ortho_cli.models.resnet_cifar:build_resnet32x2",
        "resnet18": "ortho_cli.models.resnet:build",
        "resnet34": "ortho_cli.models.resnet:build",
        "resnet50": "ortho_cli.models.resnet:build",
        "vgg19": "ortho_cli.models.vgg:build",
        "wrn": "ortho_cli.models.wide_resnet:build",
        "vit-mini": "ortho_cli.models.vit:build",
        "vit-b16": "ortho_cli.models.vit:build",
        "mlp": "ortho_cli.models.mlp:build",
        "hf-image": "ortho_cli.models.hf_image:build",
        "timm": "ortho_cli.models.timm_image:build",
        "hf-text": "ortho_cli.models.hf_text:build",
        "forecaster": "ortho_cli.models.forecaster:build",
        "eigengan": "ortho_cli.models.eigengan:build",
        "causal-lm": "ortho_cli.models.causal_lm:build",
        "tiny-lm": "ortho_cli.models.causal_lm:build_tiny",
        "gan64": "ortho_cli.models.gan_simple:build",
        "gan128": "ortho_cli.models.gan_simple:build",
        "transformer-small": "ortho_cli.models.translator:build",
        "transformer-base": "ortho_cli.models.translator:build",
        "stable-diffusion": "ortho_cli.models.stable_diffusion:build",
    },
    # What is trained: data, loss and metrics.
    "tasks": {
        "classify": "ortho_cli.tasks.classify:ClassifyTask",
        "glue": "ortho_cli.tasks.glue:GlueTask",
        "forecast": "ortho_cli.tasks.forecast:ForecastTask",
        "instruct": "ortho_cli.tasks.instruct:InstructTask",
        "gan": "ortho_cli.tasks.gan:GANTask",
        "control": "ortho_cli.tasks.control:ControlTask",
        "dreambooth": "ortho_cli.tasks.dreambooth:DreamboothTask",
        "text_to_image": "ortho_cli.tasks.text_to_image:TextToImageTask",
        "translate": "ortho_cli.tasks.translate:TranslateTask",
    },
    # What `generate` makes with a run of a task.
    "makers": {
        "gan": "ortho_cli.training.generate_gan:MAKER",
        "translate": "ortho_cli.training.generate_translation:MAKER",
        "instruct": "ortho_cli.training.generate_answers:MAKER",
        "text_to_image": "ortho_cli.training.generate_diffusion:MAKER",
        "dreambooth": "ortho_cli.training.generate_diffusion:MAKER",
        "control": "ortho_cli.training.generate_diffusion:CONTROL_MAKER",
    },
    # What `evaluate` says of a task's outputs beyond its own metrics.
    "judges": {
        "classify": "ortho_cli.analysis.classification:JUDGE",
        "instruct": "ortho_cli.analysis.answers:JUDGE",
    },
    # What `evaluate` asks a task's model for beyond its outputs.
    "model_judges": {
        "gan": "ortho_cli.training.evaluate_gan:GANJudge",
        "control": "ortho_cli.training.evaluate_control:ControlJudge",
        "instruct": "ortho_cli.training.evaluate_language:LanguageJudge",
        "dreambooth": "ortho_cli.training.evaluate_subject:SubjectJudge",
    },
    # What `evaluate` says of a folder of generated pictures beside a folder of references.
    "picture_metrics": {
        "fid": "ortho_cli.analysis.feature_distance:fid_of_folders",
        "kid": "ortho_cli.analysis.feature_distance:kid_of_folders",
        "canny": "ortho_cli.analysis.control_scores:edges_of_folders",
        "landmarks": "ortho_cli.analysis.control_scores:landmarks_of_folders",
        "segments": "ortho_cli.analysis.control_scores:segments_of_folders",
        "dino": "ortho_cli.analysis.subject_scores:dino_of_folders",
        "clip-i": "ortho_cli.analysis.subject_scores:clip_i_of_folders",
        "clip-t": "ortho_cli.analysis.subject_scores:clip_t_of_folders",
        "lpips": "ortho_cli.analysis.subject_scores:lpips_of_folders",
    },
    # What a recipe may do to a model while it trains.
    "methods": {
        "hra": "ortho_cli.methods.hra:HRAMethod",
        "lora": "ortho_cli.methods.lora:LoRAMethod",
        "gor": "ortho_cli.methods.gor:GORMethod",
        "peft": "ortho_cli.methods.peft:PEFTMethod",
        "factorized": "ortho_cli.methods.factorized:FactorizedMethod",
        "frobenius_decay": "ortho_cli.methods.frobenius_decay:FrobeniusDecayMethod",
        "normalize": "ortho_cli.methods.normalize:NormalizeMethod",
        "distill": "ortho_cli.methods.distill:DistillMethod",
        "oialr": "ortho_cli.methods.oialr:OIALRMethod",
        "track_stability": "ortho_cli.methods.track_stability:TrackStabilityMethod",
        "nog": "ortho_cli.methods.nog:NOGMethod",
        "olr": "ortho_cli.methods.olr:OLRMethod",
        "soc": "ortho_cli.methods.skew_conv:SOCMethod",
        "spectral_norm": "ortho_cli.methods.spectral_norm:SpectralNormMethod",
        "orthogonal_loss": "ortho_cli.methods.orthogonal_loss:OrthogonalLossMethod",
        "whiten": "ortho_cli.methods.whiten:WhitenMethod",
        "track_conditioning": "ortho_cli.methods.track_conditioning:TrackConditioningMethod",
        "hessian": "ortho_cli.methods.code_penalties:HessianMethod",
        "orojar": "ortho_cli.methods.code_penalties:OroJaRMethod",
        "vp": "ortho_cli.methods.variation:VPMethod",
    },
}


def names(table: str) -> list[str]:
    """The names of one table, in its order.

    >>> names("dialects")
    ['peft', 'kohya', 'diffusers', 'ortho', 'hra-repo']
    """
    return list(TABLES[table])


def resolve(table: str, name: str) -> Any:
    """Import what a name stands for.

    Raises:
        UsageError: no such name; the hint gives the nearest.
    """
    entry = TABLES[table].get(name)
    if entry is None:
        near = difflib.get_close_matches(name, TABLES[table], 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"no {table.removesuffix('s')} {name!r}", hint=f"{hint}known: {', '.join(TABLES[table])}")
    module, _, attribute = entry.partition(":")
    return getattr(importlib.import_module(module), attribute)
