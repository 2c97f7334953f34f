"""Volumes for the viewer: what is stored is what was seen, within the budget, and what is missing is said."""

from __future__ import annotations

import base64
import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from monai_adv.studies.volumes import save_volumes
from monai_adv.visualize.viewer import LEGEND, Drawn, ViewerContent, viewer_content

AFFINE = np.array([[-2.0, 0, 0, 30], [0, -2.0, 0, 40], [0, 0, 3.0, -10], [0, 0, 0, 1]])
SHAPE = (12, 14, 10)


def volumes(subject: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(subject)
    image = np.zeros((4, *SHAPE), np.float32)
    image[:, 3:9, 4:11, 2:8] = rng.gamma(4, 100, (4, 6, 7, 6))
    truth = np.zeros(SHAPE, np.uint8)
    truth[4:7, 5:8, 3:6] = 2
    return {"image": image, "truth": truth, "prediction": truth.copy(), "affine": AFFINE,
            "spacing": np.array([2.0, 2, 3])}  # fmt: skip


def drawn(folder: Path, subject: str = "s0", setting: str = "fgsm 0.2 std", eps: float = 0.2, seed: int = 0) -> Drawn:
    clean, attacked = volumes(seed), volumes(seed)
    rng = np.random.default_rng(7)
    attacked["image"] = clean["image"] + np.where(clean["image"] != 0, rng.normal(0, 40 * eps, (4, *SHAPE)), 0)
    attacked["prediction"] = clean["prediction"].copy()
    attacked["prediction"][4, 5, 4] = 0
    paths = [folder / subject / f"{name}.npz" for name in ("clean", setting)]
    for path, content in zip(paths, (clean, attacked)):
        save_volumes(path, content, "key")
    identity = {"subject": subject, "victim": "net", "setting": setting, "units": "std", "eps": eps}
    return Drawn(identity, paths[0], paths[1], {"WT": (1.0, 0.5), "ET": (float("nan"), 0.0)})


def content_of(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as found:
        return {name: found[name] for name in found.files if name != "key"}


def opened(content: ViewerContent, index: int) -> nib.Nifti1Image:
    return nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(content.volumes[index])))


def made(*pairs: Drawn, **options: object) -> ViewerContent:
    content = viewer_content(pairs, **options)  # type: ignore[arg-type]
    assert content is not None
    return content


def test_stored_volumes_are_those_of_the_run(tmp_path: Path) -> None:
    one = drawn(tmp_path)
    clean, attacked = content_of(one.clean), content_of(one.attacked)
    content = made(one)
    (scene,) = content.scenes
    (setting,) = scene["settings"]
    assert content.notes == []
    assert [m["name"] for m in scene["modalities"]] == ["FLAIR", "T1c", "T2", "T1"]
    box = (slice(1, 11), slice(2, 13), slice(0, 10))  # the brain with two voxels around it
    for modality, change, channel in zip(scene["modalities"], setting["changes"], (3, 1, 2, 0)):
        stored = opened(content, modality["volume"])
        x, y = (v["image"][channel][box] for v in (clean, attacked))
        assert stored.get_data_dtype() == np.uint8
        np.testing.assert_allclose(stored.affine @ [0, 0, 0, 1], AFFINE @ [1, 2, 0, 1])
        step = float(stored.dataobj.slope)
        inside = x <= stored.get_fdata().max()  # what is brighter than the window is clipped
        assert inside.mean() > 0.98
        np.testing.assert_allclose(stored.get_fdata()[inside], x[inside], atol=0.51 * step)
        assert modality["window"][1] <= x.max()
        delta = opened(content, change["volume"])
        np.testing.assert_allclose(delta.get_fdata(), y - x, atol=0.51 * float(delta.dataobj.slope))
        assert ((delta.get_fdata() == 0) | (x != 0)).all()
        spread = clean["image"][channel][clean["image"][channel] != 0].std()
        assert change["size"] * spread == pytest.approx(change["scale"])
    for place, wanted in ((scene["truth"], clean["truth"]), (scene["prediction"], clean["prediction"]),
                          (setting["prediction"], attacked["prediction"])):  # fmt: skip
        np.testing.assert_array_equal(np.asarray(opened(content, place).dataobj), wanted[box])
    assert setting["truth"] == scene["truth"]
    assert setting["dice"] == {"WT": [1.0, 0.5], "ET": [None, 0.0]}
    np.testing.assert_allclose(setting["at"], (AFFINE @ [4, 5, 4, 1])[:3])  # the voxel that changed its class
    header = opened(content, 0).header
    assert not any(bytes(header[field].tobytes()).strip(b"\0") for field in ("descrip", "aux_file", "intent_name"))
    assert made(one) == content  # the same bytes again
    assert {entry["name"]: entry["index"] for entry in LEGEND} == {"NCR": 1, "ED": 2, "ET": 3}


