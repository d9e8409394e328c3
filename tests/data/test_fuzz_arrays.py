"""Whatever arrays an npz or an archive holds, preparing it gives checked data or one error with a next step."""

from __future__ import annotations

import gzip
import io
import os
import struct
import tarfile
import zipfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hpo.data.prepare import prepare
from hpo.data.readers import read_cifar10, read_idx, read_npz
from hpo.errors import DataError
from hpo.spec.study import DataSpec, SplitSpec

QUICK = settings(
    max_examples=120, deadline=timedelta(seconds=10), suppress_health_check=list(HealthCheck), derandomize=True
)
KINDS = st.one_of(
    st.just(np.dtype("uint8")),
    hnp.integer_dtypes(),
    hnp.floating_dtypes(),
    hnp.unicode_string_dtypes(),
    hnp.boolean_dtypes(),
)
COUNTS = st.integers(0, 12)


@st.composite
def arrays(draw: st.DrawFn) -> dict[str, np.ndarray[Any, Any]]:
    """Arrays under the keys of an npz: often nearly right, and then not."""
    found: dict[str, np.ndarray[Any, Any]] = {}
    for part in [*draw(st.lists(st.sampled_from(["train", "val", "test"]), unique=True, max_size=3)), "train"]:
        count, side = draw(COUNTS), draw(st.integers(0, 6))
        if draw(st.booleans()):
            found[f"{part}_images"] = np.zeros((count, side, side), np.uint8)
            found[f"{part}_labels"] = np.arange(count) % draw(st.integers(1, 4))
        else:
            shape = draw(hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4))
            found[f"{part}_images"] = draw(hnp.arrays(draw(KINDS), shape))
            found[f"{part}_labels"] = draw(
                hnp.arrays(draw(KINDS), draw(st.one_of(st.just((count,)), st.just((count, 1)))))
            )
    if draw(st.booleans()):
        found["class_names"] = draw(hnp.arrays(draw(KINDS), hnp.array_shapes(min_dims=0, max_dims=2, min_side=0)))
    for key in draw(st.lists(st.sampled_from(list(found)), max_size=1)):
        del found[key]
    return found


@QUICK
@given(found=arrays())
def test_any_arrays_are_prepared_or_refused(found: dict[str, np.ndarray[Any, Any]], tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("arrays")
    np.savez(folder / "own.npz", **found)
    try:
        card = prepare(DataSpec(name="npz", path=str(folder / "own.npz")), SplitSpec(), cache=folder)
    except DataError:
        return
    assert card.development_count > 0
    assert len(card.class_names) > 1


def npz_of(folder: Path, header: bytes, content: bytes = b"") -> Path:
    with zipfile.ZipFile(folder / "own.npz", "w") as archive:
        body = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content
        archive.writestr("train_images.npy", body)
        archive.writestr("train_labels.npy", body)
    return folder / "own.npz"


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '|u1', 'fortran_order': False, 'shape': (10**3,)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (9999999999999999,)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 8, 8)}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1,)}",
        "{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (1,)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (" + "(" * 300 + ")" * 300 + ",)}",
        "__import__('os').abort()",
        "{" * 3000,
    ],
)
def test_a_header_of_numpy_that_lies_is_refused(header: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"own\.npz"):
        read_npz(npz_of(tmp_path, header.encode()))


def test_an_npz_larger_than_memory_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez_compressed(tmp_path / "bomb.npz", train_images=np.zeros((20_000, 32, 32), np.uint8))
    monkeypatch.setattr(os, "sysconf", lambda name: 4096 if name == "SC_PAGE_SIZE" else 1000)
    with pytest.raises(DataError, match="of memory"):
        read_npz(tmp_path / "bomb.npz")


def test_a_gzip_bomb_is_read_no_further_than_its_header_says(tmp_path: Path) -> None:
    images = bytes((0, 0, 8, 3)) + struct.pack(">3I", 2, 2, 2) + bytes(200_000_000)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (tmp_path / f"{name}-ubyte.gz").write_bytes(gzip.compress(images, 1))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: the idx file is damaged"):
        read_idx(tmp_path)


def member(name: str, kind: bytes = tarfile.REGTYPE, **facts: Any) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type = kind
    for fact, value in facts.items():
        setattr(entry, fact, value)
    return entry


@pytest.mark.parametrize(
    "entry",
    [
        member("../escaped"),
        member("/tmp/hpo-escaped"),  # noqa: S108
        member("cifar-10-batches-py/../../escaped"),
        member("link", tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("link", tarfile.LNKTYPE, linkname="../../etc/passwd"),
        member("null", tarfile.CHRTYPE, devmajor=1, devminor=3),
        member("pipe", tarfile.FIFOTYPE),
    ],
    ids=lambda entry: entry.name.replace("/", "-"),
)
def test_nothing_leaves_the_folder_that_an_archive_is_unpacked_to(entry: tarfile.TarInfo, tmp_path: Path) -> None:
    file = tmp_path / "deep" / "er" / "cifar.tar.gz"
    file.parent.mkdir(parents=True)
    with tarfile.open(file, "w:gz") as archive:
        archive.addfile(entry, io.BytesIO(b"") if entry.isreg() else None)
    with pytest.raises(DataError):
        read_cifar10(file)
    assert not list(tmp_path.rglob("*escaped*"))
    assert not Path("/tmp/hpo-escaped").exists()  # noqa: S108


def test_an_archive_that_says_it_is_huge_is_not_unpacked(tmp_path: Path) -> None:
    file = tmp_path / "cifar.tar"
    file.write_bytes(member("cifar-10-batches-py/data_batch_1", size=10**12).tobuf() + bytes(1024))
    with pytest.raises(DataError, match="unpacks to more than"):
        read_cifar10(file)
