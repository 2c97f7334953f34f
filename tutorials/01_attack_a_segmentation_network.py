# %% [markdown]
# # Attack a 3D segmentation network
#
# After this tutorial you can attack whole volumes through sliding windows, draw Dice against the size of the
# perturbation, and say how sure you are. It runs on simulated MRI in about a minute on two cores. To use your own
# patients set `ROOT` to a BraTS folder and `CHECKPOINT` to the output of `monai-adv train`. Open the file in Jupyter
# (with jupytext) or run it as it is.

# %%
import os
from pathlib import Path

import pandas as pd

from monai_adv import attacks
from monai_adv.data import brats_datalist, load_case, simulate_cohort
from monai_adv.handlers import case_rows
from monai_adv.stats import compare
from monai_adv.studies.demo import packaged_victim
from monai_adv.victims import load_victim
from monai_adv.visualize import montage, save_figure

ROOT = os.environ.get("MONAI_ADV_TUTORIAL_DATA")
SUBJECTS = int(os.environ.get("MONAI_ADV_TUTORIAL_SUBJECTS", "6"))
CHECKPOINT = packaged_victim()
OUT = Path("tutorial_01")

# %% [markdown]
# ## Volumes and victim
# A victim is the deployed pipeline: z-score, sliding windows, network. It takes scanner units and gives logits.

# %%
items = brats_datalist(ROOT)[:SUBJECTS] if ROOT else simulate_cohort(OUT / "cohort", SUBJECTS, spacing=2.5, seed=3)
victim = load_victim(CHECKPOINT)
print(victim, len(items), "subjects")

# %% [markdown]
# ## One attack
# The budget is .1 standard deviations of each modality's brain; the background stays exactly zero.

# %%
case = load_case(items[0])
image, label = case["image"][None], victim.head.label_from_classes(case["label"][None].as_tensor())
result = attacks.create("ifgsm", eps=0.1, steps=5)(victim, image, label)
print(f"mean Dice {result.clean_score.item():.3f} -> {result.score.item():.3f}, {result.cost}")

# %%
spacing = image.pixdim[0].tolist() if image.pixdim.ndim > 1 else image.pixdim.tolist()
figure = montage(
    image[0], result.image[0], case["label"][0], victim.predict(image)[0, 0], result.prediction[0, 0],
    spacing=spacing, affine=case["image"].affine, title=case["subject"],
)  # fmt: skip
save_figure(figure, OUT / "montage")

# %% [markdown]
# ## All subjects, and how sure we are
# Noise of the same size is the control. The unit of every test is the subject.

# %%
rows = []
for item in items:
    case = load_case(item)
    image, label = case["image"].as_tensor()[None], victim.head.label_from_classes(case["label"][None].as_tensor())
    for name in ("clean", "noise", "fgsm"):
        prediction = victim.predict(image)
        if name != "clean":
            prediction = attacks.create(name, eps=0.1)(victim, image, label).prediction
        identity = {"subject": case["subject"], "attack": name, "status": "ok"}
        rows += case_rows(identity, head=victim.head, prediction=prediction, label=label, spacing=spacing)
comparison = compare(pd.DataFrame(rows), by="attack", baseline="clean", family=("attack", "region"))
print(comparison.to_markdown())
