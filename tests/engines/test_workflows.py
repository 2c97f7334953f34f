"""Attacks in MONAI engines with MONAI's own loaders, post-processing, metrics and handlers around them."""

from __future__ import annotations

import csv
import logging
import threading
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader, Dataset, ThreadDataLoader
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import (
    CheckpointSaver,
    EarlyStopHandler,
    IgniteMetricHandler,
    MeanDice,
    MetricsSaver,
    StatsHandler,
    ValidationHandler,
    from_engine,
    stopping_fn_from_metric,
)
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric
from monai.transforms import AsDiscreted, Compose, CropForegroundd, Invertd, SaveImaged
from torch import nn
from workflows import ANISOTROPIC_LPS, SHAPE, cohort, one_hot, preprocessing, small_unet, windows

from monai_adv import attacks
from monai_adv.engines import AttackEvaluator, AttackIteration, AttackKeys
from monai_adv.errors import ConfigError
from monai_adv.transforms import NormalizeNonzeroBatch, make_differentiable

CPU = torch.device("cpu")
ATTACK = {"name": "ifgsm", "eps": 0.5, "steps": 2}


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture
def network() -> nn.Module:
    return small_unet()


def batches(items: list[dict[str, Any]], transforms: Any = None, cls: Any = DataLoader, size: int = 2) -> DataLoader:
    return cls(Dataset(items, transforms or preprocessing()), batch_size=size)


def evaluator(kind: str, network: nn.Module, loader: Any, attack: Any = ATTACK, **options: Any) -> SupervisedEvaluator:
    options = {"device": CPU, "val_data_loader": loader, "network": network, "inferer": windows(), **options}
    if kind == "clean":
        return SupervisedEvaluator(**options)
    if kind == "iteration":
        return SupervisedEvaluator(**options, iteration_update=AttackIteration(attack))
    return AttackEvaluator(**options, attack=attack)


def dice_metric() -> IgniteMetricHandler:
    metric = DiceMetric(include_background=False, ignore_empty=False)
    return IgniteMetricHandler(metric_fn=metric, output_transform=from_engine(["pred", "label"]), save_details=True)


def raw_rows(folder: Path) -> dict[str, np.ndarray]:
    with open(folder / "dice_raw.csv", newline="") as file:
        return {Path(r["filename"]).parent.name: np.array([float(r[f"class{k}"]) for k in range(3)])
                for r in csv.DictReader(file)}  # fmt: skip


def run_with_everything(kind: str, items: list[dict[str, Any]], folder: Path, cls: Any) -> SupervisedEvaluator:
    """As a MONAI bundle evaluates: back to the grid of the file, saved, discretised, measured, written."""
    transforms = preprocessing()
    post = Compose(
        [
            AsDiscreted("pred", argmax=True),
            Invertd(("pred", "label"), transforms, orig_keys=("image", "label"), nearest_interp=True),
            *(
                SaveImaged(key, output_dir=folder, output_postfix=key, separate_folder=False, print_log=False)
                for key in ("pred", "label")
            ),
            AsDiscreted(("pred", "label"), to_onehot=4),
        ]
    )
    engine = evaluator(
        kind, small_unet(), batches(items, transforms, cls), postprocessing=post,
        key_val_metric={"dice": dice_metric()},
        additional_metrics={"mean_dice": MeanDice(False, output_transform=from_engine(["pred", "label"]))},
        val_handlers=[
            StatsHandler(name="evaluation", output_transform=lambda x: None),
            MetricsSaver(folder, metric_details="dice", batch_transform=lambda x: [i["image"].meta for i in x]),
        ],
    )  # fmt: skip
    engine.run()
    return engine


@pytest.mark.parametrize("cls", [DataLoader, ThreadDataLoader])
@pytest.mark.parametrize("kind", ["iteration", "evaluator"])
def test_what_monai_puts_behind_an_evaluator(kind: str, cls: Any, items: list[dict[str, Any]], tmp_path: Path) -> None:
    engine = run_with_everything(kind, items, tmp_path, cls)
    rows = raw_rows(tmp_path)
    assert list(rows) == [item["subject"] for item in items]
    assert engine.state.metrics["dice"] == pytest.approx(np.mean(list(rows.values())), abs=1e-6)
    for item in items:  # judged by the files alone: their geometry, and the Dice between them
        subject = item["subject"]
        saved = [nib.load(tmp_path / f"{subject}-{name}.nii.gz") for name in ("t1n_pred", "seg_label")]
        for image in saved:
            assert image.shape == SHAPE
            assert np.array_equal(image.affine, ANISOTROPIC_LPS)
        predicted, truth = (np.asarray(image.dataobj) for image in saved)
        given = np.asarray(nib.load(item["label"]).dataobj)
        assert (truth == given).mean() > 0.95  # resampled there and back, the same way round
        assert (truth[::-1] == given).mean() < (truth == given).mean() - 0.05
        for k in (1, 2, 3):
            a, b = predicted == k, truth == k
            assert rows[subject][k - 1] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()), abs=1e-6)


