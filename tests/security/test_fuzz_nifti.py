"""Any bytes in a NIfTI file: a `DataError` that names it, or a volume that can be used; never much memory."""

from __future__ import annotations

import gzip
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import make_case
from fuzzing import fuzz
from hypothesis import example, given
from hypothesis import strategies as st

from monai_adv.data import check_item, load_case, scan
from monai_adv.errors import DataError

MIB = 1 << 20
# offset and struct format of what decides how a file is read
FIELDS = {
    "sizeof_hdr": (0, "i"), "dim0": (40, "h"), "dim1": (42, "h"), "dim2": (44, "h"), "dim3": (46, "h"),
    "dim4": (48, "h"), "datatype": (70, "h"), "bitpix": (72, "h"), "pixdim0": (76, "f"), "pixdim1": (80, "f"),
    "pixdim3": (88, "f"), "vox_offset": (108, "f"), "scl_slope": (112, "f"), "scl_inter": (116, "f"),
    "xyzt_units": (123, "B"), "qform_code": (252, "h"), "sform_code": (254, "h"), "quatern_b": (256, "f"),
    "quatern_d": (264, "f"), "qoffset_x": (268, "f"), "srow_x0": (280, "f"), "srow_x3": (292, "f"),
    "srow_z2": (320, "f"), "magic": (344, "I"), "extension": (348, "I"),
}  # fmt: skip
NUMBERS = {
    "h": [-32768, -1, 0, 1, 2, 3, 4, 5, 7, 8, 16, 64, 128, 256, 512, 768, 1024, 1536, 1792, 2048, 2304, 32767],
    "i": [-1, 0, 348, 540, 2**31 - 1],
    "I": [0, 1, 0x00312B6E, 0x0031696E, 0x00322B6E, 2**32 - 1],
    "B": [0, 2, 7, 255],
    "f": [0.0, -0.0, 1.0, -1.0, 0.5, 1e-30, 1e-45, 3e38, -3e38, 352.0, 353.0, 400.0, 1e9, 1e30, float("nan"),
          float("inf"), float("-inf")],
}  # fmt: skip


def patches() -> st.SearchStrategy[list[tuple[int, bytes]]]:
    """Changes of bytes: fields set to awkward numbers, and any bytes anywhere."""
    field = st.sampled_from(sorted(FIELDS)).flatmap(
        lambda name: st.sampled_from(NUMBERS[FIELDS[name][1]]).map(
            lambda number: (FIELDS[name][0], struct.pack("<" + FIELDS[name][1], number))
        )
    )
    anything = st.tuples(st.integers(0, 360), st.binary(min_size=1, max_size=6))
    return st.lists(st.one_of(field, field, anything), min_size=0, max_size=4)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], bytes]:
    """A sound case of 13 x 12 x 12 voxels, and the bytes of its second modality."""
    root = tmp_path_factory.mktemp("nifti")
    make_case(root, shape=(13, 12, 12))
    (item,) = scan(root).items
    for name in ("plain.nii", "packed.nii.gz", "label.nii"):
        (root / name).touch()
    return item, gzip.decompress(Path(item["image"][1]).read_bytes())


def judge(item: dict[str, Any], bad: Path) -> bool:
    """Whether the case can be used; asserts that all is well either way."""
    found, refused = None, ""
    tracemalloc.start()
    try:
        found = load_case(item)
    except DataError as error:
        refused = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    usable = found is not None
    if found is None:
        assert str(bad) in refused
    else:
        for key in ("image", "label"):
            assert bool(np.isfinite(found[key].affine.numpy()).all())
            assert bool(np.isfinite(found[key].numpy()).all())
    assert peak < 32 * MIB  # whatever the header claims: five files of 4 KiB were read
    errors = [finding for finding in check_item(item) if finding.severity == "error"]
    assert bool(errors) != usable
    assert all(str(bad) in str(error) for error in errors)
    return usable


def changed(content: bytes, changes: list[tuple[int, bytes]], cut: int | None, more: bytes) -> bytes:
    found = bytearray(content)
    for at, new in changes:
        found[at : at + len(new)] = new
    return bytes(found if cut is None else found[: min(cut, len(found))]) + more


@fuzz(50)
@given(changes=patches(), cut=st.none() | st.integers(0, 5000), more=st.binary(max_size=20), role=st.integers(0, 4))
@example(changes=[], cut=None, more=b"", role=1)
@example(changes=[(42, struct.pack("<hhh", 32767, 32767, 32767))], cut=None, more=b"", role=1)
@example(changes=[(252, struct.pack("<hh", 1, 1)), (256, struct.pack("<f", 2.0))], cut=None, more=b"", role=1)
@example(changes=[(108, struct.pack("<f", float("inf")))], cut=None, more=b"", role=1)
def test_a_plain_file(
    case: tuple[dict[str, Any], bytes], changes: list[tuple[int, bytes]], cut: int | None, more: bytes, role: int
) -> None:
    item, content = case
    bad = Path(item["image"][0]).parent.parent / ("plain.nii" if role < 4 else "label.nii")
    bad.write_bytes(changed(content, changes, cut, more))
    images = list(item["image"])
    if role < 4:
        images[role] = str(bad)
    usable = judge({**item, "image": images, "label": item["label"] if role < 4 else str(bad)}, bad)
    if not changes and cut is None:
        assert usable == (role < 4)


@fuzz(30)
@given(
    changes=patches(), cut=st.none() | st.integers(0, 5000),
    packed=st.lists(st.tuples(st.integers(0, 4000), st.binary(min_size=1, max_size=3)), max_size=2),
    end=st.none() | st.integers(0, 4000),
)  # fmt: skip
@example(changes=[], cut=None, packed=[], end=None)
def test_a_compressed_file(
    case: tuple[dict[str, Any], bytes], changes: list[tuple[int, bytes]], cut: int | None,
    packed: list[tuple[int, bytes]], end: int | None,
) -> None:  # fmt: skip
    item, content = case
    bad = Path(item["image"][0]).parent.parent / "packed.nii.gz"
    bad.write_bytes(changed(gzip.compress(changed(content, changes, cut, b""), 1, mtime=0), packed, end, b""))
    usable = judge({**item, "image": [item["image"][0], str(bad), *item["image"][2:]]}, bad)
    if not changes and cut is None and not packed and end is None:
        assert usable
