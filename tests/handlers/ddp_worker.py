"""One process of distributed evaluations, one after the other; started by test_distributed.py."""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from monai.data import DataLoader, Dataset, DistributedSampler, MetaTensor, partition_dataset
from monai.handlers import IgniteMetricHandler, MetricsSaver, from_engine
from monai.inferers import SlidingWindowInferer
from monai.metrics import DiceMetric
from monai.transforms import AsDiscreted, Compose
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from monai_adv.engines import AttackEvaluator
from monai_adv.errors import ConfigError
from monai_adv.handlers import AttackRecordSaver


def cases(count: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    affine = torch.diag(torch.tensor([2.0, 2.0, 3.0, 1.0], dtype=torch.float64))
    found = []
    for index in range(count):
        meta = {"filename_or_obj": f"case{index}.nii.gz"}
        image = MetaTensor(torch.randn(4, 8, 8, 8, generator=generator), affine=affine, meta=meta)
        label = MetaTensor(torch.randint(0, 4, (1, 8, 8, 8), generator=generator), affine=affine)
        found.append({"image": image, "label": label, "subject": f"case{index}"})
    return found


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(4, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU(), nn.Conv3d(6, 4, 1))


def evaluate(folder: Path, count: int = 5, road: str = "one") -> None:
    """Attack ``count`` cases; ``road`` says how they are dealt to the processes."""
    data, net = cases(count), network()
    options: dict[str, Any] = {}
    if road != "one":
        net = DistributedDataParallel(net)
    if road == "partition":
        data = partition_dataset(data, num_partitions=2, even_divisible=False)[distributed.get_rank()]
    elif road == "dealt":
        data = data[distributed.get_rank() :: 2]
    elif road in ("sampler", "padded"):
        options["sampler"] = DistributedSampler(Dataset(data), even_divisible=road == "padded", shuffle=False)
    metric = DiceMetric(include_background=False, ignore_empty=False)
    dice = IgniteMetricHandler(metric_fn=metric, output_transform=from_engine(["pred", "label"]), save_details=True)
    discrete = [AsDiscreted("pred", argmax=True, to_onehot=4), AsDiscreted("label", to_onehot=4)]
    saver = AttackRecordSaver(folder / "records.csv", victim="net")
    AttackEvaluator(
        device="cpu", val_data_loader=DataLoader(Dataset(data), batch_size=1, **options), network=net,
        inferer=SlidingWindowInferer((6, 6, 6), 2, 0.25), attack={"name": "pgd", "eps": 0.3, "steps": 2},
        postprocessing=Compose(discrete), key_val_metric={"dice": dice},
        val_handlers=[
            saver, MetricsSaver(folder, metric_details="dice", batch_transform=lambda x: [i["image"].meta for i in x]),
        ],
    ).run()  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    root, me = Path(sys.argv[1]), int(sys.argv[2])
    said = {}
    for case, (count, road) in json.loads(sys.argv[3]).items():
        # every process group begins anew: after an error the processes of the last one are out of step
        distributed.init_process_group(
            "gloo", f"file://{root / case}.store", timedelta(seconds=15), rank=me, world_size=2
        )
        try:
            evaluate(root / case, count, road)
            said[case] = ""
        except (ConfigError, RuntimeError) as error:
            said[case] = f"{type(error).__name__}: {error}"
        distributed.destroy_process_group()
    (root / f"said{me}.json").write_text(json.dumps(said))
