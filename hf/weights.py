"""The weights of a Hugging Face directory, in and out: safetensors files, read and written one tensor at a time.

Our parameters have the names of Llama's, Mistral's and Qwen's files, without "model." in front. Only GPT-2's differ.
"""

import itertools
import json
from pathlib import Path

import torch

from hf.config import load_config
from hf.hub import find_directory
from hf.reading import is_there, read_json
from model import GPT
from runtime.files import all_finite, iterate_safetensors, safetensors_layout, save_safetensors, write_whole
from runtime.sharding import gather_whole, is_sharded, local, my_rows, rows_of


FILE_BYTES = 5_000_000_000                       # a model beyond this is saved in several files
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
EMBEDDING = "embed_tokens.weight"
HEAD = "lm_head.weight"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Constants that old files hold beside the weights.
CONSTANTS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
# In any family's file, the matrices that have a row for each token.
ROWS_OF_TOKENS = ("model.embed_tokens.weight", EMBEDDING, "transformer.wte.weight", "wte.weight", HEAD)
# What a directory without a model may hold instead, and what to do about it.
OTHER_FILES = {
    "adapter_config.json": "an adapter of PEFT's; expected a whole model: merge the adapter into its base "
                           "(merge_and_unload) and save that; train.py takes it too, as --init BASE --adapter DIR",
    "*.gguf": "which is not read; expected safetensors files: the model that it was made from",
    "pytorch_model*.bin": "a pickle, which is a program and is not read; expected safetensors files, which "
                          "transformers' save_pretrained writes",
    "checkpoint": "of a run that has not finished; expected a model: the run's command, given again, goes on with it",
}


# ---------------------------------------------------------------------------------------------------------------------
# In

def load_model(directory_or_hub_id):
    """The GPT of a Hugging Face directory (or of a repository id, which is downloaded), on the CPU, in the dtype of its
    files. They are read tensor by tensor, so that no more memory is used than for the model and one tensor.

    Raises FileNotFoundError if a file is missing, and ValueError if one is damaged, not what we support, or has values
    that are not finite.
    """
    directory = find_directory(directory_or_hub_id)
    weight_files(directory)
    # On "meta" a parameter has a shape and no memory: the file's tensors take its place.
    with torch.device("meta"):
        model = GPT(load_config(directory))
    fill_model(model, directory)
    return model


def fill_model(model, directory, convert=lambda rows, p: rows):
    """Gives a model on "meta" the tensors of a directory's files, one at a time; of a sharded one the rows that this
    rank holds. Adapters, which no file has, stay as they are.

    convert(rows, parameter): makes of the rows that are read for a parameter what it becomes. Raises as `load_model`,
    for what does not fit before anything but the files' headers is read.
    """
    gpt2 = is_gpt2(model.config)
    files = weight_files(directory)
    check_dtypes(files)
    parameters = {name: p for name, p in model.named_parameters() if ".lora_" not in name}
    missing = set(parameters)
    # A file may hold the head although it is tied to the embedding.
    parameters.setdefault(HEAD, parameters[EMBEDDING])
    dtypes, rows, misfits = {}, {}, []
    for name_in_file, name, t in tensors_on_meta(files, gpt2):
        if name not in parameters or parameters[name].shape != t.shape or name in dtypes:
            misfits.append(name_in_file)
            continue
        dtypes[name] = t.dtype
        # GPT-2's matrices are several of ours, or transposed: they are read whole.
        if not gpt2:
            rows[name_in_file] = rows_of(parameters[name])
    misfits += missing - dtypes.keys()
    refuse_misfits(misfits, directory)
    tensors = {}
    for file in files:
        for name_in_file, t in iterate_safetensors(file, rows=rows):
            parts = as_ours(name_in_file, t, gpt2)
            if parts and not all_finite(t):
                raise ValueError(f"{file}: {name_in_file} has values that are infinite or no numbers (NaN)")
            for name, part in parts:
                if gpt2:
                    part = my_rows(part, parameters[name])
                tensors[name] = convert(part, parameters[name])
            # Let go before the next one is read.
            t = part = parts = None
    if model.config.tie_embeddings and HEAD in tensors:
        head = tensors.pop(HEAD)
        if not torch.equal(local(head), local(tensors[EMBEDDING])):
            refuse_misfits([f"{HEAD} (differs from the embedding that it is tied to)"], directory)
    model.load_state_dict(tensors, strict=False, assign=True)
    model.file_dtypes = {name: dtypes[name] for name in tensors}


