"""Make the pictures of docs/app.md: the page in Chromium, 1280 and 400 pixels wide.

python scripts/screenshots.py
"""

import io
import sys
import tempfile
from pathlib import Path

import clone  # noqa: F401
from PIL import Image

from dci.cli.arguments import Parser, run

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Serve the page, use it as a visitor would, and save a picture of each tab."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=str(ROOT / "docs"), help="folder for the pictures (default docs)")
    args = parser.parse_args()
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/app")]
    from browser import browsing
    from served import Visit, serving

    with tempfile.TemporaryDirectory() as logdir, serving(logdir) as (_, address), browsing() as browser:
        with Visit(browser, address) as visit:
            _wide(visit, Path(args.out))
        with Visit(browser, address, 400) as visit:
            visit.page.set_default_timeout(900_000)
            visit.draw()
            _picture(visit, Path(args.out) / "app-narrow.webp")


def _wide(visit, out: Path) -> None:
    visit.page.set_default_timeout(900_000)
    visit.choose("concept", "cottage (demo)")
    visit.fill(Prompt="a V* house on the beach", Lambda=1, Images=2)
    visit.draw()
    _picture(visit, out / "app-draw.webp", 900)
    visit.page.locator("#images [data-number]").last.click()
    visit.page.wait_for_selector("#seen img")
    _picture(visit, out / "app-inside.webp", part="#inside")
    visit.tab("Learn")
    images = sorted((ROOT / "data/concepts/cat").glob("*.png"))
    visit.page.set_input_files("#images-to-learn input[type=file]", images)
    visit.page.wait_for_selector("#squares img")
    visit.fill(Class_noun="cat", Steps=30)
    visit.page.click("#learn")
    visit.page.wait_for_selector("#use", timeout=900_000)
    _picture(visit, out / "app-learn.webp")
    visit.tab("Compare")
    visit.choose("compared", "cottage (demo)")
    visit.fill(Prompt="a V* house on the beach", T_a="0.2, 0.4, 0.6", Lambda="0, 1, 2", Steps=20)
    visit.page.click("#compare")
    visit.page.wait_for_selector("#plane svg", timeout=900_000)
    _picture(visit, out / "app-compare.webp")


def _picture(visit, file: Path, tall: int | None = None, part: str | None = None) -> None:
    """Save what the page shows, or a part of it, the upper `tall` pixels."""
    visit.page.wait_for_timeout(700)  # until nothing moves any more
    content = visit.page.locator(part).screenshot() if part else visit.page.screenshot(full_page=True)
    image = Image.open(io.BytesIO(content)).convert("RGB")
    image.crop((0, 0, image.width, min(tall or image.height, image.height))).save(file, quality=82, method=6)
    print(f"{file}: {image.width} x {image.height}, {file.stat().st_size // 1000} kB")


if __name__ == "__main__":
    run(main)
