"""A face of ellipses that detectors of faces take for one."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFilter

SKIN, HAIR = (224, 172, 140), (50, 30, 20)


def drawn_face(size: int = 320) -> Image.Image:
    """Frontal, before a plain ground."""
    image = Image.new("RGB", (320, 320), (90, 110, 130))
    draw = ImageDraw.Draw(image)
    draw.ellipse((90, 20, 230, 260), fill=HAIR)
    draw.rectangle((135, 200, 185, 270), fill=(190, 146, 119))
    draw.ellipse((40, 255, 280, 420), fill=(60, 60, 120))
    draw.ellipse((105, 50, 215, 220), fill=SKIN)
    fringe = ((100, 110), (105, 60), (160, 40), (215, 60), (220, 110), (195, 80), (130, 78))
    draw.polygon(fringe, fill=HAIR)
    for x in (135, 185):
        draw.ellipse((x - 14, 115, x + 14, 131), fill=(245, 245, 245))
        draw.ellipse((x - 7, 115, x + 7, 131), fill=(70, 50, 30))
        draw.ellipse((x - 3, 119, x + 3, 127), fill=(5, 5, 5))
        draw.arc((x - 18, 96, x + 18, 124), 200, 340, fill=HAIR, width=5)
        draw.line((x - 14, 122, x, 114, x + 14, 122), fill=(30, 20, 10), width=3)
    draw.line((158, 130, 152, 160, 168, 162), fill=(180, 120, 95), width=3)
    draw.ellipse((140, 175, 180, 192), fill=(190, 60, 70))
    draw.line((140, 183, 180, 183), fill=(120, 30, 40), width=2)
    for left in (115, 180):
        draw.ellipse((left, 150, left + 25, 172), fill=(232, 160, 135))
    return image.filter(ImageFilter.GaussianBlur(2)).resize((size, size))
