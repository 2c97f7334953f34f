"""A deployed ``Compose`` as the preprocessing of a victim: voxels of the files in, the network's input out."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from monai import transforms as mt
from monai.data import MetaTensor
from monai.transforms.lazy.functional import apply_pending_transforms
from monai.utils import GridSampleMode, InterpolateMode
from torch import Tensor

from monai_adv.data.loading import LoadCased
from monai_adv.data.meta import plain
from monai_adv.errors import ConfigError
from monai_adv.transforms.differentiable.members import ARRAY, Member, MemberReport, Mode, flattened, member_of

_INTERPOLATION = {str(mode.value) for kind in (InterpolateMode, GridSampleMode) for mode in kind}


class DifferentiableCompose:
    """A ``Compose`` from loaded voxels to the network's input, differentiable; made by :func:`make_differentiable`.

    Attributes:
        keys: image keys in the order of the channels; empty where the pipeline is one of arrays.
        restore: whether logits come back to the image's grid.
    """

    def __init__(
        self, members: Sequence[Member], keys: Sequence[Hashable], output: Hashable, mode: Mode, restore: bool
    ) -> None:
        self._members = list(members)
        self._inside = [member for member in self._members if member.inside]
        self.keys = tuple(keys)
        self._output = output
        self._mode = mode
        self.restore = restore

    @property
    def report(self) -> list[MemberReport]:
        """What became of every member; complete once an image has gone through."""
        return [member.report for member in self._members]

    @property
    def changes_grid(self) -> bool:
        """Whether some member moves, resamples, crops or pads."""
        return any(member.changes_grid for member in self._inside)

    def summary(self) -> str:
        """The report as a table."""
        rows = [("member", "what", "note"), *((r.name, r.what, r.note) for r in self.report)]
        widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
        return "\n".join(f"{name:{widths[0]}}  {what:{widths[1]}}  {note}".rstrip() for name, what, note in rows)

    __str__ = summary

    def __repr__(self) -> str:
        names = ", ".join(member.report.name for member in self._inside)
        return f"DifferentiableCompose([{names}], keys={self.keys}, restore={self.restore})"

    def __call__(self, image: Tensor, affine: Tensor | None = None) -> Tensor:
        """The network's input ``(B, C', *other)`` of loaded images.

        Args:
            image: voxels as loaded ``(B, C, *spatial)``: native grid, scanner units, floating point.
            affine: voxel to world (RAS mm, as NIfTI and MONAI), ``(n, n)`` or ``(B, n, n)``; a MetaTensor's own if
                None.

        Raises:
            ConfigError: if a member needs the affine and there is none, if the channels are not those of the keys, if
                the samples of a batch do not come out in one shape, or if a member that changes the shape passes no
                gradient.
        """
        return self._run(image, affine)[0]

    def prepare(self, image: Tensor, affine: Tensor | None = None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The network's input, and the way back for its logits.

        Args:
            image: see :meth:`__call__`, as the other.
            affine: see :meth:`__call__`.

        Returns:
            The input ``(B, C', *other)``, and a function that brings ``(B, K, *other)`` to ``(B, K, *spatial)`` on the
            image's own grid by MONAI's inverses with linear interpolation, differentiably; voxels that were cropped
            away become 0. With ``restore=False`` the function does nothing.
        """
        data, made, affines = self._run(image, affine)
        if not self.restore:
            return data, _same
        shape = tuple(image.shape[2:])
        trails = [(value.meta, value.applied_operations) if isinstance(value, MetaTensor) else None for value in made]

        def back(logits: Tensor) -> Tensor:
            if logits.shape[0] != len(trails) or logits.shape[2:] != data.shape[2:]:
                raise ConfigError(
                    f"logits {tuple(logits.shape)} are not on the grid of the network's input {tuple(data.shape)}"
                )
            found = [self._undone(x, trail, shape, a) for x, trail, a in zip(logits, trails, affines)]
            return torch.stack(found)

        return data, back

    def gradient_support(self, image: Tensor, support: Tensor) -> Tensor:
        """Where the gradient of the output is needed for that of the image on ``support``.

        Pointwise members need it on the support; statistics of the non-zero voxels couple those, see
        :meth:`monai_adv.transforms.NormalizeNonzeroBatch.gradient_support`; any other member needs all.

        Args:
            image: ``(B, C, *spatial)``.
            support: same shape, bool.
        """
        if any(member.coupling == "all" for member in self._inside):
            return torch.ones_like(support)
        with torch.no_grad():
            masks = [self._coupled(*pair) for pair in zip(plain(image), support)]
        return torch.stack(masks)

    # --------------------------------------------------------------------------------------------- internals
    def _run(self, image: Tensor, affine: Tensor | None) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
        affines = self._affines(image, affine)
        made = []
        voxels = plain(image)
        for sample, place in zip(voxels if voxels.is_floating_point() else voxels.float(), affines):
            items = self._items(sample, place)
            for member in self._inside:
                items = member(items)
            # of lazy resampling what is left
            done = apply_pending_transforms(items[ARRAY] if self._mode.array else items, None, self._mode.overrides)
            items = {ARRAY: done} if self._mode.array else done
            if not isinstance(items.get(self._output), Tensor):
                raise ConfigError(
                    f"the pipeline leaves no image under {self._output!r}, only {sorted(map(str, items))}"
                )
            made.append(items[self._output])
        shapes = [tuple(value.shape) for value in made]
        if len(set(shapes)) > 1:
            raise ConfigError(f"the images of the batch come out of the pipeline as {shapes}: attack one at a time")
        return torch.stack([plain(value) for value in made]), made, affines

    def _items(self, sample: Tensor, affine: Tensor | None) -> dict[Hashable, Any]:
        if len(self.keys) < 2:
            return {(self.keys[0] if self.keys else ARRAY): MetaTensor(sample, affine=affine)}
        if len(sample) != len(self.keys):
            raise ConfigError(
                f"the pipeline loads {len(self.keys)} images ({', '.join(map(str, self.keys))}) but the batch has "
                f"{len(sample)} channels: give one channel each, in that order"
            )
        return {key: MetaTensor(sample[i : i + 1], affine=affine) for i, key in enumerate(self.keys)}

    def _affines(self, image: Tensor, affine: Tensor | None) -> list[Tensor | None]:
        if affine is None and isinstance(image, MetaTensor):
            affine = image.affine
        if affine is None:
            reads = [member.report.name for member in self._inside if member.reads_affine]
            if reads:
                raise ConfigError(
                    f"{reads[0]} depends on the affine, and the image has none: give a MetaTensor or affine= "
                    "(in an attack too)"
                )
            return [None] * len(image)
        affine = torch.as_tensor(plain(affine)).detach().cpu().double()
        affine = affine[None] if affine.dim() == 2 else affine
        if affine.dim() != 3 or affine.shape[1] != affine.shape[2] or len(affine) not in (1, len(image)):
            raise ConfigError(f"affine {tuple(affine.shape)} must be (n, n), or one for each of {len(image)} images")
        return list(affine.expand(len(image), -1, -1))

    def _undone(
        self, logits: Tensor, trail: tuple[Any, Any] | None, shape: tuple[int, ...], affine: Tensor | None
    ) -> Tensor:
        data, key = logits, self._output
        if trail is not None:
            meta, operations = trail
            data = MetaTensor(logits, meta=deepcopy(meta), applied_operations=_linear(deepcopy(operations)))
            for member in reversed(self._inside):
                data, key = member.undo(data, key)
        if tuple(data.shape[1:]) != shape:
            raise ConfigError(
                f"the logits come back as {tuple(data.shape[1:])}, the image is {shape}: a member that changes the "
                "shape has no inverse, or drops the metadata. Use restore=False and a label on the network's grid"
            )
        return plain(data).to(logits.dtype)

    def _coupled(self, sample: Tensor, mask: Tensor) -> Tensor:
        items = self._items(sample, None)
        for member in self._inside:
            if member.coupling == "nonzero":
                images = [plain(items[key]) for key in (self.keys or (ARRAY,)) if key in items]
                images = (
                    images
                    if len(self.keys) > 1 and len(images) == len(self.keys)
                    else [plain(items[self._last(items)])]
                )
                mask = mask | (torch.cat(images) != 0)
            items = member(items)
        # the network may get the channels in another order than they were loaded in
        return mask if len(self.keys) < 2 else mask.any(0, keepdim=True).expand_as(mask)

    def _last(self, items: Mapping[Hashable, Any]) -> Hashable:
        return self._output if self._output in items else next(iter(items))


