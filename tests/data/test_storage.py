from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from builders import write_itk, write_nifti

from monai_adv.data import Storage, save_nifti, stored_type
from monai_adv.errors import DataError


def scaled(path, numbers, slope, inter):
    """A NIfTI file that holds these numbers, with a scale."""
    image = nib.Nifti1Image(numbers, np.eye(4), dtype=numbers.dtype)
    image.header.set_slope_inter(slope, inter)
    nib.save(image, path)
    return path


def test_the_type_in_the_file_and_its_scale(tmp_path):
    numbers = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    assert stored_type(scaled(tmp_path / "a.nii.gz", numbers, 0.5, -100)) == Storage(np.int16, 0.5, -100)
    assert stored_type(write_nifti(tmp_path / "b.nii", numbers.astype(">u2"))) == Storage("uint16")
    assert stored_type(write_nifti(tmp_path / "c.nii", numbers.astype("f4"))) == Storage("float32")
    assert stored_type(write_itk(tmp_path / "d.nrrd", numbers.astype("u1"))) == Storage("uint8")
    assert stored_type(write_nifti(tmp_path / "e.nii", np.stack([numbers] * 4, -1))) == Storage("int16")
    with pytest.raises(DataError, match="no such file"):
        stored_type(tmp_path / "none.nii")


@pytest.mark.parametrize(("dtype", "low", "high"), [("int16", -16484.0, 16283.5), ("uint8", -100.0, 27.5)])
def test_levels_and_quantum(dtype, low, high):
    stored = Storage(dtype, 0.5, -100)
    assert stored.levels() == (low, high)
    assert stored.quantum == 0.5
    assert Storage(dtype, -0.5).levels()[0] < 0 < Storage(dtype, -0.5, 1).levels()[1]
    assert Storage("float32").quantum == 0
    stored.encode([low, high])
    for beyond in (low - 0.5, high + 0.5):
        with pytest.raises(DataError, match=rf"do not fit {dtype} with slope 0.5 and intercept -100 \({low:g} to"):
            stored.encode([beyond])


@pytest.mark.parametrize(("slope", "inter"), [(0.5, -100), (0.0173, 3.25), (-2.0, 7), (1, 0), (1, 5)])
def test_a_file_reads_back_to_within_half_a_quantum(tmp_path, slope, inter):
    numbers = np.random.default_rng(0).integers(-3000, 3000, (5, 6, 7)).astype(np.int16)
    source = scaled(tmp_path / "in.nii", numbers, slope, inter)
    storage = stored_type(source)
    values = nib.load(source).get_fdata() + np.random.default_rng(1).normal(0, 3, numbers.shape)
    written = nib.load(save_nifti(values, source, tmp_path / "out.nii.gz", storage=storage))
    assert written.get_data_dtype() == np.int16
    assert (written.dataobj.slope, written.dataobj.inter) == (storage.slope, storage.inter)
    assert np.abs(written.get_fdata() - values).max() <= storage.quantum / 2 * 1.001
    assert np.abs(written.get_fdata() - values).max() > storage.quantum / 3  # it is rounding that was tested
    assert np.array_equal(written.get_fdata(), storage.nearest(values))
    same = nib.load(
        save_nifti(nib.load(source).get_fdata(dtype=np.float32), source, tmp_path / "s.nii", storage=storage)
    )
    assert np.array_equal(same.dataobj.get_unscaled(), numbers)  # and what was not touched has the same numbers


def test_real_numbers_keep_their_bits(tmp_path):
    values = np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32)
    values[0, 0, :4] = -0.0, np.float32(1e-42), np.finfo(np.float32).max, np.finfo(np.float32).tiny
    source = write_nifti(tmp_path / "in.nii", values)
    written = nib.load(save_nifti(values, source, tmp_path / "out.nii", storage=stored_type(source)))
    assert written.get_data_dtype() == np.float32
    assert np.asarray(written.dataobj).tobytes() == values.tobytes()


def test_what_is_no_storage():
    with pytest.raises(DataError, match="complex64"):
        Storage("complex64")
    for slope, inter in ((0.0, 0.0), (np.nan, 0.0), (1.0, np.inf)):
        with pytest.raises(DataError, match="slope"):
            Storage("int16", slope, inter)


def test_a_type_and_a_storage_are_one_too_many(tmp_path):
    source = write_nifti(tmp_path / "in.nii", np.ones((3, 4, 5), np.int16))
    with pytest.raises(DataError, match="not both"):
        save_nifti(np.ones((3, 4, 5)), source, tmp_path / "out.nii", np.float32, storage=Storage("int16"))