def test_both_roads_score_the_same_attack(items: list[dict[str, Any]], tmp_path: Path) -> None:
    found = {}
    for kind in ("clean", "iteration", "evaluator"):
        run_with_everything(kind, items, tmp_path / kind, DataLoader)
        found[kind] = raw_rows(tmp_path / kind)
    for subject, dice in found["iteration"].items():
        assert np.array_equal(dice, found["evaluator"][subject])
    assert np.mean(list(found["iteration"].values())) < np.mean(list(found["clean"].values())) - 0.02


# ignite deprecates what MONAI 1.6.1 passes to its EarlyStopping
@pytest.mark.filterwarnings("ignore:'(min|cumulative)_delta' is deprecated:DeprecationWarning")
def test_adversarial_training_with_validation_checkpoints_and_early_stop(
    items: list[dict[str, Any]], network: nn.Module, tmp_path: Path
) -> None:
    loader = batches(items, preprocessing(spacing=None))
    validation = evaluator(
        "evaluator", network, loader, postprocessing=one_hot(), key_val_metric={"dice": dice_metric()},
        val_handlers=[
            StatsHandler(output_transform=lambda x: None),
            CheckpointSaver(tmp_path, {"network": network}, save_key_metric=True),
        ],
    )  # fmt: skip
    trainer = SupervisedTrainer(
        device=CPU, max_epochs=5, train_data_loader=loader, network=network,
        optimizer=torch.optim.Adam(network.parameters(), 0.0),  # nothing is learnt: the second epoch is no better
        loss_function=DiceCELoss(softmax=True, to_onehot_y=True), iteration_update=AttackIteration(ATTACK),
        postprocessing=one_hot(),
        key_train_metric={"train_dice": MeanDice(False, output_transform=from_engine(["pred", "label"]))},
        train_handlers=[
            ValidationHandler(1, validation),
            StatsHandler(tag_name="loss", output_transform=from_engine(["loss"], first=True)),
            CheckpointSaver(tmp_path, {"network": network}, save_final=True, final_filename="final.pt"),
        ],
    )  # fmt: skip
    stop = EarlyStopHandler(1, stopping_fn_from_metric("dice"), trainer, epoch_level=True)
    stop.attach(validation)
    losses: list[float] = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: losses.append(e.state.output[0]["loss"]))
    logging.disable(logging.WARNING)
    try:
        trainer.run()
    finally:
        logging.disable(logging.NOTSET)
    assert trainer.state.epoch == 2
    assert validation.state.best_metric_epoch == 1
    assert losses[0] == losses[2]
    assert network.training
    assert all(p.requires_grad for p in network.parameters())
    kept = torch.load(tmp_path / "final.pt")
    assert list(kept) == list(network.state_dict())
    assert list(tmp_path.glob("*key_metric*.pt"))


