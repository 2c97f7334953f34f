"""A victim out of a MONAI bundle: everything it needs is found in the bundle's own configuration."""

from __future__ import annotations

import importlib
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.inferers import Inferer
from monai.transforms import Compose
from torch import Tensor, nn

from monai_adv.bundle.head import Regions, find_head
from monai_adv.bundle.trust import bundle_folder, read_metadata, require_trust
from monai_adv.data.meta import plain
from monai_adv.engines.attack import _Autocast
from monai_adv.errors import CheckpointError, ConfigError
from monai_adv.inferers import differentiable
from monai_adv.victims import Head, Victim
from monai_adv.victims.naming import channel_order, head_of_classes, modality, region
from monai_adv.victims.weights import read_checkpoint_file, state_dict_of

_SUFFIXES = (".json", ".yaml", ".yml")
# what is looked for, in the order of preference: in configurations that evaluate, then in those that infer
_IDS = {
    "network": ("network_def", "network", "net", "model"),
    "inferer": ("validate#inferer", "validate#evaluator#inferer", "inferer", "evaluator#inferer"),
    "preprocessing": ("validate#preprocessing", "validate#dataset#transform", "preprocessing", "dataset#transform"),
    "postprocessing": ("validate#postprocessing", "validate#evaluator#postprocessing", "postprocessing"),
    "data": ("validate#dataset#data", "dataset#data"),
    "amp": ("validate#evaluator#amp", "evaluator#amp"),
    "amp_kwargs": ("validate#evaluator#amp_kwargs", "evaluator#amp_kwargs"),
}
_UNUSED = ("prepare_batch", "iteration_update", "amp_kwargs")


@dataclass
class BundleVictim:
    """What :func:`load_bundle` found.

    Attributes:
        victim: network, inferer and head as the bundle deploys them; it takes what ``preprocessing`` gives.
        folder: the bundle.
        sha256: hash of its configuration and scripts, as trusted.
        network: the network with the bundle's weights.
        inferer: the bundle's own inferer (the victim's is the same with exact gradients).
        preprocessing: the bundle's own ``Compose``.
        amp: whether the bundle evaluates with automatic mixed precision (MONAI's engines: on a CUDA device only).
        channels: names of the network's input channels, in order; empty if the metadata do not say.
        weights: the file the weights came from.
        found: what was found and where, to be shown; see :meth:`summary`.
    """

    victim: Victim
    folder: Path
    sha256: str
    network: nn.Module
    inferer: Inferer
    preprocessing: Callable[[Any], Any]
    amp: bool
    channels: tuple[str, ...]
    weights: Path
    found: dict[str, str]
    _bundle: _Bundle = field(repr=False)
    _amp_kwargs: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def head(self) -> Head:
        """The victim's head."""
        return self.victim.head

    @property
    def channel_order(self) -> tuple[int, ...]:
        """For every input channel its place in T1, T1c, T2, FLAIR.

        Raises:
            ConfigError: if the bundle does not name the four modalities.
        """
        if not self.channels:
            raise ConfigError(
                f"{self.folder.name}: configs/metadata.json has no network_data_format#inputs#*#channel_def that names "
                "the input channels: give channels=['T1c', 'T1', 'T2', 'FLAIR'] in the network's order"
            )
        return channel_order(self.channels)

    def items(self) -> list[dict[str, Any]]:
        """The bundle's own validation data, before any transform.

        Raises:
            ConfigError: if the configuration has none, or they are not where it says.
        """
        data, key = self._bundle.get("data", "list of validation cases")
        if not isinstance(data, (list, tuple)) or not data or not all(isinstance(i, Mapping) for i in data):
            raise ConfigError(f"{key} of {self.folder.name} must be a list of dictionaries with 'image' and 'label'")
        self.found["data"] = f"{len(data)} cases ({key})"
        return [dict(item) for item in data]

    def logits(self, image: Tensor) -> Tensor:
        """What the bundle's own evaluator computes for a preprocessed batch ``(B, C, *spatial)``, without a gradient.

        The bundle's own inferer and autocast, no part of ours: the path that is deployed.
        """
        device = next(iter(self.network.parameters())).device
        self.network.eval()
        with torch.no_grad(), torch.autocast("cuda", enabled=self.amp and device.type == "cuda", **self._amp_kwargs):
            return plain(self.inferer(plain(image).to(device), self.network)).float()

    def summary(self) -> str:
        """What was found, a line each."""
        return "\n".join(f"{name}: {text}" for name, text in self.found.items())