def make_differentiable(
    compose: mt.Compose | Sequence[Callable[..., Any]],
    *,
    keys: str | Sequence[str] | None = None,
    restore: bool = True,
) -> DifferentiableCompose:
    """The preprocessing of a :class:`monai_adv.victims.Victim` from the ``Compose`` that a pipeline deploys.

    It maps the voxels of the loaded files to the network's input with the values of the deployed pipeline, so that an
    attack acts on the files: native grid, scanner units. Loading, members of the label and random augmentation are left
    outside. Members that pass a gradient are kept; those that break or falsify it (``NormalizeIntensity``,
    ``StdShiftIntensity``, percentiles of large volumes, ``AdjustContrast``) are replaced by equivalents; the rest keeps
    its values and is passed straight through, with a warning (Athalye et al. 2018). ``report`` says which is which.

    Args:
        compose: array or dictionary transforms, as deployed, from loading to the network's input.
        keys: the loaded image keys in the order of the channels; found out if None: those that ``ConcatItemsd``
            joins, else "image".
        restore: bring logits back to the image's grid (MONAI's inverses, linear); else they stay on the network's.

    Raises:
        ConfigError: if the image keys are not clear.

    Example:
        >>> deployed = mt.Compose([
        ...     mt.LoadImaged(["image", "label"]), mt.Orientationd(["image", "label"], "RAS", labels=None),
        ...     mt.NormalizeIntensityd("image", nonzero=True, channel_wise=True)])
        >>> print(make_differentiable(deployed))
        member               what      note
        LoadImaged           outside   loading: the attack acts on what it reads
        Orientationd         kept      a gradient is looked for on the first image
        NormalizeIntensityd  replaced  statistics inside the gradient, out of place
    """
    if not isinstance(compose, mt.Compose):
        if not isinstance(compose, Sequence) or not all(callable(t) for t in compose):
            raise ConfigError(f"make_differentiable needs a MONAI Compose or a list of transforms, got {compose!r}")
        compose = mt.Compose(compose)
    transforms = list(flattened(compose))
    mode = Mode(
        not any(isinstance(t, (mt.MapTransform, LoadCased)) for t in transforms), compose.lazy, compose.overrides
    )
    if mode.array:
        if keys is not None:
            raise ConfigError(f"keys {keys!r} are of a pipeline of dictionaries; this one has array transforms only")
        return DifferentiableCompose([member_of(t, None, mode) for t in transforms], (), ARRAY, mode, restore)
    names: Sequence[Hashable] = (keys,) if isinstance(keys, str) else tuple(keys or _image_keys(transforms))
    available: set[Hashable] | None = set(names)
    output, joined = names[0], len(names) == 1
    members = []
    for transform in transforms:
        member = member_of(transform, available, mode)
        members.append(member)
        if not member.inside:
            continue
        if isinstance(transform, mt.ConcatItemsd):
            output, joined = transform.name, True
        if available is not None and isinstance(transform, (mt.ConcatItemsd, mt.CopyItemsd)):
            available = available | set(getattr(transform, "names", ())) | {getattr(transform, "name", names[0])}
        elif not isinstance(transform, mt.MapTransform):
            available = None  # it may add keys of its own
    if not joined:
        raise ConfigError(
            f"the images {list(names)} are not joined: the Compose needs ConcatItemsd, or keys= one image"
        )
    return DifferentiableCompose(members, names, output, mode, restore)


