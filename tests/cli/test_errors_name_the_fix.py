"""What a newcomer does wrong: one clear line says what, where, and what to do; exit code 1 or 2; no traceback."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from builders import case_file, make_cohort
from cli_caller import call
from victims_on_disk import TINY

from monai_adv.data.files import check_writable
from monai_adv.errors import WriteError
from monai_adv.networks import build_network
from monai_adv.victims import VictimConfig, save_checkpoint

BASE: dict[str, Any] = {
    "data": {"root": "data"},
    "victims": [{"name": "tiny", "checkpoint": "tiny.pt"}],
    "attacks": [{"name": "fgsm"}],
    "budgets": {"eps": [0.5]},
    "figures": {"montages": 0},
    "output": "run",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cohort, damaged copies of it, and checkpoints of all sorts."""
    here = tmp_path_factory.mktemp("world")
    make_cohort(here / "data", 2)
    for copy in ("lacking", "unlabelled", "truncated"):
        shutil.copytree(here / "data", here / copy)
    case_file(here / "lacking", "BraTS2021_00001", "FLAIR").unlink()
    for subject in ("BraTS2021_00000", "BraTS2021_00001"):
        case_file(here / "unlabelled", subject, "label").unlink()
    cut = case_file(here / "truncated", "BraTS2021_00001", "T1")
    cut.write_bytes(cut.read_bytes()[:-40])
    (here / "empty").mkdir()
    (here / "afile").write_text("no table")
    networks = {"tiny.pt": TINY, "one.pt": {**TINY, "in_channels": 1}, "binary.pt": {**TINY, "out_channels": 2},
                "flat.pt": {**TINY, "spatial_dims": 2}}  # fmt: skip
    for name, network in networks.items():
        config = VictimConfig(network=network, roi_size=[8] * network["spatial_dims"])
        save_checkpoint(here / name, build_network(network), config)
    network = build_network(TINY)
    torch.save(network.state_dict(), here / "raw.pt")
    torch.save({"state_dict": network.state_dict(), "epoch": 3}, here / "lightning.ckpt")
    torch.save(network, here / "pickled.pt")
    (here / "nothing.pt").write_bytes(b"")
    (here / "text.pt").write_text("hello")
    (here / "study.yaml").write_text(yaml.safe_dump(BASE))
    return here


def said(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> tuple[int, str]:
    """Exit code and what was written to standard error, as one line without typer's frame."""
    monkeypatch.chdir(world)
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 400)
    code = call(monkeypatch, *words)
    return code, " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().err).split())