def test_tensorboard_gets_scalars_and_adversarial_images(
    items: list[dict[str, Any]], network: nn.Module, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    from monai.handlers import TensorBoardImageHandler, TensorBoardStatsHandler
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars = TensorBoardStatsHandler(log_dir=str(tmp_path), output_transform=lambda x: None)
    images = TensorBoardImageHandler(
        log_dir=str(tmp_path), batch_transform=from_engine(["image", "label"]), output_transform=from_engine(["pred"])
    )
    evaluator(
        "evaluator", network, batches(items), postprocessing=AsDiscreted("pred", argmax=True),
        key_val_metric={"dice": MeanDice(False, output_transform=from_engine(["pred", "label"]), num_classes=4)},
        val_handlers=[scalars, images],
    ).run()  # fmt: skip
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["scalars"] == ["dice"]
    assert any("image" in tag for tag in events.Tags()["images"])


def test_mixed_precision_on_the_cpu_is_the_attack_evaluators_own(
    items: list[dict[str, Any]], network: nn.Module
) -> None:
    seen: dict[str, Any] = {}
    for amp in (False, True):
        engine = evaluator("evaluator", network, batches(items), amp=amp, decollate=False)
        engine.run()
        seen[amp] = engine.state.output
    low, high = (seen[amp][AttackKeys.CLEAN_PRED].as_tensor() for amp in (True, False))
    assert low.dtype == torch.float32
    assert 1e-4 < float((low - high).abs().max()) < 0.1  # bfloat16 has 8 bits
    image = seen[True]["image"].as_tensor()
    with torch.no_grad(), torch.autocast("cpu"):
        again = windows()(image, network.eval()).float()
    assert torch.allclose(seen[True]["pred"].as_tensor(), again, atol=0.05)


@pytest.mark.parametrize("amp", [False, True])
def test_what_the_iteration_attacks_is_what_monai_evaluates(
    amp: bool, items: list[dict[str, Any]], network: nn.Module
) -> None:
    """MONAI casts on CUDA devices only: on a CPU it evaluates, and the attack searches, in float32."""
    iteration = AttackIteration(ATTACK)
    engine = SupervisedEvaluator(CPU, batches(items), network, inferer=windows(), iteration_update=iteration,
                                 amp=amp, decollate=False)  # fmt: skip
    if amp and not torch.cuda.is_available():
        with pytest.warns(UserWarning, match="CUDA is not available"):
            engine.run()
    else:
        engine.run()
    assert iteration.result is not None
    prediction = engine.state.output["pred"].argmax(1, keepdim=True)
    assert torch.equal(prediction.as_tensor(), iteration.result.prediction)


@pytest.mark.parametrize("kind", ["iteration", "evaluator"])
def test_without_labels_the_prediction_is_attacked(kind: str, items: list[dict[str, Any]], network: nn.Module) -> None:
    class Unlabelled(Dataset):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"image": super().__getitem__(index)["image"]}

    loader = DataLoader(Unlabelled(items, preprocessing()), batch_size=1)
    engine = evaluator(kind, network, loader, {**ATTACK, "label_source": "prediction"})
    engine.run()
    assert engine.state.output[0]["label"] is None
    assert not torch.equal(engine.state.output[0]["image"], engine.state.batch[0]["image"])
    with pytest.raises(ConfigError, match="label_source='prediction'"):
        evaluator(kind, network, loader).run()


def test_the_batchs_voxel_size_reaches_the_attack(items: list[dict[str, Any]], network: nn.Module) -> None:
    """A deformation is limited in mm: on a grid of 1.5 x 1.5 x 2 mm it is another one than on 1 mm."""
    attack = attacks.create("deformation", eps=2.0, steps=2)
    iteration = AttackIteration(attack)
    engine = SupervisedEvaluator(CPU, batches(items, size=1), network, inferer=windows(), iteration_update=iteration)
    engine.run()
    assert iteration.result is not None
    from monai_adv.victims import Victim

    clean, label = engine.state.batch[0]["image"].as_tensor()[None], engine.state.batch[0]["label"].as_tensor()[None]
    for spacing, same in (((1.5, 1.5, 2.0), True), (None, False)):
        found = attack(Victim(network, windows()), clean, label, spacing=spacing)
        assert torch.equal(found.image, iteration.result.image.as_tensor()) == same


@pytest.mark.parametrize("own_grid", [False, True])
def test_preprocessing_is_in_front_of_the_attack_and_of_the_iteration(
    own_grid: bool, items: list[dict[str, Any]], network: nn.Module
) -> None:
    """Batches in the file's units: the budget is in them, and MONAI's own iteration scores the normalised image."""
    deployed = preprocessing()
    cropped = Compose([*deployed.transforms, CropForegroundd(("image", "label"), source_key="image")])
    normalise = make_differentiable(cropped) if own_grid else NormalizeNonzeroBatch()
    before = 2 if own_grid else -1  # what the data loader does: only loading, or everything but the z-scores
    loader = DataLoader(Dataset(items, Compose(deployed.transforms[:before])), batch_size=1)
    attack = {"name": "ifgsm", "eps": 20.0, "units": "absolute", "steps": 2}
    one = SupervisedEvaluator(CPU, loader, network, inferer=windows(), decollate=False,
                              iteration_update=AttackIteration(attack, preprocessing=normalise))  # fmt: skip
    two = AttackEvaluator(CPU, loader, network, inferer=windows(), decollate=False, attack=attack,
                          preprocessing=normalise)  # fmt: skip
    for engine in (one, two):
        inferer = engine.inferer
        engine.run()
        assert engine.inferer is inferer
    clean, attacked, logits = one.state.batch["image"], one.state.output["image"], one.state.output["pred"]
    assert float((attacked - clean).abs().max()) == pytest.approx(20, rel=1e-4)
    assert torch.equal(logits.as_tensor(), two.state.output["pred"].as_tensor())
    assert logits.shape[2:] == clean.shape[2:] == (SHAPE if own_grid else clean.shape[2:])
    assert torch.equal(logits.affine, clean.affine)


