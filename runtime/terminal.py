"""What others wrote does not drive the terminal: all that is printed shows control characters as escapes."""

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


class Shown:
    """A text stream that shows what is not text. On stderr a write may begin by going back: libraries draw bars there,
    and none of our own begins with what others wrote."""

    def __init__(self, stream, may_go_back):
        self.stream, self.may_go_back = stream, may_go_back

    def write(self, text):
        start = GOING_BACK.match(text)[0] if self.may_go_back else ""
        self.stream.write(start + escaped(text[len(start):], keep="\n\t"))
        return len(text)

    def writelines(self, lines):
        for line in lines:
            self.write(line)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def guard_terminal():
    """Replaces stdout and stderr of this process. Files hold what they are given."""
    if hasattr(sys.stdout, "reconfigure"):
        # A terminal may lack characters that the data has.
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = Shown(sys.stdout, False), Shown(sys.stderr, True)
    # Or Python itself colours help and tracebacks, from 3.13 on, with what would show as escapes.
    os.environ["NO_COLOR"] = "1"
