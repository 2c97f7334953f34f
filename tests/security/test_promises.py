"""What docs/security.md promises, each with the thing that would break it."""

from __future__ import annotations

import ast
import csv
import functools
import gzip
import json
import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from builders import LPS, brain_volumes, case_file, make_case
from cli_caller import call
from victims_on_disk import tiny_checkpoint

import monai_adv
from monai_adv.attacks import UniversalPerturbation
from monai_adv.data import load_case, save_displacement, save_nifti, scan
from monai_adv.data.files import inside
from monai_adv.errors import CheckpointError, ConfigError, DataError, WriteError
from monai_adv.handlers.handler import _append
from monai_adv.stats import write_csv
from monai_adv.studies import cases, run_study, study_from
from monai_adv.studies.export import attack_files
from monai_adv.studies.shards import usable_device
from monai_adv.studies.units import UnitStore, read_checked, read_json, safe_name
from monai_adv.studies.volumes import save_volumes
from monai_adv.threats import create_threat
from monai_adv.victims import load_victim
from monai_adv.visualize.study_figures import montages
from monai_adv.visualize.viewer import Drawn

PACKAGE = Path(monai_adv.__file__).parent
UNIT = {"subject": "s1", "victim": "v", "attack": "fgsm", "eps": 0.1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("victim") / "tiny.pt", steps=5)


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# ------------------------------------------------------------------------------------------ nothing is executed
@functools.cache
def calls() -> list[tuple[str, str, ast.Call]]:
    """Every call in the package: file, dotted name as written, node."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                found.append((str(path.relative_to(PACKAGE)), ast.unparse(node.func), node))
    return found


def test_the_package_reads_files_without_executing_them() -> None:
    found = calls()
    loads = [(file, node) for file, name, node in found if name in ("torch.load", "np.load")]
    assert {file for file, _ in loads} >= {"networks/stored.py", "victims/weights.py", "studies/volumes.py"}
    for file, node in loads:
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        wanted = ("weights_only", "True") if "torch" in ast.unparse(node.func) else ("allow_pickle", "False")
        assert given.get(wanted[0]) == wanted[1], file
    forbidden = {"eval", "exec", "compile", "__import__", "torch.jit.load", "os.system", "yaml.load",
                 "yaml.unsafe_load", "yaml.full_load", "pickle.load", "pickle.loads", "pd.read_pickle",
                 "joblib.load", "os.popen"}  # fmt: skip
    assert [(file, name) for file, name, _ in found if name in forbidden or name.startswith("subprocess.")] == []
    # users' YAML is read in one place, which bounds it
    assert {file for file, name, _ in found if "SafeLoader" in name or name == "yaml.safe_load"} == {
        "studies/plain_yaml.py"
    }


def test_a_stored_option_that_means_nothing_is_an_error_of_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    changes: list[dict[str, Any]] = [
        {"network": {**content["config"]["network"], "channels": ["a", None]}}, {"network": 5}, {"roi_size": 5},
        {"preprocessing": ["x"]}, {"mode": "x"}, {"overlap": "much"}, {"overlap": 2.0}, {"sw_batch_size": "x"},
    ]  # fmt: skip
    for change in changes:
        torch.save({**content, "config": {**content["config"], **change}}, tmp_path / "odd.pt")
        with pytest.raises(CheckpointError, match=r"odd\.pt|overlap|sw_batch_size"):
            load_victim(tmp_path / "odd.pt")


@pytest.mark.parametrize("device", ["junk", "junk:0", "cuda:9999", "cpu:x", ""])
def test_a_device_that_is_not_there_is_named(device: str) -> None:
    with pytest.raises(ConfigError, match="cannot be used here"):
        usable_device(device)
    assert usable_device("cpu") == "cpu"


def test_deep_json_is_damaged_json(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 200_000)
    assert read_json(tmp_path / "deep.json") is None
    assert read_checked(tmp_path / "deep.json") is None


# ------------------------------------------------------------------------------------------------ output paths
def test_hostile_names_stay_in_the_run_folder(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_case(tmp_path / "data", "BraTS2021_..", shape=(12, 12, 12))
    study = {
        "title": "../../x",
        "data": {"root": "data"},
        "victims": [{"name": "../../evil", "checkpoint": str(checkpoint)}],
        "attacks": [{"name": "fgsm", "label": "/abs/x"}, {"name": "noise", "label": "$\\frac{x$ .."}],
        "budgets": {"eps": [0.5]},
        "figures": {"montages": 1},
        "checks": {"probes": False},
        "output": "a/b/run",
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    before = tree(tmp_path)
    assert call(monkeypatch, "run", str(tmp_path / "study.yaml")) in (0, 3)
    new = tree(tmp_path) - before - {"a", "a/b", "a/b/run"}
    assert new
    assert {name for name in new if not name.startswith("a/b/run/")} == set()
    assert (tmp_path / "a/b/run/report.html").is_file()


def test_a_link_that_leads_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "units").mkdir()
    (tmp_path / "units" / "s1").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WriteError, match="leads out of"):
        UnitStore(tmp_path / "units").write(UNIT, "key", {"status": "ok", "rows": []})
    assert tree(tmp_path / "elsewhere") == set()
    (tmp_path / "disk").symlink_to(tmp_path / "elsewhere")  # the whole folder may lie on another disk
    UnitStore(tmp_path / "disk").write(UNIT, "key", {"status": "ok", "rows": []})
    assert len(tree(tmp_path / "elsewhere")) == 2


def test_a_file_that_is_a_link_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    store = UnitStore(tmp_path / "units")
    path = store.path(UNIT)
    path.parent.mkdir(parents=True)
    (tmp_path / "precious").write_text("precious")
    path.symlink_to(tmp_path / "precious")
    with pytest.raises(WriteError, match="leads out of"):
        store.write(UNIT, "key", {"status": "ok", "rows": []})
    assert (tmp_path / "precious").read_text() == "precious"
    link = tmp_path / "out.nii"
    link.symlink_to(tmp_path / "precious")
    like = make_case(tmp_path / "data")
    save_nifti(like["T1"], case_file(tmp_path / "data", "BraTS2021_00000", "T1"), link)
    assert (tmp_path / "precious").read_text() == "precious"
    assert not link.is_symlink()


def test_an_exported_case_stays_in_its_folder(checkpoint: Path, tmp_path: Path) -> None:
    make_case(tmp_path / "data", shape=(12, 12, 12))
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "BraTS2021_00000").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WriteError, match="leads out of"):
        list(attack_files(tmp_path / "data", checkpoint, tmp_path / "out", {"name": "noise", "eps": 0.1}))
    assert tree(tmp_path / "elsewhere") == set()


@pytest.mark.parametrize("path", ["run/../../x", "/etc/passwd", "run/../x"])
def test_paths_outside(path: str) -> None:
    with pytest.raises(WriteError):
        inside("run", path)


def test_long_names_that_differ_at_the_end_have_different_files() -> None:
    one, two = (safe_name("x" * 150 + end) for end in "ab")
    assert one != two
    assert max(len(one), len(two)) <= 100


def test_pictures_whose_titles_read_alike_have_different_files(tmp_path: Path) -> None:
    built = brain_volumes((12, 12, 12))
    image = np.stack([built[m] for m in ("T1", "T1c", "T2", "FLAIR")]).astype(np.float32)
    path = tmp_path / "a.npz"
    kept = {"image": image, "prediction": built["label"], "truth": built["label"], "affine": LPS, "spacing": (1, 1, 1)}
    save_volumes(path, kept, "key")
    dice = dict.fromkeys(("WT", "TC", "ET"), (1.0, 1.0))
    about = {"subject": "s", "eps": 0.5, "units": "std", "norm": "linf", "method": "fgsm"}
    drawn = [
        Drawn({**about, "victim": victim, "attack": attack, "setting": attack}, path, path, dice=dice)
        for victim, attack in (("net", "a b"), ("net a", "b"), ("NET", "a b"))
    ]
    assert len({figure.name.casefold() for figure in montages(drawn)}) == 3


# -------------------------------------------------------------------------------------------------- input files
def test_a_pipe_or_device_among_the_images_is_no_file(tmp_path: Path) -> None:
    make_case(tmp_path, "BraTS2021_00000")
    pipe, device = (case_file(tmp_path, "BraTS2021_00000", role) for role in ("T1", "T2"))
    pipe.unlink()
    device.unlink()
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    (item,) = scan(tmp_path).items
    with pytest.raises(DataError, match="no such file"):
        load_case(item)
    with pytest.raises(FileNotFoundError):
        cases.item_hash(item)


def test_links_to_files_are_read_and_links_to_folders_are_not_searched(tmp_path: Path) -> None:
    make_case(tmp_path / "a", "BraTS2021_00000")
    original = case_file(tmp_path / "a", "BraTS2021_00000", "T1")
    original.rename(tmp_path / "moved.bin.nii.gz")
    original.symlink_to(tmp_path / "moved.bin.nii.gz")
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    (item,) = scan(tmp_path / "a").items
    assert load_case(item)["image"].shape[0] == 4


@pytest.mark.parametrize("packed", [False, True])
def test_a_header_that_claims_terabytes_is_refused_before_anything_is_allocated(tmp_path: Path, packed: bool) -> None:
    make_case(tmp_path, suffix=".nii")
    path = case_file(tmp_path, "BraTS2021_00000", "T1", suffix=".nii")
    content = path.read_bytes()
    (item,) = scan(tmp_path).items
    for size in (32767, 1200):  # beyond any volume; and a sane one that the file does not hold
        bad = content[:42] + struct.pack("<hhh", size, size, size) + content[48:]
        file = path.with_suffix(".nii.gz") if packed else path
        file.write_bytes(gzip.compress(bad) if packed else bad)
        tracemalloc.start()
        with pytest.raises(DataError, match=r"_t1\.nii"):
            load_case({**item, "image": [str(file), *item["image"][1:]]})
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
        tracemalloc.stop()


def test_a_gzip_bomb_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from monai_adv.data import nifti

    make_case(tmp_path)
    path = case_file(tmp_path, "BraTS2021_00000", "T1")
    monkeypatch.setattr(nifti, "ROOM", 1 << 20)
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + bytes(32 << 20)))
    assert path.stat().st_size < 1 << 18
    (item,) = scan(tmp_path).items
    tracemalloc.start()
    with pytest.raises(DataError, match="holds far more than"):
        load_case(item)
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(("at", "packed"), [(112, struct.pack("<f", 3e38)), (116, struct.pack("<f", 3e38))])
@pytest.mark.parametrize("role", ["T1", "label"])
def test_a_scale_that_no_number_can_hold(tmp_path: Path, role: str, at: int, packed: bytes) -> None:
    make_case(tmp_path, suffix=".nii")
    path = case_file(tmp_path, "BraTS2021_00000", role, suffix=".nii")
    content = path.read_bytes()
    slope = struct.pack("<f", 1.0) if at == 116 else content[112:116]
    content = content[:112] + slope + content[116:]
    path.write_bytes(content[:at] + packed + content[at + 4 :])
    (item,) = scan(tmp_path).items
    with pytest.raises(DataError, match=path.name):
        load_case(item)


def test_a_rotation_that_is_none(tmp_path: Path) -> None:
    make_case(tmp_path, suffix=".nii")
    path = case_file(tmp_path, "BraTS2021_00000", "T1", suffix=".nii")
    content = path.read_bytes()
    path.write_bytes(content[:256] + struct.pack("<f", 2.0) + content[260:])
    (item,) = scan(tmp_path).items
    with pytest.raises(DataError, match=r"_t1\.nii: .*cannot be read as NIfTI"):
        load_case(item)


# ------------------------------------------------------------------------------------------------- what is written
@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n"])
def test_no_cell_is_a_formula(tmp_path: Path, start: str) -> None:
    hostile = start + "cmd|'/C calc'!A0\r=1+1"  # nor what a reader makes the next row
    write_csv(pd.DataFrame({"subject": [hostile], hostile: [-0.5]}), tmp_path / "a.csv")
    _append(tmp_path / "b.csv", [{"subject": hostile, "eps": -0.5}])
    for name in ("a.csv", "b.csv"):
        with open(tmp_path / name, newline="", encoding="utf-8") as file:
            header, (subject, number) = csv.reader(file)
        assert subject == "'" + hostile.replace("\r", "\n")  # which is quoted for sure
        assert number == "-0.5"
        assert all(not cell.startswith(start) for cell in header)


def test_every_table_of_the_package_is_written_safely() -> None:
    writers = {"csv.writer", "csv.DictWriter", "to_excel"}
    found = {file for file, name, _ in calls() if name in writers or name.rpartition(".")[2] == "to_excel"}
    assert found == {"handlers/handler.py"}  # which the test above reads
    frames = {file for file, name, _ in calls() if name.rpartition(".")[2] == "to_csv"}
    assert frames == {"stats/tables.py"}


def test_no_text_of_a_source_is_in_a_volume_that_is_written(tmp_path: Path) -> None:
    secret = b"Jane Doe 1970"
    image = nib.Nifti1Image(brain_volumes()["T1"], LPS)
    for name in ("descrip", "aux_file", "intent_name", "db_name", "data_type"):
        image.header[name] = secret[: image.header[name].dtype.itemsize]
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", secret))
    source = tmp_path / "source.nii"
    nib.save(image, source)
    shape = image.shape
    save_nifti(brain_volumes()["T1"], source, tmp_path / "volume.nii")
    save_displacement(np.zeros((3, *shape), np.float32), source, tmp_path / "field.nii")
    universal = UniversalPerturbation(
        torch.ones(4, 3, 3, 3), create_threat(eps=0.1), affine=torch.eye(4, dtype=torch.float64)
    )
    universal.save(tmp_path / "universal.nii")
    assert b"Jane Doe" in source.read_bytes()
    for name in ("volume.nii", "field.nii", "universal.nii"):
        content = (tmp_path / name).read_bytes()
        assert b"Jane" not in content
        header = nib.load(tmp_path / name).header
        assert len(header.extensions) == 0
        assert [bytes(header[n].tobytes()).strip(b"\0") for n in ("descrip", "aux_file", "db_name", "intent_name")] == [
            b""
        ] * 4


def test_every_volume_of_the_package_is_written_by_the_writer_that_drops_text() -> None:
    made = {file for file, name, _ in calls() if name.rpartition(".")[2] in ("Nifti1Image", "Nifti2Image")}
    assert made <= {"attacks/universal.py", "data/simulation/files.py", "data/writing.py", "visualize/viewer.py"}
    assert not [file for file, name, _ in calls() if name == "nib.save"]


# -------------------------------------------------------------------------------------------------- configuration
def test_an_unknown_key_anywhere_is_an_error_with_a_suggestion(tmp_path: Path) -> None:
    study: dict[str, Any] = {
        "data": {"root": "d"}, "victims": [{"name": "v", "checkpoint": "c"}], "attacks": [{"name": "fgsm"}],
        "budgets": {"eps": [0.1]}, "output": "o",
    }  # fmt: skip
    for section, key, near in (
        ("data", "rot", "root"), ("budgets", "untis", "units"), ("figures", "montage", "montages"),
        ("compare", "alpa", "alpha"), ("checks", "probe", "probes"), ("trackers", "tensorbord", "tensorboard"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=rf"{section}\.{key}: unknown key; did you mean '{near}'"):
            study_from({**study, section: {**study.get(section, {}), key: 1}})
    with pytest.raises(ConfigError, match=r"victims\.0\.overlp: unknown key; did you mean 'overlap'"):
        study_from({**study, "victims": [{**study["victims"][0], "overlp": 0.5}]})
    with pytest.raises(ConfigError, match=r"attack fgsm has no option epsilonn"):
        study_from({**study, "attacks": [{"name": "fgsm", "epsilonn": 1}]})


@pytest.mark.parametrize("option", ["steps=[", "steps=2024-13-45", "steps=!!python/name:os.system", "steps=&a [*a]"])
def test_options_of_the_command_line_are_plain_data_too(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("attack", str(tmp_path), "--checkpoint", "c.pt", "-o", str(tmp_path / "out"), "--option", option)
    assert call(monkeypatch, *arguments) == 1
    assert "is not valid YAML" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", ["loss=[]", "goal=null", "norm=[]", "channels=x", "quantize=[x]", "steps=many", "step_size=[1]"]
)
def test_an_option_that_means_nothing_is_an_error_without_a_traceback(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("attack", str(tmp_path), "--checkpoint", "c.pt", "-o", str(tmp_path / "out"), "--option", option)
    assert call(monkeypatch, *arguments) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_a_budget_beyond_every_number() -> None:
    study: dict[str, Any] = {
        "data": {"root": "d"}, "victims": [{"name": "v", "checkpoint": "c"}], "output": "o", "budgets": {"eps": [0.1]},
        "attacks": [{"name": "motion", "eps": 10**400}],
    }  # fmt: skip
    with pytest.raises(ConfigError, match="attack motion: int too large"):
        study_from(study)


def test_trouble_of_the_machine_is_said_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "compare", "x" * 5000) == 1
    said = capsys.readouterr().err
    assert "error:" in said
    assert "Traceback" not in said


def test_a_study_in_which_every_name_is_markup_runs(checkpoint: Path, tmp_path: Path) -> None:
    make_case(tmp_path / "data", shape=(12, 12, 12))
    study = study_from({
        "title": "[red]{{ 7 * 7 }}<script>alert(1)</script>",
        "data": {"root": str(tmp_path / "data")}, "victims": [{"name": "[bold]<b>", "checkpoint": str(checkpoint)}],
        "attacks": [{"name": "noise", "label": "%s{0}|"}], "budgets": {"eps": [0.5]}, "figures": {"montages": 0},
        "output": str(tmp_path / "run"),
    })  # fmt: skip
    assert run_study(study).problems == []
    assert json.loads((tmp_path / "run" / "study.json").read_text())["study"]["title"] == study.title
