"""`python -m scripts.pages`: write all pages, or say which are stale."""

import argparse
import sys

from scripts.pages.blocks import PAGES, ROOT, stale, write


def main(arguments: list[str]) -> int:
    """Writes or checks the pages and returns an exit status."""
    parser = argparse.ArgumentParser(prog="python -m scripts.pages", description="Write the generated pages.")
    parser.add_argument("--check", action="store_true", help="write nothing, name the stale pages")
    parser.add_argument("--pictures", action="store_true", help="draw docs/*.png too (needs Chromium)")
    options = parser.parse_args(arguments)
    if options.check:
        found = stale()
        print(
            "\n".join(f"{page} is stale: run python -m scripts.pages" for page in found) or "all up to date"
        )
        return int(bool(found))
    if options.pictures:
        from scripts.pages import classes, depth, many_gpus, quality, speed

        for part in (quality, depth, classes, speed, many_gpus):
            for path in part.draw(ROOT / "docs"):
                print(f"drew {path.relative_to(ROOT)}")
    for page in write(PAGES):
        print(f"wrote {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
