"""One perturbation for a whole cohort: the data, and the attack that applies it to a subject."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd
from monai.transforms import SpatialResample
from torch import Tensor

from monai_adv.attacks.base import Attack
from monai_adv.attacks.run import Run
from monai_adv.data.files import write_atomic
from monai_adv.data.headers import GEOMETRY_TOLERANCE, check_integrity, read_header
from monai_adv.data.loading import read_volume
from monai_adv.errors import ConfigError, DataError
from monai_adv.losses import AttackLoss
from monai_adv.threats import Ball, Threat, create_threat

MODES = ("untargeted", "static", "dynamic")
PLACEMENTS = ("world", "tile")
FORMAT = "monai_adv.universal/1"


@dataclass(eq=False)
class UniversalPerturbation:
    """One perturbation for every subject, in units of its threat, on a reference grid.

    Args:
        data: ``(C, *spatial)``, dimensionless: multiplied by a subject's own unit (its standard deviation per channel,
            say) when it is applied.
        threat: what it was made for; its eps is the size of ``data``.
        affine: voxel to world of the grid, ``(4, 4)``; None if it has no place in the world.
        mode: "untargeted", "static" (one target mask for every subject) or "dynamic" (a rule per subject).
        target: the target as plain data, None if untargeted.
        subjects: names of the subjects it was trained on.
        victim: name of the victim it was trained on.
        seed: of the training.
        details: how it was trained, plain data: steps, batch, step size, loss and the ``"trace"``.

    Raises:
        ConfigError: if the data, the threat, the mode and the affine do not fit together.
    """

    data: Tensor
    threat: Threat
    affine: Tensor | None = None
    mode: str = "untargeted"
    target: Any = None
    subjects: tuple[str, ...] = ()
    victim: str = ""
    seed: int = 0
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.data.dim() not in (3, 4) or not self.data.is_floating_point():
            raise ConfigError(
                f"a universal perturbation is a floating point (C, *spatial) in 2D or 3D, got {tuple(self.data.shape)} "
                f"of {self.data.dtype}"
            )
        if not bool(torch.isfinite(self.data).all()):
            raise ConfigError("the universal perturbation holds NaN or infinite values")
        if self.mode not in MODES:
            raise ConfigError(f"mode {self.mode!r} is unknown: use one of {', '.join(MODES)}")
        check_threat(self.threat)
        if self.affine is not None:
            self.affine = to_affine_nd(3, torch.as_tensor(self.affine).detach().cpu().double())
        self.subjects = tuple(self.subjects)

    def on(self, image: Tensor, affine: Tensor | None = None, placement: str = "world") -> Tensor:
        """The perturbation on another grid, in units, ``(C, *spatial)``.

        Args:
            image: ``(C, *spatial)``, tensor or MetaTensor; only its shape, device and affine are used.
            affine: voxel to world of the image; a MetaTensor's own if None.
            placement: "world" (aligned by the affines: copied where the grids differ by whole voxels, else linear;
                zeros outside; without an affine on both sides as "tile") or "tile" (repeated from the first voxel and
                cropped; as it is for the same shape).

        Raises:
            ConfigError: if channels or dimensions differ.
        """
        if image.dim() != self.data.dim() or len(image) != len(self.data):
            raise ConfigError(
                f"a universal perturbation {tuple(self.data.shape)} does not fit an image {tuple(image.shape)}: "
                "channels and dimensions must be the same"
            )
        if affine is None and isinstance(image, MetaTensor):
            affine = image.affine
        return placed(self.data.to(image.device), self.affine, image.shape[1:], affine, placement)

    def applied(self, ball: Ball, affine: Tensor | None = None, placement: str = "world") -> Tensor:
        """Perturbed images ``(B, C, *spatial)`` of a ball: scaled to its budget and each subject's unit, projected.

        Args:
            ball: the allowed images; its budget may differ from the trained one, then the perturbation is scaled.
            affine: ``(B, 4, 4)`` voxel to world of each image, or None.
            placement: see :meth:`on`.

        Raises:
            ConfigError: if it does not reach a sample, whose Dice would look unharmed.
        """
        if not math.isfinite(ball.eps):
            raise ConfigError("a universal perturbation needs a finite budget: give eps")
        on = [
            self.on(image, None if affine is None else affine[b], placement) for b, image in enumerate(ball.clean)
        ]  # fmt: skip
        delta = torch.stack(on).to(ball.clean)
        empty = (~torch.logical_and(delta, ball.mask).flatten(1).any(1)).nonzero().flatten().tolist()
        if empty:
            raise ConfigError(
                f"the universal perturbation is zero wherever sample {empty} may change: the grids do not overlap in "
                "world space (use placement='tile'), or it was trained on other modalities or is zero itself"
            )
        return ball.project(ball.clean + delta * (ball.eps / self.threat.eps) * ball.scale)

    def fits(self, threat: Threat) -> None:
        """Make sure that the perturbation means something under a threat.

        Raises:
            ConfigError: if norm or units differ.
        """
        if (threat.norm, threat.units) != (self.threat.norm, self.threat.units):
            raise ConfigError(
                f"the universal perturbation was trained for {self.threat.describe()}: apply it with "
                f"norm={self.threat.norm!r} and units={self.threat.units!r}, not with {threat.describe()}"
            )

    # ------------------------------------------------------------------------------------------------ on disk
    def save(self, path: str | Path) -> Path:
        """Write ``path`` (4D float32 NIfTI, channels last) and its metadata as ``<name>.json`` beside it.

        Raises:
            DataError: if the name does not end in .nii or .nii.gz.
        """
        path = Path(path)
        beside = _json_path(path)
        volume = self.data.detach().cpu().float().movedim(0, -1)
        volume = volume if volume.dim() == 4 else volume.unsqueeze(2)  # an image is a volume of one slice
        affine = torch.eye(4, dtype=torch.float64) if self.affine is None else self.affine
        image = nib.Nifti1Image(volume.contiguous().numpy(), affine.numpy())
        image.header.set_xyzt_units("mm")
        content = image.to_bytes()
        if path.suffix.lower() == ".gz":
            content = gzip.compress(content, compresslevel=6, mtime=0)
        meta = {
            "format": FORMAT, "dimensions": self.data.dim() - 1,
            "threat": {"norm": self.threat.norm, **asdict(self.threat)},
            "mode": self.mode, "target": self.target, "subjects": list(self.subjects), "victim": self.victim,
            "seed": self.seed, "affine": None if self.affine is None else self.affine.tolist(), "details": self.details,
        }  # fmt: skip
        write_atomic(path, content)
        write_atomic(beside, json.dumps(meta, indent=2).encode())
        return path

    @classmethod
    def load(cls, path: str | Path) -> UniversalPerturbation:
        """Read what :meth:`save` wrote.

        Raises:
            DataError: if a file is missing or damaged, or the two do not belong together.
        """
        path = Path(path)
        beside = _json_path(path)
        header = read_header(path, 4)
        check_integrity(header)
        try:
            meta = json.loads(beside.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(
                f"{beside}: cannot be read ({error}). It belongs to {path.name}: copy both files."
            ) from error
        if not isinstance(meta, Mapping) or meta.get("format") != FORMAT:
            raise DataError(f"{beside}: is not the description of a universal perturbation ({FORMAT}).")
        affine = None if meta["affine"] is None else torch.tensor(meta["affine"], dtype=torch.float64)
        if affine is not None and float((torch.from_numpy(header.affine) - affine).abs().max()) > GEOMETRY_TOLERANCE:
            raise DataError(f"{path}: its affine is not that of {beside.name}. Copy both files again.")
        data = read_volume(header).as_tensor()
        threat: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in meta["threat"].items()}
        return cls(
            data=data if meta["dimensions"] == 3 else data[..., 0],
            threat=create_threat(**threat),
            affine=affine,
            **{k: meta[k] for k in ("mode", "target", "subjects", "victim", "seed", "details")},
        )

    def digest(self) -> str:
        """SHA-256 of voxels, grid and threat."""
        found = hashlib.sha256(self.data.detach().cpu().float().contiguous().numpy().tobytes())
        place = None if self.affine is None else self.affine.tolist()
        found.update(repr((tuple(self.data.shape), place, self.threat)).encode())
        return found.hexdigest()


class Universal(Attack):
    """Universal perturbation: one for a whole cohort, trained on some subjects and applied to others as it is.

    Train it with :func:`monai_adv.attacks.fit_universal` or ``monai-adv universal``. Applying costs one evaluation and
    no gradient. The paper's accumulated minimal perturbations (DeepFool) are replaced by sign steps on the mean
    gradient, as in Metzen et al. 2017; budgets in units of each subject and the placement by world coordinates are
    ours.

    Reference:
        Moosavi-Dezfooli et al., Universal adversarial perturbations, CVPR 2017; Metzen et al., Universal adversarial
        perturbations against semantic image segmentation, ICCV 2017; on BraTS Cheng and Ji 2020.

    Args:
        threat: of the norm and units the perturbation was trained for; another eps scales it.
        perturbation: a :class:`UniversalPerturbation`, or the path of one that was saved.
        placement: "world" or "tile", see :meth:`UniversalPerturbation.on`.
        loss: only recorded in the trace.
        **options: see :class:`Attack`; with a target the score is the agreement with it.
    """

    name: ClassVar[str] = "universal"
    reference: ClassVar[str] = "Moosavi-Dezfooli et al. 2017"
    white_box: ClassVar[bool] = False

    def __init__(
        self,
        threat: Threat,
        perturbation: UniversalPerturbation | str | Path | None = None,
        placement: str = "world",
        loss: str | AttackLoss = "dice_ce",
        **options: Any,
    ) -> None:
        super().__init__(threat, loss, **options)
        if not isinstance(perturbation, (UniversalPerturbation, str, Path)):
            raise ConfigError(
                f"universal needs perturbation, a saved one or a UniversalPerturbation, got {perturbation!r}: "
                "make one with `monai-adv universal ROOT --checkpoint unet.pt -o OUT` or attacks.fit_universal"
            )
        self.perturbation = perturbation
        self.placement = check_placement(placement)
        self._loaded: UniversalPerturbation | None = None
        if isinstance(perturbation, UniversalPerturbation):
            self._load()

    def parameters(self) -> dict[str, Any]:
        """The constructor's arguments as plain values, a perturbation by its hash or its path."""
        given = self.perturbation
        if isinstance(given, UniversalPerturbation):
            source = f"{given.mode}, {len(given.subjects)} subjects, SHA-256 {given.digest()}"
        else:
            source = str(given)
        return {**super().parameters(), "perturbation": source}

    def _load(self) -> UniversalPerturbation:
        """The perturbation; a file is read when it is first needed."""
        if self._loaded is None:
            given = self.perturbation
            found = given if isinstance(given, UniversalPerturbation) else UniversalPerturbation.load(given)
            found.fits(self.threat)
            self._loaded = found
        return self._loaded

    def _search(self, run: Run) -> None:
        run.consider(self._load().applied(run.ball, run.affine, self.placement))


