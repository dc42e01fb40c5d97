"""Small random models of transformers', of every family. What needs transformers imports it when it is called."""

import torch


SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 3}
ROPE_LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 32}
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256, "bos_token_id": 1, "eos_token_id": 3}
FAMILIES = {                                                              # transformers' class, its configuration
    "gpt2": ("GPT2", GPT2), "gpt2-untied": ("GPT2", {**GPT2, "tie_word_embeddings": False, "n_inner": 40}),
    "llama": ("Llama", {**SIZES, "tie_word_embeddings": False, "num_key_value_heads": 4}),
    "llama-biases": ("Llama", {**SIZES, "attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    "llama-3.2": ("Llama", {**SIZES, "tie_word_embeddings": True, "rope_parameters": ROPE_LLAMA3, "eos_token_id": [3, 4]}),
    "smollm2": ("Llama", {**SIZES, "tie_word_embeddings": True, "hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3,
                          "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}}),
    "mistral": ("Mistral", {**SIZES, "head_dim": 12, "sliding_window": None}),
    "mistral-tied": ("Mistral", {**SIZES, "tie_word_embeddings": True, "sliding_window": None}),
    "mistral-window": ("Mistral", {**SIZES, "sliding_window": 4096}),
    "qwen2": ("Qwen2", {**SIZES, "tie_word_embeddings": False}),
    "qwen2.5-tied": ("Qwen2", {**SIZES, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen3": ("Qwen3", {**SIZES, "tie_word_embeddings": True, "head_dim": 16}),
    "qwen3-untied": ("Qwen3", {**SIZES, "tie_word_embeddings": False, "head_dim": 6}),
}


def theirs_of(family, **change):
    """A random model of transformers', far from any symmetry."""
    import transformers
    name, config = FAMILIES[family]
    torch.manual_seed(1)
    head = "GPT2LMHeadModel" if name == "GPT2" else name + "ForCausalLM"
    theirs = getattr(transformers, head)(getattr(transformers, name + "Config")(**{**config, **change})).eval()
    for key, p in theirs.named_parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 and key.endswith("weight") else 0.0, 0.4)
    return theirs


def opened_by_transformers(directory):
    import transformers
    return transformers.AutoModelForCausalLM.from_pretrained(directory).eval()


def equal_tensors(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)