TO = ["--checkpoint", "tiny.pt", "-o", "out"]
ATTACK = ["attack", "data", *TO]
TRAIN = ["train", "data", "-o", "v.pt", "--steps", "1", "--patch", "16", "--channels", "4,8"]
WRONG: list[tuple[list[str], int, list[str]]] = [
    # the command line itself
    (["atack", "data"], 2, ["No such command 'atack'", "Did you mean 'attack'"]),
    (["attack", "data"], 2, ["Missing option '--checkpoint'"]),
    ([*ATTACK, "--chekpoint", "x"], 2, ["No such option: --chekpoint", "--checkpoint"]),
    ([*ATTACK, "--eps", "much"], 2, ["'--eps'", "valid number"]),
    ([*ATTACK, "--eps", "0"], 2, ["'--eps'", "0 must be a number > 0"]),
    ([*ATTACK, "--eps", "-1"], 2, ["'--eps'", "-1 must be a number > 0"]),
    ([*ATTACK, "--eps", "nan"], 2, ["'--eps'", "nan must be a number > 0"]),
    ([*ATTACK, "--eps", "0.1", "--eps", "0.2"], 2, ["'--eps'", "more than once"]),
    ([*ATTACK, "-o", "other"], 2, ["'--output' / '-o'", "more than once"]),
    ([*ATTACK, "--units", "sd"], 2, ["'--units'", "'std', 'range', 'absolute'"]),
    ([*ATTACK, "--norm", "l1"], 2, ["'--norm'", "'linf', 'l2'"]),
    ([*ATTACK, "--scheme", "brats21"], 2, ["'--scheme'", "'brats2021'"]),
    ([*ATTACK, "--store", "int8"], 2, ["'--store'", "'source'", "'int16'"]),
    ([*TRAIN, "--method", "pgdat"], 2, ["'--method'", "'pgd_at'"]),
    ([*TRAIN, "--network", "Unet3D"], 2, ["'--network'", "'unet'"]),
    ([*TRAIN, "--minutes", "-1"], 2, ["'--minutes'", "greater than or equal to 0"]),
    (["universal", "data", *TO, "--loss", "dicece"], 2, ["'--loss'", "'dice_ce'"]),
    (["universal", "data", *TO, "--eps", "0"], 2, ["'--eps'", "> 0"]),
    (["ablation", "data", *TO, "--eps", "0.1", "--eps", "0"], 2, ["'--eps'", "> 0"]),
    (["bundle-overlay", "atack"], 2, ["OVERLAY", "'attack', 'defend', 'robust_train'"]),
    # names of attacks and their options
    ([*ATTACK, "--attack", "fgms"], 1, ["attack 'fgms' is unknown", "did you mean 'fgsm'"]),
    ([*ATTACK, "--attack", "PGD"], 1, ["did you mean 'pgd'"]),
    ([*ATTACK, "--option", "stepss=3"], 1, ["no option stepss", "did you mean 'steps'"]),
    ([*ATTACK, "--option", "boundz=1"], 1, ["did you mean 'bounds'"]),
    ([*ATTACK, "--option", "steps"], 1, ["must be key=value, e.g. --option steps=10"]),
    ([*ATTACK, "--option", "steps=3", "--option", "steps=4"], 1, ["steps= is given more than once"]),
    ([*ATTACK, "--option", "steps=many"], 1, ["steps must be an integer >= 1"]),
    ([*ATTACK, "--option", "target={hide: [}"], 1, ["not valid YAML", "line 1, column"]),
    ([*ATTACK, "--option", "target={hide: XX}"], 1, ["BraTS2021_00000: cannot hide 'XX'", "(the same of 1 more"]),
    ([*ATTACK, "--attack", "deformation", "--units", "std"], 1, ["is in mm, not in std", "leave units out"]),
    ([*ATTACK, "--attack", "transfer"], 1, ["needs a surrogate", "surrogate: other.pt"]),
    ([*TRAIN, "--method", "pgd_at", "--option", "epss=1"], 1, ["no option epss", "did you mean 'eps'"]),
    ([*TRAIN, "--option", "eps=1"], 1, ["--option belongs to a method", "--method pgd_at"]),
    ([*TRAIN, "--method", "distillation"], 1, ["needs a teacher", "teacher=teacher.pt"]),
    ([*TRAIN[:-1], "a,b"], 1, ["--channels 'a,b'", "--channels 16,32,64,128"]),
    ([*TRAIN[:-2], "--network", "SegResNet", "--network-option", "filters=8"], 1, ["did you mean 'init_filters'"]),
    ([*TRAIN[:-2], "--init", "tiny.pt", "--network", "SegResNet"], 1, ["holds the network", "leave the network"]),
    ([*TRAIN[:-2], "--init", "tiny.pt", "--dims", "2"], 1, ["tiny.pt holds a network of 3 axes"]),
    (["universal", "data", *TO, "--modality", "T5"], 1, ["T5", "T1, T1c, T2, FLAIR or all"]),
    (["universal", "data", *TO, "--mode", "static"], 1, ["{subject: NAME} or {file: PATH}"]),
    (["certify", "data", *TO, "--sigma", "0"], 1, ["sigma must be a number > 0"]),
    (["certify", "data", *TO, "--sigma", "0.2", "--tau", "0.3"], 1, ["tau must be in [0.5, 1)"]),
    # folders and files of images
    (["attack", "nowhere", *TO], 1, ["nowhere: no such folder"]),
    (["attack", "afile", *TO], 1, ["afile: a file, not a folder", "Pass the folder"]),
    (["attack", "empty", *TO], 1, ["empty: no cases found", "_t1ce", "monai-adv convert"]),
    (["attack", "lacking", *TO, "--subject", "BraTS2021_00001"], 1, ["FLAIR is missing", "_flair.nii.gz"]),
    (["attack", "truncated", *TO, "--subject", "BraTS2021_00001"], 1, ["_t1.nii.gz", "truncated", "download it again"]),
    ([*ATTACK, "--subject", "BraTS2021_0000"], 1, ["BraTS2021_0000 are not in data", "did you mean 'BraTS2021_0000"]),
    ([*ATTACK, "--subject", "Kim"], 1, ["Kim are not in data", "monai-adv check data"]),
    ([*ATTACK, "--scheme", "msd"], 1, ["do not fit scheme 'msd'", "pass the scheme of the BraTS release"]),
    (["train", "unlabelled", *TRAIN[2:]], 1, ["nothing to train on", "label is missing", "monai-adv check unlabelled"]),
    ([*TRAIN, "--hold-out", "1"], 1, ["2 subjects held out", "--hold-out 5"]),
    (["convert", "nowhere", "-o", "x.nii.gz"], 1, ["nowhere: no such file"]),
    (["convert", "empty", "-o", "x.nii.gz"], 1, ["no DICOM series here", "folder that holds the slices"]),
    # checkpoints
    (["attack", "data", "--checkpoint", "none.pt", "-o", "out"], 1, ["none.pt does not exist", "monai-adv train"]),
    (["attack", "data", "--checkpoint", "data", "-o", "out"], 1, ["checkpoint data is a folder: give the file"]),
    (["attack", "data", "--checkpoint", "raw.pt", "-o", "out"], 1, ["monai-adv victim raw.pt -o victim.pt --network"]),
    (["attack", "data", "--checkpoint", "lightning.ckpt", "-o", "out"], 1, ["monai-adv victim lightning.ckpt -o"]),
    (["attack", "data", "--checkpoint", "pickled.pt", "-o", "out"], 1, ["UNet", "network.state_dict()"]),
    (["attack", "data", "--checkpoint", "nothing.pt", "-o", "out"], 1, ["nothing.pt", "the file is empty"]),
    (["attack", "data", "--checkpoint", "text.pt", "-o", "out"], 1, ["text.pt", "no file of torch.save"]),
    (["attack", "data", "--checkpoint", "one.pt", "-o", "out"], 1, ["takes 1 channels but the data have 4"]),
    (["attack", "data", "--checkpoint", "binary.pt", "-o", "out"], 1, ["do not fit 2 classes", "--outputs"]),
    ([*TRAIN[:-2], "--init", "raw.pt"], 1, ["monai-adv victim raw.pt"]),
    # where results go
    (["attack", "data", *TO[:2], "-o", "afile"], 1, ["afile is a file, not a folder", "give another output"]),
    (["attack", "data", *TO[:2], "-o", "data"], 1, ["holds the source files: choose another output folder"]),
    (["certify", "data", *TO[:2], "-o", "afile", "--sigma", "0.2"], 1, ["afile is a file, not a folder"]),
    (["train", "data", "-o", "empty", *TRAIN[4:]], 1, ["cannot write empty: it is a folder"]),
    (["check", "data", "-o", "empty"], 1, ["cannot write empty: it is a folder"]),
    (["demo", "afile"], 1, ["afile", "part of this path is a file", "give another folder"]),
    # runs
    (["run"], 1, ["monai-adv run study.yaml", "--bundle FOLDER"]),
    (["run", "stduy.yaml"], 1, ["stduy.yaml does not exist", "did you mean 'study.yaml'"]),
    (["run", "data"], 1, ["data is a folder: give a YAML file"]),
    (["run", "tiny.pt"], 1, ["no text in UTF-8", "no YAML file"]),
    (["run", "study.yaml", "--shard", "3"], 1, ["'3'", "2/3 for the second of three"]),
    (["run", "study.yaml", "--eps", "0.1"], 1, ["--eps go with --bundle", "YAML"]),
    (["run", "--bundle", "empty"], 1, ["empty is no MONAI bundle", "configs/"]),
    (["compare", "nowhere"], 1, ["nowhere does not exist", "monai-adv run study.yaml"]),
    (["compare", "empty"], 1, ["empty/records.csv does not exist"]),
    (["compare", "afile"], 1, ["no column subject, attack", "give the folder of a run"]),
    (["report", "empty"], 1, ["empty holds no study.json"]),
    (["merge", "empty"], 1, ["empty/plan.json", "run the study again"]),
    (["table", "nowhere"], 1, ["nowhere does not exist"]),
]  # fmt: skip


