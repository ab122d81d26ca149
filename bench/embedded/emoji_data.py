"""Pictures and captions for the embedded model: rendered emoji, six styles, and their words."""

import random
import subprocess
from dataclasses import dataclass
from functools import cache
from multiprocessing import Pool

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from realera_fast.embedded import Thing, Words, words
from realera_fast.evaluation import prompt_of as _prompt

SIZE = 64
CANVAS = 128  # glyphs are composed at twice the size, then averaged down
BITMAP_SIZE = 109  # the one size Noto Color Emoji has bitmaps for


def find_font(family: str) -> str:
    """Path of an installed font, as fontconfig sees it."""
    query = ["fc-match", "-f", "%{file}\n%{family}", family]
    found = subprocess.run(query, check=True, capture_output=True, text=True).stdout.split("\n")
    if family.split()[0] not in found[1]:
        raise FileNotFoundError(f"font {family!r} is not installed (best match {found[1]!r})")
    return found[0]


def has_glyph(font: str, char: str) -> bool:
    """Whether the font's character map covers ``char``."""
    from fontTools.ttLib import TTFont

    return ord(char) in TTFont(font, lazy=True).getBestCmap()


def draw_glyph(font: str, char: str, color: bool) -> Image.Image:
    """The glyph on a transparent square whose side is its longer side."""
    face = ImageFont.truetype(font, BITMAP_SIZE if color else 150)
    sheet = Image.new("RGBA", (400, 400))
    ImageDraw.Draw(sheet).text((100, 80), char, font=face, embedded_color=color, fill=(0, 0, 0))
    glyph = sheet.crop(sheet.getbbox())
    side = max(glyph.size)
    square = Image.new("RGBA", (side, side))
    square.paste(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
    return square


# --- backgrounds ----------------------------------------------------------------------------


def _hue(rng: np.random.Generator, saturation: float, value: float) -> np.ndarray:
    """A random hue as RGB in 0..1."""
    h = rng.uniform(0, 6)
    ramp = np.clip(np.abs((h + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return value * (1 - saturation + saturation * ramp)


def background(rng: np.random.Generator) -> np.ndarray:
    """A light picture without content, ``[CANVAS, CANVAS, 3]`` in 0..1."""
    first, second = (_hue(rng, rng.uniform(0.05, 0.45), rng.uniform(0.8, 1.0)) for _ in range(2))
    y, x = np.mgrid[0:CANVAS, 0:CANVAS] / CANVAS
    angle = rng.uniform(0, np.pi)
    along = np.cos(angle) * x + np.sin(angle) * y
    match rng.choice(5, p=(0.35, 0.3, 0.1, 0.1, 0.15)):
        case 0:
            mix = np.zeros_like(x)
        case 1:
            mix = (along - along.min()) / np.ptp(along)
        case 2:
            mix = 0.6 * ((along * rng.integers(3, 7)) % 1 > 0.5)
        case 3:
            cells = rng.integers(3, 6)
            mix = 0.6 * ((np.floor(x * cells) + np.floor(y * cells)) % 2)
        case _:
            coarse = Image.fromarray((rng.random((5, 5)) * 255).astype(np.uint8))
            mix = np.asarray(coarse.resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)) / 255
    return first + (second - first) * mix[..., None]


# --- styles ---------------------------------------------------------------------------------


def _place(glyph: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The glyph somewhere on an otherwise transparent canvas: scaled, flipped, tilted."""
    side = int(CANVAS * rng.uniform(0.65, 0.92))
    glyph = glyph.resize((side, side), Image.Resampling.LANCZOS)
    if rng.random() < 0.5:
        glyph = glyph.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    glyph = glyph.rotate(rng.uniform(-8, 8), Image.Resampling.BICUBIC)
    room = (CANVAS - side) / 2
    corner = tuple(int(room + room * rng.uniform(-0.8, 0.8)) for _ in range(2))
    canvas = Image.new("RGBA", (CANVAS, CANVAS))
    canvas.paste(glyph, corner)
    return canvas


def _halve(picture: np.ndarray) -> np.ndarray:
    """2x2 averages."""
    return picture.reshape(SIZE, 2, SIZE, 2, -1).mean((1, 3))


def _blur(plane: np.ndarray, radius: float) -> np.ndarray:
    image = Image.fromarray((np.clip(plane, 0, 1) * 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius))) / 255


def _outlines(glyph: np.ndarray) -> np.ndarray:
    """Strength of the glyph's edges, ``[SIZE, SIZE]`` in 0..1."""
    alpha = glyph[..., 3:]
    planes = np.concatenate([glyph[..., :3] * alpha + 0.5 * (1 - alpha), alpha], -1)
    planes = np.stack([_blur(planes[..., i], 1.0) for i in range(4)], -1)
    dy, dx = np.gradient(planes, axis=(0, 1))
    edges = np.sqrt(dx**2 + dy**2).max(-1)
    return np.clip(_halve(edges[..., None])[..., 0] * 9, 0, 1)


def _compose(glyph: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    alpha = glyph[..., 3:]
    return _halve(glyph[..., :3] * alpha + background(rng) * (1 - alpha))


def _luminance(picture: np.ndarray) -> np.ndarray:
    return picture @ np.array([0.299, 0.587, 0.114])


def color(glyph: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The picture as it is."""
    return _compose(glyph, rng)


def ink(glyph: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Black strokes on light paper (the glyph comes from the line-drawing font)."""
    paper = np.array([1.0, 0.985, 0.95]) * rng.uniform(0.93, 1.0)
    stroke = np.full(3, rng.uniform(0.02, 0.12))
    strength = _halve(glyph[..., 3:])
    return paper + (stroke - paper) * strength


def mosaic(glyph: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Square tiles of one colour each, with dark grout between them."""
    picture = _compose(glyph, rng)
    tiles = picture.reshape(16, 4, 16, 4, 3).mean((1, 3))
    picture = tiles.repeat(4, 0).repeat(4, 1)
    grout = np.zeros((SIZE, SIZE, 1))
    grout[3::4] = grout[:, 3::4] = 0.75
    return picture + (0.2 - picture) * grout


def blueprint(glyph: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """White outlines on squared blue paper."""
    paper = np.array([0.08, 0.25, 0.62]) * rng.uniform(0.9, 1.1)
    grid = np.zeros((SIZE, SIZE, 1))
    grid[7::8] = grid[:, 7::8] = 0.16
    picture = paper + (1 - paper) * grid
    return picture + (0.97 - picture) * _outlines(glyph)[..., None]


def sepia(glyph: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A faded brown photograph with dark corners."""
    grey = _luminance(_compose(glyph, rng))[..., None]
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]
    vignette = 1 - 0.35 * np.clip((x**2 + y**2 - 0.5), 0, None)[..., None]
    dark, light = np.array([0.2, 0.1, 0.03]), np.array([0.98, 0.84, 0.6])
    return (dark + (light - dark) * grey**1.6) * vignette


def neon(glyph: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Glowing outlines in the dark."""
    outlines = _outlines(glyph)
    first, second = (_hue(rng, 0.9, 1.0) for _ in range(2))
    ramp = np.linspace(0, 1, SIZE)[:, None, None]
    light = first + (second - first) * ramp
    glow = 0.8 * _blur(outlines, 3.0)[..., None] + outlines[..., None]
    core = np.clip(outlines - 0.6, 0, 1)[..., None]
    return np.array([0.03, 0.02, 0.07]) + light * glow + core


PAINT = {f.__name__: f for f in (color, ink, mosaic, blueprint, sepia, neon)}


@dataclass(frozen=True)
class Fonts:
    """Paths of the two fonts."""

    color: str
    line: str

    @classmethod
    def find(cls, color: str | None = None, line: str | None = None) -> "Fonts":
        """The given paths, or what fontconfig finds."""
        return cls(color or find_font("Noto Color Emoji"), line or find_font("Symbola"))


@cache
def _glyph(fonts: Fonts, char: str, line: bool) -> Image.Image:
    return draw_glyph(fonts.line if line else fonts.color, char, not line)


def pairs(fonts: Fonts) -> list[tuple[int, int]]:
    """Every (thing, style) that can be drawn; ink needs a line drawing."""
    table = words()
    return [
        (t, s)
        for t, thing in enumerate(table.things)
        for s, style in enumerate(table.styles)
        if style.name != "ink" or has_glyph(fonts.line, thing.glyph)
    ]


def render(fonts: Fonts, thing: Thing, style: str, rng: np.random.Generator) -> np.ndarray:
    """One picture, uint8 ``[64, 64, 3]``."""
    glyph = _place(_glyph(fonts, thing.glyph, style == "ink"), rng)
    picture = PAINT[style](np.asarray(glyph) / 255, rng)
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)


def _render_pair(job: tuple[Fonts, int, int, int, int]) -> np.ndarray:
    fonts, t, s, count, seed = job
    table = words()
    rng = np.random.default_rng([seed, t, s])
    style = table.styles[s].name
    return np.stack([render(fonts, table.things[t], style, rng) for _ in range(count)])


def render_all(
    fonts: Fonts, color_count: int, other_count: int, seed: int, workers: int = 2
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pictures ``[n, 64, 64, 3]`` with their thing and style indices, the same for equal seeds."""
    jobs = [
        (fonts, t, s, color_count if words().styles[s].name == "color" else other_count, seed)
        for t, s in pairs(fonts)
    ]
    with Pool(workers) as pool:
        blocks = pool.map(_render_pair, jobs, chunksize=4)
    things = np.concatenate([np.full(len(b), j[1]) for b, j in zip(blocks, jobs, strict=True)])
    styles = np.concatenate([np.full(len(b), j[2]) for b, j in zip(blocks, jobs, strict=True)])
    return np.concatenate(blocks), things, styles


# --- captions -------------------------------------------------------------------------------


def with_article(caption: str, rng: random.Random) -> str:
    """Half the time "a airplane" becomes "an airplane": prompts are written both ways."""
    return _prompt(caption, "") if rng.random() < 0.5 else caption


@dataclass(frozen=True)
class Caption:
    """A text and what it says; ``None`` where it leaves a choice."""

    text: str
    thing: int | None
    category: str | None
    style: int | None


def caption(table: Words, t: int, s: int, rng: random.Random) -> Caption:
    """A caption of thing ``t`` in style ``s``: by name, synonym, category or style alone."""
    thing, style = table.things[t], table.styles[s]
    plain = style.name == "color"
    style_word = rng.choice([style.name, style.name, *style.synonyms])
    draw = rng.random()
    if not plain and draw < 0.06:
        text = rng.choice(table.templates["style_only"]).format(style=style_word)
        return Caption(with_article(text, rng), None, None, s)
    if draw < 0.14:
        word, known, category = thing.category, None, thing.category
        kind = "category"
    else:
        word = thing.name if rng.random() < 0.5 else rng.choice(thing.synonyms)
        known, category = t, None
        kind = thing.kind
    if plain and rng.random() < 0.88:
        text = rng.choice(table.templates[kind]).format(word)
    else:
        text = rng.choice(table.templates["style"]).format(word, style=style_word)
    return Caption(with_article(text, rng), known, category, s)


def caption_words(table: Words) -> list[str]:
    """Every word that a caption can contain, sorted."""
    texts = [
        line.replace("{style}", " ").replace("{}", " ")
        for lines in table.templates.values()
        for line in lines
    ]
    for thing in table.things:
        texts += [thing.name, *thing.synonyms, thing.category, thing.article]
    for style in table.styles:
        texts += [style.name, *style.synonyms]
    return sorted({word for text in texts for word in text.replace(",", " ").split()})
