"""Real diffusers transformers, tiny: what the tests run instead of pictures of them.

Every function returns `(model, kwargs)`: float32, eval mode, seeded; one call takes milliseconds.
All weights are random and none is zero, since an output that is zero by initialisation proves nothing.
Sizes are chosen so that no two axes that mean different things have the same length by accident.

    model, kwargs = MODELS["flux"]()
    model, kwargs = flux(batch=3, height=6, width=10)
"""

from tests.tiny_images import (
    auraflow,
    chroma,
    cogview4,
    dit,
    flux,
    flux2,
    lumina2,
    pixart,
    qwen_image,
    sana,
    sd3,
    z_image,
)
from tests.tiny_videos import (
    allegro,
    cogvideox,
    cosmos,
    hunyuan_video,
    kandinsky5,
    latte,
    ltx,
    mochi,
    wan,
    wan_i2v,
    wan_vace,
)

MODELS = {
    function.__name__: function
    for function in (
        flux,
        flux2,
        sd3,
        pixart,
        wan,
        wan_i2v,
        wan_vace,
        hunyuan_video,
        qwen_image,
        cogvideox,
        ltx,
        mochi,
        auraflow,
        lumina2,
        chroma,
        z_image,
        kandinsky5,
        cosmos,
        cogview4,
        dit,
        latte,
        sana,
        allegro,
    )
}