def refuse_misfits(misfits, directory):
    if misfits:
        raise ValueError(f"{directory} does not fit its config.json: missing, unexpected, twice or of another shape: "
                         f"{first_names(misfits)}")


def first_names(names):
    """For an error: the first of them, and how many more there are."""
    text = ", ".join(sorted(names)[:5])
    if len(names) > 5:
        text += f" and {len(names) - 5} more"
    return text


def tensors_on_meta(files, gpt2):
    """Yields (name in the file, our name, tensor on "meta"). Nothing but the files' headers is read."""
    for file in files:
        with open(file, "rb") as f:
            layout = safetensors_layout(f)
        for name_in_file, dtype, shape in layout:
            for name, t in as_ours(name_in_file, torch.empty(shape, dtype=dtype, device="meta"), gpt2):
                yield name_in_file, name, t


def as_ours(name, t, gpt2):
    """A tensor of a file under our names: [(name, tensor)]; none for a constant."""
    if name.endswith(CONSTANTS):
        return []
    return from_gpt2(name, t) if gpt2 else [(name.removeprefix("model."), t)]


def check_dtypes(files):
    """Raises ValueError for weights of a type that we do not have. Nothing but the files' headers is read."""
    for file in files:
        with open(file, "rb") as f:
            layout = safetensors_layout(f)
        for name, dtype, _ in layout:
            if dtype not in DTYPES and not name.endswith(CONSTANTS):
                raise ValueError(f"{file}: {name} is {dtype}; supported: float32, float16, bfloat16 (if it is a "
                                 "quantised model, take the one that it was made from)")


def untrained_rows(directory, ids):
    """Those of these token ids that the model was never trained on, in order: the largest number in their row of the
    embedding, or of the head, is at most a thousandth of that of the median row.

    No other tensor is read. Raises ValueError or OSError for files that cannot be read.
    """
    config = load_config(directory)
    untrained = set()
    for file in weight_files(directory):
        for _, matrix in iterate_safetensors(file, names=ROWS_OF_TOKENS):
            if matrix.shape != (config.vocab_size, config.n_embd):
                # load_model will say so.
                continue
            # By parts, since abs() copies.
            largest = torch.cat([rows.abs().amax(1).float() for rows in matrix.split(4096)])   # (V,)
            limit = largest.median() / 1000
            untrained.update(i for i in ids if i < len(largest) and largest[i] <= limit)
    return [i for i in ids if i in untrained]


def weight_files(directory):
    """The safetensors files of a model directory, in order. Raises FileNotFoundError, ValueError, or UserError as
    `hf.reading.is_there`."""
    directory = Path(directory)
    index = directory / INDEX
    has_config = is_there(directory / "config.json")
    if has_config and is_there(directory / SINGLE):
        return [directory / SINGLE]
    if not has_config or not is_there(index):
        raise FileNotFoundError(what_is_there(directory))
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        # A name with a directory in it could lead anywhere.
        if not names or any(Path(name).name != name or not is_there(directory / name) for name in names):
            named = ", ".join(map(repr, names)) or "no file"
            raise ValueError(f"it names {named}; expected files beside it")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{index} is not an index that we can read: {e}") from None
    return [directory / name for name in names]


