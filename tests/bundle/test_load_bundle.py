"""A victim out of a bundle, by its own configuration, and only with trust."""

from __future__ import annotations

import json
import os
import py_compile
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.inferers import SlidingWindowInferer
from monai.utils import optional_import
from zoo_bundle import CHANNELS, make_bundle, weights

from monai_adv.bundle import BundleVictim, bundle_hash, load_bundle
from monai_adv.errors import CheckpointError, ConfigError, MonaiAdvError
from monai_adv.victims import Head

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("zoo"))


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / original.name))


def edit(bundle: Path, name: str, change: Change) -> None:
    path = bundle / "configs" / f"{name}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def load(bundle: Path, **options: Any) -> BundleVictim:
    return load_bundle(bundle, bundle_hash(bundle), **options)


def test_everything_is_found(bundle: Path) -> None:
    found = load(bundle)
    assert found.channels == CHANNELS
    assert found.channel_order == (1, 0, 2, 3)
    assert found.head == Head("sigmoid", ("TC", "WT", "ET"))
    assert type(found.inferer) is SlidingWindowInferer
    assert tuple(found.victim.inferer.roi_size) == (8, 8, 8)  # type: ignore[attr-defined]
    assert found.amp is True
    assert not found.network.training
    for name, value in weights().items():
        assert torch.equal(found.network.state_dict()[name], value)
    assert [Path(item["image"][0]).name for item in found.items()] == [
        "BraTS2021_00000_t1ce.nii.gz",
        "BraTS2021_00001_t1ce.nii.gz",
    ]
    text = found.summary()
    for part in ("SegResNet", "network_def", "SlidingWindowInferer", "validate#inferer", "NormalizeIntensityd",
                 "sigmoid (validate#postprocessing)", "TC, WT, ET", "T1c, T1, T2, FLAIR", "2 cases"):  # fmt: skip
        assert part in text
    assert "FLAIR =" not in text  # canonical names are not said twice
    assert "= FLAIR, T1c, T1, T2" in load(bundle, channels=["flair", "T1-Gd", "t1n", "t2w"]).summary()


def test_the_victim_is_what_the_bundle_deploys(bundle: Path) -> None:
    found = load(bundle)
    data = found.preprocessing(found.items()[0])
    image = data["image"][None].as_tensor()
    expected = found.logits(image)
    logits = found.victim(image.requires_grad_(True))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert torch.autograd.grad(logits.sum(), image)[0].any()
    score = 2 * ((expected > 0) & data["label"].bool()[None]).sum() / ((expected > 0).sum() + data["label"].sum())
    assert score > 0.7


def test_nothing_is_executed_without_trust(bundle: Path, tmp_path: Path) -> None:
    written, imported = tmp_path / "written", tmp_path / "imported"
    (bundle / "scripts").mkdir()
    (bundle / "scripts" / "__init__.py").write_text(f"import os\nos.mkdir({str(imported)!r})\n")

    def attack(content: dict[str, Any]) -> None:
        content["imports"].append("$import scripts")
        content["network_def"]["in_channels"] = f"$__import__('os').mkdir({str(written)!r}) or 4"

    edit(bundle, "train", attack)
    with pytest.raises(ConfigError, match=f"--trust {bundle_hash(bundle)}") as refused:
        load_bundle(bundle)
    assert "Multimodal Brain Tumor segmentation" in str(refused.value)
    for wrong in ("0" * 64, "yes", ""):
        with pytest.raises(ConfigError):
            load_bundle(bundle, wrong)
    assert not written.exists()
    assert not imported.exists()
    modules = set(sys.modules)
    load(bundle)
    assert written.exists()  # the expression does run where it is trusted: the test above can fail
    assert imported.exists()
    assert not {name for name in set(sys.modules) - modules if name.startswith("scripts")}
    assert str(bundle) not in sys.path
    assert not list(bundle.rglob("__pycache__"))


def test_compiled_files_that_the_hash_does_not_hold_are_not_run(bundle: Path, tmp_path: Path) -> None:
    module, marker = bundle / "scripts" / "__init__.py", tmp_path / "marker"
    module.parent.mkdir()
    module.write_text(f"open({str(marker)!r}, 'w').write('compiled')")
    py_compile.compile(str(module), doraise=True)
    when = module.stat().st_mtime_ns
    module.write_text(f"open({str(marker)!r}, 'w').write('sourcecd')")  # as long, and as old
    os.utime(module, ns=(when, when))
    edit(bundle, "train", lambda content: content["imports"].append("$import scripts"))
    load(bundle)
    assert marker.read_text() == "sourcecd"


def rename(bundle: Path) -> None:
    (bundle / "configs" / "datalist.json").rename(bundle / "configs" / "list.json")


CHANGES: dict[str, Callable[[Path], Any]] = {
    "configuration": lambda b: edit(b, "evaluate", lambda c: c.update(extra=1)),
    "new configuration": lambda b: (b / "configs" / "more.yaml").write_text("a: 1"),
    "renamed": rename,
    "module": lambda b: (b / "helper.py").write_text("x = 1"),
    "compiled": lambda b: (b / "helper.so").write_text("x"),
}
NO_CHANGES: dict[str, Callable[[Path], Any]] = {
    "weights": lambda b: (b / "models" / "model.pt").write_bytes(b"other"),
    "results": lambda b: ((b / "eval").mkdir(), (b / "eval" / "metrics.json").write_text("{}")),
    "documents": lambda b: (b / "LICENSE").write_text("x"),
}


