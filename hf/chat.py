"""Conversations to token ids, by chat templates: the model's own, or one of the built-in ones, which are templates too.

A conversation is rendered once as a whole, and once up to each response, with the prompt for an answer. The whole is
cut at the special tokens that the template wrote, and what lies between them is tokenised: the ids are those of
transformers' `apply_chat_template`. A response begins where the prompt for it ends, at a token boundary, as it does
when a model writes it.

Characters that no text has (Unicode's noncharacters) stand in the contents while they are rendered:

    HIDDEN      inside of what a content has of special tokens' spellings, which so stay text; and before each content
    ENDS        around the number of a turn, after its content: there the turn is found again
    UNTOUCHED   inside of <think> and </think>, for templates that would drop what stands between
    THOUGHT     around thoughts that stand in a key of their own
"""

import functools
import importlib.metadata
import itertools
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import NamedTuple

from hf.reading import is_there, read_file, read_json
from hf.tokenizer import AddedToken
from hf.weights import untrained_rows
from runtime.process import UserError


HIDDEN, ENDS, UNTOUCHED, THOUGHT = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
END = re.compile(f"{ENDS}[0-9]{{1,9}}{ENDS}")
MARKS = re.compile(f"{END.pattern}|{HIDDEN}|{THOUGHT}")
NONCHARACTERS = re.compile(f"[{HIDDEN}{ENDS}{UNTOUCHED}{THOUGHT}]")
THOUGHT_TAGS = ("<think>", "</think>")
RENDER_SECONDS = 10                  # for a conversation


class Turn(NamedTuple):
    role: str | None                 # "system", "user", "assistant"; None: bare text, all of it response
    content: str | None              # None in a last turn of the assistant: what a model is to write
    thoughts: str | None = None      # reasoning_content of an assistant's turn
    is_trained: bool = True          # False: an assistant's turn that is context only


# ---------------------------------------------------------------------------------------------------------------------
# The built-in templates

class BuiltIn(NamedTuple):
    tokens: tuple                    # special tokens that it needs; the last one ends a response
    template: str


BUILT_IN = {
    "chatml": BuiltIn(
        ("<|im_start|>", "<|im_end|>"),
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + "
        "'<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"),
    "llama3": BuiltIn(
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "{{ '<|begin_of_text|>' }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
        "'<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"),
}
CHAT_FORMATS = ("plain", *BUILT_IN)


def plain_template(tokenizer):
    """Texts, a line break after those that are no response, the end-of-text after those that are."""
    begin, end = (json.dumps(text, ensure_ascii=False) for text in ("".join(tokenizer.begin), eos_text(tokenizer)))
    return ("{{ " + begin + " }}{% for message in messages %}{{ message['content'] }}"
            "{% if message['role'] == 'assistant' %}{{ " + end + " }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}")


def eos_text(tokenizer):
    """Raises UserError where there is none, or one that texts are made of."""
    for text, i in tokenizer.special.items():
        if i == tokenizer.eos_id:
            return text
    where = tokenizer.path or "the tokenizer"
    if tokenizer.eos_id is None:
        raise UserError(f"{where} names no end-of-text token; expected eos_token in tokenizer_config.json or "
                        "eos_token_id in config.json")
    raise UserError(f"{where}: its end-of-text token {tokenizer.decode([tokenizer.eos_id])!r} ({tokenizer.eos_id}) is "
                    "one that texts are made of; expected a special token")


def begin_ids(tokenizer):
    """What stands before any text: Llama 3's <|begin_of_text|>, Mistral's <s>; nothing for models that have none."""
    return [tokenizer.special[token] for token in tokenizer.begin]


# ---------------------------------------------------------------------------------------------------------------------
# Which template

