"""Small landscapes with their captions and label maps: the data set of the quickstart.

A scene has a sky, a ground and a few houses, trees and balloons. The label map (the hint) says where each thing is;
only the caption says what it looks like (day or night, brick or stone, ...): a trained ControlNet has to use both.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CLASSES = ("sky", "ground", "house", "tree", "balloon")
FOREGROUND = ("house", "tree", "balloon")  # placed freely; sky and ground could be guessed without a hint

# Colour of a class in the hint. None is a colour that the class has in an image, so the hint cannot simply be copied.
HINT_COLOURS = np.array([(0, 0, 0), (90, 90, 90), (255, 0, 0), (0, 255, 0), (0, 0, 255)], dtype=np.uint8)

# What the caption can say of a class, and the two colours that this stands for: wall and roof of a house, inside and
# rim of a crown, the stripes of a balloon, top and bottom of sky and ground. No two classes share a colour.
LOOKS = {
    "sky": {
        "day": ((95, 165, 240), (170, 215, 250)),
        "dusk": ((185, 105, 165), (235, 150, 150)),
        "night": ((14, 16, 48), (38, 42, 96)),
    },
    "ground": {
        "meadow": ((140, 200, 80), (105, 170, 60)),
        "sand": ((230, 212, 160), (212, 190, 125)),
        "snow": ((245, 246, 250), (222, 228, 236)),
    },
    "house": {
        "brick": ((165, 65, 50), (100, 40, 35)),
        "stone": ((140, 140, 140), (88, 86, 90)),
        "blue": ((45, 95, 200), (25, 60, 140)),
    },
    "tree": {
        "green": ((30, 110, 45), (15, 75, 30)),
        "autumn": ((225, 120, 20), (180, 90, 10)),
        "pink": ((245, 120, 190), (215, 80, 160)),
    },
    "balloon": {
        "yellow": ((255, 235, 60), (240, 205, 10)),
        "violet": ((150, 50, 185), (115, 25, 150)),
        "red": ((240, 25, 40), (200, 0, 20)),
    },
}


def vocabulary() -> list[str]:
    """Returns every word that a caption can contain, sorted."""
    looks = {word for of_class in LOOKS.values() for word in of_class}
    return sorted(looks | {"sky", "over", "with", "a", "an", "house", "tree", "balloon", "and"})


def scene(rng: np.random.Generator, size: int = 64) -> tuple[np.ndarray, str, np.ndarray]:
    """Draws one scene.

    Args:
        rng: source of all randomness; the same state gives the same scene.
        size: height and width in pixels.

    Returns:
        image [size, size, 3] uint8, caption, labels [size, size] uint8 (index into CLASSES).
    """
    looks = {name: str(rng.choice(list(LOOKS[name]))) for name in CLASSES}
    labels, accents = _draw(rng, size)
    present = [name for name in FOREGROUND if (labels == CLASSES.index(name)).any()]
    things = [f"{'an' if looks[name] == 'autumn' else 'a'} {looks[name]} {name}" for name in present]
    listed = " and ".join(filter(None, [", ".join(things[:-1]), things[-1]]))
    caption = f"{looks['sky']} sky over {looks['ground']} with {listed}"

    image = np.empty((size, size, 3))
    height = np.linspace(0, 1, size)[:, None, None]
    for index, name in enumerate(CLASSES):
        first, second = (np.array(colour, dtype=np.float64) for colour in LOOKS[name][looks[name]])
        mix = height if name in ("sky", "ground") else accents[..., None]
        image[labels == index] = np.broadcast_to(first + (second - first) * mix, image.shape)[labels == index]
    grain = rng.normal(0, 0.03, (size, size)) * (labels == CLASSES.index("ground"))
    image *= 1 + rng.normal(0, 0.01) + grain[..., None]
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), caption, labels


def _draw(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Places the things of a scene: labels [size, size], and accents [size, size], 1 where the second colour shows."""
    row, column = np.mgrid[0:size, 0:size] / size
    wave = np.sin(2 * np.pi * (column * rng.uniform(0.5, 1.5) + rng.uniform()))
    horizon = rng.uniform(0.45, 0.7) + rng.uniform(0, 0.05) * wave
    labels = np.where(row > horizon, CLASSES.index("ground"), CLASSES.index("sky")).astype(np.uint8)
    accents = np.zeros((size, size))
    counts = {"balloon": rng.integers(0, 3), "house": rng.integers(0, 3), "tree": rng.integers(0, 4)}
    if not any(counts.values()):
        counts["house"] = 1
    shapes = [name for name, count in counts.items() for _ in range(count)]
    for name in shapes:
        x = rng.uniform(0.08, 0.92)
        if name == "house":
            inside, accent = _house(rng, row, column, x)
        elif name == "tree":
            inside, accent = _tree(rng, row, column, x)
        else:
            inside, accent = _balloon(rng, row, column, x)
        labels[inside] = CLASSES.index(name)
        accents[inside] = accent[inside]
    return labels, accents


