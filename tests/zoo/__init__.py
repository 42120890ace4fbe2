"""Every transformer class of diffusers, tiny, and plain-PyTorch transformers as people write them.

model, inputs = ZOO["FluxTransformer2DModel"].tiny()
outputs = [model(**inputs(step)) for step in range(STEPS)]
"""

from tests.zoo import flux_family, images, other_signals, plain, videos, wan_family
from tests.zoo.entry import STEPS, Entry

ZOO = {
    entry.name: entry
    for family in (flux_family, images, videos, wan_family, other_signals, plain)
    for entry in family.ENTRIES
}

__all__ = ["STEPS", "ZOO", "Entry"]
