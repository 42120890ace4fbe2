"""The vocabulary, and captions as tensors.

A caption is a list of phrases split by commas ("night sky, moon left, sea, red boat near center"). A phrase
becomes one text token: the sum of the one-hot vectors of its words. So "red" and "boat" of one thing stay
together without a text encoder, and the model's own `context_embedder` learns what they mean. No phrase is a
zero vector.
"""

import torch

SKIES = ("day", "sunset", "night", "dawn", "overcast")
CELESTIALS = ("sun", "moon", "clouds")
GROUNDS = ("hills", "mountains", "sea", "desert", "checkerboard", "field")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
KINDS = ("ball", "box", "house", "tree", "pine", "tower", "boat", "balloon", "mushroom", "cactus")
PATTERNS = ("striped", "checkered")
DEPTHS = ("far", "near")
COLUMNS = ("leftmost", "left", "center", "right", "rightmost")

# In the order in which a phrase reads well: "striped red ball near left".
WORDS = SKIES + CELESTIALS + PATTERNS + COLOURS + GROUNDS + KINDS + DEPTHS + COLUMNS
INDEX = {word: index for index, word in enumerate(WORDS)}
SILENT = frozenset(("a", "an", "the", "sky", "at", "in", "on", "of", "and", "with"))

VOCABULARY = 64  # width of a text token; more than len(WORDS), so that words can be added
TEXT_TOKENS = 16  # phrases a caption can hold; a drawn scene uses at most 8


def encode_captions(captions: list[str]) -> torch.Tensor:
    """Captions as text tokens.

    Returns float32 [batch, TEXT_TOKENS, VOCABULARY]; the empty caption is all zeros (unconditional).
    Raises ValueError for an unknown word or too many phrases.
    """
    tokens = torch.zeros(len(captions), TEXT_TOKENS, VOCABULARY)
    for row, caption in enumerate(captions):
        phrases = [phrase.split() for phrase in caption.lower().split(",") if phrase.strip()]
        if len(phrases) > TEXT_TOKENS:
            raise ValueError(f"{len(phrases)} phrases in {caption!r}; a caption holds at most {TEXT_TOKENS}")
        for column, phrase in enumerate(phrases):
            for word in phrase:
                if word in INDEX:
                    tokens[row, column, INDEX[word]] = 1.0
                elif word not in SILENT:
                    raise ValueError(f"unknown word {word!r} in {caption!r}; known: {', '.join(WORDS)}")
    return tokens


def decode_captions(tokens: torch.Tensor) -> list[str]:
    """The captions of text tokens [batch, TEXT_TOKENS, VOCABULARY], words in vocabulary order per phrase."""
    return [
        ", ".join(" ".join(WORDS[i] for i in phrase.nonzero().flatten()) for phrase in rows if phrase.any())
        for rows in tokens.cpu()
    ]
