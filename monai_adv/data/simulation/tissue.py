"""Tissue constants at 3 T and the signal equations of the four contrasts."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from monai_adv.data.simulation.fields import Draws


class Tissue(NamedTuple):
    """Relaxation times (ms) and relative proton density of a tissue at 3 T, and where they come from."""

    t1: float
    t2: float
    pd: float
    source: str


_OURS = "chosen by us"

TISSUES: dict[str, Tissue] = {
    "csf": Tissue(4200, 1500, 1.00, f"T1 near Lu 2005 (3817 +/- 424, which they call too short); T2 {_OURS}"),
    "gm": Tissue(1400, 98, 0.83, "T1 between Wansapura 1999 (1331) and Stanisz 2005 (1820); T2 Stanisz (99)"),
    "wm": Tissue(850, 72, 0.70, "T1 Wansapura 1999 (832); T2 between Stanisz 2005 (69) and Wansapura (79)"),
    "deep_gm": Tissue(1180, 80, 0.78, f"between grey and white matter, T2 shortened by iron; {_OURS}"),
    "wmh": Tissue(1250, 125, 0.80, f"{_OURS}: longer than white matter, not as long as oedema"),
    "oedema": Tissue(1500, 150, 0.86, f"{_OURS}: water added to white matter"),
    "non_enhancing": Tissue(1750, 165, 0.90, f"{_OURS}: darker than oedema on T1, bright on T2 and FLAIR"),
    "necrosis": Tissue(2500, 290, 0.95, f"{_OURS}: between solid tumour and fluid"),
    "enhancing": Tissue(1500, 115, 0.88, f"{_OURS}: before contrast like the cortex, or slightly darker"),
    "vessel": Tissue(1900, 30, 0.80, f"T1 of blood, Stanisz 2005 (1932); T2 {_OURS}: signal lost to flow"),
}
"""Mean constants of every tissue the simulation mixes; each subject has its own, scattered around them.

Proton densities are ours, near the water contents in use for spectroscopy (grey 0.78, white 0.65, CSF 0.97: Gasparovic
et al., Magn Reson Med 55, 2006). Wansapura et al., J Magn Reson Imaging 9, 1999; Stanisz et al., Magn Reson Med 54,
2005; Lu et al., J Magn Reson Imaging 22, 2005.
"""

RELAXIVITY = 4.5e-3
"""Longitudinal relaxivity of gadolinium at 3 T, per ms and mM: plasma 3.7 to 5.0 per s and mM for the usual linear and
macrocyclic agents (Rohrer et al., Invest Radiol 40, 2005)."""

VESSEL_GADOLINIUM = 1.3
"""Concentration (mM) in vessels, dura and choroid plexus after contrast; chosen by us."""

VESSEL_T2_AFTER_CONTRAST = 60.0
"""Effective T2 (ms) of vessels after contrast, longer than before: less of the signal is lost to flow; chosen by us."""


@dataclass(frozen=True)
class Sequence:
    """A spin-echo or inversion-recovery sequence, times in ms (`ti` is None for a spin echo)."""

    tr: float
    te: float
    ti: float | None = None

    def signal(self, t1: Tensor, t2: Tensor, pd: Tensor) -> Tensor:
        """Magnitude signal, relative to fully relaxed water: the textbook equations of both sequences."""
        recovered = torch.exp(-self.tr / t1)
        longitudinal = 1 - recovered if self.ti is None else (1 - 2 * torch.exp(-self.ti / t1) + recovered).abs()
        return pd * longitudinal * torch.exp(-self.te / t2)

    def scattered(self, draws: Draws) -> Sequence:
        """The same sequence with the times of another scanner: 6 % scatter, 3.5 % for the inversion time."""
        tr, te = self.tr * (1 + draws.normal(0.06)), self.te * (1 + draws.normal(0.06))
        return replace(self, tr=tr, te=te, ti=None if self.ti is None else self.ti * (1 + draws.normal(0.035)))

    def as_dict(self) -> dict[str, float]:
        """Plain data with the times rounded to 0.1 ms, without the times the sequence does not have."""
        return {f"{k}_ms": round(v, 1) for k, v in asdict(self).items() if v is not None}


SEQUENCES: dict[str, Sequence] = {
    "t1": Sequence(tr=550, te=10),
    "t2": Sequence(tr=4800, te=95),
    "flair": Sequence(tr=9000, te=115, ti=2450),
}
"""Mean protocol; T1 after contrast repeats the subject's T1."""


class Relaxation(NamedTuple):
    """One subject's constants of one tissue."""

    t1: float
    t2: float
    pd: float

    def signal(self, sequence: Sequence) -> float:
        """Signal of this tissue in `sequence`."""
        return float(sequence.signal(*(torch.tensor(v) for v in self)))


def subject_tissues(draws: Draws) -> dict[str, Relaxation]:
    """Constants of one subject: 5 % scatter of T1, 6 % of T2, 2 % of the proton density."""
    scatter = {name: (1 + draws.normal(0.05), 1 + draws.normal(0.06), 1 + draws.normal(0.02)) for name in TISSUES}
    return {n: Relaxation(*(value * s for value, s in zip(t[:3], scatter[n]))) for n, t in TISSUES.items()}


def shortened_t1(t1: float, gadolinium: Tensor | float) -> Tensor:
    """T1 (ms) after contrast: 1 / T1' = 1 / T1 + r1 c with the concentration c in mM."""
    return 1 / (1 / t1 + RELAXIVITY * torch.as_tensor(gadolinium))
