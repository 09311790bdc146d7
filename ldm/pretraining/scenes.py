"""Procedural places of the toy world: each function renders one on a square canvas.

A scene function takes a numpy Generator and returns an RGB image of CANVAS x CANVAS pixels.
Colours, horizons and details vary with the generator, so that no two scenes are alike.
"""

from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

CANVAS = 128  # pixels; images are rendered at this size and halved

Colour = tuple[int, int, int]


def _vary(rng: Generator, colour: Colour, amount: int = 16) -> Colour:
    """Return the colour, each channel moved by at most `amount`."""
    moved = zip(colour, rng.integers(-amount, amount + 1, 3), strict=True)
    red, green, blue = (int(np.clip(c + d, 0, 255)) for c, d in moved)
    return red, green, blue


def _gradient(rng: Generator, top: Colour, bottom: Colour) -> Image.Image:
    """A vertical gradient over the whole canvas."""
    ends = np.array([_vary(rng, top), _vary(rng, bottom)], dtype=np.uint8)[:, None]
    return Image.fromarray(ends).resize((CANVAS, CANVAS), Image.Resampling.BILINEAR)


def _ground(rng: Generator, image: Image.Image, colour: Colour, horizon: int, roughness: int = 14) -> None:
    """Paint everything below a slightly wavy horizon with a speckled colour."""
    mean = np.array(_vary(rng, colour), dtype=np.float32)
    noise = rng.normal(0, roughness, (20, 20, 1)).astype(np.float32)
    patch = np.clip(mean + noise + np.linspace(12, -22, 20)[:, None, None], 0, 255).astype(np.uint8)
    texture = Image.fromarray(patch).resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)
    image.paste(texture, mask=_below(_wave(rng, horizon, rng.uniform(0, 4))))


def _wave(rng: Generator, level: float, height: float) -> np.ndarray:
    """Heights (CANVAS,) of a smooth curve around `level`."""
    x = np.linspace(0, 2 * np.pi, CANVAS)
    first, second = rng.uniform(0, 2 * np.pi, 2)
    return level + height * (0.7 * np.sin(x * rng.uniform(0.5, 1.5) + first) + 0.3 * np.sin(3 * x + second))


def _below(curve: np.ndarray) -> Image.Image:
    """A mask of everything below a curve."""
    return Image.fromarray(((np.arange(CANVAS)[:, None] > curve[None]) * 255).astype(np.uint8))


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: Colour) -> None:
    draw.ellipse([x - r, y - r, x + r, y + r], fill=colour)


def _dots(rng: Generator, draw: ImageDraw.ImageDraw, number: int, colour: Colour, size: tuple, y: tuple) -> None:
    """Scatter discs of the given range of radii over the given range of heights."""
    for _ in range(number):
        _disc(draw, rng.uniform(0, CANVAS), rng.uniform(*y), rng.uniform(*size), colour)


def beach(rng: Generator) -> Image.Image:
    """Sky, sea and sand, at times the sun."""
    image = _gradient(rng, (90, 175, 240), (190, 230, 250))
    horizon = int(rng.integers(36, 56))
    shore = horizon + int(rng.integers(14, 28))
    _ground(rng, image, (30, 140, 190), horizon, 8)
    _ground(rng, image, (240, 250, 250), shore - 3, 4)
    _ground(rng, image, (240, 215, 150), shore, 8)
    if rng.random() < 0.6:
        _disc(ImageDraw.Draw(image), rng.uniform(8, 120), rng.uniform(6, 24), rng.uniform(6, 10), (255, 245, 170))
    return image


def snow(rng: Generator) -> Image.Image:
    """White ground, firs with snow on them, flakes."""
    image = _gradient(rng, (165, 190, 220), (220, 230, 242))
    horizon = int(rng.integers(45, 72))
    draw = ImageDraw.Draw(image)
    for x in rng.uniform(0, CANVAS, rng.integers(3, 8)):
        tall, wide = rng.uniform(22, 45), rng.uniform(8, 15)
        tree = _vary(rng, (70, 110, 105))
        draw.polygon([(x, horizon - tall), (x - wide, horizon + 4), (x + wide, horizon + 4)], fill=tree)
        draw.polygon(
            [(x, horizon - tall), (x - wide / 2, horizon - tall / 2), (x + wide / 2, horizon - tall / 2)],
            fill=(245, 250, 255),
        )
    _ground(rng, image, (240, 245, 252), horizon, 5)
    _dots(rng, draw, int(rng.integers(15, 35)), (255, 255, 255), (1.5, 2.6), (0, CANVAS))
    return image


