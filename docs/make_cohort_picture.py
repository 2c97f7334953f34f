"""Draw docs/images/simulated_cohort.png: six simulated subjects, a row each.

Run from the repository root: python docs/make_cohort_picture.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from monai_adv.data.simulation import Geometry, simulate_subject

TITLES = ("T1", "T1c", "T2", "FLAIR", "labels", "labels, coronal")
COLOURS = {1: (0.85, 0.15, 0.20), 2: (0.30, 0.80, 0.35), 4: (1.00, 0.85, 0.20)}


def overlay(grey: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Labels laid over a grey image in [0, 1]: red NCR, green oedema, yellow enhancing."""
    rgb = np.repeat(grey[..., None], 3, -1)
    for value, colour in COLOURS.items():
        rgb[label == value] = 0.55 * rgb[label == value] + 0.45 * np.array(colour)
    return rgb


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4, 5, 6, 7])
    parser.add_argument("--spacing", type=float, default=1.5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "images" / "simulated_cohort.png")
    options = parser.parse_args()
    rows = len(options.seeds)
    figure, panels = plt.subplots(rows, len(TITLES), figsize=(len(TITLES) * 1.35, rows * 1.6), squeeze=False)
    figure.patch.set_facecolor("black")
    for row, seed in zip(panels, options.seeds):
        subject = simulate_subject(seed, Geometry.from_spacing(options.spacing))
        label = subject.label
        core = np.isin(label, (1, 4))
        z, y = int(core.sum((0, 1)).argmax()), int(core.sum((0, 2)).argmax())
        scaled = [np.clip(c / np.percentile(c[c > 0], 99.5), 0, 1) for c in subject.image]
        views = [c[:, :, z].T for c in scaled]
        views += [np.zeros(0)] * 2
        views[4] = overlay(scaled[3][:, :, z], label[:, :, z]).transpose(1, 0, 2)
        views[5] = overlay(scaled[3][:, y], label[:, y])[:, ::-1].transpose(1, 0, 2)
        for panel, view, title in zip(row, views, TITLES):
            panel.imshow(view, cmap="gray", vmin=0, vmax=1, interpolation="bilinear")
            panel.axis("off")
            if seed == options.seeds[0]:
                panel.set_title(title, color="white", fontsize=8)
        grade = subject.info["grade"]
        row[0].text(2, 6, f"{seed} {grade}", color="white", fontsize=5)
    figure.subplots_adjust(0, 0, 1, 0.97, 0.02, 0.02)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output, dpi=100, facecolor="black")
    with Image.open(options.output) as image:  # 256 colours are enough here and take a third of the space
        small = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(options.output, optimize=True)


if __name__ == "__main__":
    main()
