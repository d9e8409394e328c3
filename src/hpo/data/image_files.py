"""An image file to pixels: one way for training and for prediction, or the two would not see the same images."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpo.data.pixels import Range, Ranges, extent_of, kind_of, range_for, to_levels
from hpo.errors import DataError
from hpo.home import plain_file

if TYPE_CHECKING:
    from PIL.Image import Image

AnyFile = Path | zipfile.Path

# Raster formats only: a file in PostScript is a program, and none of these runs one.
FORMATS = (
    *("BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP"),
    *("AVIF", "QOI", "PCX", "SGI"),
)
_GREY = ("1", "L", "LA")
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ORIENTATION, _SAMPLE_FORMAT, _SIGNED = 0x0112, 339, 2
_UPRIGHT: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels[:, ::-1].swapaxes(0, 1),
}


class NotAnImageError(Exception):
    """The content of a file is of none of FORMATS."""


@dataclass(frozen=True)
class Header:
    """What a file says of its image: kind of pixel (a numpy dtype), grey or not.

    bands is the number of channels where they are neither grey, RGB nor transparent, else 0. frames counts the images
    in the file, of which the first is read.
    """

    kind: str
    grey: bool
    bands: int = 0
    frames: int = 1


@cache
def _formats() -> tuple[str, ...]:
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@contextmanager
def _opened(file: AnyFile) -> Iterator[Image | NDArray[Any]]:
    """The file as an image of Pillow or, where Pillow does not read a TIFF, as an array (h, w) or (h, w, bands).

    Raises NotAnImageError, and whatever the decoders raise for damaged files.
    """
    from PIL import Image, UnidentifiedImageError

    with (plain_file(file) if isinstance(file, Path) else file).open("rb") as stream:
        start = stream.read(4)
        stream.seek(0)
        try:
            with Image.open(stream, formats=_formats()) as image:
                if not (image.format == "TIFF" and image.mode == "L" and _signed(image)):
                    yield image
                    return
        except UnidentifiedImageError:
            if start not in _TIFF_STARTS:
                raise NotAnImageError(str(file)) from None
        stream.seek(0)
        yield _read_tiff(stream)


def _signed(image: Image) -> bool:
    return _SIGNED in tuple(getattr(image, "tag_v2", {}).get(_SAMPLE_FORMAT, ()))


def _read_tiff(stream: IO[bytes]) -> NDArray[Any]:
    """The first page of a TIFF of fractions, signed numbers or several bands, (h, w) or (h, w, bands), upright."""
    import tifffile
    from PIL import Image

    with tifffile.TiffFile(stream) as file:
        page: Any = file.pages[0]
        count, most = prod(page.shape), 2 * (Image.MAX_IMAGE_PIXELS or 0)
        if most and count > most:  # as Pillow refuses other formats: a small file may unpack to all of the memory
            raise ValueError(f"it has {count:,} values, more than {most:,}")
        pixels: NDArray[Any] = np.asarray(page.asarray())
        if pixels.ndim == 3 and getattr(page, "planarconfig", 1) == 2:
            pixels = np.moveaxis(pixels, 0, 2)
        tag = page.tags.get(_ORIENTATION)
        turn = _UPRIGHT.get(int(tag.value)) if tag is not None else None
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] > 4) or pixels.dtype.kind not in "biuf":
        raise ValueError(f"{pixels.dtype} pixels of shape {pixels.shape}; 1 to 4 bands of numbers are read")
    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    return turn(pixels) if turn is not None else pixels


def _deep(image: Any) -> str:
    """The raw mode of an image of several 16-bit channels, whose lower bytes Pillow drops; "" for any other."""
    if image.mode not in ("RGB", "RGBA") or not image.tile:
        return ""
    arguments = image.tile[0].args
    raw = arguments if isinstance(arguments, str) else arguments[0] if arguments else ""
    return raw if isinstance(raw, str) and ";16" in raw else ""


def _kind(image: Image) -> str:
    if image.mode.startswith("I;16"):
        return "uint16"
    wide = {"I": "int32", "F": "float32"}.get(image.mode)
    return wide or ("uint16" if _deep(image) else "uint8")


def read_header(file: AnyFile) -> Header:
    """The header of an image file; pixels are not decoded, but for TIFFs that Pillow does not read.

    Raises NotAnImageError, and DataError for a file that is missing or damaged.
    """
    with _reasons(file), _opened(file) as image:
        if isinstance(image, np.ndarray):
            bands = image.shape[2] if image.ndim == 3 and image.shape[2] != 3 else 0
            return Header(image.dtype.name, image.ndim == 2, bands)
        grey = image.mode in _GREY or image.mode.startswith("I") or image.mode == "F" or _deep(image).startswith("LA")
        # The second image of an MPO, which telephones write, is a preview.
        return Header(_kind(image), grey, frames=1 if image.format == "MPO" else getattr(image, "n_frames", 1))


def read_sides(file: AnyFile) -> tuple[int, int]:
    """(width, height) of an image file as it is stored, in pixels. Raises as read_header does."""
    with _reasons(file), _opened(file) as image:
        return (image.shape[1], image.shape[0]) if isinstance(image, np.ndarray) else image.size


@contextmanager
def _reasons(file: AnyFile) -> Iterator[None]:
    """Whatever a decoder raises as a DataError that names the file."""
    try:
        yield
    except (DataError, NotAnImageError):
        raise
    except Exception as error:  # noqa: BLE001 - what Pillow's decoders and archives raise for damaged files is no list
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise unreadable([f"{file}: not an image that can be read: {reason or type(error).__name__}"]) from None


def unreadable(reasons: list[str]) -> DataError:
    """The error for one or more files that cannot be read; the first ten are named."""
    if len(reasons) == 1:
        return DataError(f"{reasons[0]}.", "Check the file, or leave it out.")
    more = f"; and {len(reasons) - 10:,} more" if len(reasons) > 10 else ""
    return DataError(
        f"{len(reasons):,} files cannot be read: {'; '.join(reasons[:10])}{more}.",
        "Check the files, or leave them out.",
    )


@dataclass(frozen=True)
class Pixels:
    """The upright pixels of an image that is not of 8 bits, in its own values.

    values are (h, w) or (h, w, channels); opacity (h, w) uint8 where the image has any.
    """

    values: NDArray[Any]
    opacity: NDArray[np.uint8] | None = None


def read_values(file: AnyFile) -> NDArray[Any]:
    """The pixels of a file in its own values, upright: (h, w) or (h, w, channels). Raises as read_header does."""
    with _reasons(file), _opened(file) as image:
        return _pixels(image, file).values


def _pixels(image: Image | NDArray[Any], file: AnyFile) -> Pixels:
    if isinstance(image, np.ndarray):
        return Pixels(image)
    raw = _deep(image)  # first: reading the EXIF tag of a PNG decodes it
    turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1), _as_it_is)
    if not raw:
        return Pixels(turn(np.asarray(image)))
    pixels = turn(_deep_values(file, raw))
    if pixels.shape[2] == 3:
        return Pixels(pixels)
    opacity = (pixels[:, :, -1] // 257).astype(np.uint8)
    return Pixels(pixels[:, :, 0] if pixels.shape[2] == 2 else pixels[:, :, :3], opacity)


def _as_it_is(pixels: NDArray[Any]) -> NDArray[Any]:
    return pixels


def _deep_values(file: AnyFile, raw: str) -> NDArray[np.uint16]:
    """Channels of 16 bits as (h, w, channels). Pillow unpacks only the upper byte of each, so it decodes them twice."""
    if raw == "LA;16B":
        whole = _unpacked(file, "RGBA")  # as four bytes a pixel
        return whole[:, :, ::2] * np.uint16(256) + whole[:, :, 1::2]
    little = raw[-1] == "L" or (raw[-1] == "N" and sys.byteorder == "little")
    lower = raw[:-1] + ("B" if little else "L")
    return _unpacked(file, raw) * np.uint16(256) + _unpacked(file, lower)


def _unpacked(file: AnyFile, raw: str) -> NDArray[np.uint8]:
    """The pixels of a file as Pillow unpacks them in another raw mode than the file's own."""
    from PIL import Image

    with file.open("rb") as stream, Image.open(stream, formats=_formats()) as opened:
        image: Any = opened
        image.tile = [
            tile._replace(args=raw if isinstance(tile.args, str) else (raw, *tile.args[1:])) for tile in image.tile
        ]
        return np.asarray(image)


