"""Threat models: what may change, by how much, in which units."""

from monai_adv.threats.ball import Ball, L2Ball, LInfBall, ParametricBall
from monai_adv.threats.levels import Levels
from monai_adv.threats.threat import L2, THREATS, LInf, Parametric, Threat, create_threat
from monai_adv.threats.units import UNITS, foreground, unit_scale

__all__ = [
    "L2",
    "THREATS",
    "UNITS",
    "Ball",
    "L2Ball",
    "LInf",
    "LInfBall",
    "Levels",
    "Parametric",
    "ParametricBall",
    "Threat",
    "create_threat",
    "foreground",
    "unit_scale",
]
