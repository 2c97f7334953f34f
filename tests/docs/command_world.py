"""The folder that a page's commands run in: what the text takes for granted, made small."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel as nib
import numpy as np
import torch
import yaml
from builders import brain_volumes, case_file, make_cohort, write_itk, write_nifti
from command_pages import HERE
from victims_on_disk import tiny_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("benchmarks", "data", "docs", "studies")
PLACEHOLDERS = {
    "FOLDER": "BraTS2021", "ROOT": "BraTS2021", "TRUTH_DIR": "BraTS2021", "PRED_DIR": "predictions",
    "CHECKPOINT": "checkpoint.pt", "UNET": "checkpoint.pt", "WEIGHTS": "weights.pth", "GENERATOR": "generator.pt",
    "RUN": "runs/brats", "DIR": "brats_mri_segmentation", "OUT": "out", "OUTPUT": "out", "N": "2", "MM": "4", "S": "3",
    "COMMAND": "run", "STUDY": "study.yaml",
}  # fmt: skip
"""Words of the text in capitals and what they stand for; ``SHA256`` is the hash of the bundle."""
STUDY = {
    "data": {"root": "BraTS2021", "every": 5},
    "victims": [{"name": "U-Net", "checkpoint": "unet.pt"}],
    "attacks": [{"name": "noise"}, {"name": "fgsm"}, {"name": "ifgsm", "steps": 2}],
    "budgets": {"eps": [0.2], "units": "std", "norm": "linf"},
    "output": "runs/brats",
}
"""The study of the pages that show none."""
LESS = {"figures": {"montages": 0}, "checks": {"probes": False}}
"""What every study has in these tests: no pictures of volumes and no probes, which take most of the time."""


def say(word: str) -> str:
    """A word with placeholders replaced."""
    return re.sub(r"(?<![\w.-])[A-Z_]+(?![\w.-])", lambda match: PLACEHOLDERS.get(match[0], match[0]), word)


def neighbour(path: str) -> ModuleType:
    """A module of another folder of tests."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / "tests" / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, module)
    spec.loader.exec_module(module)
    return module