def forest(rng: Generator) -> Image.Image:
    """Dark trunks under a roof of leaves."""
    image = _gradient(rng, (35, 85, 45), (70, 125, 60))
    draw = ImageDraw.Draw(image)
    horizon = int(rng.integers(80, 100))
    for x in rng.uniform(0, CANVAS, rng.integers(6, 11)):
        wide = rng.uniform(3, 8)
        draw.rectangle([x - wide, 0, x + wide, horizon + 6], fill=_vary(rng, (85, 60, 40)))
    for _ in range(int(rng.integers(16, 30))):
        _disc(draw, rng.uniform(0, CANVAS), rng.uniform(-5, 42), rng.uniform(8, 18), _vary(rng, (40, 110, 45), 26))
    _ground(rng, image, (60, 85, 40), horizon, 14)
    return image


def desert(rng: Generator) -> Image.Image:
    """Dunes under a pale sky, at times cacti and the sun."""
    image = _gradient(rng, (235, 190, 120), (250, 225, 170))
    horizon = int(rng.integers(40, 60))
    for i in range(3):
        shade = (225 - 18 * i, 150 - 14 * i, 75 - 8 * i)
        image.paste(_vary(rng, shade, 10), mask=_below(_wave(rng, horizon + 26 * i, rng.uniform(6, 14))))
    draw = ImageDraw.Draw(image)
    if rng.random() < 0.5:
        _disc(draw, rng.uniform(8, 120), rng.uniform(8, 24), rng.uniform(7, 11), (255, 250, 210))
    for x in rng.uniform(0, CANVAS, rng.integers(0, 4)):
        base, tall, green = horizon + rng.uniform(8, 30), rng.uniform(18, 34), _vary(rng, (70, 125, 65))
        draw.line([(x, base), (x, base - tall)], fill=green, width=5)
        arms = [(x - 7, base - tall * 0.7), (x - 7, base - tall / 2), (x + 7, base - tall / 2), (x + 7, base - tall * 0.8)]
        draw.line(arms, fill=green, width=3)
    return image


def night(rng: Generator) -> Image.Image:
    """A dark sky with stars and a full or crescent moon."""
    image = _gradient(rng, (8, 10, 40), (30, 35, 85))
    draw = ImageDraw.Draw(image)
    _dots(rng, draw, int(rng.integers(15, 32)), (255, 255, 230), (1.2, 2.0), (0, 95))
    x, y, r = rng.uniform(14, 114), rng.uniform(14, 34), rng.uniform(8, 13)
    _disc(draw, x, y, r, (250, 245, 205))
    if rng.random() < 0.5:
        _disc(draw, x + r * 0.5, y - r * 0.3, r * 0.85, (14, 16, 50))
    _ground(rng, image, (18, 24, 40), int(rng.integers(92, 106)), 4)
    return image


def city(rng: Generator) -> Image.Image:
    """House fronts with windows, and a street with its line."""
    image = _gradient(rng, (165, 190, 215), (215, 220, 225))
    draw = ImageDraw.Draw(image)
    street = int(rng.integers(88, 102))
    x = -rng.uniform(0, 15)
    while x < CANVAS:
        wide, top = rng.uniform(18, 34), rng.uniform(5, 50)
        wall = _vary(rng, [(130, 125, 130), (165, 140, 125), (105, 120, 145), (180, 175, 165)][rng.integers(4)])
        draw.rectangle([x, top, x + wide, street], fill=wall)
        lit = _vary(rng, [(250, 235, 160), (70, 90, 115)][rng.integers(2)])
        for wy in np.arange(top + 4, street - 6, 10):
            for wx in np.arange(x + 3, x + wide - 5, 8):
                draw.rectangle([wx, wy, wx + 4, wy + 5], fill=lit)
        x += wide + rng.uniform(0, 3)
    _ground(rng, image, (95, 95, 100), street, 5)
    for x in np.arange(rng.uniform(-20, 0), CANVAS, 28):
        draw.rectangle([x, 116, x + 14, 119], fill=(240, 240, 235))
    return image


