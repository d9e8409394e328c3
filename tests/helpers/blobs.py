"""Small grey images of two classes, a bright disc or a bar on noise, and ways to write them that people have."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("long", "round")
SIDE = 32
Write = Callable[[np.ndarray, Path], None]


def blob(label: int, seed: int) -> np.ndarray:
    """A SIDE x SIDE uint8 image: noise of about 40 with a bar (label 0) or a disc (label 1)."""
    generator = np.random.default_rng(seed)
    image = generator.normal(40, 8, (SIDE, SIDE))
    down, across = np.mgrid[:SIDE, :SIDE]
    middle = generator.integers(10, 22, 2)
    if label == 1:
        image[(down - middle[0]) ** 2 + (across - middle[1]) ** 2 < 36] += 170
    else:
        image[np.abs(down - middle[0]) < 3] += 170
    return image.clip(0, 255).round().astype(np.uint8)


def write_blobs(folder: Path, write: Write, *, count: int = 20, ending: str = ".png", first: int = 0) -> Path:
    """A folder with `count` images of each class, written by `write`."""
    for label, name in enumerate(NAMES):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(first, first + count):
            write(blob(label, 1000 * label + number), folder / name / f"{number:03}{ending}")
    return folder


def png(image: np.ndarray, path: Path) -> None:
    """8 bits, whatever the ending of path is."""
    Image.fromarray(image).save(path, "PNG")


def tiff(values: np.ndarray, path: Path) -> None:
    """A TIFF of any dtype and number of bands."""
    import tifffile

    tifffile.imwrite(path, values)


def deep_png(values: np.ndarray, path: Path) -> None:
    """A PNG of 16 bits a channel: (h, w), or (h, w, 2 to 4) with opacity last where there are 2 or 4."""
    values = values[..., None] if values.ndim == 2 else values
    high, wide, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", wide, high, 16, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def prepared_images(card) -> np.ndarray:
    """All prepared images of a card, those of the test part last."""
    places = (Path(card.folder) / "development_images.npy", Path(card.test_folder) / "test_images.npy")
    return np.concatenate([np.load(place) for place in places])


def as_set(images) -> set[bytes]:
    """The images as bytes, in no order."""
    return {np.ascontiguousarray(image).tobytes() for image in images}
