"""Random changes of a batch, each image by amounts of its own: ours against torchvision.transforms.v2.

    OMP_NUM_THREADS=1 uv run python benchmarks/augment.py

v2 draws one set of amounts a call, so amounts for each image mean a call for each image, as in a data loader.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms import v2

from hpo.spec.training import AugmentSpec
from hpo.training.batches import augmenter

CASES: dict[str, tuple[AugmentSpec, v2.Transform]] = {
    "flip": (AugmentSpec(flip_horizontal=True), v2.RandomHorizontalFlip(0.5)),
    "rotate": (AugmentSpec(rotate=15), v2.RandomRotation(15, v2.InterpolationMode.BILINEAR)),
    "rotate, shift, zoom": (
        AugmentSpec(rotate=15, shift=0.1, zoom=0.2),
        v2.RandomAffine(15, (0.1, 0.1), (1 / 1.2, 1.2), interpolation=v2.InterpolationMode.BILINEAR),
    ),
    "crop": (AugmentSpec(crop=3), v2.RandomCrop(28, padding=3, padding_mode="reflect")),
    "colours": (
        AugmentSpec(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1),
        v2.ColorJitter(0.2, 0.2, 0.2, 0.1),
    ),
    "erase": (AugmentSpec(erase=0.5), v2.RandomErasing(0.5, (0.02, 0.25))),
    "randaugment": (AugmentSpec(randaugment=2, magnitude=0.3), v2.RandAugment(2, 9)),
    "all of these": (
        AugmentSpec(
            flip_horizontal=True,
            rotate=15,
            shift=0.1,
            zoom=0.2,
            brightness=0.2,
            contrast=0.2,
            saturation=0.2,
            hue=0.1,
            erase=0.5,
        ),
        v2.Compose(
            [
                v2.RandomHorizontalFlip(0.5),
                v2.RandomAffine(15, (0.1, 0.1), (1 / 1.2, 1.2), interpolation=v2.InterpolationMode.BILINEAR),
                v2.ColorJitter(0.2, 0.2, 0.2, 0.1),
                v2.RandomErasing(0.5, (0.02, 0.25)),
            ]
        ),
    ),
}


def seconds(step: Callable[[], object], repeats: int) -> float:
    """The fastest of the repeats, after one to warm up: other processes only ever add time."""
    step()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=28)
    parser.add_argument("--repeats", type=int, default=50)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    shape = (asked.batch, asked.size, asked.size, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    planes = images.permute(0, 3, 1, 2).contiguous()  # v2 wants channels first; its conversion is not counted

    print(f"images/s, batches of {asked.batch} x {asked.size} x {asked.size} x 3, one thread")
    print(f"{'':22}{'ours':>10}{'v2':>10}{'ours / v2':>12}")
    for name, (spec, transform) in CASES.items():
        augment = augmenter(spec)
        assert augment is not None

        def each(transform: v2.Transform = transform) -> Tensor:
            return torch.stack([transform(image) for image in planes])

        def ours(augment: Callable[[Tensor, torch.Generator], Tensor] = augment) -> Tensor:
            return augment(images, generator)

        rates = [
            asked.batch / seconds(step, repeats)
            for step, repeats in ((ours, asked.repeats), (each, max(2, asked.repeats // 10)))
        ]
        print(f"{name:22}" + "".join(f"{rate:10,.0f}" for rate in rates) + f"{rates[0] / rates[1]:11.0f}x")


if __name__ == "__main__":
    main()