def grass(rng: Generator) -> Image.Image:
    """A meadow with flowers under a blue sky with clouds."""
    image = _gradient(rng, (110, 185, 245), (205, 232, 250))
    draw = ImageDraw.Draw(image)
    horizon = int(rng.integers(46, 70))
    for _ in range(int(rng.integers(0, 3))):
        x, y = rng.uniform(0, CANVAS), rng.uniform(6, 28)
        for dx in (-9, 0, 9):
            _disc(draw, x + dx, y + rng.uniform(-2, 2), rng.uniform(6, 9), (250, 252, 255))
    _ground(rng, image, (105, 195, 70), horizon, 14)
    flower = [(255, 240, 90), (255, 255, 255), (250, 140, 180)][rng.integers(3)]
    _dots(rng, draw, int(rng.integers(4, 22)), flower, (1.2, 2.4), (horizon + 8, CANVAS))
    return image


def underwater(rng: Generator) -> Image.Image:
    """Deepening blue with rays of light, weeds and bubbles."""
    image = _gradient(rng, (40, 170, 210), (5, 55, 120))
    rays = Image.new("L", image.size)
    draw = ImageDraw.Draw(rays)
    for x in rng.uniform(0, CANVAS, rng.integers(2, 5)):
        lean, wide = rng.uniform(-30, 30), rng.uniform(5, 12)
        draw.polygon([(x, 0), (x + wide, 0), (x + wide * 2 + lean, 100), (x - wide + lean, 100)], fill=50)
    image.paste((170, 230, 245), mask=rays)
    draw = ImageDraw.Draw(image)
    for x in rng.uniform(0, CANVAS, rng.integers(3, 9)):
        tall, lean, green = rng.uniform(18, 48), rng.uniform(-6, 6), _vary(rng, (20, 120, 85))
        draw.line([(x, 128), (x + lean, 128 - tall / 2), (x, 128 - tall)], fill=green, width=4)
    for _ in range(int(rng.integers(6, 18))):
        x, y, r = rng.uniform(0, CANVAS), rng.uniform(0, CANVAS), rng.uniform(1.5, 4.5)
        draw.ellipse([x - r, y - r, x + r, y + r], outline=(190, 235, 250), width=1)
    return image


def table(rng: Generator) -> Image.Image:
    """Wooden boards in front of a wall."""
    image = _gradient(rng, *[((225, 212, 190), (205, 190, 165)), ((190, 205, 205), (170, 185, 188))][rng.integers(2)])
    edge = int(rng.integers(50, 70))
    wood = np.array(_vary(rng, (160, 100, 55), 20), dtype=np.float32)
    grain = rng.normal(0, 13, (CANVAS, 1, 1)) + rng.normal(0, 4, (CANVAS, 16, 1))
    boards = Image.fromarray(np.clip(wood + grain, 0, 255).astype(np.uint8)).resize((CANVAS, CANVAS))
    image.paste(boards.crop((0, edge, CANVAS, CANVAS)), (0, edge))
    draw = ImageDraw.Draw(image)
    dark = tuple(int(c * 0.6) for c in wood)
    draw.rectangle([0, edge, CANVAS, edge + 2], fill=dark)
    for y in np.arange(edge + rng.uniform(12, 22), CANVAS, rng.uniform(18, 26)):
        draw.line([(0, y), (CANVAS, y)], fill=dark, width=2)
    return image


def bricks(rng: Generator) -> Image.Image:
    """A wall of bricks."""
    colour = [(175, 75, 55), (190, 100, 75), (160, 85, 70)][rng.integers(3)]
    image = Image.new("RGB", (CANVAS, CANVAS), _vary(rng, (205, 195, 185)))
    draw = ImageDraw.Draw(image)
    tall = int(rng.integers(11, 16))
    wide, start = tall * 2, rng.uniform(-20, 0)
    for row, y in enumerate(range(-int(rng.integers(0, tall)), CANVAS, tall)):
        for x in np.arange(start - wide * (row % 2) / 2, CANVAS, wide):
            draw.rectangle([x, y, x + wide - 3, y + tall - 3], fill=_vary(rng, colour, 18))
    return image


