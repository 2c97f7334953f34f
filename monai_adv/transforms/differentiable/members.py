"""What happens to each member of a deployed ``Compose``: kept, replaced, passed straight through, or left outside."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai import transforms as mt
from monai.data import MetaTensor
from monai.transforms.lazy.functional import apply_pending_transforms_in_order
from monai.transforms.traits import LazyTrait, RandomizableTrait
from monai.transforms.transform import apply_transform
from torch import Tensor

from monai_adv.data.loading import LoadCased
from monai_adv.data.meta import plain
from monai_adv.errors import ConfigError
from monai_adv.transforms.differentiable.equivalents import equivalent, inner_of
from monai_adv.transforms.normalize import NormalizeNonzero, NormalizeNonzerod
from monai_adv.transforms.straight_through import replaced

# the key of the image where the pipeline is one of arrays
ARRAY = ""

_CASTS = (mt.EnsureType, mt.EnsureTyped, mt.ToTensor, mt.ToTensord)
_OUTSIDE: tuple[tuple[tuple[type, ...], str], ...] = (
    (
        (mt.LoadImage, mt.LoadImaged, LoadCased, mt.EnsureChannelFirst, mt.EnsureChannelFirstd),
        "loading: the attack acts on what it reads",
    ),
    (
        (mt.ToDevice, mt.ToDeviced, mt.ToNumpy, mt.ToNumpyd, mt.ToCupy, mt.ToCupyd, mt.ToPIL, mt.ToPILd),
        "changes the container only",
    ),
    ((mt.DataStats, mt.DataStatsd, mt.SimulateDelay, mt.SimulateDelayd), "looks only"),
    ((mt.SaveImage, mt.SaveImaged), "writes files"),
)
_READ_AFFINE = (
    mt.Spacing, mt.Spacingd, mt.Orientation, mt.Orientationd, mt.SpatialResample, mt.SpatialResampled,
    mt.ResampleToMatch, mt.ResampleToMatchd,
)  # fmt: skip
_POINTWISE = (
    mt.ShiftIntensity, mt.ScaleIntensityRange, mt.CastToType, mt.CastToTyped, mt.ConcatItemsd, mt.CopyItemsd,
    mt.SelectItemsd, mt.DeleteItemsd, mt.Identity, mt.Identityd,
)  # fmt: skip


@dataclass(frozen=True)
class MemberReport:
    """What became of one member.

    Args:
        name: its class.
        what: "kept", "replaced", "straight-through" or "outside".
        note: why, or what to know about it.
    """

    name: str
    what: str
    note: str = ""


@dataclass(frozen=True)
class Mode:
    """How the ``Compose`` runs its members: on arrays or dictionaries, lazily or not."""

    array: bool
    lazy: bool | None = False
    overrides: dict[str, Any] | None = None


class Member:
    """One member of the pipeline, run on the image alone.

    Whether it passes a gradient is found out on the first image it gets, not from a list.
    """

    def __init__(self, original: Any, transform: Any, what: str, note: str, mode: Mode) -> None:
        self.original, self.transform, self.what, self.note, self.mode = original, transform, what, note, mode
        self.settled = what in ("replaced", "outside")
        self._writes = False

    @property
    def report(self) -> MemberReport:
        """Its record."""
        note = self.note if self.settled else "a gradient is looked for on the first image"
        return MemberReport(type(self.original).__name__, self.what, note)

    @property
    def inside(self) -> bool:
        """Whether it is a part of the differentiable pipeline."""
        return self.what != "outside"

    @property
    def reads_affine(self) -> bool:
        """Whether its result depends on the voxel to world affine."""
        return self.inside and isinstance(self.original, _READ_AFFINE)

    @property
    def changes_grid(self) -> bool:
        """Whether it is one of the transforms that move, resample, crop or pad."""
        return self.inside and isinstance(self.original, LazyTrait)

    @property
    def coupling(self) -> str:
        """Which voxels of its output depend on one of its input: "pointwise", "nonzero" (those of the channel) or
        "all".
        """
        held = inner_of(self.original)
        array = self.original if held is None else held[1]
        if self.what == "straight-through" or isinstance(self.original, _POINTWISE) or type(array) in _POINTWISE:
            return "pointwise"
        if isinstance(array, mt.NormalizeIntensity) and array.subtrahend is not None and array.divisor is not None:
            return "pointwise"
        if isinstance(array, (NormalizeNonzero, NormalizeNonzerod)):
            return "nonzero"
        if isinstance(array, (mt.NormalizeIntensity, mt.StdShiftIntensity)) and array.nonzero:
            return "nonzero"
        return "all"

    def __call__(self, items: dict[Hashable, Any]) -> dict[Hashable, Any]:
        """Run on the items of one image, tensors by key."""
        # a result that is to be resampled later needs that before anything but resampling
        items = self._ordered(items)
        if not self.settled:
            self._settle(items)
        if self.what == "straight-through":
            return self._straight_through(items)
        if self._writes:  # in place: neither the caller's image nor what autograd has saved
            items = {k: _carry(plain(v).clone(), v) if isinstance(v, Tensor) else v for k, v in items.items()}
        return self._execute(items)

    def undo(self, data: Tensor, key: Hashable) -> tuple[Tensor, Hashable]:
        """MONAI's inverse, for data that carry the applied operations of the image under a key.

        Returns:
            The data before this member, and the key it had there.
        """
        if isinstance(self.transform, mt.ConcatItemsd):
            return data, (self.transform.keys[0] if key == self.transform.name else key)
        if isinstance(self.transform, mt.CopyItemsd):
            names = list(self.transform.names)
            return data, (self.transform.keys[names.index(key) % len(self.transform.keys)] if key in names else key)
        if not isinstance(self.transform, mt.InvertibleTransform):
            return data, key
        if self.mode.array:
            return self.transform.inverse(data), key
        if key not in getattr(self.transform, "keys", (key,)):
            return data, key
        return self.transform.inverse({key: data})[key], key

    # -------------------------------------------------------------------------------------------- running
    def _ordered(self, items: dict[Hashable, Any]) -> dict[Hashable, Any]:
        if self.mode.lazy is False:
            return items
        data = items[ARRAY] if self.mode.array else items
        data = apply_pending_transforms_in_order(self.transform, data, self.mode.lazy, self.mode.overrides)
        return {ARRAY: data} if self.mode.array else dict(data)

    def _execute(self, items: dict[Hashable, Any]) -> dict[Hashable, Any]:
        data = items[ARRAY] if self.mode.array else items
        data = apply_transform(self.transform, data, False, False, False, self.mode.lazy, self.mode.overrides)
        if self.mode.array:
            data = {ARRAY: data}
        if not isinstance(data, Mapping):
            raise ConfigError(
                f"{self.report.name} makes {type(data).__name__} of one image: take it out of the Compose"
            )
        for key, value in data.items():
            if isinstance(value, np.ndarray) and isinstance(items.get(key), Tensor):
                data = {**data, key: _carry(torch.as_tensor(value), items[key])}
        return dict(data)

    def _straight_through(self, items: dict[Hashable, Any]) -> dict[Hashable, Any]:
        with torch.no_grad():
            frozen = _copies(items)
            out = self._execute(frozen)
        result = {}
        for key, value in out.items():
            if key in frozen and value is frozen[key]:
                result[key] = items[key]
            elif key in items and isinstance(value, Tensor) and isinstance(items[key], Tensor):
                path = plain(items[key])
                if value.shape != path.shape:
                    raise ConfigError(
                        f"{self.report.name} turns {tuple(path.shape)} into {tuple(value.shape)} and passes no "
                        f"gradient ({self.note}): it cannot be passed straight through. Take it out of the Compose, "
                        "or give a differentiable transform in its place"
                    )
                path = path.to(value.dtype) if value.is_floating_point() else path
                result[key] = _carry(replaced(path, plain(value)), value)
            else:
                result[key] = value
        return result

    # ------------------------------------------------------------------------------------------- settling
    def _settle(self, items: dict[Hashable, Any]) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            leaves = {k: v.requires_grad_() for k, v in _plain_copies(items)}
            probe = {**items, **{k: _carry(leaf.clone(), items[k]) for k, leaf in leaves.items()}}
            versions = {k: probe[k]._version for k in leaves}
            try:
                out = self._execute(probe)
                reason = _lost(out, probe, leaves)
            except ConfigError:
                raise
            except Exception as error:  # a step that a graph disturbs raises whatever it likes; see below for others
                out, reason = {}, f"with a gradient it raises {_cause(error)}"
        if reason is None:
            self._writes = any(probe[k]._version != version for k, version in versions.items())
            self.settled = True
            return
        if reason == _ZERO and all(bool((leaf == leaf.flatten()[0]).all()) for leaf in leaves.values()):
            return  # an image without contrast says nothing about a gradient: ask the next one
        before = self.what, self.note
        self.what, self.note = "straight-through", reason
        try:
            self._straight_through(items)
        except ConfigError:
            self.what, self.note = before
            raise
        except Exception as error:
            self.what, self.note = before
            raise ConfigError(
                f"{self.report.name} does not run on the image alone: {_cause(error)}. Take it out of the Compose, or "
                "name the image keys with keys="
            ) from error
        new = [k for k in out if k not in items]
        self.note = f"{reason}; the gradient goes past it unchanged"
        if new:
            self.note += f"; none flows from the new {new}"
        self.settled = True
        warnings.warn(f"make_differentiable: {self.report.name} is passed straight through: {reason}", stacklevel=2)


_ZERO = "its gradient is zero everywhere"


def _lost(out: Mapping[Hashable, Any], probe: Mapping[Hashable, Any], leaves: Mapping[Hashable, Tensor]) -> str | None:
    """Why no gradient passes from the outputs to the images, or None if one does."""
    generator = torch.Generator().manual_seed(0)
    for key, value in out.items():
        if not isinstance(value, Tensor) or (key in probe and value is probe[key]):
            continue
        if not value.requires_grad:
            return "its output is not connected to its input (rounding, NumPy, a detached copy)"
        data = plain(value)
        # random weights: the sum of a normalised image has no gradient
        weight = torch.randn(data.shape, generator=generator).to(data)
        gradients = torch.autograd.grad((data * weight).sum(), list(leaves.values()), allow_unused=True)
        found = [g for g in gradients if g is not None]
        if not found:
            return "its output is not connected to its input (rounding, NumPy, a detached copy)"
        if not all(bool(torch.isfinite(g).all()) for g in found):
            return "its gradient is NaN or infinite"
        if not any(bool(g.any()) for g in found):
            return _ZERO
    return None


def _plain_copies(items: Mapping[Hashable, Any]) -> Iterator[tuple[Hashable, Tensor]]:
    for key, value in items.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            yield key, plain(value).detach().clone()


def _copies(items: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
    return {**items, **{k: _carry(v, items[k]) for k, v in _plain_copies(items)}}


def _carry(data: Tensor, reference: Any) -> Tensor:
    """The data with everything a MetaTensor knows, pending operations included."""
    if not isinstance(reference, MetaTensor):
        return data
    return MetaTensor(data).copy_meta_from(reference)


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": ")


class CopyItemsEquivalent(mt.CopyItemsd):
    """``CopyItemsd`` that copies with the graph; MONAI's deep copy refuses a tensor that has one."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Copy the items."""
        result = dict(data)
        for i, name in enumerate(self.names):
            key = self.keys[i % len(self.keys)]
            if key in result:
                result[name] = _carry(plain(result[key]).clone(), result[key])
        return result