def what_is_there(directory):
    """A sentence about a directory without a model."""
    for pattern, words in OTHER_FILES.items():
        for file in sorted(directory.glob(pattern)):
            return f"{directory}: no model there, but {file.name}, {words}"
    return (f"{directory}: no model there; expected config.json and {SINGLE}, or its shards and their index "
            "(pytorch_model.bin is a pickle and is not read)")


# ---------------------------------------------------------------------------------------------------------------------
# Out

def save_model(model, directory, base=None, writes=True):
    """Writes config.json and model.safetensors (several of them above FILE_BYTES), which transformers'
    AutoModelForCausalLM opens. Adapters are merged; every tensor has the dtype that it was loaded from. One is held at
    a time.

    base: the directory that a model with adapters was loaded from. They are then merged into its tensors, and not into
    those that were rounded for training. writes: False on the ranks that only bring their rows of a sharded model, all
    but one. Raises OSError naming the file that could not be written.
    """
    base_tensors = None if base is None else find_tensors(weight_files(base), is_gpt2(model.config))
    if not writes:
        if is_sharded(model):
            for _ in tensors_for_file(model, base_tensors, writes=False):
                pass
        return
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    shards = plan_files(model)
    count = len(shards)
    written = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    tensors = (t for _, t in tensors_for_file(model, base_tensors))
    for file, shard in zip(written, shards):
        save_safetensors(shard, directory / file, itertools.islice(tensors, len(shard)))
    if count > 1:
        total_size = sum(t.nbytes for shard in shards for t in shard.values())
        weight_map = {name: file for file, shard in zip(written, shards) for name in shard}
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        write_whole(directory / INDEX, [json.dumps(index).encode()])
        written.append(INDEX)
    # config.json comes last: a directory without it is unfinished.
    write_whole(directory / "config.json", [json.dumps(config_for_file(model), indent=2).encode()])
    # A model that was here before may have had other files.
    for file in directory.glob("model*.safetensors*"):
        if file.name not in written:
            file.unlink()


def plan_files(model):
    """[{name: tensor on "meta"}], one for each file of at most FILE_BYTES; a larger tensor has a file to itself."""
    shards, room = [{}], FILE_BYTES
    for name, t in tensors_for_file(model, shapes_only=True):
        if t.nbytes > room and shards[-1]:
            shards.append({})
            room = FILE_BYTES
        shards[-1][name] = t
        room -= t.nbytes
    return shards


def config_for_file(model):
    """The config.json that the model was made from, with the dtype of its file."""
    config_json = model.config.hf
    # transformers 5's spelling, and that of transformers 4.
    key = "dtype" if "dtype" in config_json else "torch_dtype"
    dtype = model.file_dtypes.get(EMBEDDING, model.embed_tokens.weight.dtype)
    return {**config_json, key: str(dtype).removeprefix("torch.")}


def tensors_for_file(model, base_tensors=None, writes=True, shapes_only=False):
    """Yields (name, tensor) as Hugging Face has them, one at a time, on the CPU (shapes_only: on "meta"). base_tensors:
    of `find_tensors`. writes: as in `save_model`."""
    gpt2 = is_gpt2(model.config)

    def whole(name):
        if shapes_only:
            p = model.get_parameter(name)
            return torch.empty(p.shape, dtype=model.file_dtypes.get(name, p.dtype), device="meta")
        return merged(name, model, base_tensors, writes)

    for name, _ in model.named_parameters():
        if ".lora_" in name:
            # It is merged into the matrix that it adapts.
            continue
        if gpt2:
            yield from to_gpt2(name, whole)
        elif name == HEAD:
            yield name, whole(name)
        else:
            yield "model." + name, whole(name)


