"""config.json -> GPTConfig: a table of model families, a table of unsupported options, and checked readers."""

import sys
from pathlib import Path
from typing import NamedTuple

from hf.reading import read_json
from model import GPTConfig


class Family(NamedTuple):
    """How the models of an architecture differ from Llama's. The defaults are Llama's row.

    A bias is there always (True), never (False), or where config.json says so under the key that is named.
    """
    keys: dict = {}                               # {its name of a key in config.json: Llama's}
    norm: str = "rms"
    norm_eps: float = 1e-6                        # where config.json has none
    rotary: bool = True                           # False: learned positions
    gated: bool = True                            # the MLP; ACTIVATIONS follow from it
    qkv_bias: bool | str = "attention_bias"
    o_bias: bool | str = "attention_bias"
    mlp_bias: bool | str = "mlp_bias"
    qk_norm: bool = False
    sets_heads: bool = True                       # config.json may set head_dim and num_key_value_heads
    head_dim: int | None = None                   # where config.json has none; None: hidden_size / heads
    tied: bool = False                            # where config.json has no tie_word_embeddings
    slides: str = "never"                         # over a sliding_window: "never", "on request" or "always"
    sliding_window: int | None = None             # where config.json has none


FAMILIES = {
    "GPT2LMHeadModel": Family(
        keys={"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_embd": "hidden_size",
              "n_inner": "intermediate_size", "n_positions": "max_position_embeddings",
              "layer_norm_epsilon": "rms_norm_eps", "activation_function": "hidden_act"},
        norm="layer", norm_eps=1e-5, rotary=False, gated=False, qkv_bias=True, o_bias=True, mlp_bias=True,
        sets_heads=False, tied=True),
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(qkv_bias=False, o_bias=False, mlp_bias=False, slides="always", sliding_window=4096),
    "Qwen2ForCausalLM": Family(qkv_bias=True, o_bias=False, slides="on request"),
    "Qwen3ForCausalLM": Family(qk_norm=True, head_dim=128, slides="on request"),
}

# Names of what `model.MLP` computes, gated or not. An absent key means the first.
ACTIVATIONS = {True: ("silu",), False: ("gelu_new", "gelu_pytorch_tanh")}

# Options that change what a model computes, each with the only value supported, which is what an absent key means.
ONLY_VALUES = {
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}

# Sizes beyond those of any model are refused before a module is made of them.
LARGEST_SIZE = 2 ** 24
MOST_LAYERS = 1000


def load_config(directory):
    """The GPTConfig of a model directory. Raises FileNotFoundError, ValueError, or UserError as
    `hf.reading.read_file`."""
    path = Path(directory) / "config.json"
    try:
        return config_from_dict(read_json(path))
    except (ValueError, TypeError, AttributeError) as e:
        raise ValueError(f"{path}: {e}") from None


def config_from_dict(config_json):
    """The GPTConfig that a config.json (as a dict) describes, as transformers 4 or 5 write it.

    Raises ValueError that names what is missing or not supported, and what is.
    """
    family = find_family(config_json)
    settings = {family.keys.get(key, key): value for key, value in config_json.items() if value is not None}
    # null is as good as absent, but for this key: there it says that there is no window.
    if family.sliding_window is not None and "sliding_window" not in config_json:
        settings["sliding_window"] = family.sliding_window
    rope = rope_settings(settings)
    check_options(settings, rope, family)

    n_head = whole_number(settings, "num_attention_heads")
    n_embd = whole_number(settings, "hidden_size")
    n_kv_head, head_dim = n_head, n_embd // n_head
    if family.sets_heads:
        n_kv_head = whole_number(settings, "num_key_value_heads", n_head)
        head_dim = whole_number(settings, "head_dim", family.head_dim or head_dim)
    check_heads(n_head, n_kv_head, head_dim, n_embd, family)

    return GPTConfig(
        vocab_size=whole_number(settings, "vocab_size"),
        n_layer=whole_number(settings, "num_hidden_layers", limit=MOST_LAYERS),
        n_head=n_head,
        n_kv_head=n_kv_head,
        head_dim=head_dim,
        n_embd=n_embd,
        n_ff=whole_number(settings, "intermediate_size", None if family.gated else 4 * n_embd),
        max_positions=longest_sample(settings, family),
        norm=family.norm,
        norm_eps=real_number(settings, "rms_norm_eps", family.norm_eps),
        rope_theta=real_number(rope, "rope_theta") if family.rotary else None,
        rope_scaling=rope_scaling(rope),
        gated=family.gated,
        qkv_bias=has_bias(settings, family.qkv_bias),
        o_bias=has_bias(settings, family.o_bias),
        mlp_bias=has_bias(settings, family.mlp_bias),
        qk_norm=family.qk_norm,
        tie_embeddings=switch(settings, "tie_word_embeddings", family.tied),
        eos_token_ids=eos_token_ids(settings),
        hf=config_json,
    )


