"""The program that renders chat templates, in a process of its own: a template is a program that others wrote.

It reads a line of JSON for each conversation and answers with one. Its arguments are the directories of what it needs
beside Python's own modules: jinja2, which torch brings, and markupsafe.
"""
# ruff: noqa: E402

import datetime
import json
import sys


sys.path += sys.argv[1:]

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


MOST_BYTES = 2 ** 30                 # of memory
# What a template may add to a conversation, in characters, beside a few times the conversation itself.
MOST_CHARACTERS = 2 ** 20
ENDS = "\ufdd1"                      # see hf/chat.py
# The same text every day.
TODAY = datetime.datetime(2024, 7, 26)


class Generation(Extension):
    """{% generation %} ... {% endgeneration %}, with which templates mark responses: what is inside is written."""
    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def raise_exception(message):
    raise jinja2.TemplateError(message)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def compile_template(text):
    """As transformers does it."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = TODAY.strftime
    return environment.from_string(text)


def render(template, names, messages, wanted, most_characters):
    """The first and the last text that is wanted, whole; of those between, what follows the last content."""
    texts = []
    for number, (count, add_generation_prompt) in enumerate(wanted, 1):
        text = template.render(messages=messages[:count], tools=None, documents=None,
                               add_generation_prompt=add_generation_prompt, **names)
        if len(text) > most_characters:
            raise jinja2.TemplateError(f"it writes {len(text)} characters; expected at most {most_characters}")
        if 1 < number < len(wanted):
            text = text.rpartition(ENDS)[2]
        texts.append(text)
    return texts


def bound_memory():
    try:
        import resource
    except ImportError:
        # Windows has no such module.
        return
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))


def main():
    """The first line is [template, names that it may use]; then each is [messages, [[how many of them, whether the
    prompt for an answer follows], ...]], and is answered by {"texts"} or {"error"}."""
    bound_memory()
    text, names = json.loads(sys.stdin.readline())
    template = None
    for line in sys.stdin:
        try:
            template = template or compile_template(text)
            messages, wanted = json.loads(line)
            answer = {"texts": render(template, names, messages, wanted, MOST_CHARACTERS + 4 * len(line))}
        except Exception as e:
            answer = {"error": str(e)[:500] or type(e).__name__}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