def load_chat_format(directory, tokenizer, name="auto"):
    """The ChatFormat of a model directory (None: the tokenizer's) and a Tokenizer.

    name: "plain", "chatml", "llama3", or "auto": the directory's own template; without one the built-in format whose
    token for the end of a response is the tokenizer's end-of-text; else the one whose special tokens it has, and has
    trained; else plain. Raises UserError, also where several fit.
    """
    warning = ""
    if directory is None and tokenizer.path is not None:
        directory = tokenizer.path.parent
    own = read_template(Path(directory)) if directory else None
    if name == "auto" and own is None:
        name, warning = guess_format(tokenizer, directory)
    template = own if name == "auto" else built_in_template(name, tokenizer)
    for known in CHAT_FORMATS:
        # A run of ours has been saved with the template that it was trained in.
        if name == "auto" and fits(known, tokenizer) and template == built_in_template(known, tokenizer):
            name = known
    chat_format = ChatFormat("own" if name == "auto" else name, template, tokenizer, directory)
    chat_format.warning = warning
    if own is not None and template != own:
        chat_format.warning = (f"{directory} has a chat template of its own, and --chat-format {name} is another "
                               "format: the model may not know it")
    return chat_format


def read_template(directory):
    """The chat template of a model directory, None if it has none. Raises UserError."""
    file, config = directory / "chat_template.jinja", directory / "tokenizer_config.json"
    try:
        if is_there(file):
            return read_file(file).decode()
        if not is_there(config):
            return None
        template = read_json(config).get("chat_template")
        if isinstance(template, list):
            # There are several, by name.
            template = {entry["name"]: entry["template"] for entry in template}["default"]
        if template is not None:
            # Raises where it is no text, or not of whole characters.
            template.encode()
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{directory}: its chat template cannot be read ({e!r}); expected one text, or --chat-format "
                        f"{', '.join(CHAT_FORMATS)}") from None
    return template


def fits(name, tokenizer):
    return name == "plain" or set(BUILT_IN[name].tokens) <= tokenizer.special.keys()


def guess_format(tokenizer, directory):
    """(name, warning) where there is no template. Raises UserError."""
    fitting = [name for name in BUILT_IN if fits(name, tokenizer)]
    for name in fitting:
        if tokenizer.special[BUILT_IN[name].tokens[-1]] == tokenizer.eos_id:
            return name, ""
    if len(fitting) > 1:
        raise UserError(f"{directory or 'the tokenizer'} has no chat template, and tokens of {' and '.join(fitting)}; "
                        "expected one of them, or plain, with --chat-format")
    if not fitting:
        return "plain", ""
    untrained = untrained_tokens(directory, tokenizer, BUILT_IN[fitting[0]].tokens)
    if untrained:
        return "plain", (f"{directory} has no chat template, and its rows of {', '.join(untrained)} are near zero, as "
                         f"if never trained: chat format plain; full fine-tuning with --chat-format {fitting[0]} would "
                         "train them (adapters leave them frozen)")
    return fitting[0], ""


def untrained_tokens(directory, tokenizer, tokens):
    """Those of these special tokens whose row in the model's embedding or head is near zero."""
    ids = {tokenizer.special[token]: token for token in tokens if token in tokenizer.special}
    try:
        return [ids[i] for i in untrained_rows(directory, list(ids))]
    except (ValueError, OSError):
        # A tokenizer without a model, or a model that `load_model` will say more of.
        return []


def built_in_template(name, tokenizer):
    """Raises UserError where the tokenizer lacks a token."""
    if name == "plain":
        return plain_template(tokenizer)
    for token in BUILT_IN[name].tokens:
        if token not in tokenizer.special:
            raise UserError(f"chat format {name} needs the special token {token}, which the tokenizer lacks")
    return BUILT_IN[name].template


# ---------------------------------------------------------------------------------------------------------------------
# A template at work

