"""Arguments and options that several commands have: one spelling, one default, one text, one completion each.

The names a user may give are written out here, because completion must not import torch to find them; the tests hold
them against the registries.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer

ATTACKS = (
    "noise", "fgsm", "ifgsm", "targeted_ifgsm", "pgd", "mifgsm", "segpgd", "cospgd", "apgd", "sea", "ensemble", "ssm",
    "asm", "asma", "dag", "fmn", "alma_prox", "minimal", "universal", "vafa", "bias_field", "gamma", "deformation",
    "affine", "synthesis", "motion", "ghosting", "gibbs", "rician", "square", "transfer",
)  # fmt: skip
MODALITIES = ("T1", "T1c", "T2", "FLAIR", "all")
RULES = ("next", "background", "permute", "least_likely", "remove_smallest_lesion")

Units = Literal["std", "range", "absolute"]
Norm = Literal["linf", "l2"]
HeadKind = Literal["softmax", "sigmoid"]
Scheme = Literal[
    "brats2017", "brats2018", "brats2019", "brats2020", "brats2021", "brats2023", "brats2024", "brats2025", "msd"
]
Loss = Literal["ce", "dice", "dice_ce", "margin", "focal", "masked_ce", "balanced_ce", "js", "spherical"]
Network = Literal["UNet", "BasicUNet", "SegResNet", "DynUNet", "AttentionUnet", "UNETR", "SwinUNETR", "VNet"]
Method = Literal[
    "plain", "noise", "fgsm_at", "pgd_at", "free", "trades", "vafa_at", "distillation", "synthesis", "offline"
]
Overlay = Literal["attack", "defend", "robust_train"]
Store = Literal["source", "float32", "int16"]
MaskMode = Literal["calibrated", "paper"]
UniversalMode = Literal["untargeted", "static", "dynamic"]
Correction = Literal["holm", "bonferroni"]
Join = Literal["path", "name"]


def _begins(names: tuple[str, ...], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def complete_attack(incomplete: str) -> list[str]:
    return _begins(ATTACKS, incomplete)


def complete_modality(incomplete: str) -> list[str]:
    return _begins(MODALITIES, incomplete)


def _complete_rule(incomplete: str) -> list[str]:
    return _begins(RULES, incomplete)


def _complete_subject(ctx: typer.Context, incomplete: str) -> list[str]:
    """Folders and files of the FOLDER given before it, without their endings: what most releases call a subject."""
    root = ctx.params.get("root") or next(iter(ctx.args), None)  # a line that is not finished leaves it in args
    try:
        names = [] if root is None else sorted(path.name.split(".")[0] for path in Path(str(root)).iterdir())
    except OSError:
        return []
    return _begins(tuple(name for name in names if name), incomplete)


LOSSES, NETWORKS, METHODS = (", ".join(get_args(kind)) for kind in (Loss, Network, Method))


def above_zero(value: Any) -> Any:
    """The value of an option whose numbers must be larger than 0.

    Raises:
        typer.BadParameter: says why 0 is none.
    """
    for number in value if isinstance(value, (list, tuple)) else [value]:
        if number is not None and not number > 0:
            raise typer.BadParameter(f"{number:g} must be a number > 0; what is not changed is always scored, as clean")
    return value


# -- what is worked on
Images = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="Subjects as NIfTI, NRRD or MetaImage, in a BraTS or MSD layout.")
]
Labelled = Annotated[
    Path,
    typer.Argument(metavar="FOLDER", help="Subjects with labels: NIfTI, NRRD or MetaImage in a BraTS or MSD layout."),
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder: the `output` of a study.")]
Checkpoint = Annotated[
    Path,
    typer.Option(metavar="CHECKPOINT", help="The victim, from `monai-adv train`, or `monai-adv victim` for weights."),
]
Subjects = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SUBJECT", help="Name of a subject; may be repeated.", show_default="all",
        autocompletion=_complete_subject,
    ),
]  # fmt: skip
SchemeName = Annotated[
    Scheme | None,
    typer.Option(
        metavar="SCHEME", case_sensitive=False, show_default="told by the names",
        help="Label scheme: brats2017 to brats2021, brats2023, brats2024, brats2025 or msd.",
    ),
]  # fmt: skip
HoldOut = Annotated[
    int, typer.Option(min=0, metavar="N", help="Leave out every n-th subject by name, from the first; 0 leaves none.")
]
Resample = Annotated[bool, typer.Option("--resample", help="Run the network at the voxel size it was trained at.")]

# -- the threat model and the attack
EPS = "Budget: the largest change, in --units."
UNITS = "Of --eps: std of the brain, share of its 0.5-99.5 percentile range, or numbers as stored."
NORM = "The change of every voxel, or the Euclidean length of all of it."
AttackName = Annotated[
    str,
    typer.Option("--attack", metavar="ATTACK", help="Attack, see `monai-adv attacks`.", autocompletion=complete_attack),
]
_TARGETS = (
    "background, permute, least_likely, remove_smallest_lesion, or YAML: '{hide: ET}', '{subject: NAME}', "
    "'{file: PATH}'."
)
Target = Annotated[
    str | None, typer.Option(metavar="RULE", help=f"Aimed at: {_TARGETS}", autocompletion=_complete_rule)
]
TargetOrNext = Annotated[
    str,
    typer.Option(
        metavar="RULE", help=f"Aimed at: next (the next subject's mask), {_TARGETS}", autocompletion=_complete_rule
    ),
]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="KEY=VALUE", help="Option of the attack; may be repeated.", show_default=False),
]

# -- training
Steps = Annotated[int, typer.Option(min=1, metavar="N", help="Optimiser steps.")]
Minutes = Annotated[
    float | None,
    typer.Option(min=0.0, metavar="MINUTES", help="Stop after these, if steps are left.", show_default="never"),
]
LearningRate = Annotated[float, typer.Option(metavar="RATE", help="Peak learning rate.")]
Seed = Annotated[int, typer.Option(min=0, metavar="SEED", help="Seed of every random number.")]

# -- runs
PROBES = "The automatic checks that compute something."
REPORT = "Tables, figures and report.html."
