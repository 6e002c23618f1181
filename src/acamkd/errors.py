"""The exceptions that users are meant to see."""

import difflib
import re
from collections.abc import Collection, Iterable


class AcamkdError(ValueError):
    """Something that the user gave cannot be used; the message says what, what is allowed and what to do.

    The command line prints the message alone and exits with 1; any other exception is a bug and keeps its traceback.
    """


class ImageError(AcamkdError, OSError):
    """An image is not there or cannot be decoded. An OSError, too: a training says how to go on."""


def without_password(text: str) -> str:
    """An address, or a message with addresses, without user names and passwords, which must not get into files."""
    named = r"(?i)([\w-]*(?:user|usr|login|pass|pwd|token|key|auth|sig|secret)[\w-]*)=[^&#\s]*"
    return re.sub(named, r"\1=...", re.sub(r"(?<=://)[^/\s]*@", "", text))


def refuse_unknown(owner: str, options: Iterable[str], known: Collection[str]) -> None:
    """Raise AcamkdError if an option's name is not known; torchvision, smp and transformers ignore such options."""
    for name in options:
        if name not in known:
            raise AcamkdError(f"{owner} has no option {name}; {nearest(name, known)}")


def check_word(what: str, given: str, known: Collection[str]) -> None:
    """Raise AcamkdError unless a word is one of those that an argument may be."""
    if given not in known:
        raise AcamkdError(f"{what}: there is no {given!r}; {nearest(given, known)}")


def nearest(word: str, known: Iterable[str]) -> str:
    """Say which known words come closest, "did you mean a, b?"; list them where none is close, at most 20."""
    words = sorted(known)
    close = difflib.get_close_matches(word, words, n=3, cutoff=0.5)
    if close:
        return f"did you mean {', '.join(close)}?"
    return f"known: {', '.join(words[:20])}" + (f" and {len(words) - 20} more" if len(words) > 20 else "")
