"""Simulated multi-contrast MRI of brains with gliomas, in the form of a BraTS folder."""

from __future__ import annotations

from monai_adv.data.simulation.cohort import simulate_cohort
from monai_adv.data.simulation.geometry import Geometry
from monai_adv.data.simulation.subject import RECIPE, SimulatedSubject, simulate_subject

__all__ = ["RECIPE", "Geometry", "SimulatedSubject", "simulate_cohort", "simulate_subject"]
