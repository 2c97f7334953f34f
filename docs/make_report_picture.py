"""Draw docs/images/report.png: the top of the demonstration's report, in a headless Chromium.

Run from the repository root: monai-adv demo && python docs/make_report_picture.py monai_adv_demo/run/report.html
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

WIDTH, HEIGHT, SHOWN = 1100, 2440, 760  # of the page in pixels, and the width of the picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "images" / "report.png")
    options = parser.parse_args()
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        parser.error("needs chromium or google-chrome")
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "page.png"
        command = [browser, "--headless", "--no-sandbox", "--hide-scrollbars", f"--screenshot={picture}"]
        command += [f"--window-size={WIDTH},{HEIGHT}", options.report.resolve().as_uri()]
        subprocess.run(command, check=True, capture_output=True)
        with Image.open(picture) as image:
            page = image.convert("RGB").resize((SHOWN, SHOWN * HEIGHT // WIDTH), Image.Resampling.LANCZOS)
    page.quantize(128, dither=Image.Dither.NONE).save(options.output, optimize=True)


if __name__ == "__main__":
    main()
