"""A headless Chromium that keeps what the console said and what was asked of a network."""

from __future__ import annotations

import base64
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
    "disable-component-update", "disable-sync", "hide-scrollbars",
)  # fmt: skip

FAINTEST = """
const channels = (color) => color.match(/[\\d.]+/g).map(Number);
const light = (color) => channels(color).slice(0, 3)
  .map((x) => x / 255 <= 0.04045 ? x / 255 / 12.92 : ((x / 255 + 0.055) / 1.055) ** 2.4)
  .reduce((sum, x, place) => sum + x * [0.2126, 0.7152, 0.0722][place], 0);
const behind = (element) => {
  for (; element; element = element.parentElement) {
    const color = getComputedStyle(element).backgroundColor;
    if (color.startsWith("rgb") && (channels(color)[3] ?? 1) === 1) return color;
  }
  return "rgb(255, 255, 255)";
};
const texts = [...document.querySelectorAll("main *")].filter((each) => each.checkVisibility() &&
  !each.closest("svg, noscript") && [...each.childNodes].some((node) => node.nodeType === 3 && node.data.trim()));
return texts.map((each) => {
  const [low, high] = [light(getComputedStyle(each).color), light(behind(each))].sort((a, b) => a - b);
  return [(high + 0.05) / (low + 0.05), each.textContent.trim().slice(0, 60)];
}).sort((a, b) => a[0] - b[0])[0];
"""
"""JavaScript: the lowest contrast (WCAG) of a text with what lies behind it, and that text."""


class Browser:
    """Chromium with a fresh profile; skips the test, with the reason, where there is none.

    Args:
        profile: Folder for it.
        screenshots: Folder for the images that `shoot` takes.
    """

    def __init__(self, profile: Path, screenshots: Path) -> None:
        chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
        if not (chromium and driver):
            pytest.skip("there is no chromium with its chromedriver (Debian: apt-get install chromium chromium-driver)")
        webdriver = pytest.importorskip("selenium.webdriver")
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for flag in (*FLAGS, f"user-data-dir={profile}"):
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver: Any = webdriver.Chrome(options, webdriver.ChromeService(driver))
        self.folder = screenshots

    def open(self, page: Path, *, width: int = 1100, scheme: str = "light", fragment: str = "") -> None:
        """Open a file in a window of this width, in the `light` or `dark` color scheme."""
        preference = {"name": "prefers-color-scheme", "value": scheme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [preference]})
        window = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", window)
        self.driver.get("about:blank")  # a change of the fragment alone would not load the page
        self.driver.get(page.as_uri() + fragment)

    def run(self, script: str) -> Any:
        """What a function's body of JavaScript returns."""
        return self.driver.execute_script(script)

    def console(self) -> list[str]:
        """What was said on the console since this was last asked."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Addresses of files and of the network that were asked for since this was last asked."""
        messages = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        sent = [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]
        return [address for address in sent if not address.startswith(("about:", "chrome:", "data:"))]

    def faintest(self) -> tuple[float, str]:
        """Lowest contrast of a text with its background, and the text."""
        ratio, text = self.run(FAINTEST)
        return ratio, text

    def shoot(self, name: str) -> None:
        """Keep an image of the whole page."""
        width, height = self.run("const {scrollWidth: w, scrollHeight: h} = document.documentElement; return [w, h]")
        area = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        taken = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": area})
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{name}.png").write_bytes(base64.b64decode(taken["data"]))


def screenshots(otherwise: Path) -> Path:
    """Where images go: the folder in ACAMKD_SCREENSHOTS, which continuous integration keeps."""
    return Path(os.environ.get("ACAMKD_SCREENSHOTS", otherwise))
