"""Values in messages: in full if they are short, else their beginning."""


def quoted(value: object, most: int = 80) -> str:
    """Return the `repr` of a value, cut after `most` characters."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."