@pytest.mark.parametrize(("words", "code", "says"), WRONG, ids=[" ".join(words)[:70] for words, _, _ in WRONG])
def test_a_wrong_command_names_the_fix(
    words: list[str], code: int, says: list[str], world: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    found, text = said(world, monkeypatch, capsys, words)
    assert found == code, text
    for part in says:
        assert part in text
    assert "Traceback" not in text
    assert text.count("error:") <= 1


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Set an entry of a study, ``budgets.eps``; None takes it away."""

    def apply(study: dict[str, Any]) -> None:
        *parents, key = path.split(".")
        for parent in parents:
            study = study[int(parent)] if isinstance(study, list) else study[parent]
        if value is None:
            del study[key]
        else:
            study[key] = value

    return apply


STUDIES: list[tuple[Callable[[dict[str, Any]], None], list[str]]] = [
    (change("atacks", []), ["atacks: unknown key", "did you mean 'attacks'"]),
    (change("budgets", None), ["budgets: is missing"]),
    (change("data.root", None), ["data.root: is missing"]),
    (change("data.root", "nowhere"), ["nowhere: no such folder"]),
    (change("data.scheme", "brats21"), ["unknown label scheme 'brats21'", "did you mean 'brats2021'"]),
    (change("data.subjects", ["BraTS2021_0001"]), ["are not in", "did you mean"]),
    (change("attacks.0.name", "fgms"), ["attack 'fgms' is unknown", "did you mean 'fgsm'"]),
    (change("attacks.0.eps", 0.2), ["eps belong under budgets"]),
    (change("attacks.0.losss", "ce"), ["no option losss", "did you mean 'loss'"]),
    (change("budgets.eps", 0.1), ["budgets.eps: must be a list: write [0.1]"]),
    (change("budgets.eps", [0]), ["budgets.eps", "> 0"]),
    (change("budgets.unit", "std"), ["budgets.unit: unknown key", "did you mean 'units'"]),
    (change("budgets.units", "sd"), ["budgets.units", "'std', 'range' or 'absolute'"]),
    (change("budgets.norm", "l3"), ["budgets.norm", "'linf' or 'l2'"]),
    (change("victims.0.checkpoint", "none.pt"), ["none.pt does not exist", "monai-adv train"]),
    (change("victims.0.checkpoint", "raw.pt"), ["monai-adv victim", "raw.pt -o victim.pt"]),
    (change("output", "afile"), ["afile is a file, not a folder"]),
    (change("device", "gpu"), ["device 'gpu' cannot be used here", "use cpu"]),
    (change("trackers", {"tensorbord": "x"}), ["trackers.tensorbord", "did you mean 'tensorboard'"]),
]


@pytest.mark.parametrize(("edit", "says"), STUDIES, ids=[says[0][:50] for _, says in STUDIES])
def test_a_wrong_study_names_the_fix(
    edit: Callable[[dict[str, Any]], None], says: list[str], world: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    study = yaml.safe_load((world / "study.yaml").read_text())
    edit(study)
    (world / "wrong.yaml").write_text(yaml.safe_dump(study))
    code, text = said(world, monkeypatch, capsys, ["run", "wrong.yaml"])
    (world / "wrong.yaml").unlink()
    assert code == 1, text
    for part in says:
        assert part in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("data:\n root: data\n   scheme: msd\n", ["line 3, column 10", "begin in the same column"]),
        ("data:\n\troot: data\n", ["line 2, column 1", "never by tabs"]),
        ("victims: [\n", ["not valid YAML", "line 2"]),
        ("- data\n", ["must be a mapping with the keys", "victims"]),
        ("", ["must be a mapping with the keys", "victims"]),
    ],
    ids=["indentation", "tab", "bracket", "list", "nothing"],
)
def test_yaml_that_is_none_says_where(
    text: str, says: list[str], world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (world / "broken.yaml").write_text(text)
    code, line = said(world, monkeypatch, capsys, ["run", "broken.yaml"])
    (world / "broken.yaml").unlink()
    assert code == 1
    for part in ["broken.yaml", *says]:
        assert part in line


def test_a_run_folder_is_no_study(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "study.json").write_text("{}")
    code, text = said(world, monkeypatch, capsys, ["run", str(tmp_path)])
    assert code == 1
    assert (
        f"is a run folder: give the YAML file it was made by, or see it again by `monai-adv report {tmp_path}`" in text
    )


def test_a_2d_checkpoint_is_taken_on_volumes(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["attack", "data", "--checkpoint", "flat.pt", "-o", str(tmp_path / "out"), "--attack", "noise"]
    code, text = said(world, monkeypatch, capsys, words)
    assert (code, text) == (0, "")


def test_a_checkpoint_named_like_a_folder_is_told_before_the_training(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="it is a folder: give the name of a file"):
        check_writable(tmp_path)
