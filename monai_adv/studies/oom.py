"""Out of memory: what may be changed, step by step, so that a pass needs less. Never the window or the overlap."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Literal

import torch

from monai_adv.victims import Victim

Step = Literal["sw_batch_size", "recompute", "stitch_cpu", "cpu"]
"""Fewer windows per forward (halved until 1), no window's graph kept, logits stitched in main memory, all of it on the
CPU. The logits are the same but for rounding."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a device or in the machine."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)


class Ladder:
    """Takes the allowed steps one by one, and undoes them at the end of the context.

    Args:
        victim: changed in place.
        steps: allowed, in this order.
        device: where the study runs.

    Attributes:
        taken: the steps taken, for the result: ``["sw_batch_size 2", "sw_batch_size 1", "recompute"]``.
        device: where it runs now.
    """

    def __init__(self, victim: Victim, steps: Sequence[Step], device: str) -> None:
        self.victim, self.device = victim, device
        self.taken: list[str] = []
        self._left = list(steps)
        self._undo: list[tuple[Any, str, Any]] = []
        self._home = device
        inferer: Any = victim.inferer
        while getattr(inferer, "inferer", None) is not None:
            inferer = inferer.inferer
        self._windows = inferer

    def __enter__(self) -> Ladder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for owner, name, value in reversed(self._undo):
            setattr(owner, name, value)
        if self.device != self._home:
            self.victim._modules().to(self._home)

    def down(self) -> bool:
        """Take the next step that changes anything; False if there is none left."""
        while self._left:
            step = self._left[0]
            if step != "sw_batch_size" or not self._halve():
                self._left.pop(0)
                if step == "sw_batch_size" or not getattr(self, f"_{step}")():
                    continue
                self.taken.append(step)
            if self._home.startswith("cuda"):
                torch.cuda.empty_cache()
            return True
        return False

    def _set(self, name: str, value: Any) -> bool:
        before = getattr(self._windows, name)
        self._undo.append((self._windows, name, before))
        setattr(self._windows, name, value)
        return True

    def _halve(self) -> bool:
        size = getattr(self._windows, "sw_batch_size", 1)
        if size > 1:
            self.taken.append(f"sw_batch_size {size // 2}")
            return self._set("sw_batch_size", size // 2)
        return False

    def _recompute(self) -> bool:
        return getattr(self._windows, "keep_windows", 0) != 0 and self._set("keep_windows", 0)

    def _stitch_cpu(self) -> bool:
        if self.device == "cpu" or not hasattr(self._windows, "sw_batch_size"):
            return False
        if self._windows.sw_device is None:
            self._set("sw_device", torch.device(self.device))
        return self._set("device", torch.device("cpu"))

    def _cpu(self) -> bool:
        if self.device == "cpu":
            return False
        for name in ("sw_device", "device"):
            if getattr(self._windows, name, None) is not None:
                self._set(name, torch.device("cpu"))
        self.victim._modules().to("cpu")
        self.device = "cpu"
        return True
