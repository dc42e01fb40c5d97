"""A GPT in one file: the transformer, Hugging Face directories in and out, LoRA, generation, and the log-probs of the
tokens that count.

One class, driven by `GPTConfig`, covers GPT-2, Llama 3, SmolLM2, Qwen2, Qwen2.5 and Qwen3: each choice in which they
differ is made once. Parameters carry LLaMA's names, GPT-2's too.

The loop feeds it *packed* samples: the tokens of several samples one after the other in a single vector, with the
offsets where each begins. Attention and positions restart at every sample.
"""

import contextlib
import functools
import itertools
import json
import math
import mmap
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint


ARCHITECTURES = ("GPT2LMHeadModel", "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
# GPT-2's keys in config.json, and those of the others.
GPT2_KEYS = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_embd": "hidden_size",
             "n_inner": "intermediate_size", "n_positions": "max_position_embeddings",
             "layer_norm_epsilon": "rms_norm_eps", "activation_function": "hidden_act"}


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int                   # key/value heads; n_head / n_kv_head query heads share one
    head_dim: int                    # D
    n_embd: int                      # d, the width of the residual stream
    n_ff: int                        # width of the MLP
    max_positions: int               # longest sample the positions were made for
    norm: str                        # "rms" RMSNorm, or "layer" LayerNorm
    norm_eps: float
    rope_theta: float | None         # None: learned positions in place of rotary ones
    rope_scaling: tuple | None       # Llama 3.1's stretching of the rotary frequencies, see rope_frequencies
    gated: bool                      # MLP: SwiGLU, or with GELU (its tanh form) alone
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool                    # RMSNorm of each head's query and key, before the rotation
    tie_embeddings: bool             # the head is the embedding matrix
    eos_token_ids: tuple             # any of them ends a text
    hf: dict = field(compare=False, repr=False)   # config.json as it was read; `save_pretrained` writes it back

    @classmethod
    def from_hf(cls, hf):
        """The configuration that a config.json (as a dict) describes, as transformers 4 or 5 write it.

        Raises ValueError naming what is missing or not supported, and what is.
        """
        family = hf.get("architectures")
        family = family[0] if isinstance(family, list) and len(family) == 1 else str(family)
        gpt2, qwen2, qwen3 = (family == name for name in (ARCHITECTURES[0], *ARCHITECTURES[2:]))
        c = {GPT2_KEYS.get(key, key): value for key, value in hf.items() if value is not None}
        # transformers 4 has rope_theta and rope_scaling, transformers 5 both in rope_parameters.
        rope = {"rope_theta": c.get("rope_theta", 10000.0), **(c.get("rope_scaling") or c.get("rope_parameters") or {})}
        stretch = rope.get("rope_type", rope.get("type", "default"))
        activations = ("gelu_new", "gelu_pytorch_tanh") if gpt2 else ("silu",)
        for key, value, supported in (
                ("architecture", family, ARCHITECTURES), ("rope type", stretch, ("default", "llama3")),
                ("hidden_act", c.get("hidden_act", activations[0]), activations),
                ("layer_types", list(set(c.get("layer_types", []))), ([], ["full_attention"])),
                *((key, rope.get(key, c.get(key, usual)), (usual,)) for key, usual in (
                    ("quantization_config", None), ("use_sliding_window", False), ("partial_rotary_factor", 1.0),
                    ("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False),
                    ("add_cross_attention", False)))):
            if value not in supported:
                raise ValueError(f"{key} {str(value)[:100]} is not supported; supported: "
                                 f"{', '.join(map(str, supported))}")

        # Larger sizes than any model has are refused before a module is made of them: 16,777,216, and 1,000 layers.
        def number(key, default=None, kind=(int,), limit=2 ** 24, of=c):
            value = of.get(key, default)
            if type(value) not in kind or not 0 < value <= limit:
                raise ValueError(f"{key} is {value!r}; expected a number above 0, {limit} at most")
            return value if kind == (int,) else float(value)

        def switch(key, default=False):
            value = c.get(key, default)
            if type(value) is not bool:
                raise ValueError(f"{key} is {value!r}; expected true or false")
            return value

        real = {"kind": (int, float), "limit": sys.float_info.max}
        n_head, n_embd = number("num_attention_heads"), number("hidden_size")
        n_kv_head = n_head if gpt2 else number("num_key_value_heads", n_head)
        head_dim = n_embd // n_head if gpt2 else number("head_dim", 128 if qwen3 else n_embd // n_head)
        if n_head % n_kv_head or head_dim % 2 and not gpt2 or gpt2 and n_embd % n_head or n_head * head_dim > 2 ** 24:
            raise ValueError(f"{n_head} heads of {head_dim}, {n_kv_head} key/value heads and width {n_embd} do not fit")
        scaling = None if stretch == "default" else tuple(number(key, **real, of=rope) for key in (
            "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"))
        if scaling and not scaling[1] < scaling[2]:
            raise ValueError(f"low_freq_factor {scaling[1]} is not below high_freq_factor {scaling[2]}")
        eos = c.get("eos_token_id", [])
        eos = tuple(eos) if isinstance(eos, list) else (eos,)
        if any(type(i) is not int or abs(i) >= 2 ** 31 for i in eos):
            raise ValueError(f"eos_token_id is {hf['eos_token_id']!r}; expected an id or a list of them")
        return cls(
            vocab_size=number("vocab_size"), n_layer=number("num_hidden_layers", limit=1000), n_head=n_head,
            n_kv_head=n_kv_head, head_dim=head_dim, n_embd=n_embd, max_positions=number("max_position_embeddings"),
            n_ff=number("intermediate_size", 4 * n_embd if gpt2 else None), norm="layer" if gpt2 else "rms",
            norm_eps=number("rms_norm_eps", 1e-5 if gpt2 else 1e-6, **real),
            rope_theta=None if gpt2 else number("rope_theta", **real, of=rope), rope_scaling=scaling,
            gated=not gpt2, qkv_bias=gpt2 or qwen2 or switch("attention_bias"),
            o_bias=gpt2 or not qwen2 and switch("attention_bias"), mlp_bias=gpt2 or switch("mlp_bias"),
            qk_norm=qwen3, tie_embeddings=switch("tie_word_embeddings", gpt2), eos_token_ids=eos, hf=hf)


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):                                                 # in float32, whatever comes in
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class Linear(nn.Linear):
    """W x + b; once it has an adapter, W x + b + alpha/r B A x (LoRA, arXiv 2106.09685)."""
    scale = 0.0

    def reset_parameters(self):                                           # GPT does it
        pass

    def add_lora(self, rank, alpha):
        self.lora_a = nn.Parameter(self.weight.new_empty(rank, self.in_features, dtype=torch.float32))
        self.lora_b = nn.Parameter(self.weight.new_zeros(self.out_features, rank, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.scale = alpha / rank

    def forward(self, x):
        y = super().forward(x)
        return y + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b) if self.scale else y


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = Linear(c.n_embd, c.n_head * c.head_dim, bias=c.qkv_bias)
        self.k_proj = Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=c.qkv_bias)
        self.v_proj = Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=c.qkv_bias)
        self.o_proj = Linear(c.n_head * c.head_dim, c.n_embd, bias=c.o_bias)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x, rope, packing):
        heads = lambda y: y.view(len(x), -1, self.head_dim)               # noqa: E731   (T, n, D)
        q = rotate(self.q_norm(heads(self.q_proj(x))), rope)
        k = rotate(self.k_norm(heads(self.k_proj(x))), rope)
        y = packing.attend(self, q, k, heads(self.v_proj(x)))
        return self.o_proj(y.flatten(1))                                  # (T, d)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        if c.gated:
            self.gate_proj = Linear(c.n_embd, c.n_ff, bias=c.mlp_bias)
        self.up_proj = Linear(c.n_embd, c.n_ff, bias=c.mlp_bias)
        self.down_proj = Linear(c.n_ff, c.n_embd, bias=c.mlp_bias)
        self.gated = c.gated

    def forward(self, x):
        up = self.up_proj(x)
        return self.down_proj(F.silu(self.gate_proj(x)) * up if self.gated else F.gelu(up, approximate="tanh"))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        norm = RMSNorm if c.norm == "rms" else nn.LayerNorm
        self.input_layernorm = norm(c.n_embd, c.norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = norm(c.n_embd, c.norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, rope, packing):
        x = x + self.self_attn(self.input_layernorm(x), rope, packing)
        return x + self.mlp(self.post_attention_layernorm(x))


class Packing:
    """Where packed samples lie in their tokens (T, ...), and attention within each of them."""
    def __init__(self, lengths, device, cache=None):
        self.lengths, self.cache = lengths, cache                         # S of them, which add up to T
        self.on_gpu = torch.device(device).type == "cuda"
        self.flash = self.on_gpu and torch.cuda.get_device_capability(device) >= (8, 0)
        self.offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)    # (S+1,)
        self.offsets = self.offsets.to(device, non_blocking=True)
        t = torch.arange(sum(lengths), dtype=torch.int32, device=device)
        self.position = t - self.offsets[torch.searchsorted(self.offsets, t, right=True) - 1]   # (T,) from 0 in each

    @torch.compiler.disable                                               # so what is compiled sees T alone change
    def attend(self, layer, q, k, v):
        """q (T, n, D), k and v (T, n_kv, D) -> (T, n, D), causal."""
        if self.cache is not None:
            self.cache.keep(layer, *(y.split(self.lengths) for y in (k, v)))
        n, D = q.shape[1:]
        if self.on_gpu and n != k.shape[1]:                               # not every kernel there knows grouped heads
            k, v = (y.repeat_interleave(n // y.shape[1], 1) for y in (k, v))
        if self.flash and q.dtype in (torch.bfloat16, torch.float16) and D % 8 == 0 and D <= 256:
            longest = max(self.lengths)                                   # one FlashAttention kernel for all samples
            return varlen_attn(q, k, v, self.offsets, self.offsets, longest, longest, window_size=(-1, 0))
        # One by one: on a CPU as fast as length buckets, faster than padding and masks (bench/RESULTS.md).
        samples = zip(*(y.transpose(0, 1)[None].split(self.lengths, 2) for y in (q, k, v)))   # (1, n, L, D) each
        y = [F.scaled_dot_product_attention(*sample, is_causal=True, enable_gqa=n != k.shape[1]) for sample in samples]
        return torch.cat(y, 2)[0].transpose(0, 1)


class Cache:
    """Keys and values of every token so far, for generation; stands in for Packing where each sample has one token."""
    def __init__(self, room):
        self.room, self.kept, self.position = room, {}, None              # position (S,): that of each new token

    def keep(self, layer, *samples):                                      # lists of k and of v: (L, n_kv, D) each
        self.kept[layer] = [torch.stack([F.pad(y, (0, 0, 0, 0, 0, self.room - len(y))) for y in kv]).transpose(1, 2)
                            for kv in samples]

    def attend(self, layer, q, k, v):
        """q (S, n, D), k and v (S, n_kv, D) of the new tokens -> (S, n, D)."""
        s = torch.arange(len(q), device=q.device)
        K, V = self.kept[layer]                                           # (S, n_kv, room, D)
        K[s, :, self.position], V[s, :, self.position] = k, v
        seen = torch.arange(self.room, device=q.device) <= self.position[:, None]   # (S, room)
        y = F.scaled_dot_product_attention(q[:, :, None], K, V, attn_mask=seen[:, None, None],
                                           enable_gqa=q.shape[1] != k.shape[1])
        return y[:, :, 0]


def rope_frequencies(c, device):
    """Radians a position, (D/2,) float32. Llama 3.1 stretches long waves by a factor, short ones not at all."""
    frequency = 1.0 / c.rope_theta ** (torch.arange(0, c.head_dim, 2, device=device).float() / c.head_dim)
    if c.rope_scaling is None:
        return frequency
    factor, low, high, original_positions = c.rope_scaling
    turns = original_positions * frequency / (2 * math.pi)                # of each wave within the original context
    smooth = ((turns - low) / (high - low)).clamp(0, 1)                   # 0: stretched, 1: as it was
    return (1 - smooth) * frequency / factor + smooth * frequency


def rotate(x, rope):
    """Rotary positions: x (T, n, D), rope = cos, sin (T, 1, D/2) float32 each. Pairs are (i, i + D/2), as in LLaMA."""
    if rope is None:
        return x
    cos, sin = rope
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


# Bytes of logits that are held at a time. On a CPU the products run at full speed from some 256 rows on; more rows mean
# fewer passes over the weight's gradient, and more that need not be computed twice. A GPU wants thousands.
CHUNK_BYTES = {"cpu": 5 * 2 ** 25, "cuda": 2 ** 29}


def linear_logprobs(hidden, weight, targets):
    """log-prob of each target under the head: (N,) float32, or float64 if hidden is.

    hidden: (N, d). weight: (V, d). targets: (N,) int64. Only positions that predict a response token come here, so
    prompts and padding cost no logits. (A weighting that needs more of the distribution than p_t, entropy say, or a
    reference model's log-probs, would start here.)

    With z = W h the log-prob of target y is z_y - lse(z), and its gradient with respect to z is onehot(y) - softmax(z).
    So all that backward needs of N x V logits are the N log-sum-exps: it computes the logits of a chunk of rows again,
    turns them into softmax(z) - onehot(y) in place, and multiplies that by W (gradient of h) and by h (of W). There is
    never more than one chunk of logits, and the last of the forward pass is still there when the backward pass begins.
    The price is a fourth matrix product beside three, for all other chunks. Products are in autocast's dtype; the
    log-sum-exp, the log-probs and the sum of the weight's gradient over chunks are float32.
    """
    return LinearLogprobs.apply(hidden, weight, targets)


class LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets):
        device = hidden.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        logsumexp = compiled(row_logsumexp) if hidden.is_cuda else row_logsumexp
        logp = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        lse = torch.empty_like(logp)
        h, w, last = hidden.to(ctx.dtype), weight.to(ctx.dtype), None
        for last in chunk_logits(h, w):
            rows, z = last
            for part, its_lse in row_blocks(z, lse[rows]):
                its_lse.copy_(logsumexp(part))
            logp[rows] = z.gather(1, targets[rows, None])[:, 0] - lse[rows]
        ctx.save_for_backward(hidden, weight, targets, logp, lse)
        ctx.kept = h, w, last
        return logp

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):                                              # (N,) d loss / d logp
        hidden, weight, targets, logp, lse = ctx.saved_tensors
        softmax_ = compiled(row_softmax_) if hidden.is_cuda else row_softmax_
        h, w, last = ctx.kept or (hidden.to(ctx.dtype), weight.to(ctx.dtype), None)
        ctx.kept = None                                                   # gone even if someone keeps the log-probs
        scaled, grad_h = (grad[:, None] * hidden).to(ctx.dtype), torch.empty_like(h)        # (N, d)
        grad_weight = torch.zeros_like(weight, dtype=logp.dtype) if ctx.needs_input_grad[1] else None
        for rows, z in chunk_logits(h, w, last):
            for part, its_lse in row_blocks(z, lse[rows]):
                softmax_(part, its_lse)
            z[torch.arange(len(z), device=z.device), targets[rows]] = logp[rows].expm1().to(z.dtype)   # p_y - 1
            torch.mm(z, w, out=grad_h[rows])
            if grad_weight is not None:
                for total, part in row_blocks(grad_weight, z.t()):
                    total.sub_(torch.mm(part, scaled[rows]))
        return grad_h * -grad[:, None], grad_weight, None