def sunset(rng: Generator) -> Image.Image:
    """Purple to orange, with a low sun over dark ground."""
    image = Image.blend(_gradient(rng, (90, 50, 125), (255, 130, 60)), _gradient(rng, (220, 70, 95), (255, 190, 70)), 0.5)
    draw = ImageDraw.Draw(image)
    horizon = int(rng.integers(74, 94))
    _disc(draw, rng.uniform(20, 108), horizon - rng.uniform(-2, 14), rng.uniform(12, 19), (255, 235, 130))
    _ground(rng, image, [(70, 35, 60), (110, 55, 75)][rng.integers(2)], horizon, 6)
    return image


def mountains(rng: Generator) -> Image.Image:
    """Rocks with caps of snow above a green foot."""
    image = _gradient(rng, (120, 180, 235), (215, 230, 245))
    draw = ImageDraw.Draw(image)
    foot = int(rng.integers(84, 100))
    for x in np.sort(rng.uniform(-5, CANVAS, rng.integers(3, 5))):
        top, wide = rng.uniform(8, 40), rng.uniform(34, 56)
        rock = _vary(rng, (110, 115, 135))
        draw.polygon([(x, top), (x - wide, foot + 5), (x + wide, foot + 5)], fill=rock)
        cap = (foot - top) * rng.uniform(0.25, 0.4)
        half = wide * cap / (foot + 5 - top)
        draw.polygon([(x, top), (x - half, top + cap), (x, top + cap * 0.7), (x + half, top + cap)], fill=(245, 248, 255))
    _ground(rng, image, (85, 140, 75), foot, 10)
    return image


def kitchen(rng: Generator) -> Image.Image:
    """Tiles with a shelf above a counter with drawers."""
    image = Image.new("RGB", (CANVAS, CANVAS), _vary(rng, (205, 222, 215), 8))
    draw = ImageDraw.Draw(image)
    tile, wall = int(rng.integers(18, 27)), [(240, 248, 244), (232, 240, 250), (250, 244, 225)][rng.integers(3)]
    for y in range(-int(rng.integers(0, tile)), CANVAS, tile):
        for x in range(-tile, CANVAS, tile):
            draw.rectangle([x, y, x + tile - 3, y + tile - 3], fill=_vary(rng, wall, 4))
    shelf = int(rng.integers(14, 30))
    for x in rng.uniform(4, 120, rng.integers(2, 6)):
        wide, tall = rng.uniform(3, 6), rng.uniform(7, 13)
        draw.rectangle([x - wide, shelf - tall, x + wide, shelf], fill=_vary(rng, (190, 120, 110), 60))
    draw.rectangle([0, shelf, CANVAS, shelf + 3], fill=(150, 115, 85))
    edge, front = int(rng.integers(80, 96)), _vary(rng, (95, 150, 150), 20)
    draw.rectangle([0, edge, CANVAS, CANVAS], fill=front)
    draw.rectangle([0, edge, CANVAS, edge + 5], fill=(235, 232, 225))
    wide = int(rng.integers(30, 46))
    for x in range(-int(rng.integers(0, wide)), CANVAS, wide):
        draw.rectangle([x, edge + 10, x + wide - 4, CANVAS], outline=tuple(c - 30 for c in front), width=2)
        draw.rectangle([x + wide / 2 - 6, edge + 15, x + wide / 2 + 4, edge + 17], fill=(235, 232, 225))
    return image


def autumn(rng: Generator) -> Image.Image:
    """Trees with yellow and red crowns, fallen leaves."""
    image = _gradient(rng, (215, 215, 210), (245, 230, 200))
    horizon = int(rng.integers(64, 84))
    draw = ImageDraw.Draw(image)
    leaves = [(225, 120, 30), (240, 175, 40), (200, 65, 35)]
    for x in rng.uniform(0, CANVAS, rng.integers(4, 7)):
        draw.rectangle([x - 3, horizon - 40, x + 3, horizon + 6], fill=_vary(rng, (95, 65, 45)))
        leaf = leaves[rng.integers(3)]
        for dx, dy in rng.uniform(-13, 13, (9, 2)):
            _disc(draw, x + dx, horizon - 42 + dy, rng.uniform(6, 11), _vary(rng, leaf, 24))
    _ground(rng, image, (175, 120, 55), horizon, 12)
    for leaf in leaves:
        _dots(rng, draw, int(rng.integers(5, 12)), _vary(rng, leaf), (1.8, 3.2), (horizon + 4, CANVAS))
    return image


