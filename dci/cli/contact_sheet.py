"""Put the images of a folder into one sheet.

python scripts/contact_sheet.py outputs/RUN/samples --columns 4 --scale 3 --out sheet.png
"""

from dci.cli.arguments import Parser, image_file, positive


def main() -> None:
    """Lay the images out in rows, in the order of their names, and save the sheet."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="folder of images of one size, put in the order of their names")
    parser.add_argument("--columns", type=positive, help="images in a row (default: about square)")
    parser.add_argument("--scale", type=positive, default=1, help="whole-number enlargement")
    parser.add_argument("--out", type=image_file, required=True, help="the sheet's file")
    args = parser.parse_args()

    from ldm.images import grid, list_images, read_image

    sheet = grid([read_image(file) for file in list_images(args.folder)], args.columns)
    sheet.resize([side * args.scale for side in sheet.size]).save(args.out)
    print(f"Sheet: {args.out}")