def chunk_logits(h, w, last=None):
    """Yields (rows, their logits) for equal chunks of the rows of h, CHUNK_BYTES at most, all in the same place. What
    an earlier call yielded `last` comes first and need not be computed."""
    limit = max(64, CHUNK_BYTES["cuda" if h.is_cuda else "cpu"] // (len(w) * w.itemsize))
    chunk = -(-len(h) // max(1, -(-len(h) // limit)))
    if last is None:
        place = h.new_empty(chunk, -(-len(w) // 64) * 64)[:, :len(w)]     # rows aligned as GPUs' products like them
    else:
        place = last[1]
        yield last
    for stop in reversed(range(len(h), 0, -max(1, chunk))):               # the first may be smaller, the last never is
        if last is None or stop < len(h):
            rows = slice(max(0, stop - chunk), stop)
            yield rows, torch.mm(h[rows], w.t(), out=place[:stop - rows.start])


def row_blocks(a, b):
    """Pairs of blocks of rows of two tensors, so that what is made of a block is small: on a CPU, small enough for its
    cache, where fresh memory would cost more than the arithmetic."""
    rows = max(1, 2 ** (25 if a.is_cuda else 20) // a.shape[1])
    return zip(a.split(rows), b.split(rows))


def row_logsumexp(z):                                                     # (n, V) -> (n,)
    return z.to(torch.promote_types(z.dtype, torch.float32)).logsumexp(-1)


def row_softmax_(z, lse):                                                 # (n, V), (n,); in place
    z.copy_((z - lse[:, None]).exp_())


@functools.cache
def compiled(function):
    return torch.compile(function)


class GPT(nn.Module):
    """model(input_ids (B, T)) -> logits (B, T, V).

    model(input_ids (T,), lengths, at, targets) -> log-probs (N,) float32 of the response tokens of packed samples:
    lengths is a list of the samples' lengths, at (N,) the positions whose next token is a response token, targets (N,)
    those tokens. `data.collate` makes all of them.

    recompute: keep a block's input alone and compute the block again in the backward pass.
    """
    recompute = False

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(c.vocab_size, c.n_embd), freeze=False)
        if c.rope_theta is None:
            self.embed_positions = nn.Embedding.from_pretrained(torch.empty(c.max_positions, c.n_embd), freeze=False)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = (RMSNorm if c.norm == "rms" else nn.LayerNorm)(c.n_embd, c.norm_eps)
        if not c.tie_embeddings:
            self.lm_head = Linear(c.n_embd, c.vocab_size, bias=False)
        self.file_dtypes = {}                                             # {name: dtype} of the file it was loaded from
        for name, p in self.named_parameters():
            if p.is_meta:                                                 # a file will fill it
                continue
            if p.dim() == 2:                                              # residual branches smaller, as in GPT-2
                depth = 2 * c.n_layer if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
                nn.init.normal_(p, std=0.02 / math.sqrt(depth))
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    @property
    def head(self):
        return self.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight   # (V, d)

    def trunk(self, tokens, packing):
        """Tokens (T,) -> what the head sees, (T, d)."""
        x = self.embed_tokens(tokens).to(self.norm.weight.dtype)          # (T, d): float32 sums over a bfloat16 base
        if self.config.rope_theta is None:
            x, rope = x + self.embed_positions(packing.position), None
        else:
            angle = packing.position[:, None, None].float() * rope_frequencies(self.config, x.device)   # (T, 1, D/2)
            rope = angle.cos(), angle.sin()
        recompute = self.recompute and torch.is_grad_enabled()
        for block in self.layers:
            x = block(x, rope, packing) if not recompute else \
                checkpoint(block, x, rope, packing, use_reentrant=False, preserve_rng_state=False)
        return self.norm(x)

    def forward(self, input_ids, lengths=None, at=None, targets=None):
        if lengths is None:                                               # each row of (B, T) is a sample
            x = self.trunk(input_ids.flatten(), Packing([input_ids.shape[1]] * len(input_ids), input_ids.device))
            return F.linear(x, self.head).view(*input_ids.shape, -1)      # (B, T, V)
        x = self.trunk(input_ids, Packing(lengths, input_ids.device))
        return linear_logprobs(x.index_select(0, at), self.head, targets)  # (N,)

    def compile(self, **options):
        """torch.compile, in place and block by block: blocks share the graphs, of which there is one for each number of
        tokens (two with adapters: before the first block nothing needs a gradient). Attention runs between their parts.
        """
        torch._dynamo.config.recompile_limit = 64                         # of 8, after which new sizes run uncompiled
        torch._dynamo.config.optimize_ddp = False                         # blocks as they are do overlap with DDP
        for block in self.layers:
            block.compile(dynamic=False, **options)

    @torch.no_grad()
    def generate(self, input_ids, max_new_tokens, temperature=0.0, stop=(), seed=0):
        """A continuation of each prompt: a list of B int64 vectors of new ids, without the stop.

        input_ids: (B, T), or a list of B prompts of any lengths, each at least one id. Prompts of similar length run
        together; no continuation depends on the others. temperature 0.0 takes the most probable token, above that one
        is drawn from softmax(logits / temperature) by a generator of its own with this seed. stop: ids, any of which
        ends a continuation; others end after max_new_tokens.
        Raises ValueError if a prompt is empty or would run beyond the positions, and for logits that are no numbers.
        """
        device = self.embed_tokens.weight.device
        prompts = [torch.as_tensor(p, dtype=torch.int64, device=device) for p in input_ids]
        lengths, new = [len(p) for p in prompts], [None] * len(prompts)
        if min(lengths, default=1) < 1 or max(lengths, default=0) + max_new_tokens > self.config.max_positions:
            raise ValueError(f"prompts have {lengths} ids; expected 1 or more, and with {max_new_tokens} new ones at "
                             f"most the {self.config.max_positions} positions of the model")
        stop = torch.tensor(list(stop), dtype=torch.int64, device=device)
        chance = torch.rand(len(prompts), max_new_tokens, dtype=torch.float64,
                            generator=torch.Generator().manual_seed(seed)).to(device)   # a number for each token drawn
        rest = sorted(range(len(prompts)), key=lengths.__getitem__)
        while rest:
            count = max(1, CACHE_TOKENS // (lengths[rest[-1]] + max_new_tokens))
            rows, rest = rest[-count:], rest[:-count]                     # the longest first
            ids = self.continuations([prompts[i] for i in rows], max_new_tokens, temperature, stop, chance[rows])
            for i, row in zip(rows, ids):
                new[i] = row[row >= 0]
        return new

    def continuations(self, prompts, max_new_tokens, temperature, stop, chance):
        """`generate` for prompts that run together: their new ids (B, new), -1 from a stop on."""
        lengths = torch.tensor([len(p) for p in prompts], device=stop.device)
        cache = Cache(int(lengths.max()) + max_new_tokens)
        x = self.trunk(torch.cat(prompts), Packing(lengths.tolist(), stop.device, cache))   # (T, d)
        x, going = x[lengths.cumsum(0) - 1], torch.ones_like(lengths, dtype=torch.bool)     # (B, d)
        new = [lengths.new_empty(len(prompts), 0)]
        for i in range(max_new_tokens):
            logits = F.linear(x, self.head).double()                      # (B, V)
            if logits.isnan().any():
                raise ValueError("the model gives logits that are no numbers (NaN)")
            if temperature == 0:
                token = logits.argmax(-1)
            else:                                                         # the first at which the sum passes chance
                logits = logits - logits.amax(-1, keepdim=True)           # finite at any temperature
                total = (logits / temperature).softmax(-1).cumsum(-1)
                token = torch.searchsorted(total, chance[:, i:i + 1] * total[:, -1:], right=True)[:, 0]
            going = going & ~torch.isin(token, stop)
            new.append(torch.where(going, token, -1)[:, None])
            if not going.any() or i == max_new_tokens - 1:
                break
            cache.position = lengths + i                                  # rows that have ended go on, unread
            x = self.trunk(token, cache)
        return torch.cat(new, 1)

    def cast(self, dtype):
        """Matrices in `dtype`, that of autocast; norms and biases in float32, and with them all sums. Returns self."""
        for p in self.parameters():
            p.data = p.data.to(dtype if p.dim() == 2 else torch.float32)
        return self

    def add_lora(self, rank, alpha):
        """Freezes everything and gives each linear layer of the blocks an adapter of this rank: float32, A drawn from
        torch's global generator, B zero."""
        self.requires_grad_(False)
        for module in self.layers.modules():
            if isinstance(module, Linear):
                module.add_lora(rank, alpha)

    # -----------------------------------------------------------------------------------------------------------------
    # Hugging Face directories

    def export(self, device="cpu"):
        """Yields (name, tensor) of what `save_pretrained` writes, one at a time: Hugging Face's names and layout,
        adapters merged, each tensor in the dtype that it was loaded from (device "meta": the shapes alone)."""
        def get(name):
            owner, _, kind = name.rpartition(".")
            module, p = self.get_submodule(owner), self.get_parameter(name).detach().to(device)
            if kind == "weight" and getattr(module, "scale", 0):
                p = p.float() + module.scale * (module.lora_b.detach().to(device) @ module.lora_a.detach().to(device))
            return p.to(self.file_dtypes.get(name, p.dtype))

        gpt2 = self.config.rope_theta is None
        for name, _ in self.named_parameters():
            if ".lora_" in name or gpt2 and re.search(r"\.[kv]_proj\.", name):
                continue                                                  # merged; and stored with q
            if not gpt2:
                yield name if name.startswith("lm_head.") else "model." + name, get(name)
                continue
            parts = (".q_", ".k_", ".v_") if ".q_proj." in name else ("",)
            t = torch.cat([get(name.replace(".q_", part)) for part in parts])
            if name.startswith("layers.") and t.dim() == 2:
                t = t.t()
            for theirs, ours in GPT2_NAMES:
                name = name.replace(ours, theirs)
            yield name if name.startswith("lm_head.") else "transformer." + name, t

    def save_pretrained(self, directory):
        """Writes config.json and model.safetensors (in shards above SHARD_BYTES), which transformers'
        AutoModelForCausalLM opens; adapters are merged, every tensor has the dtype that it was loaded from."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        shards, room = [{}], SHARD_BYTES
        for name, t in self.export("meta"):
            if t.nbytes > room and shards[-1]:
                shards, room = [*shards, {}], SHARD_BYTES
            shards[-1][name], room = t, room - t.nbytes
        files = ["model.safetensors"] if len(shards) == 1 else \
            [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        tensors = (t for _, t in self.export())
        for file, shard in zip(files, shards):
            save_safetensors(shard, directory / file, itertools.islice(tensors, len(shard)))
        if len(shards) > 1:
            write_whole(directory / "model.safetensors.index.json", [json.dumps({
                "metadata": {"total_size": sum(t.nbytes for shard in shards for t in shard.values())},
                "weight_map": {name: file for file, shard in zip(files, shards) for name in shard}}).encode()])
        key = "dtype" if "dtype" in self.config.hf else "torch_dtype"     # transformers 5's spelling, and 4's
        dtype = self.file_dtypes.get(TIED, self.embed_tokens.weight.dtype)
        write_whole(directory / "config.json", [json.dumps(               # last: without it the directory is unfinished
            {**self.config.hf, key: str(dtype).removeprefix("torch.")}, indent=2).encode()])
        written = {*files, "model.safetensors.index.json" if len(shards) > 1 else ""}
        for old in directory.glob("model*.safetensors*"):                 # of a model that was here before
            if old.name not in written:
                old.unlink()

    @classmethod
    def from_pretrained(cls, directory_or_hub_id):
        """The model of a Hugging Face directory (or of a repository id, which is downloaded), on the CPU, in the dtype
        of its files, which are read tensor by tensor.

        Raises FileNotFoundError if a file is missing, and ValueError if one is damaged or not what we support.
        """
        directory = find_directory(directory_or_hub_id)
        files, config = weight_files(directory), read_config(directory)
        with torch.device("meta"):                                        # shapes only: the file brings the memory
            model = cls(config)
        shapes, tensors, wrong = {name: p.shape for name, p in model.named_parameters()}, {}, []
        shapes.setdefault("lm_head.weight", shapes[TIED])                 # tied, a file may have it nevertheless
        translate = from_gpt2 if config.rope_theta is None else lambda n, t: [(n.removeprefix("model."), t)]
        for file in files:
            for stored, whole in iterate_safetensors(file):
                if stored.endswith((".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")):
                    continue                                              # constants, which old files have too
                for name, t in translate(stored, whole):
                    if t.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                        raise ValueError(f"{file}: {stored} is {t.dtype}; supported: float32, float16, bfloat16")
                    if shapes.get(name) != t.shape or name in tensors:
                        wrong.append(stored)
                    tensors[name] = t
        if config.tie_embeddings:
            shapes.pop("lm_head.weight")
            head = tensors.pop("lm_head.weight", tensors.get(TIED))
            if TIED in tensors and not torch.equal(head, tensors[TIED]):
                wrong.append("lm_head.weight (differs from the embedding that it is tied to)")
        wrong += shapes.keys() - tensors.keys()
        if wrong:
            raise ValueError(f"{directory} does not fit its config.json: missing, unexpected, twice or of another shape"
                             f": {', '.join(sorted(wrong)[:5])}" + f" and {len(wrong) - 5} more" * (len(wrong) > 5))
        model.load_state_dict(tensors, assign=True)
        model.file_dtypes = {name: t.dtype for name, t in tensors.items()}
        return model


CACHE_TOKENS = 2 ** 15                                                    # that `generate` holds, padding included
TIED = "embed_tokens.weight"
SHARD_BYTES = 5_000_000_000
# GPT-2's names and ours. Its matrices inside a block are stored (in, out), q, k and v as one.
GPT2_NAMES = [("wte.", "embed_tokens."), ("wpe.", "embed_positions."), ("ln_1.", "input_layernorm."),
              ("ln_2.", "post_attention_layernorm."), ("ln_f.", "norm."), ("attn.c_attn.", "self_attn.q_proj."),
              ("attn.c_proj.", "self_attn.o_proj."), ("mlp.c_fc.", "mlp.up_proj."), ("mlp.c_proj.", "mlp.down_proj."),
              ("h.", "layers.")]


def from_gpt2(name, t):
    """A tensor of a GPT-2 file as ours: [(name, tensor), ...]."""
    name = name.removeprefix("transformer.")
    if name.startswith("h.") and t.dim() == 2:
        t = t.t().contiguous()
    for theirs, ours in GPT2_NAMES:
        name = name.replace(theirs, ours)
    if ".q_proj." not in name or not t.dim():                             # (of no shape that fits)
        return [(name, t)]
    return [(name.replace(".q_", k), part) for k, part in zip((".q_", ".k_", ".v_"), t.chunk(3))]


def find_directory(name):
    """The directory of a model: the path itself, or a downloaded snapshot of the Hugging Face repository of that id.

    Raises FileNotFoundError saying what to do if there is neither.
    """
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)):
        raise FileNotFoundError(f"{name}: no such directory; expected one, or a Hugging Face repository id such as "
                                "openai-community/gpt2")
    try:
        from huggingface_hub import snapshot_download
        return Path(snapshot_download(str(name), allow_patterns=[
            "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
            "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]))
    except ImportError:
        what = 'to download a Hugging Face repository of that id: pip install -e ".[hub]"'
    except Exception as e:                                                # no network, no such one, no permission
        what = f"a Hugging Face repository of that id could not be downloaded ({type(e).__name__}: " \
            f"{' '.join(str(e).split())[:200]}); download it where you can, and name its directory"
    raise FileNotFoundError(f"{name}: no such directory here; {what}")


def read_config(directory):
    """The GPTConfig of a model directory. Raises FileNotFoundError or ValueError."""
    path = Path(directory) / "config.json"
    try:
        return GPTConfig.from_hf(json.loads(path.read_bytes()))
    except (ValueError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"{path}: {e}") from None


def weight_files(directory):
    """The safetensors files of a model directory, in order. Raises FileNotFoundError or ValueError."""
    directory = Path(directory)
    path = directory / "model.safetensors.index.json"
    if (directory / "config.json").is_file() and (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    if not (directory / "config.json").is_file() or not path.is_file():
        raise FileNotFoundError(f"{directory}: no model there; expected config.json and model.safetensors, or its "
                                "shards and their index (pytorch_model.bin is a pickle and is not read)")
    try:
        names = sorted(set(json.loads(path.read_bytes())["weight_map"].values()))
        if not names or any(Path(n).name != n or not (directory / n).is_file() for n in names):
            raise ValueError(f"it names {', '.join(map(repr, names)) or 'no file'}; expected files beside it")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"{path} is not an index that we can read: {e}") from None
    return [directory / n for n in names]


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

SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8,
                      "BOOL": torch.bool}


def save_safetensors(tensors, path, data=None):
    """Writes {name: tensor} to path, whole or not at all. data: the tensors themselves, in the same order, where those
    of `tensors` only have their shapes and dtypes (on device "meta")."""
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        start, end = end, end + t.nbytes
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)                                       # data starts aligned
    raw = (t.cpu().contiguous().flatten().view(torch.uint8).numpy().data for t in data or tensors.values())
    write_whole(path, itertools.chain((len(head).to_bytes(8, "little"), head), raw))


def load_safetensors(path):
    """{name: CPU tensor} of path. Raises FileNotFoundError, or ValueError for a file that is not safetensors."""
    return dict(iterate_safetensors(path))


def iterate_safetensors(path):
    """Yields (name, CPU tensor) in the file's order, holding one at a time. Raises as `load_safetensors`."""
    with open(path, "rb") as f:
        try:
            size, length = os.fstat(f.fileno()).st_size, int.from_bytes(f.read(8), "little")
            if length > min(size - 8, 100_000_000):                       # the library's limit
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(f.read(length))
            header.pop("__metadata__", None)
            layout, end = [], 0
            for name, t in sorted(header.items(), key=lambda x: x[1]["data_offsets"]):
                dtype, shape, start = SAFETENSORS_DTYPES[t["dtype"]], t["shape"], end
                end = t["data_offsets"][1]
                if len(shape) > 64 or any(type(n) is not int or not 0 <= n < 2 ** 48 for n in shape) or math.prod(
                        n or 1 for n in shape) >= 2 ** 48 or t["data_offsets"] != [
                        start, start + math.prod(shape) * dtype.itemsize]:
                    raise ValueError(f"{name}: {t} does not follow the {start} bytes before it")
                layout.append((name, dtype, shape))
            if f.tell() + end != size:
                raise ValueError(f"{f.tell()} bytes of header and {end} of tensors in a file of {size}")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
            raise ValueError(f"{path} is not a safetensors file that we can read: {e}") from None
        for name, dtype, shape in layout:
            # Pages of its own, which go back at once when it goes; holes that malloc keeps cost GPT-2, whose matrices
            # we transpose, a quarter of its size. Not a byte more: torch would save it, and then not load it.
            size = math.prod(shape) * dtype.itemsize
            pages = mmap.mmap(-1, max(size, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            f.readinto(memoryview(pages)[:size])
            yield name, torch.frombuffer(pages, dtype=torch.uint8)[:size].view(dtype).view(shape)


@contextlib.contextmanager
def replacing(path):
    """A binary file to write, under a temporary name that becomes `path` when all is written and on the disk: path
    holds what it is given or what it held before, even if the power fails. Raises OSError naming path."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        directory = os.open(temporary.parent, os.O_RDONLY)                # the new name, too, must be on the disk
        os.fsync(directory)
        os.close(directory)
    except BaseException as e:
        temporary.unlink(missing_ok=True)                                 # a full disk has room again
        cause = e if isinstance(e, OSError) else e.__context__            # torch.save puts an error of its own on top
        if isinstance(e, Exception) and isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, str(path)) from None
        raise


def write_whole(path, chunks):
    """Writes an iterable of bytes to path, whole or not at all: see `replacing`."""
    with replacing(path) as f:
        f.writelines(chunks)