def space(rng: Generator) -> Image.Image:
    """Black, with stars, a coloured nebula, and a planet, at times with a ring."""
    glow = np.zeros((5, 5, 3), dtype=np.uint8)
    nebula = [(120, 30, 130), (30, 80, 140), (130, 40, 60)][rng.integers(3)]
    glow[rng.integers(1, 4), rng.integers(0, 5)] = _vary(rng, nebula, 30)
    image = Image.fromarray(glow).resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    _dots(rng, draw, int(rng.integers(12, 28)), (255, 255, 255), (1.2, 2.0), (0, CANVAS))
    x, y, r = rng.uniform(12, 116), rng.uniform(14, 40), rng.uniform(11, 19)
    colour = _vary(rng, [(215, 150, 90), (110, 165, 220), (200, 90, 80), (150, 205, 140)][rng.integers(4)], 24)
    _disc(draw, x, y, r, colour)
    for dy in (-0.4, 0.25):
        half = r * (1 - dy * dy) ** 0.5
        draw.line([(x - half, y + dy * r), (x + half, y + dy * r)], fill=tuple(int(0.75 * c) for c in colour), width=3)
    if rng.random() < 0.5:
        draw.arc([x - 1.7 * r, y - 0.5 * r, x + 1.7 * r, y + 0.5 * r], -30, 210, fill=(235, 215, 180), width=3)
    return image


def lake(rng: Generator) -> Image.Image:
    """Still water with reflections between a wooded far shore and reeds."""
    image = _gradient(rng, (175, 205, 225), (225, 232, 225))
    far = int(rng.integers(34, 48))
    _ground(rng, image, (65, 110, 75), far - int(rng.integers(8, 14)), 14)
    _ground(rng, image, (70, 125, 150), far + 6, 4)
    draw = ImageDraw.Draw(image)
    for y in np.arange(far + 10, CANVAS, rng.uniform(9, 13)):
        x, half = rng.uniform(0, CANVAS), rng.uniform(8, 30)
        draw.line([(x - half, y), (x + half, y)], fill=_vary(rng, (120, 165, 185), 20), width=3)
    for side in (rng.uniform(0, 26, rng.integers(2, 5)), rng.uniform(102, CANVAS, rng.integers(2, 5))):
        for x in side:
            tall, lean = rng.uniform(30, 62), rng.uniform(-6, 6)
            draw.line([(x, CANVAS), (x + lean, CANVAS - tall)], fill=_vary(rng, (85, 120, 50)), width=4)
            tip = CANVAS - tall
            draw.rectangle([x + lean - 3, tip - 7, x + lean + 3, tip + 6], fill=(105, 65, 35))
    return image


def plain(rng: Generator) -> Image.Image:
    """A bright, nearly uniform background for captions that name no place."""
    red, green, blue = (int(c) for c in rng.integers(185, 250, 3))
    colour = (red, green, blue)
    return _gradient(rng, colour, _vary(rng, colour, 8))


PLACES: dict[str, tuple[Callable[[Generator], Image.Image], tuple[str, ...]]] = {
    "beach": (beach, ("on the beach", "at the beach")),
    "snow": (snow, ("in the snow", "in snow")),
    "forest": (forest, ("in the forest", "in a forest")),
    "desert": (desert, ("in the desert", "in a desert")),
    "night": (night, ("at night", "in the night")),
    "city": (city, ("in the city", "on a city street")),
    "grass": (grass, ("on the grass", "on green grass")),
    "underwater": (underwater, ("underwater", "under the sea")),
    "table": (table, ("on a wooden table", "on a table")),
    "bricks": (bricks, ("in front of a brick wall", "against a brick wall")),
    "sunset": (sunset, ("at sunset", "in the sunset")),
    "mountains": (mountains, ("in the mountains", "in front of mountains")),
    "kitchen": (kitchen, ("in the kitchen", "in a kitchen")),
    "autumn": (autumn, ("in autumn", "among autumn leaves")),
    "space": (space, ("in space", "in outer space")),
    "lake": (lake, ("at the lake", "on a lake")),
}
"""Place -> its rendering function and the phrases that captions use for it."""
