"""Pictures of a report's page, as docs show them: on a desktop and a phone, in light and dark colours.

    python tests/experiments/report/screenshots.py report.html docs/images

Of each look it writes the beginning of the page (report-desktop-light.png), with --full all of it. Needs Chromium, its
driver and the extra "test".
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from browser import CHROMIUM, DRIVER, Browser

LOOKS = {"desktop": (1280, 1500), "phone": (390, 1400)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="a page that `mixkv report` wrote")
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("--full", action="store_true", help="all of the page, not its beginning")
    arguments = parser.parse_args()
    if not (CHROMIUM and DRIVER):
        parser.error("needs Chromium and its driver: apt-get install chromium chromium-driver")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with Browser() as browser:
        for name, (width, height) in LOOKS.items():
            for scheme in ("light", "dark"):
                browser.look(
                    width, 800, dark=scheme == "dark", scale=2 if name == "phone" else 1, mobile=name == "phone"
                )
                browser.open(arguments.page)
                file = arguments.folder / f"report-{name}-{scheme}.png"
                browser.picture(
                    file, clip=None if arguments.full else {"x": 0, "y": 0, "width": width, "height": height}
                )
                print(file)


if __name__ == "__main__":
    main()
