"""What others wrote does not drive the terminal: all that is printed shows control characters as escapes."""

import contextlib
import os
import re
import sys
import unicodedata


# Categories of characters that are not text: control, format, surrogate, and separators of lines and paragraphs. Among
# them are those that clear a screen, turn a line around, or hide in it.
NOT_TEXT = {"Cc", "Cf", "Cs", "Zl", "Zp"}
# Format characters without which some writing is wrong: joiners, of emoji too, and the marks of Hebrew and Arabic.
PART_OF_WRITING = "\u200c\u200d\u200e\u200f"
# How a progress bar goes back: to the start of its line, or up to it.
GOING_BACK = re.compile(r"\r|(\x1b\[A)*")


def escaped(text, keep=""):
    """The text with \\x1b, \\u202e and the like in place of characters that are not text, but for those in keep."""
    keep += PART_OF_WRITING
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in NOT_TEXT and c not in keep else c
                   for c in text)


class NobodyReads(Exception):
    """Whoever read our output (`| head`) has seen enough."""


class Shown:
    """A text stream that shows what is not text. On stderr a write may begin by going back: libraries draw bars there,
    and none of our own begins with what others wrote.

    What cannot be written is lost, and all that follows. stdout says so, once: it raises NobodyReads, or OSError.
    """

    def __init__(self, stream, is_stderr):
        self.stream, self.is_stderr = stream, is_stderr

    def write(self, text):
        start = GOING_BACK.match(text)[0] if self.is_stderr else ""
        with self.lost_at_an_error():
            self.stream.write(start + escaped(text[len(start):], keep="\n\t"))
        return len(text)

    def flush(self):
        with self.lost_at_an_error():
            self.stream.flush()

    @contextlib.contextmanager
    def lost_at_an_error(self):
        try:
            yield
        except OSError as e:
            # What is buffered has nowhere to go either: Python would fail with it when it exits.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            if self.is_stderr:
                return
            if isinstance(e, BrokenPipeError):
                raise NobodyReads from None
            raise OSError(e.errno, e.strerror, "standard output") from None

    def writelines(self, lines):
        for line in lines:
            self.write(line)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def guard_terminal():
    """Replaces stdout and stderr of this process. Files hold what they are given."""
    open_what_is_closed()
    if hasattr(sys.stdout, "reconfigure"):
        # A terminal may lack characters that the data has.
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = Shown(sys.stdout, False), Shown(sys.stderr, True)
    # Or Python itself colours help and tracebacks, from 3.13 on, with what would show as escapes.
    os.environ["NO_COLOR"] = "1"


def open_what_is_closed():
    """Standard streams that whoever started us has closed lead nowhere. The next file that is opened would take such a
    descriptor, and be printed into."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest that is free.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))