class ChatFormat:
    """A chat template, and the tokenizer to whose ids it leads.

    name: a built-in one's, or "own". template: its text. tokens: texts of the special tokens that it writes around a
    question and its answer. end: the id that ends a response. warning: a sentence about the choice, "" without one.
    Raises UserError for a template that cannot render a question and its answer.
    """
    warning = ""

    def __init__(self, name, template, tokenizer, directory=None):
        self.name, self.template, self.tokenizer = name, template, tokenizer
        self.where = f"the chat template of {directory}" if name == "own" else f"chat format {name}"
        self.renderer = start_renderer(template, tuple(special_names(tokenizer).items()))
        self.added = added_tokens(tokenizer)
        self.added_ids = {token.id for token in self.added.values()}
        self.written = pattern_of(self.added)
        self.drops_thoughts = False
        self.look_at_an_example()

    def look_at_an_example(self):
        """Finds out which tokens the template writes, what ends a response, and what becomes of thoughts."""
        question = {"role": "user", "content": "Why?"}
        answer = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nSo."}
        whole, prompt = self.render([question, answer], [(2, False), (1, True)])
        self.drops_thoughts = "Hm." not in whole
        self.tokens = self.tokens_in(whole + prompt)
        try:
            longer = [{"role": "system", "content": "Be brief."}, question, answer, question, answer]
            self.tokens = list(dict.fromkeys(self.tokens + self.tokens_in(*self.render(longer, [(5, False)]))))
        except UserError:
            # It has no place for a system text, or for a second round.
            pass
        # A text that spells one of these stays text.
        special = [text for text, token in self.added.items() if token.special]
        self.lookalike = pattern_of({text: self.added[text] for text in [*special, *self.tokens]}, strip=False)
        # What the next turn begins with does not end a response.
        before, _, _ = whole.rpartition("Why?")
        *_, self.opening = ["", *self.written.findall(before)]
        ids, response = self.encode([Turn("user", "Why?"), Turn("assistant", "So.")])
        self.end = next(i for i, is_response in zip(reversed(ids), reversed(response)) if is_response)

    def tokens_in(self, text):
        """The added tokens that the template has written, each once, without those of thoughts."""
        tokens = [match[0].strip() for match in self.written.finditer(text)]
        return [token for token in dict.fromkeys(tokens) if token not in THOUGHT_TAGS]

    def encode(self, turns):
        """(ids, whether each is response) of a conversation, a list of Turn.

        A last turn of the assistant whose content is None is the one that a model is to write: the ids end with the
        prompt for it. Raises UserError where the template refuses the conversation or does not write all of it.
        """
        if turns[0].role is None:
            begin = begin_ids(self.tokenizer)
            ids = self.tokenizer.encode(turns[0].content) + [self.tokenizer.eos_id]
            return begin + ids, [False] * len(begin) + [True] * len(ids)
        written = [turn for turn in turns if turn.content is not None]
        contents = [self.mark(number, turn) for number, turn in enumerate(written)]
        messages = [self.message(turn, content) for turn, content in zip(written, contents)]
        trained = [number for number, turn in enumerate(written) if turn.role == "assistant" and turn.is_trained]
        asks = len(written) < len(turns)
        try:
            whole, *prompts = self.render(messages, [(len(written), asks), *((number, True) for number in trained)])
        except UserError as e:
            if trained[:1] != [0]:
                raise
            raise UserError(f"{e} (the conversation begins with the assistant's turn: expected a user's first, or "
                            "weight 0 for that turn)") from None
        if trained and trained[-1] == len(written) - 1:
            whole = self.with_question(whole, trained[-1], contents[-1], prompts[-1])
        ends = find_ends(whole)
        for number, turn in enumerate(written):
            self.check_turn(whole, ends, number, turn, contents[number])
        responses = []
        for number, prompt in zip(trained, prompts):
            responses.append(self.find_response(whole, ends, number, contents[number], prompt))
        return self.tokenise(whole, responses)

    def find_lookalikes(self, turn):
        """Special tokens that a turn's texts spell: they stay text."""
        return self.lookalike.findall(turn.content or "") + self.lookalike.findall(turn.thoughts or "")

    def show(self, ids):
        """The text of ids, with a backslash in what only spells a special token."""
        shown = []
        for is_token, group in itertools.groupby(ids, key=self.added_ids.__contains__):
            text = b"".join(self.tokenizer.bytes.get(int(i), b"?") for i in group).decode(errors="replace")
            if not is_token:
                text = self.lookalike.sub(lambda match: f"{match[0][0]}\\{match[0][1:]}", text)
            shown.append(text)
        return "".join(shown)

    # Before rendering

    def mark(self, number, turn):
        """The content of a turn as the template gets it. Contents that are blank are as they were."""
        text = turn.content
        if NONCHARACTERS.search(text) or NONCHARACTERS.search(turn.thoughts or ""):
            raise UserError("a text has one of the noncharacters U+FDD0 to U+FDD3; expected text")
        inside = text.strip()
        if not inside:
            return text
        before, after = text[:len(text) - len(text.lstrip())], text[len(text.rstrip()):]
        inside = self.hide(inside)
        if self.drops_thoughts and turn.role == "assistant":
            for tag in THOUGHT_TAGS:
                inside = inside.replace(tag, tag[0] + UNTOUCHED + tag[1:])
        return f"{before}{HIDDEN}{inside}{ENDS}{number}{ENDS}{after}"

    def hide(self, text):
        """What spells a special token is broken in two. Raises UserError where it is a single character."""
        for token in self.lookalike.findall(text):
            if len(token) == 1:
                raise UserError(f"a text holds {token!r}, which is a special token; expected text")
        return self.lookalike.sub(lambda match: match[0][0] + HIDDEN + match[0][1:], text)

    def message(self, turn, content):
        message = {"role": turn.role, "content": content}
        if turn.thoughts is not None:
            message["reasoning_content"] = message["thinking"] = self.mark_thoughts(turn)
        return message

    def mark_thoughts(self, turn):
        return THOUGHT + self.hide(turn.thoughts.strip()) + THOUGHT

    def render(self, messages, wanted):
        try:
            texts = self.renderer.render(messages, wanted)
        except ValueError as e:
            raise UserError(f"{self.where}: {e}; expected a conversation as it wants it, or another --chat-format "
                            f"({', '.join(CHAT_FORMATS)})") from None
        for text in texts:
            numbers = [int(mark.strip(ENDS)) for mark in END.findall(text)]
            if text.count(ENDS) != 2 * len(numbers) or max(numbers, default=0) >= max(1, len(messages)):
                raise UserError(f"{self.where} writes noncharacters of its own; expected text")
        return [text.replace(UNTOUCHED, "") for text in texts]

    # After it

    def check_turn(self, whole, ends, number, turn, content):
        """Raises UserError if the turn, whose content was marked so, is not in the whole as it was given."""
        if content == turn.content:
            # It is blank.
            return
        spans = [span for span, other in ends if other == number]
        written = ""
        if spans:
            start, _ = spans[0]
            written = whole[end_before(ends, start):start]
        if turn.role == "assistant":
            is_there = len(spans) == 1 and holds_answer(written, turn)
            if turn.is_trained and turn.thoughts is not None:
                is_there = is_there and self.mark_thoughts(turn) in written
        else:
            is_there = written.endswith(END.sub("", content.strip()))
        if is_there:
            return
        lost = f"turn {number + 1} ({turn.role}: {turn.content.strip()[:40]!r})"
        if turn.thoughts is not None:
            place = "as <think> in its content"
            if number < max((other for _, other in ends), default=number):
                place = f"in a last turn (one sample per turn that has thoughts), or {place}"
            raise UserError(f"{self.where} does not write the thoughts (reasoning_content) of {lost}; expected them "
                            f"{place}, or another --chat-format")
        if "</think>" in turn.content:
            raise UserError(f"{self.where} does not write the thoughts (<think>) of {lost}; expected them in a last "
                            "turn (one sample per turn that has thoughts), or another --chat-format")
        raise UserError(f"{self.where} does not write {lost} as it is; expected a conversation without it, or another "
                        "--chat-format")

    def with_question(self, whole, number, content, prompt):
        """The whole; or, if the prompt for its last answer has turns that it lacks, that prompt and the answer: some of
        Mistral's templates write a system text only where the last question has no answer yet."""
        ends = find_ends(whole)
        if [other for _, other in ends].count(number) != 1 or len(find_ends(prompt)) < len(ends):
            return whole
        begin, _ = self.find_response(whole, ends, number, content, prompt)
        return prompt + whole[begin:]

    def find_response(self, whole, ends, number, content, prompt):
        """(begin, end) in the whole of a turn's response: what follows the prompt for it, up to the special token after
        its content."""
        (first, last), = [span for span, other in ends if other == number]
        begin = end_before(ends, first)
        region = whole[begin:first]
        prompt = END.split(prompt)[-1]
        begin += length_in_common(region, prompt, content.replace(UNTOUCHED, "").strip())
        match = self.written.search(whole, last)
        next_turn = min((span[0] for span, _ in ends if span[0] > first), default=len(whole))
        if match is None or match.start() > next_turn or match[0] == self.opening:
            raise UserError(f"{self.where} ends an assistant's turn with no special token of its own; expected one, or "
                            "another --chat-format")
        return begin, match.end()

    def tokenise(self, whole, responses):
        """(ids, whether each is response) of the whole, cut where its responses [(begin, end), ...] begin and end."""
        ids, is_response = [], []
        edges = [0, *itertools.chain(*responses), len(whole)]
        for part, (start, stop) in enumerate(itertools.pairwise(edges)):
            ids += self.tokenise_part(whole[start:stop], self.end_of(ids))
            is_response += [part % 2 == 1] * (len(ids) - len(is_response))
        return ids, is_response

    def tokenise_part(self, text, follows):
        ids, position = [], 0
        for match in self.written.finditer(text):
            before = MARKS.sub("", text[position:match.start()])
            if before:
                ids += self.tokenizer.encode_part(before, follows)
            ids.append(self.added[match[0] if match[0] in self.added else match[0].strip()].id)
            position, follows = match.end(), "token"
        rest = MARKS.sub("", text[position:])
        if rest:
            ids += self.tokenizer.encode_part(rest, follows)
        return ids

    def end_of(self, ids):
        """What a text follows that comes after these ids: see `Tokenizer.encode_part`."""
        if not ids:
            return "nothing"
        return "token" if ids[-1] in self.added_ids else "text"


