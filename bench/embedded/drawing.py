"""Pictures for the embedded model: emoji on backgrounds, alone or two side by side, ten styles."""

import subprocess
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIZE = 64
CANVAS = 128  # pictures are composed at twice the size, then averaged down
BITMAP_SIZE = 109  # the one size Noto Color Emoji has bitmaps for


@cache
def find_font() -> str:
    """Path of Noto Color Emoji, as fontconfig sees it."""
    query = ["fc-match", "-f", "%{file}\n%{family}", "Noto Color Emoji"]
    found = subprocess.run(query, check=True, capture_output=True, text=True).stdout.split("\n")
    if "Noto Color Emoji" not in found[1]:
        raise FileNotFoundError(f"Noto Color Emoji is not installed (best match {found[1]!r})")
    return found[0]


@cache
def glyph(char: str) -> Image.Image:
    """The drawing on a transparent square whose side is its longer side."""
    face = ImageFont.truetype(find_font(), BITMAP_SIZE)
    sheet = Image.new("RGBA", (400, 400))
    ImageDraw.Draw(sheet).text((100, 80), char, font=face, embedded_color=True)
    drawn = sheet.crop(sheet.getbbox())
    side = max(drawn.size)
    square = Image.new("RGBA", (side, side))
    square.paste(drawn, ((side - drawn.width) // 2, (side - drawn.height) // 2))
    return square


def place(chars: list[str], rng: np.random.Generator, aligned: bool = False) -> np.ndarray:
    """One drawing in the middle, or two side by side: ``[CANVAS, CANVAS, 4]`` in 0..1.

    Args:
        aligned: upright, of one size, and where the cells of the latents begin: a drawing then has
            the same latents in every picture.
    """
    canvas = Image.new("RGBA", (CANVAS, CANVAS))
    cell = CANVAS // 8
    for i, char in enumerate(chars):
        if aligned:
            cells, left, top = (6, 1, 1) if len(chars) == 1 else (4, 4 * i, 2)
            drawn = glyph(char).resize((cells * cell, cells * cell), Image.Resampling.LANCZOS)
            canvas.alpha_composite(drawn, (left * cell, top * cell))
            continue
        share = rng.uniform(0.72, 0.95) if len(chars) == 1 else rng.uniform(0.46, 0.52)
        side = int(CANVAS * share)
        drawn = glyph(char).resize((side, side), Image.Resampling.LANCZOS)
        drawn = drawn.rotate(rng.uniform(-6, 6), Image.Resampling.BICUBIC)
        room = (CANVAS / len(chars) - side) / 2
        left = CANVAS / len(chars) * i + room * rng.uniform(0.3, 1.7)
        slack = (CANVAS - side) / 2 * (0.8 if len(chars) == 1 else 0.5)
        top = (CANVAS - side) / 2 + slack * rng.uniform(-1, 1)
        canvas.alpha_composite(drawn, (max(0, int(left)), max(0, int(top))))
    return np.asarray(canvas, dtype=np.float32) / 255


# --- backgrounds ----------------------------------------------------------------------------


def hue(rng: np.random.Generator, saturation: float, value: float) -> np.ndarray:
    """A random hue as RGB in 0..1."""
    h = rng.uniform(0, 6)
    ramp = np.clip(np.abs((h + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return value * (1 - saturation + saturation * ramp)


Y, X = (np.mgrid[0:CANVAS, 0:CANVAS] / CANVAS).astype(np.float32)


def mixed(first: object, second: object, amount: np.ndarray) -> np.ndarray:
    """From one color to another, ``[CANVAS, CANVAS, 3]``."""
    first, second = np.asarray(first), np.asarray(second)
    return first + (second - first) * amount[..., None]


def dots(rng: np.random.Generator, count: int, radius: float) -> np.ndarray:
    """Round spots, ``[CANVAS, CANVAS]`` in 0..1."""
    image = Image.new("L", (CANVAS, CANVAS))
    brush = ImageDraw.Draw(image)
    for x, y in rng.uniform(0, CANVAS, (count, 2)):
        r = radius * rng.uniform(0.6, 1.4)
        brush.ellipse((x - r, y - r, x + r, y + r), fill=255)
    return np.asarray(image, dtype=np.float32) / 255


def plain(rng: np.random.Generator) -> np.ndarray:
    """A light background without content."""
    first, second = (hue(rng, rng.uniform(0.03, 0.4), rng.uniform(0.85, 1.0)) for _ in range(2))
    draw = rng.random()
    if draw < 0.45:
        return mixed(first, first, np.zeros_like(X))
    if draw < 0.85:
        angle = rng.uniform(0, 2 * np.pi)
        along = np.cos(angle) * X + np.sin(angle) * Y
        return mixed(first, second, (along - along.min()) / np.ptp(along))
    coarse = Image.fromarray((rng.random((4, 4)) * 255).astype(np.uint8))
    return mixed(
        first, second, np.asarray(coarse.resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)) / 255
    )


def night(rng: np.random.Generator) -> np.ndarray:
    sky = mixed((0.03, 0.04, 0.16), (0.12, 0.14, 0.36), Y)
    stars = dots(rng, 24, 1.2)[..., None]
    return sky + (np.array([1.0, 1.0, 0.85]) - sky) * stars


def snow(rng: np.random.Generator) -> np.ndarray:
    air = mixed((0.62, 0.72, 0.84), (0.86, 0.9, 0.95), Y)
    ground = np.clip((Y - 0.78) * 40, 0, 1)
    white = np.maximum(dots(rng, 45, 1.8), ground)[..., None]
    return air + (1.0 - air) * white


def sunset(rng: np.random.Generator) -> np.ndarray:
    return mixed((0.36, 0.2, 0.5), (1.0, 0.62, 0.25), Y ** rng.uniform(0.8, 1.2))


def meadow(rng: np.random.Generator) -> np.ndarray:
    sky = mixed((0.5, 0.76, 1.0), (0.82, 0.93, 1.0), Y)
    hill = np.clip((Y - 0.7 - 0.04 * np.sin(6 * X + rng.uniform(0, 6))) * 40, 0, 1)[..., None]
    return sky + (np.array([0.45, 0.74, 0.32]) - sky) * hill


def beach(rng: np.random.Generator) -> np.ndarray:
    sky = mixed((0.55, 0.82, 1.0), (0.85, 0.95, 1.0), Y)
    sea = np.clip((Y - 0.5 - rng.uniform(0, 0.06)) * 60, 0, 1)[..., None]
    sky = sky + (np.array([0.2, 0.55, 0.8]) - sky) * sea
    sand = np.clip((Y - 0.74) * 40, 0, 1)[..., None]
    return sky + (np.array([0.95, 0.85, 0.6]) - sky) * sand


def water(rng: np.random.Generator) -> np.ndarray:
    deep = mixed((0.25, 0.7, 0.85), (0.03, 0.25, 0.5), Y)
    return deep + (np.array([0.7, 0.95, 1.0]) - deep) * 0.6 * dots(rng, 12, 3.0)[..., None]


SETTINGS = {
    "at night": night,
    "in the snow": snow,
    "at sunset": sunset,
    "in a green field": meadow,
    "on the beach": beach,
    "under water": water,
}


# --- styles ---------------------------------------------------------------------------------


def halve(picture: np.ndarray) -> np.ndarray:
    """2x2 averages."""
    return picture.reshape(SIZE, 2, SIZE, 2, -1).mean((1, 3))


def blur(plane: np.ndarray, radius: float) -> np.ndarray:
    image = Image.fromarray((np.clip(plane, 0, 1) * 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float32) / 255


def outlines(drawn: np.ndarray) -> np.ndarray:
    """Strength of the drawing's edges, ``[SIZE, SIZE]`` in 0..1."""
    alpha = drawn[..., 3:]
    planes = np.concatenate([drawn[..., :3] * alpha + 0.5 * (1 - alpha), alpha], -1)
    planes = np.stack([blur(planes[..., i], 1.0) for i in range(4)], -1)
    dy, dx = np.gradient(planes, axis=(0, 1))
    edges = np.sqrt(dx**2 + dy**2).max(-1)
    return np.clip(halve(edges[..., None])[..., 0] * 9, 0, 1)


def composed(drawn: np.ndarray, behind: np.ndarray) -> np.ndarray:
    alpha = drawn[..., 3:]
    return halve(drawn[..., :3] * alpha + behind * (1 - alpha))


def luminance(picture: np.ndarray) -> np.ndarray:
    return picture @ np.array([0.299, 0.587, 0.114])


def color(drawn: np.ndarray, behind: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The picture as it is."""
    return composed(drawn, behind)


def ink(drawn: np.ndarray, behind: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Black strokes on light paper."""
    paper = np.array([1.0, 0.985, 0.95]) * rng.uniform(0.95, 1.0)
    strength = np.clip(outlines(drawn) * 1.4 - 0.15, 0, 1)[..., None]
    return paper * (1 - 0.95 * strength)


def mosaic(drawn: np.ndarray, behind: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Square tiles of one color each, with dark grout between them."""
    picture = composed(drawn, behind)
    tiles = picture.reshape(16, 4, 16, 4, 3).mean((1, 3))
    picture = tiles.repeat(4, 0).repeat(4, 1)
    grout = np.zeros((SIZE, SIZE, 1))
    grout[3::4] = grout[:, 3::4] = 0.5
    return picture + (0.2 - picture) * grout


def blueprint(drawn: np.ndarray, behind: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """White outlines on squared blue paper."""
    paper = np.array([0.08, 0.25, 0.62]) * rng.uniform(0.9, 1.1)
    grid = np.zeros((SIZE, SIZE, 1))
    grid[7::8] = grid[:, 7::8] = 0.16
    picture = paper + (1 - paper) * grid
    return picture + (0.97 - picture) * outlines(drawn)[..., None]


def sepia(drawn: np.ndarray, behind: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A faded brown photograph with dark corners."""
    grey = luminance(composed(drawn, behind))[..., None]
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]
    vignette = 1 - 0.35 * np.clip((x**2 + y**2 - 0.5), 0, None)[..., None]
    dark, light = np.array([0.2, 0.1, 0.03]), np.array([0.98, 0.84, 0.6])
    return (dark + (light - dark) * grey**1.6) * vignette


def neon(drawn: np.ndarray, behind: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Glowing outlines in the dark."""
    edges = outlines(drawn)
    first, second = (hue(rng, 0.9, 1.0) for _ in range(2))
    ramp = np.linspace(0, 1, SIZE)[:, None, None]
    light = first + (second - first) * ramp
    glow = 0.8 * blur(edges, 3.0)[..., None] + edges[..., None]
    core = np.clip(edges - 0.6, 0, 1)[..., None]
    return np.array([0.03, 0.02, 0.07]) + light * glow + core


def watercolor(drawn: np.ndarray, behind: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pale washes that pool at their edges, on white paper."""
    alpha = drawn[..., 3:]
    picture = halve(drawn[..., :3] * alpha + (1 - alpha))
    soft = np.stack([blur(picture[..., i], 0.8) for i in range(3)], -1)
    wash = blur(rng.random((SIZE, SIZE)), 3.0)[..., None]
    wash = (wash - wash.mean()) * 2.0
    pooled = 0.35 * np.clip(blur(outlines(drawn), 0.8), 0, 1)[..., None]
    return 1 - (1 - soft) * (0.85 + wash + pooled)


def charcoal(drawn: np.ndarray, behind: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Grainy dark strokes and smudged shade on grey paper."""
    alpha = drawn[..., 3:]
    grey = luminance(halve(drawn[..., :3] * alpha + (1 - alpha)))
    grain = rng.normal(0, 0.06, (SIZE, SIZE))
    edges = np.clip(blur(outlines(drawn), 0.7) * 1.5, 0, 1)
    value = 0.8 - 0.45 * (1 - grey) - 0.45 * edges + grain * (1.2 - grey)
    return np.repeat(value[..., None], 3, -1)


@cache
def panes(cells: int = 15) -> tuple[np.ndarray, np.ndarray]:
    """Which pane every pixel is of, and how much lead is there: one window for all pictures."""
    jitter = np.random.default_rng(0).uniform(0.1, 0.9, (cells**2, 2))
    at = (np.mgrid[0:cells, 0:cells].reshape(2, -1).T + jitter) * (SIZE / cells)
    y, x = np.mgrid[0:SIZE, 0:SIZE] + 0.5
    distance = np.sqrt((y[..., None] - at[:, 0]) ** 2 + (x[..., None] - at[:, 1]) ** 2)
    first, second = np.moveaxis(np.partition(distance, 1, axis=-1)[..., :2], -1, 0)
    return distance.argmin(-1), np.clip(1.1 - (second - first), 0, 1)[..., None]


def stained_glass(drawn: np.ndarray, behind: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Saturated panes of one color each between black lead."""
    picture = composed(drawn, behind)
    pane, lead = panes()
    count = np.maximum(np.bincount(pane.ravel()), 1)
    glass = np.stack(
        [np.bincount(pane.ravel(), picture[..., c].ravel()) / count for c in range(3)], -1
    )
    grey = luminance(glass)[:, None]
    glass = np.clip(grey + (glass - grey) * 1.6, 0, 1)
    return glass[pane] * (1 - 0.75 * lead)


def pixel_art(drawn: np.ndarray, behind: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Large pixels of few colors with a dark rim."""
    flat = hue(rng, 0.35, 0.95)
    alpha = drawn[..., 3:]
    small = (drawn[..., :3] * alpha + flat * (1 - alpha)).reshape(32, 4, 32, 4, 3).mean((1, 3))
    inside = alpha.reshape(32, 4, 32, 4).mean((1, 3)) > 0.5
    padded = np.pad(inside, 1)
    near = padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    picture = np.round(small * 4) / 4
    picture[near & ~inside] = 0.1
    return picture.repeat(2, 0).repeat(2, 1)


PAINT = {
    "color": color,
    "ink": ink,
    "mosaic": mosaic,
    "blueprint": blueprint,
    "sepia": sepia,
    "neon": neon,
    "watercolor": watercolor,
    "charcoal": charcoal,
    "stained glass": stained_glass,
    "pixel art": pixel_art,
}


@dataclass(frozen=True)
class Scene:
    """What a picture shows: one thing or two, a style, and where (or nowhere in particular)."""

    things: tuple[int, ...]
    style: int
    setting: str | None = None


def draw(
    chars: list[str],
    style: str,
    setting: str | None,
    rng: np.random.Generator,
    aligned: bool = False,
) -> np.ndarray:
    """One picture, uint8 ``[SIZE, SIZE, 3]``; see `place`."""
    behind = (plain if setting is None else SETTINGS[setting])(rng)
    return to_bytes(PAINT[style](place(chars, rng, aligned), behind, rng))


def to_bytes(picture: np.ndarray) -> np.ndarray:
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)