def merged(name, model, base_tensors, writes):
    """A parameter with its adapter merged, in the dtype that it was loaded from; its shape alone where it is not
    written."""
    module_name, _, kind = name.rpartition(".")
    module, p = model.get_submodule(module_name), model.get_parameter(name)
    dtype = model.file_dtypes.get(name, p.dtype)
    whole = None
    if base_tensors is None:
        whole = gather_whole(p.detach()).cpu()
    elif writes:
        whole = read_parameter(name, base_tensors, is_gpt2(model.config))
    if kind == "weight" and getattr(module, "scale", 0):
        a = gather_whole(module.lora_a.detach()).cpu()   # (rank, in)
        b = gather_whole(module.lora_b.detach()).cpu()   # (out, rank)
        if writes:
            whole = whole.float() + module.scale * (b @ a)   # (out, in)
    if not writes:
        return torch.empty(p.shape, device="meta")
    if not all_finite(whole, dtype):
        raise ValueError(f"{name} has values that are infinite, no numbers (NaN), or beyond {dtype}, the dtype of "
                         "its file")
    return whole.to(dtype)


def find_tensors(files, gpt2):
    """{our name: (file, name in it)}."""
    found = {}
    for file in files:
        for name_in_file, name, _ in tensors_on_meta([file], gpt2):
            found[name] = file, name_in_file
    return found


def read_parameter(name, base_tensors, gpt2):
    """One of our parameters from where `find_tensors` found it."""
    file, name_in_file = base_tensors[name]
    (_, t), = iterate_safetensors(file, names=[name_in_file])
    return dict(as_ours(name_in_file, t, gpt2))[name]


# ---------------------------------------------------------------------------------------------------------------------
# GPT-2's files differ from ours in three ways.
# - Names: its "transformer.h.0.mlp.c_fc.weight" is our "layers.0.mlp.up_proj.weight".
# - Inside a block it stores matrices as (in, out), for x W; torch's Linear, and so ours, as (out, in), for x W^T.
# - It projects to queries, keys and values with one matrix (d, 3d): transposed (3d, d), it is our three, one below the
#   other. Its bias (3d,) is our three likewise.

# Applied in this order, both ways: "norm." also ends the names of the two norms above it.
GPT2_NAMES = [
    ("wte.", "embed_tokens."),
    ("wpe.", "embed_positions."),
    ("ln_1.", "input_layernorm."),
    ("ln_2.", "post_attention_layernorm."),
    ("ln_f.", "norm."),
    ("attn.c_attn.", "self_attn.q_proj."),
    ("attn.c_proj.", "self_attn.o_proj."),
    ("mlp.c_fc.", "mlp.up_proj."),
    ("mlp.c_proj.", "mlp.down_proj."),
    ("h.", "layers."),
]


def is_gpt2(config):
    return config.rope_theta is None


def from_gpt2(name, t):
    """A tensor of a GPT-2 file as ours: [(name, tensor)], three of them for queries, keys and values."""
    # The published files have no prefix, transformers' have one.
    name = name.removeprefix("transformer.")
    if name.startswith("h.") and t.dim() == 2:
        t = t.t().contiguous()
    for theirs, ours in GPT2_NAMES:
        name = name.replace(theirs, ours)
    # A number without dimensions cannot be cut; its shape will be refused.
    if ".q_proj." not in name or t.dim() == 0:
        return [(name, t)]
    names = [name, name.replace(".q_proj.", ".k_proj."), name.replace(".q_proj.", ".v_proj.")]
    return list(zip(names, t.chunk(3)))


def to_gpt2(name, whole):
    """Yields the (name, tensor) of a GPT-2 file that our parameter of this name begins: keys and values go with the
    queries. whole(name): one of our tensors."""
    if ".k_proj." in name or ".v_proj." in name:
        return
    t = whole(name)
    if ".q_proj." in name:
        k = whole(name.replace(".q_proj.", ".k_proj."))
        v = whole(name.replace(".q_proj.", ".v_proj."))
        t = torch.cat([t, k, v])
    if name.startswith("layers.") and t.dim() == 2:
        t = t.t()
    for theirs, ours in GPT2_NAMES:
        name = name.replace(ours, theirs)
    yield name if name == HEAD else "transformer." + name, t