def added_tokens(tokenizer):
    """{text: AddedToken}: those of tokenizer.json, and the special ones that a built-in template may write."""
    needed = [*tokenizer.begin, eos_text(tokenizer), *(token for form in BUILT_IN.values() for token in form.tokens)]
    more = {text: AddedToken(tokenizer.special[text]) for text in needed if text in tokenizer.special}
    return {**more, **tokenizer.added_tokens}


def pattern_of(tokens, strip=True):
    """A pattern of the texts of {text: AddedToken}, of two that begin alike the longer one; strip: with the white space
    that they take along."""
    patterns = []
    for text in sorted(tokens, key=len, reverse=True):
        before = r"\s*" if strip and tokens[text].lstrip else ""
        after = r"\s*" if strip and tokens[text].rstrip else ""
        patterns.append(before + re.escape(text) + after)
    return re.compile("|".join(patterns) or "(?!)")


def find_ends(text):
    """[((first, last), number of the turn), ...]: where contents end."""
    return [(match.span(), int(match[0].strip(ENDS))) for match in END.finditer(text)]


def end_before(ends, position):
    """Where the last content before this position ends."""
    return max((span[1] for span, _ in ends if span[1] <= position), default=0)


def holds_answer(written, turn):
    """Whether a template wrote all of an assistant's turn. It may have set white space in its way, and thoughts before
    the content; of what is context it may have left the thoughts out."""
    written = squeeze(MARKS.sub("", written))
    if not turn.is_trained:
        return written.endswith(squeeze(turn.content.rpartition("</think>")[2]))
    return written.endswith(squeeze(turn.content))