def _json_path(path: Path) -> Path:
    """The metadata's file beside a NIfTI file."""
    name = path.name.lower()
    ending = ".nii.gz" if name.endswith(".nii.gz") else ".nii"
    if not name.endswith(ending):
        raise DataError(f"{path}: the name must end in .nii or .nii.gz")
    return path.with_name(path.name[: -len(ending)] + ".json")


def check_placement(placement: str) -> str:
    """A known placement.

    Raises:
        ConfigError: lists them.
    """
    if placement not in PLACEMENTS:
        raise ConfigError(f"placement {placement!r} is unknown: use one of {', '.join(PLACEMENTS)}")
    return placement


def check_threat(threat: Threat) -> None:
    """Make sure that a threat can hold a universal perturbation.

    Raises:
        ConfigError: if it has no norm or no finite budget.
    """
    if threat.norm not in Universal.norms:
        raise ConfigError(f"universal perturbations are of {' or '.join(Universal.norms)} threats, not {threat.norm}")
    if not 0 < threat.eps < math.inf:
        raise ConfigError(f"eps of a universal perturbation must be > 0 and finite, got {threat.eps}")


def placed(
    data: Tensor,
    affine: Tensor | None,
    shape: Sequence[int],
    onto: Tensor | None,
    placement: str = "world",
    mode: str = "bilinear",
) -> Tensor:
    """Volumes ``(C, *spatial)`` on another grid, differentiable in them.

    Args:
        data: the volumes.
        affine: voxel to world of ``data``, or None.
        shape: spatial shape of the other grid.
        onto: voxel to world of the other grid, or None.
        placement: see :meth:`UniversalPerturbation.on`.
        mode: "bilinear" (linear in every dimension) or "nearest", for masks.
    """
    check_placement(placement)
    if placement == "tile" or affine is None or onto is None:
        counts = [math.ceil(wanted / have) for wanted, have in zip(shape, data.shape[1:])]
        if all(c == 1 for c in counts) and tuple(shape) == tuple(data.shape[1:]):
            return data
        return data.repeat(1, *counts)[(slice(None), *(slice(0, n) for n in shape))]
    dims = len(shape)
    source, wanted = (to_affine_nd(dims, torch.as_tensor(a).detach().cpu().double()) for a in (affine, onto))
    relative = torch.linalg.solve(source, wanted)  # voxel of the other grid -> voxel of data
    turned, offset = relative[:dims, :dims], relative[:dims, dims]
    straight = float((turned - torch.eye(dims, dtype=torch.float64)).abs().max()) < 1e-6
    if straight and float((offset - offset.round()).abs().max()) < 1e-3:
        return _cut(data, [int(o) for o in offset.round()], shape)
    resample = SpatialResample(mode=mode, padding_mode="zeros", dtype=np.float64)
    moved = resample(MetaTensor(data, affine=source), dst_affine=wanted, spatial_size=tuple(shape))
    assert isinstance(moved, MetaTensor)
    return moved.as_tensor().to(data.dtype)


def _cut(data: Tensor, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The box of ``data`` that begins at ``offset``, bit for bit; zeros outside."""
    have = data.shape[1:]
    if any(o >= h or o + n <= 0 for o, h, n in zip(offset, have, shape)):
        return data.new_zeros((len(data), *shape))
    ends = [(-o, o + n - h) for o, h, n in zip(offset, have, shape)]
    if not any(low or high for low, high in ends):
        return data
    return F.pad(data, [edge for pair in reversed(ends) for edge in pair])
