"""A headless Chromium driven over its debugging pipe with the standard library alone, for the tests of the report."""

from __future__ import annotations

import base64
import io
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

PROGRAM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome")) if p), None)
# software WebGL, no network: every name is unknown, and the page has a policy of its own
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader",
    "--remote-debugging-pipe", "--no-first-run", "--disable-extensions", "--disable-background-networking",
    "--disable-component-update", "--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip
# the pipe's ends are descriptors 3 (browser reads) and 4 (browser writes)
LAUNCH = (
    "import os, sys; r, w = os.dup(int(sys.argv[1])), os.dup(int(sys.argv[2])); os.dup2(r, 3); os.dup2(w, 4); "
    "os.set_inheritable(3, True); os.set_inheritable(4, True); os.execv(sys.argv[3], sys.argv[3:])"
)


class Browser:
    """One page in one browser.

    Args:
        profile: an empty folder for the browser's files.
        size: of the window in pixels.
        flags: further flags of the browser.

    Attributes:
        complaints: errors and warnings of the console, exceptions, violations of the page's policy.
        requests: everything the page asked for, but itself and what it holds itself (data:, blob:).
    """

    def __init__(self, profile: Path, size: tuple[int, int] = (1280, 900), flags: tuple[str, ...] = ()) -> None:
        assert PROGRAM is not None
        self.complaints: list[str] = []
        self.requests: list[str] = []
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        command = [PROGRAM, *FLAGS, *flags, f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}"]
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", LAUNCH, str(theirs_in), str(theirs_out), *command, "about:blank"],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._buffer, self._next, self._session = b"", 0, ""
        self._page = ""
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *error: object) -> None:
        self._session = ""
        try:
            self.call("Browser.close")
        except (OSError, AssertionError):
            self._process.kill()
        os.close(self._out)
        self._process.wait(20)
        os.close(self._in)

    def call(self, method: str, *, timeout: float = 60.0, **params: Any) -> dict[str, Any]:
        """Send a command and give its result; events on the way are kept."""
        self._next += 1
        message = {"id": self._next, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + timeout
        while True:
            answer = self._receive(until)
            if answer.get("id") == self._next:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return dict(answer["result"])
            self._event(answer)

    def _receive(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready = select.select([self._in], [], [], max(0.0, until - time.monotonic()))[0]
            assert ready, "the browser does not answer"
            piece = os.read(self._in, 1 << 20)
            assert piece, "the browser is gone"
            self._buffer += piece
        message, self._buffer = self._buffer.split(b"\0", 1)
        return dict(json.loads(message))

    def _event(self, event: dict[str, Any]) -> None:
        kind, params = event.get("method"), event.get("params", {})
        if kind == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(" ".join(str(a.get("value", a.get("description"))) for a in params["args"]))
        elif kind == "Runtime.exceptionThrown":
            detail = params["exceptionDetails"]
            self.complaints.append(str(detail.get("exception", {}).get("description", detail["text"])))
        elif kind == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(params["entry"]["text"])
        elif kind == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if not url.startswith(("data:", "blob:")) and url.split("#")[0] != self._page:
                self.requests.append(url)

    def open(self, page: Path, fragment: str = "") -> None:
        """Load a file and wait until it is loaded."""
        self._page = page.resolve().as_uri()
        self.call("Page.navigate", url=self._page + fragment)
        self.wait("document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """Value of an expression in the page; a promise is awaited."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition: str, timeout: float = 60.0) -> None:
        """Wait until an expression is true."""
        until = time.monotonic() + timeout
        while not self.run(condition):
            assert time.monotonic() < until, f"not so after {timeout:g} s: {condition}; {self.complaints}"
            time.sleep(0.05)

    def picture(self, selector: str) -> np.ndarray:
        """What is seen of an element, (rows, columns, 3) in 0-255."""
        return pixels(self.shot(selector))

    def shot(self, selector: str | None = None) -> bytes:
        """PNG of the window, or of an element."""
        options: dict[str, Any] = {}
        if selector is not None:
            self.run(f"document.querySelector('{selector}').scrollIntoView({{block: 'center', behavior: 'instant'}})")
            options["clip"] = {**self.box(selector), "scale": 1}
        return base64.b64decode(self.call("Page.captureScreenshot", format="png", **options)["data"])

    def box(self, selector: str) -> dict[str, float]:
        """Place of an element in the page."""
        return dict(
            self.run(
                f"(() => {{ const b = document.querySelector('{selector}').getBoundingClientRect(); return "
                "{x: b.x + scrollX, y: b.y + scrollY, width: b.width, height: b.height}; })()"
            )
        )

    def mouse(self, selector: str, at: tuple[float, float], *, wheel: float = 0.0) -> None:
        """Click a point of an element, given as shares of its width and height, or turn the wheel over it."""
        box = self.run(
            f"(() => {{ const b = document.querySelector('{selector}').getBoundingClientRect(); "
            "return [b.x, b.y, b.width, b.height]; })()"
        )
        where = {"x": box[0] + at[0] * box[2], "y": box[1] + at[1] * box[3]}
        if wheel:
            self.call("Input.dispatchMouseEvent", type="mouseWheel", deltaX=0, deltaY=wheel, **where)
            return
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **where)


def pixels(png: bytes) -> np.ndarray:
    """A PNG as (rows, columns, 3) in 0-255."""
    import matplotlib.image

    return np.asarray(matplotlib.image.imread(io.BytesIO(png), format="png"))[..., :3] * 255