def llama_config(vocab_size, n_layer, n_head, n_embd, max_positions, eos_token_id):
    """The GPTConfig of a new model of Llama's architecture. Raises ValueError."""
    return config_from_dict({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": n_embd,
        # Two thirds of 4 * n_embd, since there are three matrices, up to a multiple of 32.
        "intermediate_size": -(-n_embd * 8 // 3 // 32) * 32,
        "num_hidden_layers": n_layer,
        "num_attention_heads": n_head,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": max_positions,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": eos_token_id,
        "eos_token_id": eos_token_id,
    })


# ---------------------------------------------------------------------------------------------------------------------
# What is supported

def find_family(config_json):
    architectures = config_json.get("architectures")
    name = str(architectures)
    if isinstance(architectures, list) and len(architectures) == 1:
        name = str(architectures[0])
    check("architecture", name, tuple(FAMILIES))
    return FAMILIES[name]


def check_options(settings, rope, family):
    if quantization := settings.get("quantization_config"):
        raise ValueError(f"quantization_config {str(quantization)[:100]} is not supported; expected weights in "
                         "float32, float16 or bfloat16: the model that this one was made from")
    check("rope type", rope_type(rope), ("default", "llama3"))
    activations = ACTIVATIONS[family.gated]
    check("hidden_act", settings.get("hidden_act", activations[0]), activations)
    check("layer_types", sorted(set(settings.get("layer_types", []))), ([], ["full_attention"]))
    for key, only_value in ONLY_VALUES.items():
        value = rope.get(key, settings.get(key, only_value))
        check(key, value, (only_value,))


def check(key, value, supported):
    if value not in supported:
        raise ValueError(f"{key} {str(value)[:100]} is not supported; supported: {', '.join(map(str, supported))}")


def check_heads(n_head, n_kv_head, head_dim, n_embd, family):
    fits = n_head % n_kv_head == 0 and n_head * head_dim <= LARGEST_SIZE
    if family.rotary:
        fits = fits and head_dim % 2 == 0
    if not family.sets_heads:
        fits = fits and n_embd % n_head == 0
    if not fits:
        raise ValueError(f"{n_head} heads of {head_dim}, {n_kv_head} key/value heads and width {n_embd} do not fit")


def longest_sample(settings, family):
    """How many positions we can promise: we never slide, so no more than a window of a model that does."""
    positions = whole_number(settings, "max_position_embeddings")
    if family.slides == "on request" or "sliding_window" not in settings:
        return positions
    window = whole_number(settings, "sliding_window", limit=sys.maxsize)
    # Not all programs follow a key that the architecture does not have: their results would differ beyond the window.
    if family.slides == "never" and window < positions:
        raise ValueError(f"sliding_window {window} is not supported; supported: null, or at least the {positions} of "
                         "max_position_embeddings")
    return min(positions, window)


def has_bias(settings, answer):
    """answer: True, False, or the key that says which."""
    if type(answer) is bool:
        return answer
    return switch(settings, answer)


def rope_settings(settings):
    """transformers 4 writes rope_theta and rope_scaling, transformers 5 both in rope_parameters."""
    rope = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_scaling (or rope_parameters) is {rope!r}; expected an object")
    return {"rope_theta": settings.get("rope_theta", 10000.0), **rope}


def rope_type(rope):
    return rope.get("rope_type", rope.get("type", "default"))


def rope_scaling(rope):
    """(factor, low_freq_factor, high_freq_factor, original positions) of Llama 3.1's stretched frequencies, or None."""
    if rope_type(rope) == "default":
        return None
    factor = real_number(rope, "factor")
    low = real_number(rope, "low_freq_factor")
    high = real_number(rope, "high_freq_factor")
    if not low < high:
        raise ValueError(f"low_freq_factor {low} is not below high_freq_factor {high}")
    return factor, low, high, real_number(rope, "original_max_position_embeddings")


def eos_token_ids(settings):
    """All ids that end a text, as a tuple: the key has one, or a list of them."""
    eos = settings.get("eos_token_id", [])
    ids = eos if isinstance(eos, list) else [eos]
    for i in ids:
        if type(i) is not int or abs(i) >= 2 ** 31:
            raise ValueError(f"eos_token_id is {eos!r}; expected an id or a list of them")
    return tuple(ids)


# ---------------------------------------------------------------------------------------------------------------------
# Readers: the value of a key, or ValueError

def whole_number(settings, key, default=None, limit=LARGEST_SIZE):
    value = settings.get(key, default)
    if type(value) is not int or not 0 < value <= limit:
        raise ValueError(f"{key} is {value!r}; expected a number above 0, {limit} at most")
    return value


def real_number(settings, key, default=None):
    value = settings.get(key, default)
    limit = sys.float_info.max
    if type(value) not in (int, float) or not 0 < value <= limit:
        raise ValueError(f"{key} is {value!r}; expected a number above 0, {limit} at most")
    return float(value)


def switch(settings, key, default=False):
    value = settings.get(key, default)
    if type(value) is not bool:
        raise ValueError(f"{key} is {value!r}; expected true or false")
    return value