def _image_keys(transforms: Sequence[Any]) -> list[Hashable]:
    """The loaded keys that become the network's input."""
    loaded = {key for t in transforms if isinstance(t, mt.LoadImaged) for key in t.keys}
    copied = {name for t in transforms if isinstance(t, mt.CopyItemsd) for name in t.names}
    joins = [t for t in transforms if isinstance(t, mt.ConcatItemsd)]
    joins = [t for t in joins if t.name == "image"] or joins
    if len(joins) == 1:
        return [key for key in joins[0].keys if (key in loaded if loaded else key not in copied)]
    known = {key for t in transforms if isinstance(t, mt.MapTransform) for key in t.keys}
    if (not joins and "image" in known) or any(isinstance(t, LoadCased) for t in transforms):
        return ["image"]
    if not joins and len(known) == 1:
        return list(known)
    raise ConfigError(f"which of the keys {sorted(map(str, known))} are the image? Name them with keys=")


def _same(logits: Tensor) -> Tensor:
    return logits


def _linear(operations: Any) -> Any:
    """Applied operations whose interpolation is linear: logits of a nearest neighbour would have no slope."""
    if isinstance(operations, (list, tuple)):
        return [_linear(operation) for operation in operations]
    if not isinstance(operations, Mapping):
        return operations
    changed = {k: _linear(v) for k, v in operations.items()}
    mode = changed.get("mode")
    if isinstance(mode, int) or (isinstance(mode, str) and mode in _INTERPOLATION):
        changed["mode"] = "bilinear"
    return changed
