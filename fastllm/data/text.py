"""Text: files of it, and what every Python carries."""

from __future__ import annotations

import codecs
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"
"""What ends a document in a text."""


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, line ends and all as they are; a byte order mark at its start is dropped.

    Raises:
        FileNotFoundError, IsADirectoryError, ...: as open.
        ValueError: for a file that is empty or not UTF-8, with its name and, for the latter, the offending byte or the
            encoding that it seems to have.
    """
    data = Path(path).read_bytes()
    check_encoding(path, data)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        check_encoding(path, data, 0.0)
        # Without the mark, which the codec does not count.
        offset = error.start + len(data) - len(error.object)
        raise ValueError(f"{path} is not UTF-8 text: byte 0x{data[offset]:02x} at offset {offset}") from None
    if not text:
        raise ValueError(f"{path} is empty")
    return text


def check_encoding(path: str | Path, data: bytes, zeros: float = 0.05) -> None:
    """Sees that `data`, a file or what it begins with, is not UTF-16 or UTF-32.

    Args:
        path: named in the error.
        data: bytes.
        zeros: the share of characters, at least, that must have zeros for bytes without a mark to be such an encoding.

    Raises:
        ValueError: with the encoding that it seems to have.
    """
    if (encoding := _other_unicode(data, zeros)) is not None:
        raise ValueError(f"{path} is {encoding}: convert it to UTF-8, for example by iconv -f {encoding} -t UTF-8")


def _other_unicode(data: bytes, zeros: float) -> str | None:
    """UTF-16 or UTF-32 with its byte order, if that is what `data` is: by its mark, or by where its zeros are.

    Most text has blanks, line ends or digits at least, which these encodings fill up with zeros, all in the same place
    of a character. More than the share `zeros` of the characters must be such.
    """
    for mark, encoding in (
        (codecs.BOM_UTF32_LE, "UTF-32LE"),  # begins with the mark of UTF-16LE
        (codecs.BOM_UTF32_BE, "UTF-32BE"),
        (codecs.BOM_UTF16_LE, "UTF-16LE"),
        (codecs.BOM_UTF16_BE, "UTF-16BE"),
    ):
        if data.startswith(mark) and len(data) > len(mark):
            return encoding
    start = data[: 1 << 16]
    if len(data) % 2 or not start.strip(b"\0"):
        return None
    places = [start[place::4].count(0) * 4 / len(start) for place in range(4)]
    odd, even = places[1] + places[3], places[0] + places[2]
    if min(places[2:]) > 0.9 > places[0]:
        encoding = "UTF-32LE"
    elif min(places[:2]) > 0.9 > places[3]:
        encoding = "UTF-32BE"
    elif max(odd, even) > 2 * zeros and max(odd, even) > 10 * min(odd, even):
        encoding = "UTF-16LE" if odd > even else "UTF-16BE"
    else:
        return None
    try:
        codecs.getincrementaldecoder(encoding)().decode(start)
    except UnicodeDecodeError:
        return None
    return encoding


def topics_text() -> str:
    """English prose that every CPython carries: the language reference behind `help("for")`, about 370,000 characters.

    Topics quote each other at length. A paragraph that was there before is left out, since validation on text that
    was trained on would say nothing.

    Raises:
        ImportError: for a Python that was packaged without `pydoc_data`.
    """
    from pydoc_data.topics import topics

    unique: dict[tuple[str, ...], str] = {}
    for topic in topics.values():
        for paragraph in topic.split("\n\n"):
            # By words: the same paragraph is indented and wrapped differently from topic to topic.
            unique.setdefault(tuple(paragraph.split()), paragraph)
    return "\n\n".join(unique.values())


def split_text(text: str, validation: float) -> tuple[str, str]:
    """Cuts `text` in two: (what to train on, the last `validation` of it, a fraction in (0, 1)).

    An `<|endoftext|>` that the cut would fall into goes to the second part, whole.

    Raises:
        ValueError: for a fraction out of range.
    """
    if not 0 < validation < 1:
        raise ValueError(f"the fraction of text to validate on must be in (0, 1), got {validation}")
    cut = len(text) - round(len(text) * validation)
    marker = text.find(END_OF_TEXT, max(0, cut - len(END_OF_TEXT) + 1), cut + len(END_OF_TEXT) - 1)
    if 0 <= marker < cut:
        cut = marker
    return text[:cut], text[cut:]
