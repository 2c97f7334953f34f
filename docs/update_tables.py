"""Put what the program says of itself into the pages: attacks, commands, keys of a study, columns of a table.

Run from anywhere, without options.
"""

from __future__ import annotations

import sys
from pathlib import Path

from monai_adv.cli import app
from monai_adv.cli_reference import reference
from monai_adv.studies.attack_table import catalogue

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

from made_tables import checkpoint_keys, record_columns, study_keys  # noqa: E402

TABLES = {
    "attacks.md": {"monai-adv attacks --markdown": catalogue},
    "files_and_schemas.md": {
        "study keys": study_keys,
        "checkpoint keys": checkpoint_keys,
        "record columns": record_columns,
    },
}
"""Pages with the tables in them; a table stands between ``<!-- made by: NAME -->`` and ``<!-- end -->``."""


def pages() -> dict[str, str]:
    """Every page that is made or holds something made: its name and what it should be."""
    found = {"cli.md": reference(app)}
    for page, tables in TABLES.items():
        text = (DOCS / page).read_text(encoding="utf-8")
        for name, table in tables.items():
            begin, end = f"<!-- made by: {name} -->\n", "<!-- end -->"
            before, rest = text.split(begin)
            text = before + begin + table() + rest[rest.index(end) :]
        found[page] = text
    return found


if __name__ == "__main__":
    for page, text in pages().items():
        (DOCS / page).write_text(text, encoding="utf-8")