def test_small_changes_beside_a_large_one_are_kept(tmp_path: Path) -> None:
    one = drawn(tmp_path)
    attacked = content_of(one.attacked)
    attacked["image"][:, 5, 6, 4] += 1e4
    save_volumes(one.attacked, attacked, "key")
    content = made(one)
    delta = opened(content, content.scenes[0]["settings"][0]["changes"][0]["volume"])
    assert delta.get_data_dtype() == np.int16
    assert (delta.get_fdata() != 0).sum() > 200


def test_a_clean_image_is_stored_once(tmp_path: Path) -> None:
    content = made(drawn(tmp_path), drawn(tmp_path, setting="ifgsm 0.2 std", eps=0.3))
    assert len(content.scenes) == 1
    assert [s["name"] for s in content.scenes[0]["settings"]] == ["fgsm 0.2 std", "ifgsm 0.2 std"]
    assert len(content.volumes) == 4 + 2 * 4 + 2  # images, changes, truth (as the clean prediction) and one attacked
    assert len(set(content.volumes)) == len(content.volumes)


def test_the_budget_costs_modalities_then_subjects_then_settings(tmp_path: Path) -> None:
    pairs = [drawn(tmp_path, s, a, e, seed) for seed, s in enumerate(("s0", "s1")) for a, e in (("a", 0.2), ("b", 0.3))]
    size = {n: sum(map(len, made(*pairs[:n]).volumes)) for n in (1, 2, 4)}
    total = size[4]

    fewer = made(*pairs, budget=int(0.9 * total))
    assert [m["name"] for m in fewer.scenes[0]["modalities"]] == ["FLAIR", "T1c", "T2"]
    assert fewer.notes == ["To keep this page small, only FLAIR, T1c, T2 can be chosen, not T1."]
    assert [len(s["settings"]) for s in fewer.scenes] == [2, 2]

    first = made(*pairs, budget=int(0.9 * total), first=["T1"])
    assert [m["name"] for m in first.scenes[0]["modalities"]] == ["T1", "FLAIR", "T1c"]

    one = made(*pairs, budget=int(0.27 * total))
    assert [s["subject"] for s in one.scenes] == ["s0"]
    assert [m["name"] for m in one.scenes[0]["modalities"]] == ["FLAIR"]
    assert one.notes[1] == "Left out to keep this page small: s1, net, a; s1, net, b."

    single = made(*pairs, budget=int(0.16 * total))
    assert [[s["name"] for s in scene["settings"]] for scene in single.scenes] == [["a"]]
    assert "s0, net, b; s1, net, a; s1, net, b." in single.notes[1]
    for content, share in ((fewer, 0.9), (first, 0.9), (one, 0.27), (single, 0.16)):
        assert sum(map(len, content.volumes)) <= share * total

    nothing = made(*pairs, budget=10)
    assert nothing.scenes == []
    assert nothing.volumes == []
    assert "s0, net, a" in nothing.notes[0]


def test_missing_volumes_and_other_shapes_are_passed_over(tmp_path: Path) -> None:
    good, bad = drawn(tmp_path), drawn(tmp_path, "s1")
    bad.attacked.write_bytes(b"broken")
    assert [s["subject"] for s in made(bad, good).scenes] == ["s0"]
    assert viewer_content([bad]) is None
    assert viewer_content([good], modalities=("T1", "T2")) is None


def test_predictions_outside_the_brain_are_counted(tmp_path: Path) -> None:
    one = drawn(tmp_path)
    attacked = content_of(one.attacked)
    attacked["prediction"][0, 0, :3] = 1
    save_volumes(one.attacked, attacked, "key")
    assert made(one).notes == ["Volumes are cropped to the brain; 3 voxels of predictions outside it are not shown."]
