"""Files that MONAI's MetricsSaver wrote become records that compare reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from cli_caller import call
from ignite.engine import Engine
from monai.handlers import IgniteMetricHandler, MetricsSaver, from_engine
from monai.metrics import DiceMetric

from monai_adv.stats import compare, read_metrics_saver

REGIONS = ["TC", "WT", "ET"]


def write(folder: Path, names: list[str], seed: int, flip: float = 0.0, **options: Any) -> tuple[Path, np.ndarray]:
    """What an engine with a Dice metric and a MetricsSaver writes; the file, and the Dice ``(cases, classes)``."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.rand(len(names), 3, 6, 6, 6, generator=torch.Generator().manual_seed(9)) > 0.5
    found = truth ^ (torch.rand(truth.shape, generator=generator) < flip)
    both = 2 * (truth & found).flatten(2).sum(2) / (truth.flatten(2).sum(2) + found.flatten(2).sum(2))
    batches = [{"image": [index], "file": names[index]} for index in range(len(names))]
    engine = Engine(
        lambda _, batch: [{"pred": found[batch["image"][0]].float(), "label": truth[batch["image"][0]].float()}]
    )
    metric = DiceMetric(ignore_empty=False)
    IgniteMetricHandler(
        metric_fn=metric, output_transform=from_engine(["pred", "label"]), save_details=True
    ).attach(engine, "val_mean_dice")  # fmt: skip
    saver = {"metric_details": "*", "batch_transform": lambda b: [{"filename_or_obj": b["file"]}], **options}
    MetricsSaver(str(folder), **saver).attach(engine)
    engine.run(batches)
    return folder / "val_mean_dice_raw.csv", both.numpy()


CASES = [f"/data, all/sub-{i:02d}/t1.nii.gz" for i in range(7)]  # a comma that MONAI does not quote


@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_what_monai_writes_is_read_and_joined_on_the_filename(delimiter: str, tmp_path: Path) -> None:
    clean, dice = write(tmp_path / "clean", CASES, 1, delimiter=delimiter)
    order = [3, 0, 6, 5, 1, 2, 4]  # another evaluator may see the cases in another order
    attacked, _ = write(tmp_path / "pgd", CASES, 2, 0.2, delimiter=delimiter)
    header, *lines = attacked.read_text().splitlines()
    attacked.write_text("\n".join([header, *(lines[i] for i in order)]) + "\n")
    records = read_metrics_saver(clean, attacked, regions=REGIONS)
    assert list(records.columns) == ["subject", "attack", "region", "dice"]
    assert set(records["attack"]) == {"clean", "pgd"}
    assert list(records["subject"][:7]) == CASES
    assert np.allclose(records["dice"][:21].to_numpy().reshape(3, 7).T, dice, atol=1e-4)
    table = compare(records).table
    assert table["region"].tolist() == REGIONS
    assert table["n"].tolist() == [7, 7, 7]
    wide = records.pivot_table(index=["region", "subject"], columns="attack", values="dice")
    expected = (wide["pgd"] - wide["clean"]).groupby("region").mean()
    assert np.allclose(table.set_index("region")["mean_difference"], expected[REGIONS])
    assert (table["p"] == 2 / 2**7).all()
    assert len(read_metrics_saver(clean, attacked, regions=REGIONS, mean=True)) == 2 * 7 * 4