def test_a_trainer_with_preprocessing_learns_through_it(network: nn.Module) -> None:
    """Adversarial training on scanner units is training on the normalised attacked image."""
    raw = 100 + 10 * torch.randn(1, 4, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    label = (raw[:, :1] > 105).float()
    normalise = NormalizeNonzeroBatch()
    iteration = AttackIteration({"name": "noise", "eps": 5.0, "units": "absolute"}, preprocessing=normalise)
    trainer = SupervisedTrainer(
        CPU, 1, [{"image": raw, "label": label}], network, torch.optim.SGD(network.parameters(), 0.1),
        DiceCELoss(softmax=True, to_onehot_y=True), iteration_update=iteration, decollate=False,
    )  # fmt: skip
    expected = small_unet()
    trainer.run()
    assert iteration.result is not None
    assert float((iteration.result.image - raw).abs().max()) == pytest.approx(5, rel=1e-3)
    loss = DiceCELoss(softmax=True, to_onehot_y=True)(expected(normalise(iteration.result.image)), label)
    assert trainer.state.output["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    torch.optim.SGD(expected.parameters(), 0.1).step()
    for mine, theirs in zip(network.parameters(), expected.parameters()):
        assert torch.allclose(mine, theirs, atol=1e-6)


def test_a_trainer_draws_new_noise_for_every_batch_and_an_evaluator_the_same(network: nn.Module) -> None:
    one = {"image": torch.randn(1, 4, 8, 8, 8, generator=torch.Generator().manual_seed(0))}
    one["label"] = torch.zeros(1, 1, 8, 8, 8)
    trainer = SupervisedTrainer(
        CPU, 1, [one, one], network, torch.optim.SGD(network.parameters(), 0.0), DiceCELoss(to_onehot_y=True),
        iteration_update=AttackIteration({"name": "noise", "eps": 0.1}), decollate=False,
    )  # fmt: skip
    evaluation = evaluator("iteration", network, [one, one], {"name": "noise", "eps": 0.1}, decollate=False)
    for engine, same in ((trainer, False), (evaluation, True)):
        seen: list[torch.Tensor] = []
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e, s=seen: s.append(e.state.output["image"]))
        engine.run()
        assert torch.equal(*seen) == same


def test_what_an_attack_cannot_follow_is_refused(items: list[dict[str, Any]], network: nn.Module) -> None:
    loader = batches(items)

    def other_key(batch: Any, *_: Any, **__: Any) -> Any:
        return batch["image"] * 2, batch["label"]

    def condition(batch: Any, *_: Any, **__: Any) -> Any:
        return batch["image"], batch["label"], (torch.ones(1),), {}

    with pytest.raises(ConfigError, match="would not see the attacked"):
        evaluator("iteration", network, loader, prepare_batch=other_key).run()
    for kind in ("iteration", "evaluator"):
        with pytest.raises(ConfigError, match="nothing for the inferer"):
            evaluator(kind, network, loader, prepare_batch=condition).run()
    with pytest.raises(ConfigError, match="mode='eval'"):
        evaluator("evaluator", network, loader, mode="train")


@pytest.mark.parametrize("end", ["terminated", "short epoch", "error"])
def test_a_thread_loader_ends_with_an_engine_that_ends_early(
    end: str, items: list[dict[str, Any]], network: nn.Module
) -> None:
    before = set(threading.enumerate())
    options = {"epoch_length": 1} if end == "short epoch" else {}
    loader = batches(items, cls=ThreadDataLoader, size=1)
    engine = evaluator("evaluator", network, loader, {"name": "fgsm", "eps": 0.1}, **options)

    @engine.on(Events.ITERATION_COMPLETED)
    def _end(engine: Any) -> None:
        assert set(threading.enumerate()) - before
        if end == "terminated":
            engine.terminate()
        elif end == "error":
            raise ValueError(end)

    if end == "error":
        with pytest.raises(ValueError, match=end):
            engine.run()
    else:
        engine.run()
    assert engine.state.iteration == 1
    assert not set(threading.enumerate()) - before
    assert network.training