class Store:
    """What the pages take for granted, made once and copied into the folder of every page that names it.

    Args:
        folder: where it is kept.
        run: runs ``monai-adv`` with arguments in a folder; raises if it fails.
    """

    def __init__(self, folder: Path, run: Callable[[list[str], Path], None]) -> None:
        self.folder, self._run = folder, run
        self.passed: set[str] = set()  # commands that some page has run
        folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def cohort(self) -> Path:
        make_cohort(self.folder / "BraTS2021", 6)
        return self.folder / "BraTS2021"

    @cached_property
    def network(self) -> Path:
        from monai_adv.victims import read_checkpoint, save_checkpoint

        path = tiny_checkpoint(self.folder / "unet.pt")
        network, config = read_checkpoint(path)
        config.spacing = [1.0, 1.0, 1.0]  # of the cohort: --resample has to know it
        return save_checkpoint(path, network, config)

    @cached_property
    def generator(self) -> Path:
        place = self.folder / "generator"
        shutil.copytree(self.cohort, place / "BraTS2021")
        shutil.copy(self.network, place / "unet.pt")
        words = "train-synthesis BraTS2021 --checkpoint unet.pt -o generator.pt --steps 1 --patch 16 --no-critic"
        self._run(words.split(), place)
        return place / "generator.pt"

    @cached_property
    def run(self) -> Path:
        place = self.folder / "study"
        shutil.copytree(self.cohort, place / "BraTS2021")
        shutil.copy(self.network, place / "unet.pt")
        (place / "study.yaml").write_text(yaml.safe_dump({**STUDY, **LESS}))
        self._run(["run", "study.yaml", "--no-probes", "--no-report"], place)
        return place / "runs" / "brats"

    @property
    def records(self) -> Path:
        return self.run / "records.csv"

    @cached_property
    def case(self) -> Path:
        """One case under names of somebody's own."""
        subject = sorted(self.cohort.iterdir())[0]
        place = self.folder / "p001"
        place.mkdir()
        for file in subject.iterdir():
            shutil.copy(file, place / file.name.rpartition("_")[2])
        return place

    @cached_property
    def bundle(self) -> Path:
        return neighbour("bundle/zoo_bundle.py").make_bundle(self.folder / "bundle")

    @cached_property
    def bundle_hash(self) -> str:
        from monai_adv.bundle import bundle_hash

        return bundle_hash(self.bundle)

    @cached_property
    def dicom(self) -> Path:
        series = neighbour("data/test_convert.py")
        series.write_series(self.folder / "DICOM" / "T1", uid="1.2.840.113619.2.5")
        for uid in ("1.2.840.113619.2.5", "1.2.840.113619.2.6"):
            series.write_series(self.folder / "DICOM" / "study", uid=uid)
        return self.folder / "DICOM"

    @cached_property
    def nrrd(self) -> Path:
        return write_itk(self.folder / "t1.nrrd", brain_volumes()["T1"])

    @cached_property
    def predictions(self) -> Path:
        """A label file per subject, named by it: the truth with a slice of it missing."""
        for subject in sorted(path.name for path in self.cohort.iterdir()):
            image = nib.load(case_file(self.cohort, subject, "label"))
            numbers = np.asarray(image.dataobj).copy()
            numbers[:, :, numbers.shape[2] // 2] = 0
            write_nifti(self.folder / "predictions" / f"{subject}.nii.gz", numbers, image.affine)
        return self.folder / "predictions"

    @cached_property
    def scores(self) -> Path:
        self._run(["score", str(self.predictions), str(self.cohort), "-o", "scores"], self.folder)
        return self.folder / "scores" / "scores.csv"

    @cached_property
    def raw_csv(self) -> Path:
        """What MONAI's MetricsSaver writes: a file name and a Dice per class."""
        path = self.folder / "val_mean_dice_raw.csv"
        rows = [f"/data/{k}/t1.nii.gz\t{0.9 - k / 50}\t{0.8 - k / 90}\t{0.7 - k / 70}\t0.8" for k in range(6)]
        path.write_text("\n".join(["filename\tclass0\tclass1\tclass2\tmean", *rows]) + "\n")
        return path


PROVIDED: list[tuple[str, str]] = [
    (r"BraTS2021|runs/defenses/test", "cohort"),
    (r"(?:.*/)?(?:g_\w+|gen(?:erator)?)\.pt", "generator"),
    (r"(?:.*/)?\w+\.pt", "network"),
    (r"runs/(?:one|two|\w+_2mm|brats)", "run"),
    (r"predictions", "predictions"),
    (r"raw/p001", "case"),
    (r"records\.csv", "records"),
    (r".*/scores\.csv", "scores"),
    (r"brats_mri_segmentation", "bundle"),
    (r"DICOM(?=/)", "dicom"),
    (r".*\.nrrd", "nrrd"),
    (r".*_raw\.csv", "raw_csv"),
]
"""Names of what a page takes for granted, and what of the store they are. A page that writes such a name itself gets
none: a command that comes too early, or under another name, has to fail."""


class World:
    """The folder of one page.

    Args:
        folder: an empty folder.
        store: where to take things from.
        written: names that the page's own commands write.
        study: the page's study in YAML.
    """

    def __init__(self, folder: Path, store: Store, written: set[str], study: str) -> None:
        self.here = folder  # where the shell is
        self.folder, self.store, self.written, self.study = folder, store, written, study
        folder.mkdir(parents=True)
        (folder / "study.yaml").write_text(study)

    def say(self, word: str) -> str:
        """A word of a command with placeholders replaced."""
        return self.store.bundle_hash if word == "SHA256" else say(word.replace(HERE, str(self.here)))

    def provide(self, word: str) -> None:
        """Put there what a word of a command names and the page does not make."""
        name = (word.partition("=")[2] or word).removeprefix(f"{self.here}/")
        top = name.split("/")[0]
        if top in SCRIPTS and not (self.here / name).exists() and (ROOT / name).is_file():
            apart = shutil.ignore_patterns("cohort", "_*", "api", "tutorials")
            shutil.copytree(ROOT / top, self.here / top, ignore=apart, dirs_exist_ok=True)
            for path in (self.here / "studies").glob("*.yaml"):
                path.write_text(self._small_study(path.read_text()))
        if name == "study.yaml":
            for inside in re.findall(r"[\w./-]+", (self.here / name).read_text()):
                if inside != name and not inside.startswith("runs/"):
                    self.provide(inside)
        if (
            "configs/train.json" in name and not (self.here / "configs" / "train.json").exists()
        ):  # the page is in the folder of the bundle
            shutil.copytree(self.store.bundle, self.here, dirs_exist_ok=True)
        for pattern, what in PROVIDED:
            match = re.match(pattern, name)
            if match is None or (match.end() < len(name) and name[match.end()] != "/"):
                continue
            target = self.here / match[0]
            if match[0] in self.written or target.exists():
                return
            source: Path = getattr(self.store, what)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
            return

    def prepare(self, words: list[str], given: dict[str, Any]) -> None:
        """Put there what depends on a command's options: weights of the network it names, files as it calls them.

        Args:
            words: a command of ``monai-adv``.
            given: its parameters by name.
        """
        if words[1] == "victim" and not (self.here / words[2]).exists():
            self._write_weights(self.here / words[2], given)
        if words[1] == "score" and given["files"]:
            for file in list((self.here / words[2]).iterdir()):
                shutil.copy(file, file.with_name(given["files"].replace("*", file.name.partition(".")[0])))

    def _write_weights(self, path: Path, given: dict[str, Any]) -> None:
        from monai_adv.cli_attacks import parse_options
        from monai_adv.networks import build_network

        described = {"spatial_dims": 3, "in_channels": 4, "out_channels": 4 if given["head"] == "softmax" else 3}
        options = parse_options(given["network_option"], "--network-option")
        torch.save(build_network({"name": given["network"], **described, **options}).state_dict(), path)

    def _small_study(self, text: str) -> str:
        """A shipped study on the tiny cohort and network; whatever else it says stays."""
        data, network = self.store.cohort, self.store.network
        text = re.sub(r"(?<=root: )[^,}\s]+", str(data), text)
        return re.sub(r"(?<=(?:kpoint|rogate): )[^,}\s]+\.pt", str(network), text)
