"""Names of layers, the one place to ask: what a layer is called in each layout, and which layer a name means.

A layout is one way to name the tensors of a checkpoint. All are translated through the *canonical* name (the diffusers
name with its component, `unet.down_blocks.0...`); outside SD1.x names are themselves and the layout is `plain`.

    sd15.py         the tables, LDM <-> canonical, shapes     detection.py     which layout a checkpoint has
    names.py        canonical <-> layouts, kohya, components  layer_index.py   names -> layers of one checkpoint

Choosing layers by pattern is `targets.py`.
"""

from __future__ import annotations

from .detection import detect
from .layer_index import LayerIndex
from .names import (
    LAYOUTS,
    component_name,
    filed_name,
    fingerprint_name,
    from_canonical,
    kohya_layers,
    kohya_name,
    to_canonical,
)
from .sd15 import (
    LDM_ONLY,
    canonical_shape,
    canonical_to_ldm,
    ema_name,
    ldm_shape,
    ldm_to_canonical,
    sd15_layers,
    sd15_tensors,
)

__all__ = [
    "LAYOUTS",
    "LDM_ONLY",
    "LayerIndex",
    "canonical_shape",
    "canonical_to_ldm",
    "component_name",
    "detect",
    "ema_name",
    "filed_name",
    "fingerprint_name",
    "from_canonical",
    "kohya_layers",
    "kohya_name",
    "ldm_shape",
    "ldm_to_canonical",
    "sd15_layers",
    "sd15_tensors",
    "to_canonical",
]