def _house(rng, row, column, x):
    width, wall, foot = rng.uniform(0.1, 0.19), rng.uniform(0.15, 0.28), rng.uniform(0.6, 0.92)
    eaves, roof = foot - wall, rng.uniform(0.1, 0.2)
    across = np.abs(column - x)
    on_roof = (row <= eaves) & (across <= (width + 0.03) * (row - eaves + roof) / roof) & (row > eaves - roof)
    return ((across <= width) & (row > eaves) & (row <= foot)) | on_roof, on_roof * 1.0


def _tree(rng, row, column, x):
    radius, y = rng.uniform(0.09, 0.17), rng.uniform(0.4, 0.8)
    if rng.uniform() < 0.5:
        distance = np.hypot(column - x, row - y) / radius  # a round crown
    else:
        along = (row - y) / (1.5 * radius)  # a pointed one
        distance = np.where(np.abs(along) <= 1, np.abs(column - x) / (radius * np.maximum(along + 1, 1e-6) / 1.6), 2.0)
    return distance <= 1, (distance > 0.65) * 1.0


def _balloon(rng, row, column, x):
    radius, y = rng.uniform(0.09, 0.16), rng.uniform(0.12, 0.42)
    across = (column - x) / radius
    return np.hypot(across, (row - y) / (1.2 * radius)) <= 1, (np.floor((across + 1) * 2.5) % 2 == 1) * 1.0


def recognise(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Classifies every pixel: the class and the look of the nearest colour in LOOKS.

    It knows neither caption nor hint, and nothing of shapes.

    Args:
        images: [N, H, W, 3], values in 0..255.

    Returns:
        labels [N, H, W] uint8, index into CLASSES; looks [N, H, W] uint8, index into the looks of that class.
    """
    colours, labels, looks = [], [], []
    for label, name in enumerate(CLASSES):
        for look, (first, second) in enumerate(LOOKS[name].values()):
            for mix in (0.0, 0.5, 1.0):
                colours.append(np.array(first) + (np.array(second) - np.array(first)) * mix)
                labels.append(label)
                looks.append(look)
    palette = np.array(colours)
    distance = (palette**2).sum(-1) - 2 * (images.astype(np.float64) @ palette.T)  # plus |image|^2, the same for all
    nearest = distance.argmin(-1)
    return np.array(labels, dtype=np.uint8)[nearest], np.array(looks, dtype=np.uint8)[nearest]


def control_score(labels: np.ndarray, images: np.ndarray) -> float:
    """Measures how well images follow their hints: the mean IoU over houses, trees and balloons, in [0, 1].

    IoU of a class = |hint and image| / |hint or image|, both counted in pixels over all images, where the classes of an
    image are those that `recognise` finds. Sky and ground do not count: they are nearly right without any hint.

    Args:
        labels: [N, H, W] index into CLASSES, as the hints say.
        images: [N, H, W, 3], values in 0..255.
    """
    found, _ = recognise(images)
    scores = []
    for name in FOREGROUND:
        wanted, seen = labels == CLASSES.index(name), found == CLASSES.index(name)
        scores.append((wanted & seen).sum() / max((wanted | seen).sum(), 1))
    return float(np.mean(scores))


def caption_score(labels: np.ndarray, captions: Sequence[str], images: np.ndarray) -> float:
    """Measures how well images follow their captions: the share of things that look as described, in [0, 1].

    A thing is a class in a scene; it looks like what most of its pixels in the hint look like, whatever their class. By
    chance the score is below 1/3, the number of looks of a class.

    Args:
        labels, images: as in `control_score`.
        captions: N captions.
    """
    found, looks = recognise(images)
    right = []
    for i, caption in enumerate(captions):
        words = set(caption.replace(",", "").split())
        for label, name in enumerate(CLASSES):
            of_class = list(LOOKS[name])
            said = [
                look
                for look, word in enumerate(of_class)
                if f"{word} {name}" in caption or name == "ground" and word in words
            ]
            area = labels[i] == label
            if said and area.any():
                votes = np.bincount(looks[i][area & (found[i] == label)], minlength=len(of_class))
                right.append(votes.argmax() == said[0] and votes[said[0]] > area.sum() / 2)
    return float(np.mean(right))
