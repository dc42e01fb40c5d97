"""A GPT in one file: the transformer, packed samples, the log-probs of the tokens that count, LoRA, generation.

One class, driven by `GPTConfig`, covers GPT-2 and the LLaMA family (Llama, SmolLM2, Mistral, Qwen2, Qwen2.5, Qwen3):
each choice in which they differ is made once. Parameters carry LLaMA's names, GPT-2's too. Other people's files are
`hf/`'s business.

The loop feeds it *packed* samples: the tokens of several samples one after the other in a single vector, with the
lengths of the samples. Attention and positions restart at every sample.

T tokens, d width, n heads, D numbers a head, V vocabulary, N tokens that count.
"""

import functools
import inspect
import itertools
import math
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint


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
    hf: dict = field(compare=False, repr=False)   # config.json as it was read; `hf.save_model` writes it back


class GPT(nn.Module):
    """model(input_ids (B, T)) -> logits (B, T, V).

    model(input_ids (T,), lengths, at, targets) -> log-probs (N,) float32 of the response tokens of packed samples:
    lengths is a list of the samples' lengths, at (N,) the positions whose next token is a response token, targets (N,)
    those tokens. `data.collate` makes all of them. Without at: what the head would see of each token, (T, d).
    after: see `Packing`. looks: see `linear_logprobs`; with any, (log-probs, {name: (N,)}) is returned.

    recompute: keep only each block's input, and compute the block again in the backward pass.
    agree(tokens): gives all ranks of a sharded model the same new tokens in `generate`.
    """
    recompute = False
    agree = staticmethod(lambda tokens: tokens)

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        norm = RMSNorm if c.norm == "rms" else LayerNorm
        # from_pretrained: an Embedding made by its sizes would draw its own random weights first.
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(c.vocab_size, c.n_embd), freeze=False)
        if c.rope_theta is None:
            self.embed_positions = nn.Embedding.from_pretrained(torch.empty(c.max_positions, c.n_embd), freeze=False)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = norm(c.n_embd, c.norm_eps)
        if not c.tie_embeddings:
            self.lm_head = Linear(c.n_embd, c.vocab_size, bias=False)
        self.file_dtypes = {}                                             # {name: dtype} of the file it was loaded from
        for name, p in self.named_parameters():
            # On device "meta" there is nothing to fill yet.
            if not p.is_meta:
                self.initialise(name, p)

    def initialise(self, name, p):
        """What a parameter of this name starts from, in place. Matrices are normal(0, 0.02); those that end a residual
        branch smaller, as in GPT-2. Adapters change nothing at first: A is random, B zero (LoRA)."""
        if name.endswith("lora_a"):
            nn.init.kaiming_uniform_(p, a=math.sqrt(5))
        elif name.endswith(("bias", "lora_b")):
            nn.init.zeros_(p)
        elif p.dim() == 1:
            nn.init.ones_(p)                                              # of a norm
        else:
            ends_branch = name.endswith(("o_proj.weight", "down_proj.weight"))
            depth = 2 * self.config.n_layer if ends_branch else 1
            nn.init.normal_(p, std=0.02 / math.sqrt(depth))

    @property
    def head(self):
        return self.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight   # (V, d)

    def forward(self, input_ids, lengths=None, at=None, targets=None, after=None, looks=None):
        if lengths is None:
            # Each row of (B, T) is a sample.
            x = self.trunk(input_ids.flatten(), Packing([input_ids.shape[1]] * len(input_ids), input_ids.device))
            return F.linear(x, self.head).view(*input_ids.shape, -1)      # (B, T, V)
        x = self.trunk(input_ids, Packing(lengths, input_ids.device, after=after))   # (T, d)
        if at is None:
            return x
        return linear_logprobs(x.index_select(0, at), self.head, targets, looks)   # (N,)

    def trunk(self, tokens, packing):
        """Tokens (T,) -> what the head sees, (T, d)."""
        # To the dtype of the norms: over a frozen bfloat16 base the residual stream is summed in float32.
        x = self.embed_tokens(tokens).to(self.norm.weight.dtype)          # (T, d)
        rope = None
        if self.config.rope_theta is None:
            x = x + self.embed_positions(packing.position)
        else:
            angle = packing.position[:, None, None].float() * rope_frequencies(self.config, x.device)   # (T, 1, D/2)
            rope = angle.cos(), angle.sin()
        for block in self.layers:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, packing, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, rope, packing)
        return self.norm(x)

    def compile(self, **options):
        """torch.compile, in place and block by block: blocks share the graphs, of which there are two for each number
        of tokens, one on each side of attention (with adapters four: before the first block nothing needs a gradient).
        """
        torch._dynamo.config.recompile_limit = 64                         # of 8, after which new sizes run uncompiled
        torch._dynamo.config.optimize_ddp = False                         # blocks as they are do overlap with DDP
        for block in self.layers:
            block.before_attention = torch.compile(block.before_attention, dynamic=False, **options)
            block.after_attention = torch.compile(block.after_attention, dynamic=False, **options)

    def cast(self, dtype):
        """Matrices in `dtype`, that of autocast; norms and biases in float32, and with them all sums. Returns self."""
        for p in self.parameters():
            p.data = p.data.to(dtype if p.dim() == 2 else torch.float32)
        return self

    def add_lora(self, rank, alpha):
        """Freezes everything and gives each linear layer of the blocks an adapter of this rank, float32."""
        self.requires_grad_(False)
        for module in self.layers.modules():
            if isinstance(module, Linear):
                module.add_lora(rank, alpha)
        for name, p in self.named_parameters():
            if p.requires_grad and not p.is_meta:
                self.initialise(name, p)

    @torch.no_grad()
    def generate(self, input_ids, max_new_tokens, temperature=0.0, stop=(), seed=0):
        """A continuation of each prompt: a list of B int64 vectors of new ids, without the stop.

        input_ids: (B, T), or a list of B prompts of any lengths, each at least one id. Prompts of similar length run
        together; no continuation depends on the others. temperature 0.0 takes the most probable token, above that one
        is drawn from softmax(logits / temperature) by a generator of its own with this seed. stop: ids, any of which
        ends a continuation; others end after max_new_tokens. Of a sharded model all ranks must ask for the same.
        Raises ValueError if a prompt is empty or would run beyond the positions, and for logits that are no numbers.
        """
        device = self.embed_tokens.weight.device
        prompts = [torch.as_tensor(ids, dtype=torch.int64, device=device) for ids in input_ids]
        lengths = [len(prompt) for prompt in prompts]
        if min(lengths, default=1) < 1 or max(lengths, default=0) + max_new_tokens > self.config.max_positions:
            raise ValueError(f"prompts have {lengths} ids; expected 1 or more, and with {max_new_tokens} new ones at "
                             f"most the {self.config.max_positions} positions of the model")
        # A number for each token that may be drawn, so that a continuation does not depend on which run together.
        generator = torch.Generator().manual_seed(seed)
        chance = torch.rand(len(prompts), max_new_tokens, dtype=torch.float64, generator=generator).to(device)
        continuations = [None] * len(prompts)
        waiting = sorted(range(len(prompts)), key=lengths.__getitem__)
        while waiting:
            # The longest first, as many as the cache has room for.
            longest = lengths[waiting[-1]]
            count = max(1, CACHE_TOKENS // (longest + max_new_tokens))
            chosen, waiting = waiting[-count:], waiting[:-count]
            new = continue_prompts(self, [prompts[i] for i in chosen], max_new_tokens, temperature, set(stop),
                                   chance[chosen])
            for i, ids in zip(chosen, new):
                continuations[i] = torch.tensor(ids, dtype=torch.int64, device=device)
        return continuations


# ---------------------------------------------------------------------------------------------------------------------
# A block

class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        norm = RMSNorm if c.norm == "rms" else LayerNorm
        self.input_layernorm = norm(c.n_embd, c.norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = norm(c.n_embd, c.norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, rope, packing):
        # Attention depends on the samples' lengths and is not compiled; what is before and after it is, a graph each.
        q, k, v = self.before_attention(x, rope)
        y = packing.attend(self, q, k, v)                                 # (T, n, D)
        return self.after_attention(x, y)

    def before_attention(self, x, rope):
        return self.self_attn.queries_keys_values(self.input_layernorm(x), rope)

    def after_attention(self, x, y):
        x = x + self.self_attn.o_proj(y.flatten(1))                       # (T, d)
        return x + self.mlp(self.post_attention_layernorm(x))


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

    def queries_keys_values(self, x, rope):
        heads = len(x), -1, self.head_dim
        q = rotate(self.q_norm(self.q_proj(x).view(heads)), rope)         # (T, n, D)
        k = rotate(self.k_norm(self.k_proj(x).view(heads)), rope)         # (T, n_kv, D)
        v = self.v_proj(x).view(heads)                                    # (T, n_kv, D)
        return q, k, v


def rotate(x, rope):
    """Rotary positions: x (T, n, D), rope = cos, sin (T, 1, D/2) float32 each. Pairs are (i, i + D/2), as in LLaMA."""
    if rope is None:
        return x
    cos, sin = rope
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def rope_frequencies(c, device):
    """Radians a position, (D/2,) float32. Llama 3.1 stretches long waves by a factor, short ones not at all."""
    frequency = 1.0 / c.rope_theta ** (torch.arange(0, c.head_dim, 2, device=device).float() / c.head_dim)
    if c.rope_scaling is None:
        return frequency
    factor, low, high, original_positions = c.rope_scaling
    turns = original_positions * frequency / (2 * math.pi)                # of each wave within the original context
    smooth = ((turns - low) / (high - low)).clamp(0, 1)                   # 0: stretched, 1: as it was
    return (1 - smooth) * frequency / factor + smooth * frequency


# torch 2.11's varlen_attn has no grouped heads, 2.13's has.
FLASH_KNOWS_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters


class Packing:
    """Where packed samples lie in their tokens (T, ...), and attention within each of them.

    lengths: of the S samples; they add up to T. cache: keeps keys and values, for `generate`. after: {sample: the
    sample that it goes on from}, as choices go on from a question. It sees that one's tokens too, and its positions
    begin where they end. The one that it goes on from goes on from none.
    """

    def __init__(self, lengths, device, cache=None, after=None):
        self.lengths, self.cache = lengths, cache
        self.on_gpu = torch.device(device).type == "cuda"
        self.has_flash = self.on_gpu and torch.cuda.get_device_capability(device) >= (8, 0)
        self.offsets = offsets_of(lengths, device)                        # (S+1,)
        t = torch.arange(sum(lengths), dtype=torch.int32, device=device)
        sample = torch.searchsorted(self.offsets, t, right=True) - 1      # (T,)
        self.position = t - self.offsets[sample]                          # (T,) from 0 in each
        # What each sample sees: its own tokens, and no mask but the causal one.
        self.seen, self.seen_lengths, self.seen_offsets = None, lengths, self.offsets
        self.masks = [None] * len(lengths)
        if after:
            self.go_on(after, device)

    def go_on(self, after, device):
        """Lets samples see what they go on from: see `after`."""
        tokens = torch.arange(sum(self.lengths)).split(self.lengths)
        before = torch.zeros(len(tokens), dtype=torch.int32)              # (S,) tokens of another sample that each sees
        seen = []
        for number, own in enumerate(tokens):
            if number in after:
                earlier = tokens[after[number]]
                seen.append(earlier)
                before[number] = len(earlier)
                mask = torch.ones(len(own), len(earlier) + len(own), dtype=torch.bool, device=device)
                self.masks[number] = mask.tril(len(earlier))
            seen.append(own)
        self.seen = torch.cat(seen).to(device, non_blocking=True)         # numbers of tokens, sample by sample
        self.seen_lengths = [len(own) + n for own, n in zip(tokens, before.tolist())]
        self.seen_offsets = offsets_of(self.seen_lengths, device)
        before = before.repeat_interleave(torch.tensor(self.lengths))     # (T,)
        self.position = self.position + before.to(device, non_blocking=True)

    def attend(self, layer, q, k, v):
        """q (T, n, D), k and v (T, n_kv, D) -> (T, n, D), causal."""
        if self.cache is not None:
            self.cache.keep(layer, k.split(self.lengths), v.split(self.lengths))
        if self.seen is not None:
            k, v = k[self.seen], v[self.seen]                             # (tokens seen, n_kv, D)
        n, D = q.shape[1:]
        grouped = n != k.shape[1]
        use_flash = self.has_flash and q.dtype in (torch.bfloat16, torch.float16) and D % 8 == 0 and D <= 256
        if self.on_gpu and grouped and not (use_flash and FLASH_KNOWS_GROUPS):
            # The other kernels there do not know grouped heads.
            k = k.repeat_interleave(n // k.shape[1], 1)
            v = v.repeat_interleave(n // v.shape[1], 1)
            grouped = False
        if use_flash:
            # One FlashAttention kernel for all samples. Where there are fewer queries than keys it aligns their ends.
            options = {"enable_gqa": True} if grouped else {}
            return varlen_attn(q, k, v, self.offsets, self.seen_offsets, max(self.lengths), max(self.seen_lengths),
                               window_size=(-1, 0), **options)
        # One by one: on a CPU as fast as length buckets, faster than padding and masks (bench/RESULTS.md).
        q = q.transpose(0, 1)[None].split(self.lengths, 2)                # (1, n, L, D) each
        k, v = (x.transpose(0, 1)[None].split(self.seen_lengths, 2) for x in (k, v))
        samples = [F.scaled_dot_product_attention(*sample, mask, is_causal=mask is None, enable_gqa=grouped)
                   for *sample, mask in zip(q, k, v, self.masks)]
        return torch.cat(samples, 2)[0].transpose(0, 1)


def offsets_of(lengths, device):
    """Where each of the packed samples begins, and the last ends: (S+1,) int32."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gated = c.gated
        if c.gated:
            self.gate_proj = Linear(c.n_embd, c.n_ff, bias=c.mlp_bias)
        self.up_proj = Linear(c.n_embd, c.n_ff, bias=c.mlp_bias)
        self.down_proj = Linear(c.n_ff, c.n_embd, bias=c.mlp_bias)

    def forward(self, x):
        up = self.up_proj(x)                                              # (T, n_ff)
        if self.gated:
            return self.down_proj(F.silu(self.gate_proj(x)) * up)
        return self.down_proj(F.gelu(up, approximate="tanh"))


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        # In float32, whatever comes in.
        return F.layer_norm(x.float(), self.weight.shape, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class Linear(nn.Linear):
    """W x + b; once it has an adapter, W x + b + alpha/r B A x (LoRA, arXiv 2106.09685)."""
    scale = 0.0                                                           # alpha / r; 0: no adapter

    def reset_parameters(self):
        pass                                                              # GPT does it

    def add_lora(self, rank, alpha):
        self.lora_a = nn.Parameter(self.weight.new_empty(rank, self.in_features, dtype=torch.float32))
        self.lora_b = nn.Parameter(self.weight.new_empty(self.out_features, rank, dtype=torch.float32))
        self.alpha = alpha
        self.scale = alpha / rank

    def forward(self, x):
        y = super().forward(x)
        if self.scale:
            y = y + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)
        return y


# ---------------------------------------------------------------------------------------------------------------------
# The head

# Bytes of logits that are held at a time on a CPU. Its products run at full speed from some 256 rows on; more rows mean
# fewer passes over the weight's gradient, and more that need not be computed twice.
CHUNK_BYTES = 160 * 2 ** 20
# Rows of logits that are held at a time on a GPU. A pass over the weight's gradient moves 8 bytes a number of it, the
# products of a chunk are 8 operations a row and number: an H100 at 600 TFLOP/s and 3.35 TB/s then spends 180 / rows of
# the products' time on it, whatever V and d. With 4,096 that is 4%, and 1.2 GB of logits for the largest vocabulary
# (Qwen's).
CHUNK_ROWS = 4096


def linear_logprobs(hidden, weight, targets, looks=None):
    """log-prob of each target under the head: (N,) float32, or float64 if hidden is.

    hidden: (N, d). weight: (V, d). targets: (N,) int64. Only positions that predict a response token come here, so
    prompts and padding cost no logits. looks: {name: function of (n, V) log-probs -> (n,)}, what else is wanted of the
    distributions, chunk by chunk and without gradient; with any, (log-probs, {name: (N,)}) is returned.

    With z = W h the log-prob of target y is z_y - lse(z), and its gradient with respect to z is onehot(y) - softmax(z).
    So all that backward needs of N x V logits are the N log-sum-exps: it computes the logits of a chunk of rows again,
    turns them into softmax(z) - onehot(y) in place, and multiplies that by W (gradient of h) and by h (of W). There is
    never more than one chunk of logits, and the last of the forward pass is still there when the backward pass begins.
    The price is a fourth matrix product beside three, for all other chunks. Products are in autocast's dtype; the
    target's logit, the log-sum-exp, the log-probs and the sum of the weight's gradient over chunks are float32.
    """
    logp, *values = LinearLogprobs.apply(hidden, weight, targets, looks or {})
    return (logp, dict(zip(looks, values))) if looks else logp


class LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, looks):
        device = hidden.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        h, w = hidden.to(ctx.dtype), head_of_products(weight, ctx.dtype)
        logsumexp = compiled(row_logsumexp) if on_gpu(hidden) else row_logsumexp
        look_at = compiled(row_look) if on_gpu(hidden) else row_look
        logp = hidden.new_empty(len(h), dtype=torch.promote_types(hidden.dtype, torch.float32))   # (N,)
        lse = torch.empty_like(logp)                                      # (N,)
        values = [torch.empty_like(logp) for _ in looks]                  # (N,) each
        chunks, buffer = chunks_of_logits(h, w)
        for rows in chunks:
            z = torch.mm(h[rows], w.t(), out=buffer[:rows.stop - rows.start])   # (chunk, V), and the padding
            of_rows = [x[rows] for x in (lse, *values)]
            for z_block, lse_block, *value_blocks in row_blocks(z[:, :len(weight)], *of_rows):
                lse_block.copy_(logsumexp(z_block))
                for value_block, look in zip(value_blocks, looks.values()):
                    value_block.copy_(look_at(z_block, lse_block, look))
            z_y = z.gather(1, targets[rows, None])[:, 0]                  # (chunk,)
            if z.dtype != logp.dtype:
                # A logit of 30, rounded to bfloat16, is off by up to 1/16, and p_y by as much of itself; p_y is what
                # DFT and BFT weight by. The others' errors average out in the sum, so that the target's alone is
                # computed once more, in float32, and takes the rounded one's place in the sum as well.
                exact = (hidden[rows].to(logp.dtype) * weight[targets[rows]]).sum(1)   # (chunk,)
                rounded = (z_y - lse[rows]).clamp(max=0)                  # (chunk,) log p_y by the rounded logit
                others = lse[rows] + (-rounded.expm1()).log()             # log-sum-exp without the target
                lse[rows] = torch.logaddexp(others, exact)
                z_y = exact
            logp[rows] = z_y - lse[rows]
        ctx.save_for_backward(hidden, weight, targets, logp, lse)
        ctx.kept = h, w, chunks, buffer                                   # with the last chunk's logits in it
        ctx.mark_non_differentiable(*values)
        return logp, *values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):                                          # (N,) d loss / d logp
        hidden, weight, targets, logp, lse = ctx.saved_tensors
        softmax_ = compiled(row_softmax_) if on_gpu(hidden) else row_softmax_
        last_logits_are_there = ctx.kept is not None
        if not last_logits_are_there:
            h, w = hidden.to(ctx.dtype), head_of_products(weight, ctx.dtype)
            ctx.kept = h, w, *chunks_of_logits(h, w)
        h, w, chunks, buffer = ctx.kept
        ctx.kept = None                                                   # gone even if someone keeps the log-probs
        scaled = (grad[:, None] * hidden).to(ctx.dtype)                   # (N, d)
        grad_h = torch.empty_like(h)                                      # (N, d)
        grad_weight = torch.zeros_like(weight, dtype=logp.dtype) if ctx.needs_input_grad[1] else None   # (V, d)
        # The last chunk first: its logits are in the buffer, unless this is a second backward pass.
        for rows in chunks[-1:] + chunks[:-1]:
            z = buffer[:rows.stop - rows.start]                           # (chunk, V), and the padding
            if not last_logits_are_there:
                torch.mm(h[rows], w.t(), out=z)
            last_logits_are_there = False
            # Padding stays zero.
            for z_block, lse_block in row_blocks(z[:, :len(weight)], lse[rows]):
                softmax_(z_block, lse_block)
            z[torch.arange(len(z), device=z.device), targets[rows]] = logp[rows].expm1().to(z.dtype)   # p_y - 1
            torch.mm(z, w, out=grad_h[rows])
            if grad_weight is not None:
                for total, z_block in row_blocks(grad_weight, z.t()):
                    total.sub_(torch.mm(z_block, scaled[rows])[:len(total)])
        return grad_h * -grad[:, None], grad_weight, None, None


def on_gpu(tensor):                                                       # a function, so that tests can answer for it
    return tensor.is_cuda


def head_of_products(weight, dtype):
    """The head (V, d) in the dtype of the products; on a GPU with rows of zeros up to a multiple of 64, since its
    products are slow where V is odd (GPT-2's is). The V of the other families' published models is such a multiple:
    then nothing is copied."""
    missing = -len(weight) % 64 if on_gpu(weight) else 0
    weight = weight.to(dtype)
    return F.pad(weight, (0, 0, 0, missing)) if missing else weight


def chunks_of_logits(h, w):
    """(slices of the N rows, room for the logits of one of them), for h (N, d) and w (V, d).

    The slices are equal, but the first may be smaller. On a GPU they have CHUNK_ROWS rows at most, on a CPU so many
    that their logits take CHUNK_BYTES (64 at least).
    """
    limit = CHUNK_ROWS if on_gpu(h) else max(64, CHUNK_BYTES // (len(w) * w.itemsize))
    count = max(1, math.ceil(len(h) / limit))
    size = max(1, math.ceil(len(h) / count))
    stops = reversed(range(len(h), 0, -size))
    chunks = [slice(max(0, stop - size), stop) for stop in stops]
    row = 64 * math.ceil(len(w) / 64)                                     # rows aligned as GPUs' products like them
    return chunks, h.new_empty(size, row)[:, :len(w)]


def row_blocks(a, *others):
    """Blocks of the same rows of some tensors. On a CPU what is made of a block is small enough for its cache, where
    fresh memory would cost more than the arithmetic. A GPU gets all rows at once: fewer kernels, and no block that
    starts off a 16-byte boundary."""
    if on_gpu(a):
        return [(a, *others)]
    rows = max(1, 2 ** 20 // a.shape[1])
    return zip(*(x.split(rows) for x in (a, *others)))


def row_logsumexp(z):                                                     # (n, V) -> (n,)
    return z.to(torch.promote_types(z.dtype, torch.float32)).logsumexp(-1)


def row_look(z, lse, look):                                               # (n, V), (n,) -> (n,)
    return look(z - lse[:, None])


def row_softmax_(z, lse):                                                 # (n, V), (n,); in place
    z.copy_((z - lse[:, None]).exp_())


@functools.cache
def compiled(function):
    return torch.compile(function)


# ---------------------------------------------------------------------------------------------------------------------
# Generation

# Tokens whose keys and values `generate` holds at a time, padding included.
CACHE_TOKENS = 2 ** 15


class Cache:
    """Keys and values of every token so far. It stands in for Packing where each sample has one new token.

    Samples end at the same column: their new tokens are one column, and nothing is read beyond it.
    """

    def __init__(self, lengths, new_tokens, device):
        self.position = torch.tensor(lengths, device=device)              # (S,) that of each sample's new token
        self.column = max(lengths)                                        # and where it goes
        self.room = self.column + new_tokens
        padding = self.column - self.position[:, None]                    # (S, 1) columns before a sample's first token
        self.seen = torch.arange(self.room, device=device) >= padding     # (S, room)
        self.kept = {}                                                    # {layer: (keys, values)} (S, n_kv, room, D)

    def keep(self, layer, keys, values):
        """Keeps those of the prompts: lists of (L, n_kv, D), one for each of S samples."""
        self.kept[layer] = self.aligned(keys), self.aligned(values)

    def aligned(self, samples):
        """(S, n_kv, room, D)."""
        columns = samples[0].new_zeros(len(samples), self.room, *samples[0].shape[1:]).transpose(1, 2)
        for row, sample in zip(columns, samples):
            row[:, self.column - len(sample):self.column] = sample.transpose(0, 1)
        return columns

    def attend(self, layer, q, k, v):
        """q (S, n, D), k and v (S, n_kv, D) of the new tokens -> (S, n, D)."""
        keys, values = self.kept[layer]                                   # (S, n_kv, room, D)
        keys[:, :, self.column] = k
        values[:, :, self.column] = v
        so_far = slice(self.column + 1)
        # The query heads that share keys are rows of one product: GPUs' fast kernels with masks know no grouped heads.
        rows = q.view(len(q), k.shape[1], -1, q.shape[2])                 # (S, n_kv, n / n_kv, D)
        y = F.scaled_dot_product_attention(rows, keys[:, :, so_far], values[:, :, so_far],
                                           attn_mask=self.seen[:, None, None, so_far])
        return y.reshape(q.shape)

    def next_token(self):
        self.position = self.position + 1
        self.column += 1

    def select(self, samples):
        """Forgets samples other than these, a tensor of their numbers."""
        self.position, self.seen = self.position[samples], self.seen[samples]
        self.kept = {layer: (keys[samples], values[samples]) for layer, (keys, values) in self.kept.items()}


def continue_prompts(model, prompts, max_new_tokens, temperature, stop, chance):
    """`GPT.generate` for prompts that run together: [[new ids], ...]. stop: a set. chance: (B, new tokens)."""
    lengths = [len(prompt) for prompt in prompts]
    device = prompts[0].device
    cache = Cache(lengths, max_new_tokens, device)
    x = model.trunk(torch.cat(prompts), Packing(lengths, device, cache))  # (T, d)
    x = x[torch.tensor(lengths, device=device).cumsum(0) - 1]             # (B, d) of each prompt's last token
    new = [[] for _ in prompts]
    rows = list(range(len(prompts)))                                      # whose continuations are computed
    going = set(rows)                                                     # and are not over
    for i in range(max_new_tokens):
        tokens = model.agree(next_tokens(F.linear(x, model.head), temperature, chance[:, i:i + 1]))   # (B,)
        for number, token in zip(rows, tokens.tolist()):
            if token < 0:
                raise ValueError("the model gives logits that are no numbers (NaN)")
            if token in stop:
                going.discard(number)
            elif number in going:
                new[number].append(token)
        if not going or i == max_new_tokens - 1:
            break
        if len(going) <= len(rows) / 2:
            # The others need not be computed any more. (To forget each as it ends would copy the cache each time.)
            places = [place for place, number in enumerate(rows) if number in going]
            rows = [rows[place] for place in places]
            kept = torch.tensor(places, device=device)
            tokens, chance = tokens[kept], chance[kept]
            cache.select(kept)
        x = model.trunk(tokens, cache)
        cache.next_token()
    return new


def next_tokens(logits, temperature, chance):
    """The tokens that follow, (B,), by logits (B, V) and random numbers (B, 1) from 0 to 1; -1 where a logit is NaN."""
    largest, likeliest = logits.max(-1)                                   # NaN, if there is one
    tokens = likeliest
    if temperature > 0:
        logits = logits.double() - largest[:, None]                       # finite at any temperature
        total = (logits / temperature).softmax(-1).cumsum(-1)
        # The first token at which the sum of probabilities passes chance.
        tokens = torch.searchsorted(total, chance * total[:, -1:], right=True)[:, 0]
    return torch.where(largest.isnan(), -1, tokens)