def read_picture(
    file: AnyFile, *, mode: str | None = None, size: tuple[int, int] | None = None, ranges: Ranges | None = None
) -> NDArray[np.uint8]:
    """An image file of any kind -> (height, width) uint8 if grey, else (height, width, channels).

    mode is L or RGB; None keeps what the file has: grey, RGB, or the 2 or 4 bands of a TIFF that are no colours. The
    image is turned upright by its EXIF tag, laid on white where it is transparent, scaled to 0 to 255 by the range of
    its kind of pixel, and stretched bilinearly to size (width, height) in pixels. Without ranges, as for models that
    know none, 16 bits are scaled from 0 to 65535, and fractions are cut at 0 and 255. Raises DataError naming the file
    that is missing or damaged, or whose pixels have no range.
    """
    from PIL import Image

    try:
        with _reasons(file), _opened(file) as opened:
            if not isinstance(opened, np.ndarray) and (ranges is None or _kind(opened) == "uint8"):
                image: Image.Image | NDArray[np.uint8] = _eight_bit(opened, ranges or {}, mode)
            else:
                image = _scaled(_pixels(opened, file), file, ranges or {}, mode)
    except NotAnImageError:
        raise unreadable([f"{file}: not an image that can be read: its content is of no known format"]) from None
    if isinstance(image, np.ndarray):
        if size is None or image.shape[1::-1] == size:
            return image
        bands = [Image.fromarray(band).resize(size, Image.Resampling.BILINEAR) for band in np.moveaxis(image, 2, 0)]
        return np.stack([np.asarray(band) for band in bands], axis=2)
    if size is not None and image.size != size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    return np.asarray(image, dtype=np.uint8)


