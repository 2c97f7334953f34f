"""Attacks that take no gradient of the victim: square (queries) and transfer (from a surrogate)."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from monai_adv.attacks.base import Attack, positive
from monai_adv.attacks.run import Run
from monai_adv.errors import ConfigError
from monai_adv.losses import AttackLoss
from monai_adv.threats import Threat
from monai_adv.victims import Head, Victim, load_victim
from monai_adv.victims.checkpoint import file_hash

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000 queries, Andriushchenko et al.


class Square(Attack):
    """Square attack: random cubes (3D) or squares (2D) of plus or minus eps, kept where the loss rises; no gradient.

    From the paper: stripes of plus or minus eps at the start (constant along the first spatial axis), then one cube
    per query with one sign per channel, a proposal that changes nothing is drawn anew, and the share p of the volume
    that a cube covers is halved after 10, 50, 200, 500, 1000, 2000, 4000, 6000 and 8000 of 10,000 queries, scaled to
    the number there are. Ours: cubes in 3D, placed on the bounding box of the support (a cube on the background asks
    nothing), and a search that uses all its queries, as Dice can fall further after a success.

    Reference:
        Andriushchenko et al., Square attack: a query-efficient black-box adversarial attack via random search, ECCV
        2020.

    Args:
        threat: what may change, L-inf with a finite budget.
        loss: what has to rise; its value needs the victim's logits (a score-based black box).
        queries: evaluations of the victim per sample.
        p: share of the volume that the first cubes cover.
        **options: see :class:`Attack`.
    """

    name: ClassVar[str] = "square"
    reference: ClassVar[str] = "Andriushchenko et al. 2020"
    white_box: ClassVar[bool] = False
    norms: ClassVar[tuple[str, ...]] = ("linf",)

    def __init__(
        self,
        threat: Threat,
        loss: str | AttackLoss = "dice_ce",
        queries: int = 1000,
        p: float = 0.8,
        **options: Any,
    ) -> None:
        super().__init__(threat, loss, **options)
        self.queries = positive("queries", queries)
        if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 < p <= 1:
            raise ConfigError(f"p must be in (0, 1], got {p!r}")
        self.p = p

    def side(self, query: int, shape: tuple[int, ...]) -> int:
        """Side of the cube of a query (the stripes are query 0) in a volume, in voxels."""
        scaled = int((query - 1) / self.queries * 10_000)
        share = self.p / 2 ** sum(scaled > threshold for threshold in _HALVINGS)
        side = round((share * math.prod(shape)) ** (1 / max(1, sum(n > 1 for n in shape))))
        return max(side, 1)

    def _search(self, run: Run) -> None:
        if math.isinf(run.ball.eps):
            raise ConfigError("square moves voxels by eps, which is infinite here: give a finite eps")
        clean, mask = run.clean, run.ball.mask
        size = run.ball.eps * run.ball.scale
        batch, channels, _, *rest = clean.shape
        signs = self._signs((batch, channels, 1, *rest), run).expand_as(clean)
        best = run.consider(run.ball.project(clean + size * signs))
        loss, first = best["loss"], self._first(run, best["score"], torch.full((batch,), -1), 0)
        accepted = torch.zeros(batch, dtype=torch.long)
        low, high = _bounding_boxes(mask)
        for query in range(1, self.queries):
            cube = self._cubes(low, high, self.side(query, tuple(clean.shape[2:])), run)
            drawn = self._signs((batch, channels, *[1] * (clean.dim() - 2)), run)
            # of the proposals that change something; the opposite of one that does not is such a one
            unchanged = ~(cube & mask & (drawn != signs)).flatten(1).any(1)
            drawn = torch.where(_flat(unchanged, clean), -drawn, drawn)
            proposal = torch.where(cube, drawn, signs)
            entry = run.consider(run.ball.project(clean + size * proposal))
            better = entry["loss"] > loss
            signs = torch.where(_flat(better, clean), proposal, signs)
            loss = torch.where(better, entry["loss"], loss)
            accepted += better.cpu()
            first = self._first(run, entry["score"], first, query)
        run.details["queries"] = [self.queries] * batch
        run.details["accepted"] = accepted.tolist()
        run.details["queries_to_success"] = [None if n < 0 else n + 1 for n in first.tolist()]

    @staticmethod
    def _first(run: Run, score: Tensor, first: Tensor, query: int) -> Tensor:
        """Index of the first query that succeeded, -1 before."""
        return torch.where((first < 0) & run.reached(score).cpu(), query, first)

    @staticmethod
    def _signs(shape: tuple[int, ...], run: Run) -> Tensor:
        drawn = torch.rand(shape, generator=run.generator, device=run.generator.device)
        return torch.where(drawn < 0.5, -1.0, 1.0).to(run.clean)

    @staticmethod
    def _cubes(low: Tensor, high: Tensor, side: int, run: Run) -> Tensor:
        """One random cube per sample, ``(B, 1, *spatial)`` bool: inside the box if it fits, else around it."""
        inside = torch.ones(1, 1, *[1] * low.shape[1], dtype=torch.bool, device=run.clean.device)
        drawn = torch.rand(low.shape, generator=run.generator, device=run.generator.device).to(low.device)
        for axis, length in enumerate(run.clean.shape[2:]):
            width = min(side, length)
            ends = torch.stack([low[:, axis], high[:, axis] - width]).clamp(0, length - width)
            start = ends.amin(0) + (drawn[:, axis] * (ends.amax(0) - ends.amin(0) + 1)).long()
            place = torch.arange(length, device=low.device)
            covered = (place >= start[:, None]) & (place < start[:, None] + width)
            inside = inside & covered.view(-1, 1, *[length if a == axis else 1 for a in range(low.shape[1])])
        return inside


class Transfer(Attack):
    """Transfer attack: crafted on a surrogate network, then only scored on the victim, which is asked once.

    Paper (Papernot et al.): the surrogate is a network the attacker trained. Ours: any attack of the registry crafts,
    with the surrogate's own head; where the heads differ, labels and targets are translated through the BraTS classes.
    With a ``memory`` (see :class:`Attack`) an image is crafted once for all victims that it is scored on, where the
    surrogate is a checkpoint; the seconds reported are then those of that one crafting and of the scoring.

    Reference:
        Papernot et al., Transferability in machine learning: from phenomena to black-box attacks using adversarial
        samples, 2016 (arXiv 1605.07277).

    Args:
        threat: what may change; the same for the crafting attack.
        surrogate: checkpoint of the network that is attacked instead (see ``monai-adv train``), or a
            :class:`monai_adv.victims.Victim`.
        attack: what crafts: a name, or ``{"name": ..., **options}``.
        loss: only recorded in the trace; the crafting attack has its own.
        **options: see :class:`Attack`; a ``target`` is what the crafting attack aims at.
    """

    name: ClassVar[str] = "transfer"
    reference: ClassVar[str] = "Papernot et al. 2016"
    white_box: ClassVar[bool] = False

    def __init__(
        self,
        threat: Threat,
        surrogate: str | Path | Victim | None = None,
        attack: str | Mapping[str, Any] = "pgd",
        loss: str | AttackLoss = "dice_ce",
        **options: Any,
    ) -> None:
        super().__init__(threat, loss, **options)
        if surrogate is None:
            raise ConfigError("transfer needs a surrogate: the checkpoint of another network, e.g. surrogate: other.pt")
        if not isinstance(surrogate, (str, Path, Victim)):
            raise ConfigError(f"surrogate must be the path of a checkpoint or a Victim, got {surrogate!r}")
        if not isinstance(surrogate, Victim) and not Path(surrogate).is_file():
            raise ConfigError(f"surrogate {surrogate} does not exist; train one with `monai-adv train`")
        self.surrogate = surrogate
        self.attack = attack
        self._loaded: Victim | None = surrogate if isinstance(surrogate, Victim) else None
        self._crafting(threat)  # an attack that cannot be made is told of now

    def _crafting(self, threat: Threat) -> Attack:
        from monai_adv.attacks.registry import build  # the registry lists this module's classes

        spec: dict[str, Any] = {"name": self.attack} if isinstance(self.attack, str) else dict(self.attack)
        if self.targeted:
            spec["target"] = "background"  # the mask itself comes with the call
        return build(spec, threat)

    def _victim(self, device: torch.device) -> Victim:
        if self._loaded is None:
            assert not isinstance(self.surrogate, Victim)
            self._loaded = load_victim(self.surrogate, device=device)
        return self._loaded

    def _search(self, run: Run) -> None:
        attack = self._crafting(self.threat.with_eps(run.ball.eps))
        key = None if self.memory is None else self._key(run, attack)
        known: _Crafted | None = None if self.memory is None or key is None else self.memory.get(key)
        if known is None:
            known = self._crafted(run, attack)
            if self.memory is not None and key is not None:
                self.memory[key] = known
        else:
            run.spent(known.seconds)
            run.generator.set_state(known.numbers)  # as if it had been crafted now
        run.consider(known.image)
        run.details |= {name: list(values) for name, values in known.details.items()}

    def _crafted(self, run: Run, attack: Attack) -> _Crafted:
        started = time.perf_counter()
        surrogate = self._victim(run.clean.device)
        target = None if run.target is None else translated(run.target, run.head, surrogate.head)
        found = attack(
            surrogate,
            run.clean,
            translated(run.label, run.head, surrogate.head),
            support=run.ball.mask,
            weight=run.weight,
            target=target,
            generator=run.generator,
            spacing=run.spacing,
            affine=run.affine,
        )
        batch = len(run.clean)
        details: dict[str, list[Any]] = {
            "surrogate_score": found.score.tolist(),
            "surrogate_clean_score": found.clean_score.tolist(),
            "surrogate_success": found.success.tolist(),
            "surrogate_forwards": [found.cost.forwards] * batch,
            "surrogate_backwards": [found.cost.backwards] * batch,
        }
        return _Crafted(found.image, details, time.perf_counter() - started, run.generator.get_state())

    def _key(self, run: Run, attack: Attack) -> str | None:
        """What the crafted image depends on, as a hash; None where it cannot be told."""
        if isinstance(self.surrogate, Victim):
            return None
        try:
            spec = json.dumps(self.attack, sort_keys=True)
        except TypeError:  # an object: two may be written alike
            return None
        about = (file_hash(self.surrogate), spec, repr(attack), run.head, run.spacing, run.clean.device)
        found = hashlib.sha256(repr(about).encode())
        tensors = (run.clean, run.label, run.target, run.ball.mask, run.weight, run.affine, run.generator.get_state())
        for data in tensors:
            found.update(repr(None if data is None else (data.dtype, data.shape)).encode())
            if data is not None:
                found.update(data.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return found.hexdigest()


@dataclass(frozen=True)
class _Crafted:
    """An image that was crafted, what is told of it, what it cost, and where it left the random numbers."""

    image: Tensor
    details: dict[str, list[Any]]
    seconds: float
    numbers: Tensor


def translated(label: Tensor, head: Head, other: Head) -> Tensor:
    """A label of one head as a label of another, through the BraTS classes where their kinds differ.

    Raises:
        ConfigError: if the regions of a sigmoid head are not BraTS WT, TC, ET.
    """
    if head.exclusive == other.exclusive and (head.exclusive or head.region_names == other.region_names):
        return label
    return other.label_from_classes(head.classes_from_prediction(label).long())


def _bounding_boxes(mask: Tensor) -> tuple[Tensor, Tensor]:
    """First voxel of each sample's support along every axis, and the one after its last: two ``(B, dims)``."""
    low, high = [], []
    for axis in range(2, mask.dim()):
        present = mask.movedim(axis, 1).flatten(2).any(2).byte()  # (B, length)
        low.append(present.argmax(1))
        high.append(present.shape[1] - present.flip(1).argmax(1))
    return torch.stack(low, 1), torch.stack(high, 1)


def _flat(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.device).view(-1, *[1] * (like.dim() - 1))
