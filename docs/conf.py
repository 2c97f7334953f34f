"""Sphinx configuration: ``python -m sphinx -W --keep-going -b html docs docs/_build/html``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent / "_ext"))

import monai_adv

project = "monai_adv"
author = "The monai_adv authors"
project_copyright = "The monai_adv authors, Apache License 2.0"
version = release = monai_adv.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "myst_nb",  # Markdown and notebooks
    "public_names",  # one page per subpackage from its __all__
    "repository",  # notebooks copied in, links to files outside docs/
]
exclude_patterns = ["_build", "jupyter_execute", "**.ipynb_checkpoints"]
suppress_warnings: list[str] = []

# every reference to a name of this package must resolve; those of other packages cannot, without a network
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(?!monai_adv\b).*\..*"),  # qualified names of torch, MONAI, NumPy, the standard library ...
    (r"py:class", r"[a-z ]*"),  # builtins
]
# the same by the short names that annotations have
_ELSEWHERE = "BlendMode DataLoader Engine Inferer KeysCollection Optimizer Path PytorchPadMode Tensor"
nitpick_ignore = [("py:class", name) for name in _ELSEWHERE.split()]
nitpick_ignore += [("py:class", "Target")]  # str | Mapping | Tensor, spelt out in the text

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_format = "short"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Reference", "References"), ("Class attributes", "Attributes")]
python_maximum_signature_line_length = 100
add_module_names = False
toc_object_entries_show_parents = "hide"

myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # notebooks are executed by the tests; the site shows the outputs they were shipped with
nb_merge_streams = True
copybutton_exclude = ".linenos, .gp, .go"

html_theme = "furo"
html_title = f"monai_adv {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