def _eight_bit(opened: Image, ranges: Ranges, mode: str | None) -> Image:
    from PIL import ImageOps

    grey = opened.mode in _GREY or opened.mode.startswith("I")
    image = _opaque(ImageOps.exif_transpose(opened))
    limits = range_for("uint8", ranges)
    if limits is not None and limits != (0, 255):
        image = image.convert("L" if grey else "RGB")
        image = image.point(to_levels(np.arange(256, dtype=np.uint8), limits).tolist() * len(image.getbands()))
    return image.convert(mode or ("L" if grey else "RGB"))


def _scaled(pixels: Pixels, file: AnyFile, ranges: Ranges, mode: str | None) -> Image | NDArray[np.uint8]:
    """Pixels in their own values as an image of 8 bits; (h, w, bands) where no mode of Pillow's has such bands."""
    from PIL import Image

    levels = np.ascontiguousarray(to_levels(pixels.values, _limits(pixels.values, file, ranges)))
    if levels.ndim == 3 and levels.shape[2] != 3:
        if mode is not None:
            raise DataError(f"{file}: {levels.shape[2]} bands, which are neither grey nor RGB.", "Leave it out.")
        return levels
    image = Image.fromarray(levels)
    own = image.mode
    if pixels.opacity is not None:
        image = image.convert("RGBA")
        image.putalpha(Image.fromarray(np.ascontiguousarray(pixels.opacity)))
        image = _opaque(image)
    return image.convert(mode or own)


def _limits(values: NDArray[Any], file: AnyFile, ranges: Ranges) -> Range:
    """The range of these pixels. Raises DataError where none is known, and where values are not finite."""
    kind, extent = kind_of(values.dtype), extent_of(values)
    if extent.not_finite:
        raise DataError(f"{file}: {extent.not_finite:,} pixel values are NaN or infinite.", "Replace them by numbers.")
    limits = range_for(kind, ranges)
    if limits is None and kind in ("uint16", "int32") and extent.low >= 0 and 16383 < extent.high <= 65535:
        limits = (0.0, 65535.0)  # all 16 bits are used
    if limits is None:
        raise DataError(
            f"{file}: {kind} pixels from {extent.low:g} to {extent.high:g}, and a range is known only of "
            f"{', '.join(ranges) or 'uint8'} pixels.",
            "Convert it to 8 bits a pixel, or give files of the kind that the model was trained on.",
        )
    return limits


def _opaque(image: Image) -> Image:
    from PIL import Image

    if image.mode.startswith("I"):
        # 16 bits a pixel: Pillow's own conversion to 8 would cut at 255 in place of scaling.
        return Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) // 257).astype(np.uint8))
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