@pytest.mark.parametrize("what", [*CHANGES, *NO_CHANGES])
def test_trust_is_bound_to_what_can_be_executed(bundle: Path, what: str) -> None:
    before = bundle_hash(bundle)
    {**CHANGES, **NO_CHANGES}[what](bundle)
    assert (bundle_hash(bundle) != before) == (what in CHANGES)
    if what in CHANGES:
        with pytest.raises(ConfigError, match=f"{bundle_hash(bundle)}, not the trusted {before}"):
            load_bundle(bundle, before)


def test_the_hash_does_not_depend_on_where_the_bundle_lies(original: Path, bundle: Path) -> None:
    assert bundle_hash(original) == bundle_hash(bundle)
    (bundle / "more").symlink_to(original / "configs")
    with pytest.raises(ConfigError, match="links to a folder"):
        bundle_hash(bundle)


def drop(*keys: str) -> Change:
    def change(content: dict[str, Any]) -> None:
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return change


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("train", ("network_def",), "network_def"),
        ("train", ("validate", "inferer"), "validate#inferer"),
        ("train", ("validate", "preprocessing"), "validate#preprocessing"),
        ("metadata", ("network_data_format", "outputs"), "regions="),
    ],
)
def test_what_is_not_found_is_named(bundle: Path, name: str, keys: tuple[str, ...], message: str) -> None:
    edit(bundle, name, drop(*keys))
    with pytest.raises(ConfigError, match=message) as error:
        load(bundle)
    assert "give it" in str(error.value) or "overrides=" in str(error.value) or "give regions" in str(error.value)


def test_channels_are_asked_for_only_where_they_are_needed(bundle: Path) -> None:
    edit(bundle, "metadata", drop("network_data_format", "inputs"))
    found = load(bundle)
    with pytest.raises(ConfigError, match="channels="):
        _ = found.channel_order
    assert load(bundle, channels=["flair", "T1-Gd", "t1n", "t2w"]).channel_order == (3, 1, 0, 2)
    with pytest.raises(ConfigError, match="not T1, T1c, T2, FLAIR"):
        _ = load(bundle, channels=["CT"]).channel_order


def test_what_is_given_counts(bundle: Path) -> None:
    found = load(bundle, regions=["ET", "TC", "WT"], overrides={"validate#inferer#overlap": 0.25}, head="sigmoid")
    assert found.head.region_names == ("ET", "TC", "WT")
    assert found.inferer.overlap == 0.25  # type: ignore[attr-defined]
    softmax = load(bundle, head="softmax", regions={"a": [1], "b": 2}).head
    assert softmax == Head("softmax", {"a": (1,), "b": (2,)})


def test_a_softmax_bundle(bundle: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        discrete = {"_target_": "AsDiscreted", "keys": "pred", "argmax": True}
        content["validate#postprocessing"] = {"_target_": "Compose", "transforms": [discrete]}

    edit(bundle, "evaluate", change)
    edit(bundle, "metadata", lambda c: c["network_data_format"]["outputs"]["pred"].update(
        channel_def={"0": "background", "1": "edema", "2": "NCR", "3": "enhancing tumor"}))  # fmt: skip
    assert load(bundle).head.regions == {"WT": (1, 2, 3), "TC": (2, 3), "ET": (3,)}


def other_network() -> dict[str, torch.Tensor]:
    return {"weight": torch.zeros(3)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "none of model.pt"),
        (b"", "cannot be read"),
        ([1, 2], "no state dict"),
        ({"model": {"weight": torch.zeros(3)}}, "do not fit"),
        ({"a": torch.tensor(float("nan"))}, "NaN"),
        ({"model": Path("x")}, "weights_only"),
    ],
)
def test_bad_weights(bundle: Path, content: Any, message: str) -> None:
    path = bundle / "models" / "model.pt"
    path.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        load(bundle)


def test_safetensors(bundle: Path, tmp_path: Path) -> None:
    save, available = optional_import("safetensors.torch", name="save_file")
    if not available:
        pytest.skip("safetensors is not installed")
    (bundle / "models" / "model.pt").unlink()
    save(weights(), str(bundle / "models" / "model.safetensors"))
    found = load(bundle)
    assert found.weights.name == "model.safetensors"
    assert all(torch.equal(found.network.state_dict()[k], v) for k, v in weights().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: shutil.rmtree(b / "configs"), "no MONAI bundle"),
        (lambda b: (b / "configs" / "metadata.json").write_text("{"), "metadata.json cannot be read"),
        (lambda b: (b / "configs" / "train.json").write_text("{"), "reading train.json"),
        (lambda b: edit(b, "train", lambda c: c["network_def"].update(_target_="NoSuchNet")), "NoSuchNet"),
        (lambda b: edit(b, "train", lambda c: c.update(network_def=3)), "not a torch module"),
        (lambda b: [(b / "configs" / f"{n}.json").unlink() for n in ("train", "evaluate")], "no train, evaluate"),
    ],
)
def test_bad_bundles(bundle: Path, change: Callable[[Path], Any], message: str) -> None:
    change(bundle)
    with pytest.raises(MonaiAdvError, match=message):
        load(bundle)


def test_a_data_list_that_is_not_there_is_said_when_it_is_asked_for(bundle: Path) -> None:
    found = load(bundle, overrides={"data_list_file_path": "nowhere.json"})
    with pytest.raises(ConfigError, match=r"validate#dataset#data.*overrides"):
        found.items()
