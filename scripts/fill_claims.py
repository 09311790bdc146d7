"""Write the numbers of a report into the tables of README and docs that name it (dci/evaluation/claims.py).

python scripts/fill_claims.py                 # all pages
python scripts/fill_claims.py README.md
"""

from pathlib import Path

import clone  # noqa: F401

from dci.cli.arguments import Parser, run
from ldm.shipped import ROOT


def main() -> None:
    """Rewrite the pages whose numbers differ from their reports, and print which ones those are."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", help="Markdown files (default: README.md and docs)")
    args = parser.parse_args()

    from dci.evaluation.claims import fill
    from dci.files import write_atomically

    for page in map(Path, args.pages or [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]):
        text = page.read_text(encoding="utf-8")
        if (filled := fill(text, ROOT)) != text:
            write_atomically(page, filled.encode())
            print(f"filled: {page}")


if __name__ == "__main__":
    run(main)
