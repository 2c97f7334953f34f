"""From fractions of tissue to the four images a scanner would have stored."""

from __future__ import annotations

import torch
from torch import Tensor

from monai_adv.data.simulation.anatomy import Axes
from monai_adv.data.simulation.fields import Draws, SmoothField, blur
from monai_adv.data.simulation.tissue import (
    SEQUENCES,
    VESSEL_GADOLINIUM,
    VESSEL_T2_AFTER_CONTRAST,
    Relaxation,
    Sequence,
    shortened_t1,
    subject_tissues,
)

CONTRASTS = ("t1", "t1ce", "t2", "flair")
"""The images of a subject, in the order of its channels and by the suffix of their files."""


class Scanner:
    """The scanner and protocol of one subject.

    Args:
        seed: the subject's seed.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        draws = Draws(seed, "scanner")
        self._tissues = subject_tissues(draws)
        self._dose = draws.uniform(0.05, 0.22)  # mM: T1 falls by 300 to 950 ms (838 +/- 210: Nöth et al. 2020)
        self._texture, self._clouds = draws.field(6.0, 2), draws.field(14.0)
        self._shared_bias, self._shared_bias_size = draws.field(75.0), draws.uniform(0.02, 0.09)
        sequences = {name: sequence.scattered(draws) for name, sequence in SEQUENCES.items()}
        self.sequences = {name: sequences["t1" if name == "t1ce" else name] for name in CONTRASTS}

    @property
    def info(self) -> dict[str, object]:
        """Plain data for the subject's metadata."""
        sequences = {name: s.as_dict() for name, s in self.sequences.items()}
        return {"sequences": sequences, "gadolinium_mM": round(self._dose, 3)}

    def __call__(
        self, fractions: dict[str, Tensor], inside: Tensor, axes: Axes, spacing: float, flow: SmoothField
    ) -> Tensor:
        """The four images.

        Args:
            fractions: (X, Y, Z) of every tissue of `TISSUES`.
            inside: (X, Y, Z) bool, the brain; everything else is exactly zero, as after skull stripping.
            axes: the grid.
            spacing: of the grid in mm.
            flow: where CSF moves and shines up on FLAIR.

        Returns:
            (4, X, Y, Z) float32 in the arbitrary units of a scanner (mean of the brain 250 to 900).
        """
        texture, clouds = self._texture(axes), self._clouds(axes)[0]
        shared_bias = self._shared_bias(axes)[0] * self._shared_bias_size
        uptake = self._dose * (0.35 + torch.sigmoid(1.4 * texture[0] + 0.6))
        images = []
        for name in CONTRASTS:
            sequence, draws = self.sequences[name], Draws(self._seed, f"image {name}")
            signal = torch.zeros(inside.shape)
            for tissue, fraction in fractions.items():
                value = self._signal(tissue, sequence, uptake if name == "t1ce" else None)
                signal += fraction * value * _heterogeneity(tissue, texture, clouds)
            if name == "flair":  # CSF that flows in during the inversion is not suppressed
                moving = torch.sigmoid(4 * (flow(axes)[0] - 1.5)) * draws.uniform(0, 1)
                signal += 0.35 * fractions["csf"] * moving * self._tissues["gm"].signal(sequence)
            images.append(self._acquire(signal, inside, axes, spacing, shared_bias, draws, thin="t1" in name))
        return torch.stack(images)

    def _signal(self, tissue: str, sequence: Sequence, uptake: Tensor | None) -> Tensor | float:
        relaxation: Relaxation = self._tissues[tissue]
        if uptake is None or tissue not in ("enhancing", "vessel"):
            return relaxation.signal(sequence)
        t1, t2, pd = relaxation
        if tissue == "vessel":
            return Relaxation(float(shortened_t1(t1, VESSEL_GADOLINIUM)), VESSEL_T2_AFTER_CONTRAST, pd).signal(sequence)
        return sequence.signal(shortened_t1(t1, uptake), torch.tensor(t2), torch.tensor(pd))

    def _acquire(
        self,
        signal: Tensor,
        inside: Tensor,
        axes: Axes,
        spacing: float,
        shared_bias: Tensor,
        draws: Draws,
        *,
        thin: bool,
    ) -> Tensor:
        """Slice thickness, coil sensitivity, noise and gain of one image."""
        slice_mm = draws.uniform(0.3, 1.0) if thin else draws.uniform(0.6, 1.9)
        in_plane = 0.45 if spacing <= 1.2 else 0.3
        signal = blur(signal, (in_plane, in_plane, max(0.3, slice_mm / spacing)))
        bias = torch.exp(shared_bias + draws.field(60.0)(axes)[0] * draws.uniform(0.01, 0.05))
        mean = signal[inside].mean()
        sd = draws.uniform(0.012, 0.04) * mean
        gain = draws.uniform(250, 900) / mean
        real, imaginary = sd * draws.noise(signal.shape), sd * draws.noise(signal.shape)
        return ((signal * bias + real).square() + imaginary.square()).sqrt() * inside * gain  # Rician magnitude


def _heterogeneity(tissue: str, texture: Tensor, clouds: Tensor) -> Tensor | float:
    """Relative variation of the signal inside one tissue."""
    if tissue == "oedema":
        return 1 + 0.10 * clouds
    if tissue in ("non_enhancing", "necrosis", "enhancing"):
        return 1 + 0.10 * texture[1] + 0.06 * clouds
    if tissue in ("gm", "wm"):
        return 1 + 0.025 * texture[0]
    return 1.0
