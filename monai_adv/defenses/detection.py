"""Detection by squeezing: an image whose segmentation changes under a mild filter is suspect."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import stats as scipy_stats
from torch import Tensor

from monai_adv.defenses.defended import Composed, DefendedVictim, prepared
from monai_adv.defenses.purification import purified
from monai_adv.errors import ConfigError
from monai_adv.metrics import region_scores
from monai_adv.stats.resampling import bootstrap_interval
from monai_adv.victims import Victim


def disagreement(
    victim: Victim,
    image: Tensor,
    purify: Callable[..., Tensor] | Sequence[Callable[..., Tensor]],
    affine: Tensor | None = None,
) -> dict[str, Tensor]:
    """How much a segmentation changes when its image is filtered: 1 - Dice between before and after.

    Reference:
        Xu et al., Feature squeezing: detecting adversarial examples in deep neural networks, NDSS 2018; Dice in the
        place of a distance of probabilities is ours.

    Args:
        victim: the pipeline whose image may have been attacked.
        image: ``(B, C, *spatial)``.
        purify: a filter (:class:`monai_adv.defenses.Purify`), or several: then the largest disagreement counts.
        affine: voxel to world, see :class:`monai_adv.victims.Victim`.

    Returns:
        Region -> ``(B,)`` float64 in [0, 1], and ``"mean"``: 1 - the mean Dice over the regions. A region that is empty
        before and after agrees. The maximum over filters is taken of each entry by itself.

    Raises:
        ConfigError: if there is no filter.

    Example:
        >>> from monai_adv.defenses import Purify
        >>> victim = Victim(torch.nn.Conv3d(4, 4, 1))
        >>> scores = disagreement(victim, torch.rand(2, 4, 6, 6, 6), [Purify("median"), Purify("bit_depth", bits=3)])
        >>> list(scores), scores["mean"].shape
        (['WT', 'TC', 'ET', 'mean'], torch.Size([2]))
    """
    filters = [purify] if callable(purify) else list(purify)
    if not filters:
        raise ConfigError("disagreement needs at least one filter, e.g. Purify('median')")
    before = victim.head.regions_of(victim.predict(image, affine))
    found: dict[str, Tensor] = {}
    for squeeze in filters:
        after = victim.head.regions_of(purified(victim, squeeze).predict(image, affine))
        scores = {
            name: torch.tensor([_apart(a, b) for a, b in zip(mask, after[name])], dtype=torch.float64)
            for name, mask in before.items()
        }
        scores["mean"] = torch.stack(list(scores.values())).mean(0)
        found = {name: torch.maximum(score, found.get(name, score)) for name, score in scores.items()}
    return found


def _apart(before: Tensor, after: Tensor) -> float:
    return 1 - region_scores(before.cpu(), after.cpu(), 1.0, hd95=False)["dice"]


@dataclass(frozen=True)
class DetectionROC:
    """How well scores tell adversarial from clean images.

    Attributes:
        table: a row per threshold, from the strictest: ``threshold``, ``tpr``, ``fpr``; an image is flagged if its
            score is at least the threshold.
        auc: probability that an adversarial image scores higher than a clean one, ties count half.
        confidence_interval: of the AUC, bootstrap over subjects; NaN for one subject.
        method: of the interval: "BCa", "percentile" or "none".
        note: why it is not BCa.
        subjects: number of subjects.
    """

    table: pd.DataFrame
    auc: float
    confidence_interval: tuple[float, float]
    method: str
    note: str
    subjects: int

    def threshold_at(self, fpr: float) -> tuple[float, float, float]:
        """The lowest threshold that flags at most a share of the clean images.

        Args:
            fpr: the share, in [0, 1].

        Returns:
            Threshold (infinite if no lower one is allowed), and its true and false positive rates on these scores.
        """
        if not 0 <= fpr <= 1:
            raise ConfigError(f"a false positive rate is in [0, 1], got {fpr}")
        row = self.table[self.table["fpr"] <= fpr].iloc[-1]
        return float(row["threshold"]), float(row["tpr"]), float(row["fpr"])


def detection_roc(
    clean_scores: ArrayLike,
    adversarial_scores: ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = 1999,
    seed: int = 0,
) -> DetectionROC:
    """ROC and AUC of a detector, with an interval over subjects.

    The AUC is the Mann-Whitney U statistic over the number of pairs (SciPy). Subjects are resampled whole, with all
    their scores, since the clean and the adversarial images of a subject are not independent.

    Args:
        clean_scores: ``(n,)`` or ``(n, k)``: a row per subject, higher is more suspect.
        adversarial_scores: ``(n,)`` or ``(n, m)``, the same subjects in the same order.
        confidence: of the interval, in (0, 1).
        resamples: bootstrap samples.
        seed: of the bootstrap.

    Raises:
        ConfigError: if the subjects are not the same number, or a score is NaN.

    Example:
        >>> roc = detection_roc([0.0, 0.1, 0.1, 0.2], [0.1, 0.3, 0.4, 0.5])
        >>> roc.auc, roc.threshold_at(0.0)
        (0.875, (0.3, 0.75, 0.0))
    """
    clean, adversarial = _scores(clean_scores, "clean"), _scores(adversarial_scores, "adversarial")
    n = len(clean)
    if len(adversarial) != n:
        raise ConfigError(f"{n} subjects have clean scores and {len(adversarial)} adversarial ones: give the same ones")

    # U in parts: how often an adversarial image of one subject beats a clean one of another
    beats = (np.sign(adversarial.reshape(n, 1, -1, 1) - clean.reshape(1, n, 1, -1)).mean((2, 3)) + 1) / 2

    def auc(subjects: NDArray[Any]) -> float:
        return float(beats[np.ix_(subjects, subjects)].mean())

    interval: tuple[float, float, str, str] = (float("nan"), float("nan"), "none", "one subject: no interval")
    if n > 1:
        interval = bootstrap_interval(np.arange(n), auc, seed, resamples, confidence=confidence)
    low, high, method, note = interval
    u = scipy_stats.mannwhitneyu(adversarial.ravel(), clean.ravel(), method="asymptotic").statistic
    thresholds = np.concatenate([[np.inf], np.unique(np.concatenate([clean.ravel(), adversarial.ravel()]))[::-1]])
    table = pd.DataFrame(
        {
            "threshold": thresholds,
            "tpr": [(adversarial >= t).mean() for t in thresholds],
            "fpr": [(clean >= t).mean() for t in thresholds],
        }
    )
    return DetectionROC(table, float(u / (adversarial.size * clean.size)), (low, high), method, note, n)


def _scores(values: ArrayLike, what: str) -> NDArray[np.float64]:
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim not in (1, 2) or not scores.size:
        raise ConfigError(f"{what} scores of shape {scores.shape}: give one per subject, or one row per subject")
    if np.isnan(scores).any():
        raise ConfigError(f"{int(np.isnan(scores).sum())} {what} scores are NaN: leave those subjects out of both")
    return scores


def detector_aware(victim: Victim, purify: Callable[..., Tensor], name: str | None = None) -> DefendedVictim:
    """The victim to attack when the detector is known: its logits are the mean of those before and after the filter.

    An attack that moves both the same way changes the segmentation without a disagreement: the adaptive attack on
    :func:`disagreement`. Where its budget is too small to move both, it may be seen as well as the unaware one.

    Args:
        victim: the pipeline that the detector watches.
        purify: the detector's filter.
        name: how tables call it; the victim's name with " and its detector" by default.
    """
    return DefendedVictim(victim, _Both(purify, victim), name or f"{victim.name} and its detector")


class _Both(Composed):
    """The network's input of the image and of the filtered image as one batch; the way back takes the mean."""

    def __init__(self, step: Callable[..., Tensor], victim: Victim) -> None:
        super().__init__(step, victim.preprocessing)

    def prepare(self, image: Tensor, affine: Tensor | None = None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        plain, back = prepared(self.inner, image, affine)
        filtered, back_filtered = prepared(self.inner, self.filtered(image, affine), affine)

        def mean(logits: Tensor) -> Tensor:
            before, after = logits[: len(plain)], logits[len(plain) :]
            return (back(before) + back_filtered(after)) / 2

        return torch.cat([plain, filtered]), mean

    def gradient_support(self, image: Tensor, support: Tensor) -> Tensor:
        needed = super().gradient_support(image, support)
        rule = getattr(self.inner, "gradient_support", None)
        own = support if self.inner is None else torch.ones_like(support) if rule is None else rule(image, support)
        return torch.cat([own, needed])