def flattened(compose: mt.Compose) -> Iterator[Any]:
    """The members of a ``Compose`` and of those in it."""
    for transform in compose.transforms:
        if isinstance(transform, mt.Compose) and type(transform).__call__ is mt.Compose.__call__:
            yield from flattened(transform)
        else:
            yield transform


def member_of(transform: Any, available: set[Hashable] | None, mode: Mode) -> Member:
    """What to do with a transform.

    Args:
        transform: a member of the deployed pipeline.
        available: keys that hold the image or something made of it; None if that is not known.
        mode: how the pipeline runs.
    """
    keys = None if mode.array else getattr(transform, "keys", None)
    if keys is not None and available is not None and not available & set(keys):
        return Member(transform, transform, "outside", f"acts on {', '.join(map(str, keys))} only", mode)
    if isinstance(transform, RandomizableTrait):
        return Member(transform, transform, "outside", "random augmentation: not a part of deployment", mode)
    for kinds, note in _OUTSIDE:
        if isinstance(transform, kinds):
            return Member(transform, transform, "outside", note, mode)
    if isinstance(transform, _CASTS):
        dtype = getattr(getattr(transform, "converter", transform), "dtype", None)
        if dtype is None:
            return Member(transform, transform, "outside", "changes the container only", mode)
        cast = mt.CastToType(dtype) if keys is None else mt.CastToTyped(keys, dtype, allow_missing_keys=True)
        return Member(transform, cast, "kept", f"as a cast to {dtype}", mode)
    found = equivalent(transform)
    if found is None and isinstance(transform, mt.CopyItemsd):
        found = object.__new__(CopyItemsEquivalent), "copies with the graph"
        found[0].__dict__.update(vars(transform))
    runs = transform if found is None else found[0]
    if keys is not None and not transform.allow_missing_keys:  # it gets the image without the label
        runs = copy.copy(runs)
        runs.allow_missing_keys = True
    return Member(transform, runs, *(("kept", "") if found is None else ("replaced", found[1])), mode)
