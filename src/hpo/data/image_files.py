"""An image file to pixels: one way for training and for prediction, or the two would not see the same images."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hpo.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

_GREY = ("1", "L", "LA")


def read_picture(
    file: Path | zipfile.Path, *, mode: str | None = None, size: tuple[int, int] | None = None
) -> NDArray[np.uint8]:
    """An image file of any kind -> (height, width) uint8 if grey (mode L), else (height, width, 3) (mode RGB).

    mode None keeps grey files grey. The image is turned upright by its EXIF tag, laid on white where it is transparent,
    scaled from 16 bits to 8, and stretched bilinearly to size (width, height) in pixels. Raises DataError naming the
    file that is missing or damaged.
    """
    from PIL import Image, ImageOps

    try:
        with file.open("rb") as stream, Image.open(stream) as opened:
            grey = opened.mode in _GREY or opened.mode.startswith("I")
            image = _opaque(ImageOps.exif_transpose(opened)).convert(mode or ("L" if grey else "RGB"))
    except Exception as error:  # noqa: BLE001 - what Pillow's decoders and archives raise for damaged files is no list
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(
            f"{file}: not an image that can be read: {reason}.", "Check the file, or leave it out."
        ) from None
    if size is not None and image.size != size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    return np.asarray(image, dtype=np.uint8)


def _opaque(image: Image) -> Image:
    from PIL import Image

    if image.mode.startswith("I"):
        # 16 bits a pixel: Pillow's own conversion to 8 would cut at 255 in place of scaling.
        return Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) // 257).astype(np.uint8))
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
