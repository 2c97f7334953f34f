"""How a perturbation is searched: one class per method and a registry of names."""

from monai_adv.attacks.auto import APGD, SEA
from monai_adv.attacks.base import Attack
from monai_adv.attacks.black_box import Square, Transfer
from monai_adv.attacks.dense import DAG
from monai_adv.attacks.ensemble import Ensemble
from monai_adv.attacks.frequency import VAFA
from monai_adv.attacks.mask import ASM, ASMA, SSM, target_accuracy, target_iou
from monai_adv.attacks.minimal import Minimal
from monai_adv.attacks.minimum_norm import FMN, ALMAProx, MinimumNorm
from monai_adv.attacks.momentum import MIFGSM
from monai_adv.attacks.physical import BiasFieldAttack, GammaAttack, PhysicalAttack
from monai_adv.attacks.physical_geometry import AffineAttack, DeformationAttack, GeometricAttack
from monai_adv.attacks.physical_kspace import GhostingAttack, GibbsAttack, MotionAttack, RicianAttack
from monai_adv.attacks.registry import (
    ATTACKS,
    THREAT_OPTIONS,
    attack_class,
    available,
    build,
    create,
    option_defaults,
    option_names,
    register,
)
from monai_adv.attacks.result import AttackResult, Cost
from monai_adv.attacks.run import Run
from monai_adv.attacks.segmentation import CosPGD, SegPGD
from monai_adv.attacks.sign import FGSM, IFGSM, PGD, Noise, TargetedIFGSM
from monai_adv.attacks.synthesis import SynthesisAttack
from monai_adv.attacks.universal import Universal, UniversalPerturbation
from monai_adv.attacks.universal_training import fit_universal

__all__ = [
    "APGD",
    "ASM",
    "ASMA",
    "ATTACKS",
    "DAG",
    "FGSM",
    "FMN",
    "IFGSM",
    "MIFGSM",
    "PGD",
    "SEA",
    "SSM",
    "THREAT_OPTIONS",
    "VAFA",
    "ALMAProx",
    "AffineAttack",
    "Attack",
    "AttackResult",
    "BiasFieldAttack",
    "CosPGD",
    "Cost",
    "DeformationAttack",
    "Ensemble",
    "GammaAttack",
    "GeometricAttack",
    "GhostingAttack",
    "GibbsAttack",
    "Minimal",
    "MinimumNorm",
    "MotionAttack",
    "Noise",
    "PhysicalAttack",
    "RicianAttack",
    "Run",
    "SegPGD",
    "Square",
    "SynthesisAttack",
    "TargetedIFGSM",
    "Transfer",
    "Universal",
    "UniversalPerturbation",
    "attack_class",
    "available",
    "build",
    "create",
    "fit_universal",
    "option_defaults",
    "option_names",
    "register",
    "target_accuracy",
    "target_iou",
]
