"""A GPT in one file: the transformer, its Hugging Face directory, and the log-probs of the tokens that count.

One class, driven by `GPTConfig`. It is the LLaMA architecture (RMSNorm, rotary positions, SwiGLU, grouped-query
attention, no biases), and its parameters carry LLaMA's names, so that transformers opens what we save.

The loop feeds it *packed* samples: the tokens of several samples one after the other in a single vector, with the
offsets where each begins. Attention and positions restart at every sample.
"""

import itertools
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int                      # d, the width of the residual stream
    n_ff: int                        # width of the SwiGLU
    n_kv_head: int                   # key/value heads; n_head / n_kv_head query heads share one
    max_positions: int = 2048        # longest sample the positions were made for
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_embeddings: bool = True      # the head is the embedding matrix
    eos_token_id: int | None = None


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = c.n_head, c.n_kv_head, c.n_embd // c.n_head
        self.q_proj = nn.Linear(c.n_embd, c.n_head * self.head_dim, bias=False)
        self.k_proj = nn.Linear(c.n_embd, c.n_kv_head * self.head_dim, bias=False)
        self.v_proj = nn.Linear(c.n_embd, c.n_kv_head * self.head_dim, bias=False)
        self.o_proj = nn.Linear(c.n_head * self.head_dim, c.n_embd, bias=False)

    def forward(self, x, cos, sin, rows):
        heads = lambda y, n: y.view(-1, n, self.head_dim)                 # noqa: E731   (T, n, D)
        q = rotate(heads(self.q_proj(x), self.n_head), cos, sin)
        k = rotate(heads(self.k_proj(x), self.n_kv_head), cos, sin)
        v = heads(self.v_proj(x), self.n_kv_head)
        q, k, v = (rows.pad(y).transpose(1, 2) for y in (q, k, v))        # (S, n, L, D): a row for each sample
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.n_kv_head != self.n_head)
        return self.o_proj(rows.unpad(y.transpose(1, 2)).flatten(1))      # (T, d)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.n_embd, c.n_ff, bias=False)
        self.up_proj = nn.Linear(c.n_embd, c.n_ff, bias=False)
        self.down_proj = nn.Linear(c.n_ff, c.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c.n_embd, c.norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.n_embd, c.norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, rows):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, rows)
        return x + self.mlp(self.post_attention_layernorm(x))


class Rows:
    """Packed tokens (T, ...) to one right-padded row for each sample (S, L, ...) and back.

    Padding stands to the right of every real token, so causal attention over rows never sees it, nor another sample:
    no mask is needed.
    """
    def __init__(self, offsets, longest, tokens):
        t = torch.arange(tokens, device=offsets.device)
        sample = torch.searchsorted(offsets, t, right=True) - 1           # (T,)
        self.shape = len(offsets) - 1, longest                            # S, L
        self.position = t - offsets[sample]                               # (T,) restarts at 0 in each sample
        self.index = sample * longest + self.position                     # (T,) place in the flattened rows

    def pad(self, y):
        S, L = self.shape
        return y.new_zeros(S * L, *y.shape[1:]).index_copy(0, self.index, y).view(S, L, *y.shape[1:])

    def unpad(self, y):
        return y.flatten(0, 1)[self.index]


