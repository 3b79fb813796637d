"""Questions about a scene with replies, and exchanges without an image."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import random

    from scenes import Scene

# The questions of the handwriting task; the base is trained to answer them for printed digits.
DIGIT_QUESTIONS = (
    "Which digit is this?",
    "What digit is shown here?",
    "Read the digit.",
    "Name the digit in the picture.",
)
CHARACTER_QUESTIONS = ("Which character is shown?", "Read the character.", "What is printed here?")
LETTER_QUESTIONS = ("Which letter is this?", "What letter is shown here?", "Read the letter.")
TEXT_QUESTIONS = ("What does it say?", "Read the text.", "What is written here?")
NUMBER_QUESTIONS = ("Which number is this?", "What number is shown here?", "Read the number.")
WORD_QUESTIONS = ("Which word is this?", "What word is shown here?", "Read the word.")
SHAPE_QUESTIONS = ("What shape is this?", "Name the shape.", "Which shape do you see?")
COLOUR_QUESTIONS = ("What colour is it?", "Name the colour.", "Which colour does it have?")
COUNT_QUESTIONS = (
    "How many shapes are there?",
    "Count the shapes.",
    "What is the number of shapes?",
)
DESCRIBE_QUESTIONS = ("Describe the picture.", "What do you see?", "What is in the picture?")

DIGIT_NAMES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
)  # fmt: skip

WITHOUT_IMAGE = (
    ("Hello!", "Hello! Show me a picture."),
    ("Hi, who are you?", "I am a tiny vision assistant."),
    ("Good morning.", "Good morning! How can I help?"),
    ("What can you do?", "I read printed text and name shapes."),
    ("Can you see pictures?", "Yes, small ones."),
    ("Thank you!", "You are welcome."),
    ("Goodbye.", "Goodbye!"),
    ("How many days has a week?", "7"),
    ("How many months has a year?", "12"),
    ("How many sides has a triangle?", "3"),
    ("How many sides has a square?", "4"),
    ("How many sides has a hexagon?", "6"),
    ("How many letters has the alphabet?", "26"),
    ("What colour is grass?", "green"),
    ("What colour is snow?", "white"),
    ("What colour is the sky?", "blue"),
    ("What colour is a ripe banana?", "yellow"),
    ("Which letter comes after A?", "B"),
    ("Which letter comes after X?", "Y"),
    ("Which digit comes after 4?", "5"),
    ("Which digit comes before 9?", "8"),
    ("What is the first letter of the alphabet?", "A"),
    ("What is the capital of France?", "Paris"),
    ("What is the capital of Italy?", "Rome"),
)


class Exchange(NamedTuple):
    """A question and its reply."""

    query: str
    response: str


def ask(scene: Scene, count: int, rng: random.Random) -> list[Exchange]:
    """At most ``count`` different questions on a scene, the main one among them."""
    makers = {
        "digit": _about_digit,
        "letter": _about_letter,
        "number": _about_text,
        "word": _about_text,
        "shape": _about_shape,
        "count": _about_count,
    }
    main, *others = makers[scene.kind](scene, rng)
    chosen = [main, *rng.sample(others, min(count - 1, len(others)))]
    rng.shuffle(chosen)
    return chosen


def _about_digit(scene: Scene, rng: random.Random) -> list[Exchange]:
    digit = int(scene.text)
    return [
        Exchange(rng.choice(DIGIT_QUESTIONS), scene.text),
        Exchange(rng.choice(CHARACTER_QUESTIONS), scene.text),
        Exchange("Write the digit as a word.", DIGIT_NAMES[digit]),
        Exchange("Is the digit even or odd?", ("even", "odd")[digit % 2]),
        Exchange("Is it a digit or a letter?", "digit"),
        _ink(scene),
    ]


def _about_letter(scene: Scene, rng: random.Random) -> list[Exchange]:
    return [
        Exchange(rng.choice(LETTER_QUESTIONS), scene.text),
        Exchange(rng.choice(CHARACTER_QUESTIONS), scene.text),
        Exchange("Is the letter a capital?", "yes" if scene.text.isupper() else "no"),
        Exchange("Is it a digit or a letter?", "letter"),
        _ink(scene),
    ]


def _about_text(scene: Scene, rng: random.Random) -> list[Exchange]:
    own = NUMBER_QUESTIONS if scene.kind == "number" else WORD_QUESTIONS
    part = "digit" if scene.kind == "number" else "letter"
    return [
        Exchange(rng.choice(TEXT_QUESTIONS), scene.text),
        Exchange(rng.choice(own), scene.text),
        Exchange(f"How many {part}s are there?", str(len(scene.text))),
        Exchange(f"What is the first {part}?", scene.text[0]),
        Exchange(f"What is the last {part}?", scene.text[-1]),
        _ink(scene),
    ]


def _about_shape(scene: Scene, rng: random.Random) -> list[Exchange]:
    article = "an" if scene.colour == "orange" else "a"
    return [
        Exchange(rng.choice(SHAPE_QUESTIONS), scene.shape),
        Exchange(rng.choice(COLOUR_QUESTIONS), scene.colour),
        Exchange(rng.choice(DESCRIBE_QUESTIONS), f"{article} {scene.colour} {scene.shape}"),
        Exchange(rng.choice(COUNT_QUESTIONS), "1"),
    ]


def _about_count(scene: Scene, rng: random.Random) -> list[Exchange]:
    ending = "" if scene.count == 1 else "es" if scene.shape == "cross" else "s"
    return [
        Exchange(rng.choice(COUNT_QUESTIONS), str(scene.count)),
        Exchange(rng.choice(SHAPE_QUESTIONS), scene.shape),
        Exchange(rng.choice(COLOUR_QUESTIONS), scene.colour),
        Exchange(
            rng.choice(DESCRIBE_QUESTIONS), f"{scene.count} {scene.colour} {scene.shape}{ending}"
        ),
    ]


def _ink(scene: Scene) -> Exchange:
    return Exchange("Is the ink dark or light?", scene.colour)