def test_names_and_metric_come_from_the_files_or_the_caller(tmp_path: Path) -> None:
    clean, _ = write(tmp_path / "clean", CASES, 1)
    other = clean.with_name("attacked_mean_dice_raw.csv")
    other.write_bytes(clean.read_bytes())
    assert list(read_metrics_saver(clean, other)["attack"].unique()) == ["val_mean_dice", "attacked_mean_dice"]
    named = read_metrics_saver(clean, other, names=["a", "b"], metric="score")
    assert list(named["attack"].unique()) == ["a", "b"]
    assert "score" in named
    moved = tmp_path / "moved" / "val_mean_dice_raw.csv"
    moved.parent.mkdir()
    moved.write_text(clean.read_text().replace("/data, all/sub-", "/adversarial/sub-").replace("/t1.nii", "-t1.nii"))
    with pytest.raises(ValueError, match=r"moved lacks /data, all/sub-00/t1\.nii\.gz.* use join='name'"):
        read_metrics_saver(clean, moved)
    flat = tmp_path / "flat" / "val_mean_dice_raw.csv"
    flat.parent.mkdir()
    flat.write_text(moved.read_text().replace("/adversarial/", "/elsewhere/"))
    assert set(read_metrics_saver(moved, flat, join="name")["subject"]) == {f"sub-{i:02d}-t1" for i in range(7)}
    with pytest.raises(ValueError, match=r"t1 more than once.* use join='path'"):
        read_metrics_saver(clean, clean.with_name("attacked_mean_dice_raw.csv"), join="name")
    with pytest.raises(ValueError, match="give metric"):
        read_metrics_saver(clean.rename(clean.with_name("score_raw.csv")))
    with pytest.raises(ValueError, match="2 files need as many different names"):
        read_metrics_saver(moved, flat, names=["a", "a"])
    with pytest.raises(ValueError, match="2 regions do not name them"):
        read_metrics_saver(moved, regions=["TC", "WT"])


def test_lost_and_repeated_names_are_errors_that_name_them(tmp_path: Path) -> None:
    lost, _ = write(tmp_path / "lost", ["a", "b", "c"], 1, batch_transform=lambda b: [{}])
    with pytest.raises(ValueError, match=r"no filename in line\(s\) 2, 3, 4.* batch_transform=lambda"):
        read_metrics_saver(lost)
    numbered, _ = write(tmp_path / "numbered", ["0", "1", "2"], 1)
    with pytest.raises(ValueError, match="row numbers instead of filenames"):
        read_metrics_saver(numbered)
    twice, _ = write(tmp_path / "twice", ["a", "b", "a"], 1)
    with pytest.raises(ValueError, match=r"has a more than once: .*even_divisible=False"):
        read_metrics_saver(twice)
    one, _ = write(tmp_path / "one", ["a", "b", "c"], 1)
    two, _ = write(tmp_path / "two", ["a", "c", "d"], 1)
    with pytest.raises(ValueError, match="two lacks b; one lacks d"):
        read_metrics_saver(one, two)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("filename,class0,mean\n", "has no case"),
        ("subject,dice\na,1\n", "no raw table"),
        ("filename\na\n", "no raw table"),
        ("filename,class0,mean\na,0.5\n", "line 2 has 1 of 2 values"),
        ("filename,class0,mean\na,x,0.5\n", "line 2: could not convert"),
    ],
)
def test_other_files_are_refused_by_name(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "dice_raw.csv"
    file.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_metrics_saver(file)
    assert str(file) in str(error.value)


def test_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [
        str(write(tmp_path / name, CASES, 3, flip)[0]) for name, flip in (("clean", 0), ("fgsm", 0.1), ("pgd", 0.3))
    ]
    assert call(monkeypatch, "compare", *files, "--regions", "TC,WT,ET", "-o", str(tmp_path / "out")) == 0
    table = pd.read_csv(tmp_path / "out" / "tables" / "comparison_dice.csv")
    assert set(table["attack"]) == {"fgsm", "pgd"}
    assert set(table["region"]) == set(REGIONS)
    assert (table["mean_difference"] < 0).all()
    assert "clean" in capsys.readouterr().out
    names = ["--name", "x", "--name", "y", "--name", "z", "--baseline", "y", "--join", "path"]
    assert call(monkeypatch, "compare", *files, *names) == 0
    assert set(pd.read_csv(tmp_path / "clean" / "tables" / "comparison_dice.csv")["attack"]) == {"x", "z"}
    for arguments, says in (
        ([files[0]], "needs two"),
        ([*files, "--baseline", "none"], "baseline 'none'"),
        ([str(tmp_path), "--regions", "a"], "for the *_raw.csv"),
    ):
        capsys.readouterr()
        assert call(monkeypatch, "compare", *arguments) == 1
        assert says in capsys.readouterr().err