def squeeze(text):
    return "".join(text.split())


def length_in_common(region, prompt, content):
    """How much of the region the prompt for its response has written: the region's content may not be cut into."""
    length = 0
    for character in prompt:
        while region[length:length + 1] == HIDDEN:
            length += 1
        if region[length:length + 1] != character:
            content = END.sub("", content)
            return min(length, len(region) - len(content)) if region.endswith(content) else length
        length += 1
    return length


# ---------------------------------------------------------------------------------------------------------------------
# The process that renders

RENDERER = Path(__file__).resolve().with_name("renderer.py")
# What it imports, and the oldest version. Templates can leave the sandbox of an older jinja2: CVE-2025-27516.
NEEDED = {"jinja2": (3, 1, 6), "markupsafe": (2, 0, 0)}
# What Python itself may need to start.
ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT")


# All who use a template share its process: several files, and several models.
@functools.lru_cache(maxsize=4)
def start_renderer(template, names):
    return Renderer(template, dict(names))


class Renderer:
    """A process that renders one template: in jinja2's sandbox, in bounded time and memory.

    names: what the template may use beside messages. Raises UserError where jinja2 is missing or too old.

    The directory that the command is called in may hold what others wrote, and so may those that the environment names.
    The process (-I, -S) looks for modules only among Python's own and where we say.
    """

    def __init__(self, template, names):
        command = [sys.executable, "-I", "-S", str(RENDERER), *directories_of_packages(NEEDED)]
        environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, text=True, encoding="ascii", env=environment,
                                        cwd=RENDERER.parent)
        weakref.finalize(self, stop, self.process)
        self.watchdog = Watchdog(self.process)
        self.unsent = json.dumps([template, names]) + "\n"

    def render(self, messages, wanted):
        """The texts of what is wanted, [(how many of the messages, whether the prompt for an answer follows), ...].

        Raises ValueError, with the template's words.
        """
        self.watchdog.deadline = time.monotonic() + RENDER_SECONDS
        try:
            self.process.stdin.write(self.unsent + json.dumps([messages, wanted]) + "\n")
            self.unsent = ""
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:
            line = ""
        was_in_time = time.monotonic() < self.watchdog.deadline
        self.watchdog.deadline = math.inf
        if not line.endswith("\n"):
            start_renderer.cache_clear()
            reason = "its process has ended" if was_in_time else f"it takes more than {RENDER_SECONDS} s"
            raise ValueError(f"it cannot be rendered: {reason}")
        answer = json.loads(line)
        if "error" in answer:
            raise ValueError(f"it cannot be rendered: {answer['error']}")
        return answer["texts"]


