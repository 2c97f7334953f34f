"""The report of a real run in headless Chromium: nothing is loaded, the viewer shows volumes, the table works."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from chromium import PROGRAM, Browser
from small_run import HOSTILE

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="needs Chromium")

CANVASES = ("#viewer-canvas-clean", "#viewer-canvas-adversarial", "#viewer-canvas-perturbation")
STATE = "document.getElementById('viewer-panel').dataset.state"


@pytest.fixture(scope="module")
def browser(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        opened.open(run / "report.html")
        yield opened


def pictures(browser: Browser) -> list[np.ndarray]:
    browser.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return [browser.picture(canvas) for canvas in CANVASES]


def choose(browser: Browser, name: str, value: str) -> None:
    """Choose an option as a reader does, and wait until it is shown."""
    browser.run(
        f"(() => {{ const s = document.getElementById('viewer-{name}'); s.value = {value!r}; "
        "document.getElementById('viewer-panel').dataset.state = 'asked'; "
        "s.dispatchEvent(new Event('change', {bubbles: true})); })()"
    )
    browser.wait(f"{STATE} === 'ready'")


def differ(one: np.ndarray, other: np.ndarray) -> bool:
    return bool((np.abs(one - other) > 20).any(axis=-1).mean() > 0.002)


def test_the_first_screen_is_quick_and_nothing_is_decoded(browser: Browser, run: Path) -> None:
    paints = []
    for _ in range(3):  # the quickest: the first pays for the start of the browser, others for what else runs
        browser.wait("performance.getEntriesByName('first-contentful-paint').length > 0")
        paints.append(browser.run("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
        browser.call("Page.navigate", url="about:blank")
        browser.open(run / "report.html")
    assert min(paints) < 2000
    assert browser.run("typeof niivue") == "undefined"
    assert browser.run("document.getElementById('viewer-panel').open") is False
    assert browser.run("[...document.images].every((i) => i.complete && i.naturalWidth > 0)")
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")


def test_the_table_is_sorted_and_filtered(browser: Browser) -> None:
    def column(index: int) -> list[str]:
        return list(
            browser.run(f"[...document.querySelectorAll('#subject-body tr')].map(r => r.cells[{index}].innerText)")
        )

    def click(index: int) -> None:
        browser.run(f"document.querySelectorAll('#subject-head button')[{index}].click()")

    names = [
        str(n) for n in browser.run("[...document.querySelectorAll('#subject-head button')].map(b => b.innerText)")
    ]
    assert len(column(0)) == 2 * 2 * 7
    assert list(dict.fromkeys(column(1))) == ["zeta", "alpha"]
    dice = names.index("mean Dice")
    click(dice)
    rising = [float(v) for v in column(dice)]
    assert rising == sorted(rising)
    assert rising[0] < rising[-1]
    click(dice)
    assert [float(v) for v in column(dice)] == rising[::-1]
    browser.run(
        "(() => { const s = document.getElementById('subject-filter-1'); s.value = 'alpha'; "
        "s.dispatchEvent(new Event('change')); })()"
    )
    assert set(column(1)) == {"alpha"}
    browser.run(
        "(() => { const s = document.getElementById('subject-search'); s.value = '00001 <SCRIPT>'; "
        "s.dispatchEvent(new Event('input')); })()"
    )
    assert set(column(0)) == {"BraTS2021_00001"}
    assert sorted(set(column(2))) == [f"{HOSTILE} 0.2 std", f"{HOSTILE} 0.8 std"]
    assert "2 of 2 rows shown, 28 in all" in browser.run("document.getElementById('subject-count').innerText")


def test_volumes_are_shown_scrolled_and_chosen(browser: Browser) -> None:
    browser.run("location.hash = '#viewer'")
    browser.wait(f"{STATE} === 'ready'")
    first = pictures(browser)
    for picture in first:
        assert picture.std() > 10
        assert len(np.unique(picture.astype(int).reshape(-1, 3), axis=0)) > 5
    clean, adversarial, perturbation = first
    assert differ(clean, adversarial)
    assert np.ptp(perturbation, axis=-1).max() > 100  # coloured, unlike the images

    browser.mouse(CANVASES[0], (0.25, 0.25))
    clicked = pictures(browser)
    assert all(differ(a, b) for a, b in zip(first, clicked))  # the crosshair moved in all three
    browser.mouse(CANVASES[0], (0.25, 0.25), wheel=120.0)
    browser.wait("true")
    scrolled = pictures(browser)
    assert all(differ(a, b) for a, b in zip(clicked, scrolled))

    choose(browser, "overlay", "none")
    bare = pictures(browser)
    assert np.ptp(bare[0], axis=-1).mean() < np.ptp(scrolled[0], axis=-1).mean()  # grey without the labels
    red, blue = (bare[2][..., band] for band in (0, 2))
    change = (bare[1] - bare[0]).mean(axis=-1)  # the adversarial image is made in the page: clean + perturbation
    assert change[(red > 200) & (blue < 150)].mean() > 5
    assert change[(blue > 200) & (red < 100)].mean() < -5
    choose(browser, "modality", "T2")
    assert differ(bare[0], pictures(browser)[0])
    choose(browser, "overlay", "truth")
    choose(browser, "setting", f"{HOSTILE} 0.8 std")
    choose(browser, "victim", "alpha")
    assert browser.run("document.getElementById('viewer-dice').innerText").startswith("Dice, clean → attacked: WT 0.")
    assert "full colour at" in browser.run("document.getElementById('viewer-scale').innerText")
    browser.run(
        "(() => { const s = document.getElementById('viewer-plane'); s.value = 'axial'; "
        "s.dispatchEvent(new Event('change')); })()"
    )
    assert differ(pictures(browser)[0], scrolled[0])
    browser.run("document.getElementById('viewer-outline').click()")
    outlined = pictures(browser)
    assert outlined[0].std() > 10
    assert browser.complaints == []
    assert browser.requests == []


def test_the_page_may_load_nothing(browser: Browser) -> None:
    """Last: what is tried here is refused by the policy, and complained about."""
    before = len(browser.complaints)
    browser.run("fetch('https://example.org/x').catch(() => null)")
    browser.run(
        "new Promise((done) => { const i = new Image(); i.onerror = done; i.src = 'https://example.org/x.png'; })"
    )
    browser.run("(() => { const s = document.createElement('script'); s.textContent = 'window.broken = 1'; "
                "document.head.append(s); })()")  # fmt: skip
    assert browser.run("typeof window.broken") == "undefined"
    assert len(browser.complaints) >= before + 3
    assert all("Content Security Policy" in c or "violates" in c for c in browser.complaints[before:])


def test_without_webgl_the_pictures_are_there(run: Path, tmp_path: Path) -> None:
    with Browser(tmp_path / "profile", (480, 800), ("--disable-3d-apis",)) as page:
        page.open(run / "report.html", "#viewer")
        page.wait(f"{STATE} === 'unavailable'")
        assert "no WebGL 2" in page.run("document.getElementById('viewer-status').innerText")
        assert page.run("document.getElementById('viewer-body').hidden") is True
        assert page.run("document.querySelectorAll('#viewer > figure img').length") == 4
        assert page.picture("#viewer > figure img").std() > 10
        assert page.run("document.documentElement.scrollWidth <= innerWidth")  # narrow, and nothing sticks out
        assert page.complaints == []
