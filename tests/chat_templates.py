"""Chat templates that write what those of published models write, and tokenizers that have their special tokens.

They are shorter than the published files: but for DeepSeek's, no tools. The tests compare with what transformers makes of
the same template.
"""

import importlib.util
import json
from pathlib import Path
from typing import NamedTuple

from tokenizer_files import assets_with, trained


class Published(NamedTuple):
    template: str
    style: str                       # of the tokenizer, as tokenizer_files has it
    bos: str | None
    eos: str


CHATML_TURNS = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}" \
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
DEFAULT_SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}"
LLAMA31 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\nToday Date: " + date_string }}
{{- "\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
# Thoughts are written in the last answer alone, where they stand empty if there are none.
QWEN3 = """{%- set ns = namespace(last_question=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' and not message.content.startswith('<tool_response>') %}
        {%- set ns.last_question = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- set thoughts = '' %}
    {%- if message.role == 'assistant' %}
        {%- if message.reasoning_content is string %}
            {%- set thoughts = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and loop.index0 > ns.last_question and (loop.last or thoughts) %}
        {{- '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
    {%- else %}
        {{- content }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
# Writes what `published_by_deepseek` does, without that package: no thoughts, but <think> at the end of the prompt.
R1 = """{%- set ns = namespace(system='', has_called=false, has_output=false, follows_output=false) %}
{%- for message in messages if message['role'] == 'system' %}
    {%- set ns.system = message['content'] %}
{%- endfor %}
{{- bos_token + ns.system }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {%- set ns.follows_output = false %}
        {{- '<｜User｜>' + message['content'] }}
    {%- elif message['role'] == 'tool' %}
        {{- '\\n' if ns.has_output else '<｜tool▁outputs▁begin｜>' }}
        {{- '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' }}
        {%- set ns.has_output = true %}
        {%- set ns.follows_output = true %}
    {%- elif message['role'] == 'assistant' and message['content'] is none %}
        {%- set ns.follows_output = false %}
        {%- for call in message['tool_calls'] %}
            {{- '\\n' if ns.has_called else '<｜Assistant｜><｜tool▁calls▁begin｜>' }}
            {{- '<｜tool▁call▁begin｜>' + call['type'] + '<｜tool▁sep｜>' + call['function']['name'] }}
            {{- '\\n```json\\n' + call['function']['arguments'] + '\\n```<｜tool▁call▁end｜>' }}
            {{- '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' if ns.has_called else '' }}
            {%- set ns.has_called = true %}
        {%- endfor %}
    {%- elif message['role'] == 'assistant' and ns.follows_output %}
        {%- set ns.follows_output = false %}
        {{- '<｜tool▁outputs▁end｜>' + message['content'] + '<｜end▁of▁sentence｜>' }}
    {%- elif message['role'] == 'assistant' %}
        {{- '<｜Assistant｜>' + message['content'].split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}
    {%- endif %}
{%- endfor %}
{%- if ns.follows_output %}
    {{- '<｜tool▁outputs▁end｜>' }}
{%- elif add_generation_prompt %}
    {{- '<｜Assistant｜><think>\\n' }}
{%- endif %}
"""
# The system text goes into the last question; elsewhere a question with an answer is not the last message.
MISTRAL = """{%- set ns = namespace(system=none, turns=messages) %}
{%- if messages[0]['role'] == 'system' %}
    {%- set ns.system = messages[0]['content'] %}
    {%- set ns.turns = messages[1:] %}
{%- endif %}
{%- set questions = ns.turns | selectattr('role', 'equalto', 'user') | list %}
{{- bos_token }}
{%- for message in ns.turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message['role'] == 'assistant' %}
        {{- ' ' + message['content'] | trim + eos_token }}
    {%- elif ns.system is not none and WHERE %}
        {{- '[INST] ' + ns.system + '\\n\\n' + message['content'] + '[/INST]' }}
    {%- else %}
        {{- '[INST] ' + message['content'] + '[/INST]' }}
    {%- endif %}
{%- endfor %}
"""
PHI4 = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}" \
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
GEMMA3 = "{{ bos_token }}{% set ns = namespace(prefix='', turns=messages) %}{% if messages[0]['role'] == 'system' %}" \
    "{% set ns.prefix = messages[0]['content'] + '\n\n' %}{% set ns.turns = messages[1:] %}{% endif %}{% for m in ns.turns %}" \
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + (ns.prefix if loop.first else '') }}" \
    "{{ m['content'] | trim }}{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
GENERATION = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}" \
    "{% endgeneration %}{{ '\n' }}{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}" \
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"

PUBLISHED = {
    "SmolLM2": Published(DEFAULT_SYSTEM + CHATML_TURNS, "smollm2", "<|im_start|>", "<|im_end|>"),
    "Qwen2.5": Published(DEFAULT_SYSTEM + CHATML_TURNS, "qwen", None, "<|im_end|>"),
    "Qwen3": Published(QWEN3, "qwen", None, "<|im_end|>"),
    "Llama 3.1": Published(LLAMA31, "llama3", "<|begin_of_text|>", "<|eot_id|>"),
    "R1-Distill-Qwen": Published(R1, "qwen", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "R1-Distill-Llama": Published(R1, "llama3", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "ChatML on Llama 3": Published("{{ bos_token }}" + CHATML_TURNS, "llama3", "<|begin_of_text|>", "<|im_end|>"),
    "Mistral": Published(MISTRAL.replace("WHERE", "message == questions[-1]"), "llama3", "<s>", "</s>"),
    "Mistral, unanswered": Published(MISTRAL.replace("WHERE", "loop.last"), "llama3", "<s>", "</s>"),
    "Phi-4-mini": Published(PHI4, "llama3", "<|endoftext|>", "<|endoftext|>"),
    "Gemma 3": Published(GEMMA3, "llama3", "<bos>", "<eos>"),
    "generation": Published(GENERATION, "qwen", None, "<|im_end|>"),
}

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
           "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<s>", "</s>", "[INST]", "[/INST]", "<|user|>", "<|assistant|>", "<|system|>",
           "<|end|>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
# Added tokens that a text may contain.
ORDINARY = ["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "<tool_call>"]


def published_by_deepseek():
    """The template of all DeepSeek-R1-Distill models (MIT), to the byte. `trl` has a copy of it."""
    package, = importlib.util.find_spec("trl").submodule_search_locations
    return Path(package, "chat_templates", "deepseek_r1_distill.jinja").read_text(encoding="utf-8")


def chat_directory(directory, name, library=False):
    """A directory with the template of this name, and a tokenizer that has its tokens: that of assets/, or with library
    one of its style, and DeepSeek's own template, which needs the other libraries. Returns the directory."""
    published = PUBLISHED[name]
    directory.mkdir(exist_ok=True)
    assets_with(directory, SPECIAL + ORDINARY)
    file = directory / "tokenizer.json"
    spec = json.loads(file.read_text())
    if library:
        spec = json.loads(trained(published.style, True, tuple(SPECIAL + ORDINARY), 2500))
    for token in spec["added_tokens"]:
        token["special"] = token["content"] in SPECIAL
    file.write_text(json.dumps(spec))
    config = {"eos_token": published.eos, "tokenizer_class": "PreTrainedTokenizerFast"}
    if published.bos:
        config["bos_token"] = published.bos
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    template = published_by_deepseek() if library and name.startswith("R1") else published.template
    (directory / "chat_template.jinja").write_text(template)
    return directory