def load_bundle(
    folder: str | Path,
    trust: str | None = None,
    *,
    configs: Sequence[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    weights: str | Path | None = None,
    channels: Sequence[str] | None = None,
    regions: Regions | None = None,
    head: str | None = None,
    device: str | torch.device = "cpu",
) -> BundleVictim:
    """Find network, inferer, pre- and post-processing, channel and label order in a bundle's own configuration.

    The configuration of a bundle is a program. Without ``trust`` nothing of it is executed: only metadata and file
    names are read, and the error says the hash to trust.

    Args:
        folder: the bundle (it holds ``configs/`` and ``models/``).
        trust: SHA-256 of its configuration and scripts: :func:`monai_adv.bundle.bundle_hash`.
        configs: files of ``configs/`` to read, the last wins; by default train and evaluate, or the one that is there.
        overrides: configuration entries to set, as on MONAI's own command line: ``{"data_list_file_path": ...}``.
        weights: file of the weights; ``models/model.pt`` or ``models/model.safetensors`` by default.
        channels: names of the input channels in the network's order, where the metadata do not tell.
        regions: what is scored, where the metadata do not tell: names of a sigmoid head's channels in order, or
            ``{name: class indices}`` of a softmax head.
        head: "sigmoid" or "softmax", where the post-processing does not tell.
        device: where the network runs.

    Raises:
        ConfigError: without trust, for another hash, or naming the key that was not found and how to give it.
        CheckpointError: if the weights cannot be read without executing them, or do not fit the network.
    """
    folder = bundle_folder(folder)
    sha256 = require_trust(folder, trust)
    device = torch.device(device)
    files = _config_files(folder, configs)
    metadata = read_metadata(folder)
    bundle = _Bundle(folder, files, overrides or {}, device)
    found = {"bundle": f"{folder.name} {metadata.get('version', '')}".strip(), "sha256": sha256,
             "configuration": ", ".join(f.name for f in files)}  # fmt: skip

    network, key = bundle.get("network", "network")
    if not isinstance(network, nn.Module):
        raise ConfigError(f"{key} of {folder.name} is a {type(network).__name__}, not a torch module")
    path = _weights_file(folder, weights)
    _load_weights(network, path)
    network = network.to(device).eval()
    count = sum(p.numel() for p in network.parameters())
    found["network"] = f"{type(network).__name__}, {count:,} parameters ({key})"
    found["weights"] = path.name

    inferer, key = bundle.get("inferer", "inferer")
    if not isinstance(inferer, Inferer):
        raise ConfigError(f"{key} of {folder.name} is a {type(inferer).__name__}, not a MONAI inferer")
    details = {n: getattr(inferer, n) for n in ("roi_size", "sw_batch_size", "overlap", "mode") if hasattr(inferer, n)}
    found["inferer"] = f"{type(inferer).__name__} {details or ''}".strip() + f" ({key})"

    preprocessing, key = bundle.get("preprocessing", "preprocessing")
    found["preprocessing"] = f"{_names(preprocessing)} ({key})"
    chosen = _head(bundle, metadata, head, regions, found)

    names = tuple(channels) if channels is not None else tuple(_definition(metadata, "inputs").values())
    found["channels"] = ", ".join(names) or "not named in metadata.json (channels=)"
    known = [modality(name) for name in names]
    if names and None not in known and known != list(names):
        found["channels"] += f" = {', '.join(map(str, known))}"
    amp, key = bundle.get("amp", default=False)
    amp_kwargs, _ = bundle.get("amp_kwargs", default={})
    amp = bool(amp)
    active = "on" if device.type == "cuda" else "on, without effect on a CPU (MONAI autocasts CUDA operations only)"
    found["amp"] = f"{active} ({key})" if amp else "off"
    for option in _UNUSED[:2]:
        if f"validate#evaluator#{option}" in bundle.parser:
            found[f"not used: {option}"] = f"validate#evaluator#{option}; the overlay attack.json keeps prepare_batch"

    # MONAI's engines enter CUDA's autocast only, whatever the device
    cast = _Autocast(network, {"device_type": "cuda", **(amp_kwargs or {})}) if amp and device.type == "cuda" else None
    victim = Victim(cast or network, differentiable(inferer), head=chosen, name=folder.name)
    return BundleVictim(
        victim, folder, sha256, network, inferer, preprocessing, amp, names, path, found, bundle, amp_kwargs or {}
    )


class _Bundle:
    """The parsed configuration of a trusted bundle."""

    def __init__(self, folder: Path, files: Sequence[Path], overrides: Mapping[str, Any], device: torch.device) -> None:
        self.folder, self.files = folder, files
        self.parser = ConfigParser()
        with self._inside("reading " + ", ".join(f.name for f in files)):
            self.parser.read_config([str(f) for f in files])
            if (folder / "configs" / "metadata.json").is_file():
                self.parser.read_meta(str(folder / "configs" / "metadata.json"))
            own = {"bundle_root": str(folder), "device": f"$torch.device({str(device)!r})"}
            pairs = {k: v for k, v in own.items() if k in self.parser and k not in overrides}
            self.parser.update(pairs={**pairs, **overrides})

    def get(self, what: str, description: str | None = None, **default: Any) -> tuple[Any, str]:
        """The object under the first known id, and that id."""
        ids = _IDS[what]
        for key in ids:
            if key in self.parser:
                with self._inside(key + ("" if key == ids[0] else f" (there is no {ids[0]})")):
                    return self.parser.get_parsed_content(key), key
        if "default" in default:
            return default["default"], ""
        raise ConfigError(
            f"{self.folder.name}: no {description}: looked for {', '.join(ids)} in "
            f"{', '.join(f.name for f in self.files)}; give it as overrides={{{ids[0]!r}: ...}} "
            f"(--override {ids[0]}=...), or name other files as configs="
        )

    @contextmanager
    def _inside(self, what: str) -> Iterator[None]:
        """The bundle's modules can be imported, only as sources that were hashed, and are forgotten afterwards."""
        before, prefix = list(sys.path), sys.pycache_prefix
        with tempfile.TemporaryDirectory() as empty, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a bundle's parts warn about while they are made is theirs
            sys.path.insert(0, str(self.folder))
            sys.pycache_prefix = empty
            importlib.invalidate_caches()
            try:
                yield
            except ConfigError:
                raise
            except Exception as error:  # a bundle's configuration may stumble over anything
                raise ConfigError(
                    f"{self.folder.name}: {what} in its configuration cannot be made: {_cause(error)}; entries can be "
                    "set as overrides={'key': value} (--override key=value)"
                ) from error
            finally:
                sys.path[:], sys.pycache_prefix = before, prefix
                for name, module in list(sys.modules.items()):
                    origin = getattr(module, "__file__", None)
                    if origin and Path(origin).is_relative_to(self.folder):
                        del sys.modules[name]  # another bundle may have a module of that name


def _head(
    bundle: _Bundle, metadata: Mapping[str, Any], head: str | None, regions: Regions | None, found: dict[str, str]
) -> Head:
    """The head by the post-processing, its regions by the metadata."""
    if head is None:
        postprocessing, key = bundle.get("postprocessing", "postprocessing that tells the head")
        kind = find_head(postprocessing)
    else:
        kind, key = find_head(None, head=head), "given"
    found["head"] = f"{kind.kind} ({key})"
    if regions is not None:
        chosen, where = find_head(None, regions, kind), "given"
    else:
        names, where = _definition(metadata, "outputs"), "metadata.json"
        if not names:
            raise ConfigError(
                f"{bundle.folder.name}: configs/metadata.json has no network_data_format#outputs#*#channel_def that "
                "names the output channels: give regions=['TC', 'WT', 'ET'] (--regions TC,WT,ET) in the network's "
                "order, or {name: class indices} for a softmax head"
            )
        if kind.exclusive:
            chosen = head_of_classes({k: name for k, name in names.items() if k != 0})
        else:
            chosen = Head("sigmoid", tuple(region(name) for name in names.values()))
    found["regions"] = f"{chosen.regions if chosen.exclusive else ', '.join(chosen.region_names)} ({where})"
    return chosen


def _definition(metadata: Mapping[str, Any], side: str) -> dict[int, str]:
    """``channel_def`` of the first input or output, by channel; empty where there is none."""
    try:
        ends = metadata["network_data_format"][side]
        content = next(iter(ends.values())).get("channel_def") or {}
        return dict(sorted((int(channel), str(name)) for channel, name in content.items()))
    except (KeyError, TypeError, AttributeError, ValueError, StopIteration):
        return {}


def _config_files(folder: Path, names: Sequence[str] | None) -> list[Path]:
    """The configuration files to read, in order."""
    there = {p.stem: p for p in sorted((folder / "configs").iterdir(), reverse=True) if p.suffix in _SUFFIXES}
    if names is None:
        names = ["train", "evaluate"] if "train" in there else [n for n in ("inference", "evaluate") if n in there]
        names = [n for n in names if n in there]
        if not names:
            raise ConfigError(f"{folder}: no train, evaluate or inference configuration in configs/ (configs=)")
    missing = [n for n in names if Path(n).stem not in there]
    if missing:
        raise ConfigError(f"{folder}: no {', '.join(missing)} in configs/; there are {', '.join(sorted(there))}")
    return [there[Path(n).stem] for n in names]


def _weights_file(folder: Path, given: str | Path | None) -> Path:
    if given is not None:
        return Path(given)
    usual = [folder / "models" / name for name in ("model.pt", "model.safetensors", "model.pth")]
    for path in usual:
        if path.is_file():
            return path
    raise CheckpointError(
        f"{folder}: none of {', '.join(p.name for p in usual)} in models/: download it, or give weights="
    )


def _load_weights(network: nn.Module, path: Path) -> None:
    state = state_dict_of(read_checkpoint_file(path), str(path))
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"weights {path} do not fit the bundle's network: {error}") from error


def _names(transform: Any) -> str:
    members = transform.transforms if isinstance(transform, Compose) else [transform]
    return ", ".join(type(member).__name__ for member in members)


def _cause(error: BaseException) -> str:
    """The innermost message: MONAI wraps errors in sentences about itself."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}".replace("::", "#").strip()  # ids as the configuration writes them