def rotate(x, cos, sin):
    """Rotary positions: x (T, n, D), cos and sin (T, 1, D/2) float32. Pairs are (i, i + D/2), as in LLaMA."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def linear_logprobs(hidden, weight, targets):
    """log-prob of each target under the head: (N,) float32.

    hidden: (N, d). weight: (V, d). targets: (N,) int64. Only positions that predict a response token come here, so
    prompts and padding cost no logits; the log-softmax is float32 whatever the autocast dtype. (A weighting that
    needs more of the distribution than p_t, entropy say, or a reference model's log-probs, would start here.)
    """
    return -F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")


class GPT(nn.Module):
    """model(input_ids (B, T)) -> logits (B, T, V).

    model(input_ids (T,), offsets, longest, at, targets) -> log-probs (N,) float32 of the response tokens of packed
    samples: offsets (S+1,) int64 are the samples' bounds in input_ids, longest the length of the longest one, at (N,)
    the positions whose next token is a response token, targets (N,) those tokens. `data.collate` makes all of them.
    """
    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.n_embd)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = RMSNorm(c.n_embd, c.norm_eps)
        if not c.tie_embeddings:
            self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:                                              # residual branches smaller, as in GPT-2
                depth = 2 * c.n_layer if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
                nn.init.normal_(p, std=0.02 / math.sqrt(depth))

    @property
    def head(self):
        return self.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight   # (V, d)

    def forward(self, input_ids, offsets=None, longest=None, at=None, targets=None):
        if offsets is None:                                               # each row of (B, T) is a sample
            longest = input_ids.shape[1]
            offsets = torch.arange(0, input_ids.numel() + 1, longest, device=input_ids.device)
        rows = Rows(offsets, longest, input_ids.numel())
        D = self.config.n_embd // self.config.n_head
        frequency = self.config.rope_theta ** (-torch.arange(0, D, 2, device=input_ids.device).float() / D)   # (D/2,)
        angle = (rows.position[:, None].float() * frequency)[:, None]     # (T, 1, D/2)
        cos, sin = angle.cos(), angle.sin()
        x = self.embed_tokens(input_ids.flatten())                        # (T, d)
        for block in self.layers:
            x = block(x, cos, sin, rows)
        x = self.norm(x)
        if targets is None:
            return F.linear(x, self.head).view(*input_ids.shape, -1)      # (B, T, V)
        return linear_logprobs(x[at], self.head, targets)                 # (N,)

    def save_pretrained(self, directory):
        """Writes model.safetensors and config.json, which transformers' AutoModelForCausalLM opens."""
        c, directory = self.config, Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        save_safetensors({name if name.startswith("lm_head.") else "model." + name: p.detach()
                          for name, p in self.named_parameters()}, directory / "model.safetensors")
        write_whole(directory / "config.json", [json.dumps({              # last: without it the directory is unfinished
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "vocab_size": c.vocab_size, "num_hidden_layers": c.n_layer, "num_attention_heads": c.n_head,
            "num_key_value_heads": c.n_kv_head, "hidden_size": c.n_embd, "intermediate_size": c.n_ff,
            "max_position_embeddings": c.max_positions, "rms_norm_eps": c.norm_eps, "rope_theta": c.rope_theta,
            "tie_word_embeddings": c.tie_embeddings, "attention_bias": False, "mlp_bias": False,
            "bos_token_id": c.eos_token_id, "eos_token_id": c.eos_token_id,
            "torch_dtype": str(self.embed_tokens.weight.dtype).removeprefix("torch.")}, indent=2).encode()])

    @classmethod
    def from_pretrained(cls, directory):
        """The model of a directory that `save_pretrained` wrote, on the CPU, in the dtype of the file.

        Raises FileNotFoundError if a file is missing and ValueError if one is not what we support.
        """
        path = Path(directory) / "config.json"
        try:
            c = {"architectures": None, **json.loads(path.read_bytes())}
            expected = {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "rope_scaling": None,
                        "attention_bias": False, "mlp_bias": False}
            for key, value in expected.items():
                if c.get(key, value) != value:
                    raise ValueError(f"{key} {c[key]} is not supported; supported: {value}")
            sizes = {"vocab_size": "vocab_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
                     "n_kv_head": "num_key_value_heads", "n_embd": "hidden_size", "n_ff": "intermediate_size",
                     "max_positions": "max_position_embeddings"}
            if bad := [key for key in sizes.values() if type(c.get(key)) is not int or c[key] < 1]:
                raise ValueError(f"{bad[0]} is {c.get(bad[0])!r}; expected a number above 0")
            config = GPTConfig(**{ours: c[theirs] for ours, theirs in sizes.items()}, norm_eps=c["rms_norm_eps"],
                               rope_theta=c["rope_theta"], tie_embeddings=c["tie_word_embeddings"],
                               eos_token_id=c.get("eos_token_id"))
        except (ValueError, TypeError) as e:
            raise ValueError(f"{path}: {e}") from None
        except KeyError as e:
            raise ValueError(f"{path} has no {e}") from None
        with torch.device("meta"):                                        # shapes only: the file brings the memory
            model = cls(config)
        path = path.with_name("model.safetensors")
        tensors = {name.removeprefix("model."): t for name, t in load_safetensors(path).items()}
        shapes = {name: p.shape for name, p in model.named_parameters()}
        wrong = sorted(n for n in shapes.keys() | tensors.keys()
                       if n not in shapes or n not in tensors or shapes[n] != tensors[n].shape)
        if wrong:
            raise ValueError(f"{path} does not fit config.json: missing, unexpected or of another shape: "
                             f"{', '.join(wrong[:5])}" + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""))
        model.load_state_dict(tensors, assign=True)
        return model


def compute_dtype(name, device):
    """The autocast dtype of --dtype: "float32", "bfloat16", or "auto": bfloat16 where the device has it natively."""
    if name == "auto":
        native = torch.cuda.is_bf16_supported(including_emulation=False) if torch.device(device).type == "cuda" else \
            torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        name = "bfloat16" if native else "float32"
    return getattr(torch, name)


def autocast(device, dtype):
    """Matrix products in dtype, everything that sums or exponentiates in float32; nothing at all for float32."""
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# safetensors: 8 bytes of length (little-endian), a JSON header {name: {dtype, shape, data_offsets}}, the raw tensors.

SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def save_safetensors(tensors, path):
    """Writes {name: tensor} to path, whole or not at all."""
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        start, end = end, end + t.numel() * t.element_size()
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)                                       # data starts aligned
    raw = (t.cpu().contiguous().view(torch.uint8).numpy().tobytes() for t in tensors.values())
    write_whole(path, itertools.chain((len(head).to_bytes(8, "little"), head), raw))


def load_safetensors(path):
    """{name: CPU tensor} of path. Raises FileNotFoundError, or ValueError for a file that is not safetensors."""
    with open(path, "rb") as f:
        try:
            header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
            header.pop("__metadata__", None)
            base, tensors = f.tell(), {}
            for name, t in header.items():
                start, end = t["data_offsets"]
                f.seek(base + start)
                raw = torch.from_numpy(np.frombuffer(bytearray(f.read(end - start)), dtype=np.uint8))
                tensors[name] = raw.view(SAFETENSORS_DTYPES[t["dtype"]]).view(t["shape"])
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, MemoryError, OverflowError) as e:
            raise ValueError(f"{path} is not a safetensors file that we can read: {e}") from None
    return tensors


def write_whole(path, chunks):
    """Writes an iterable of bytes under a temporary name, then renames: path holds all of it or what it held before."""
    temporary = Path(f"{path}.tmp")
    with open(temporary, "wb") as f:
        f.writelines(chunks)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)