class Watchdog:
    """Kills a process after `deadline`, a time.monotonic(). (To start a timer for each conversation would take longer
    than to render it.)"""

    def __init__(self, process):
        self.process, self.deadline = process, math.inf
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self):
        while self.process.poll() is None:
            if time.monotonic() > self.deadline:
                self.process.kill()
            time.sleep(0.1)


def directories_of_packages(oldest):
    """Where this process would import the packages of {name: oldest version} from, if the current directory were not
    looked at: for each the directory that it is installed in. Raises UserError where one is missing or older."""
    here = os.path.realpath("")
    path = [directory for directory in sys.path if os.path.realpath(directory) != here]
    directories = []
    for name, version in oldest.items():
        # Its metadata say which version a package is, without running it.
        found = next(iter(importlib.metadata.distributions(name=name, path=path)), None)
        installed = str(found.version) if found else "missing"
        if tuple(map(int, re.findall("[0-9]+", installed)[:3])) < version:
            wanted = ".".join(map(str, version))
            raise UserError(f'chat templates are rendered by {name}, which is {installed}; expected {wanted} or later: '
                            f'pip install "{name}>={wanted}"')
        directories.append(str(found.locate_file("")))
    return directories


def stop(process):
    process.kill()
    process.communicate()


def special_names(tokenizer):
    """{"bos_token": text, ...}: what transformers gives to a template of the special tokens."""
    names = {}
    if tokenizer.path is None:
        return names
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        path = tokenizer.path.with_name(file)
        if not is_there(path):
            continue
        try:
            content = read_json(path)
            named = {key: value["content"] if isinstance(value, dict) else value
                     for key, value in content.items() if key.endswith("_token")}
        except (ValueError, KeyError, AttributeError) as e:
            raise UserError(f"{path} is not a configuration that we can read: {e!r}") from None
        names.update({key: text for key, text in named.items() if isinstance(text, str)})
    return names
