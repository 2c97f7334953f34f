"""What made a result: versions and platform, for run folders and reports."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from monai_adv import __version__

PACKAGES = ("monai", "torch", "numpy", "scipy", "nibabel", "SimpleITK", "itk", "pytorch-ignite", "pandas", "matplotlib")


def versions() -> dict[str, str]:
    """Versions of this package, Python and the packages it is built on, without importing them."""
    found = {"monai_adv": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
