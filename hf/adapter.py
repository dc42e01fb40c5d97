"""Adapters (LoRA) in PEFT's format, in and out: adapter_config.json and adapter_model.safetensors.

The weight W of a linear layer becomes W + lora_alpha / r B A, with A (r, in) and B (out, r). The file has our tensors
as they are. Only GPT-2 differs: its c_attn is our projections to queries, keys and values, one below the other (see
hf/weights.py). Our three adapters of rank r are one of rank 3r there, and one of rank r that PEFT made becomes three of
ours: see `cut`.
"""

import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch

from hf.hub import find_directory
from hf.reading import is_there, read_json
from hf.weights import GPT2_NAMES, check_dtypes, first_names, is_gpt2
from model import GPT, Linear
from runtime.files import all_finite, iterate_safetensors, safetensors_layout, save_safetensors, write_whole
from runtime.process import UserError
from runtime.sharding import gather_whole, local, my_rows


CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# Of PEFT's names; what follows is the name in the family's file.
PREFIX = "base_model.model."
# The name of an adapter, as in lora_A.default.weight, which PEFT leaves out of its files.
ADAPTER_NAME = re.compile(r"(?<=\.lora_[AB])\.[^.]+(?=\.weight$)")
# Options of PEFT's, and the values that we have. Other ways to initialise change the base, too.
SUPPORTED = {"bias": ("none",), "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva")}
# Options that may have any value here: they say how an adapter was trained (its dropout, too), or what its tensors say
# themselves. All others must be off.
ANY_VALUE = ("auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules", "fan_in_fan_out",
             "inference_mode", "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core",
             "peft_version", "qalora_group_size", "revision", "target_modules", "task_type",
             # `read_options` looks at these.
             "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
EXPECTED = ("expected LoRA on all linear layers of the blocks and on nothing else, as --lora-rank makes it; or merge "
            "the adapter into its base (PEFT's merge_and_unload), and start from that")


class Adapter(NamedTuple):
    directory: Path
    rank: int
    alpha: float                     # B A is multiplied by alpha / rank
    base: str | None                 # the model that it was trained on, as its config calls it
    stacked: bool                    # of GPT-2: one of rank 3r stands for three of ours


def adapter_files(directory):
    return [Path(directory, CONFIG), Path(directory, WEIGHTS)]


# ---------------------------------------------------------------------------------------------------------------------
# In

def open_adapter(directory_or_hub_id, config):
    """The Adapter of a directory (or of a repository id, which is downloaded), for a model of this GPTConfig. Of its
    tensors only the header is read. Raises UserError for one that we cannot go on from."""
    try:
        adapter = read_options(find_directory(directory_or_hub_id), config)
        with torch.device("meta"):
            model = GPT(config)
            model.add_lora(adapter.rank, adapter.alpha)
        check_tensors(model, adapter)
    except (ValueError, OSError) as e:
        raise UserError(str(e)) from None
    return adapter


def fill_adapter(model, directory):
    """Gives the adapters of a model, sharded or not, the numbers of a directory: on each rank its rows. One tensor is
    held at a time. Raises UserError."""
    try:
        adapter = read_options(Path(directory), model.config)
        expected = check_tensors(model, adapter)
        _, file = adapter_files(directory)
        for name_in_file, t in iterate_safetensors(file):
            if not all_finite(t):
                raise ValueError(f"{file}: {name_in_file} has values that are infinite or no numbers (NaN)")
            names = expected[name_in_file].names
            for name, part in zip(names, cut(name_in_file, t, len(names), adapter)):
                p = model.get_parameter(name)
                with torch.no_grad():
                    local(p).copy_(my_rows(part, p))
    except (ValueError, OSError) as e:
        raise UserError(str(e)) from None


def read_options(directory, config):
    """The Adapter that adapter_config.json describes. Raises ValueError, FileNotFoundError, and UserError as
    `hf.reading.is_there`."""
    path, weights = adapter_files(directory)
    if not is_there(path) or not is_there(weights):
        raise FileNotFoundError(f"{directory}: no adapter there; expected {CONFIG} and {WEIGHTS}, as in RUN/adapter "
                                "(adapter_model.bin is a pickle and is not read)")
    try:
        options = read_json(path)
    except ValueError as e:
        raise ValueError(f"{path} is not JSON that we can read: {e}") from None
    if not isinstance(options, dict):
        raise ValueError(f"{path} is not the configuration of an adapter; expected an object")
    check_options(path, options)
    rank, alpha = options.get("r"), options.get("lora_alpha")
    if type(rank) is not int or type(alpha) not in (int, float) or not 0 < rank < 2 ** 31 or not 0 < alpha < 2 ** 31:
        raise ValueError(f"{path}: r is {rank!r} and lora_alpha {alpha!r}; expected two numbers above 0, r a whole one")
    ranks, alphas = options.get("rank_pattern") or {}, options.get("alpha_pattern") or {}
    # rsLoRA multiplies by alpha / sqrt(r), which is not the others' where both are three times theirs.
    is_rslora = bool(options.get("use_rslora"))
    stacked = is_gpt2(config) and not is_rslora and (ranks, alphas) == stacked_patterns(rank, alpha)
    if not stacked and not (changes_nothing(ranks, rank) and changes_nothing(alphas, alpha)):
        raise ValueError(f"{path}: rank_pattern is {ranks!r} and alpha_pattern {alphas!r}; expected the same rank and "
                         "alpha for all layers")
    if is_rslora:
        alpha *= math.sqrt(rank)
    base = options.get("base_model_name_or_path")
    return Adapter(Path(directory), rank, float(alpha), base if isinstance(base, str) else None, stacked)


def check_options(path, options):
    """Raises ValueError for one that makes an adapter another thing than ours."""
    kind = options.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{path}: peft_type is {kind!r}, which is not supported; {EXPECTED}")
    for key, value in options.items():
        if key in SUPPORTED:
            is_supported = value in SUPPORTED[key]
        else:
            is_supported = key in ANY_VALUE or not value
        if not is_supported:
            raise ValueError(f"{path}: {key} is {value!r}, which is not supported; {EXPECTED}")


def changes_nothing(pattern, value):
    """Whether a rank_pattern or alpha_pattern has this value, that of all layers, wherever it has one."""
    return isinstance(pattern, dict) and all(of_layer == value for of_layer in pattern.values())


def check_tensors(model, adapter):
    """{name in the file: FileTensor} of a model's adapters. The file has these tensors and no others; nothing but its
    header is read. Raises ValueError, OSError."""
    _, file = adapter_files(adapter.directory)
    expected = tensors_in_file(model, adapter.stacked)
    check_dtypes([file])
    with open(file, "rb") as f:
        shapes = {name: tuple(shape) for name, _, shape in safetensors_layout(f)}
    unexpected = shapes.keys() - expected.keys()
    with_name = [name for name in unexpected if ADAPTER_NAME.sub("", name) in expected]
    if with_name:
        raise ValueError(f"{file} has {first_names(with_name)}, in which the name of an adapter stands; expected "
                         f"names like {ADAPTER_NAME.sub('', min(with_name))}, as PEFT's save_pretrained writes them")
    if unexpected:
        raise ValueError(f"{file} has {first_names(unexpected)}, of no linear layer in this model's blocks; {EXPECTED}")
    missing = {name.removeprefix(PREFIX).partition(".lora_")[0] for name in expected.keys() - shapes.keys()}
    if missing:
        raise ValueError(f"{file} has no adapter of {first_names(missing)}; {EXPECTED}")
    for name, shape in shapes.items():
        if shape != expected[name].shape:
            raise ValueError(f"{file}: {name} is {shape}; expected {expected[name].shape}, for r {adapter.rank} and "
                             "the layers of --init")
    return expected


# What c_attn has in the file, and what our three layers have of it. r is the rank of each, and d its rows:
#
#     PEFT's own    A (r, in)      each the whole        B (3d, r)     thirds
#     stacked       A (3r, in)     thirds                B (3d, 3r)    the three blocks of the diagonal
#
# All other layers are one of ours, and have their A (r, in) and B (out, r) as it is.
def cut(name, t, count, adapter):
    """The tensors of `count` layers of ours from that of their layer in the file."""
    if name.endswith("lora_A.weight"):
        return t.chunk(count) if adapter.stacked else [t] * count
    rows = t.chunk(count)
    if not adapter.stacked:
        return rows
    blocks = [part.chunk(count, 1)[i] for i, part in enumerate(rows)]
    if not torch.equal(torch.block_diag(*blocks), t):
        raise ValueError(f"{adapter.directory}: {name} mixes queries, keys and values; expected zeros outside of "
                         f"{count} blocks on its diagonal, as train.py writes it")
    return blocks


# ---------------------------------------------------------------------------------------------------------------------
# Out

def save_adapter(model, directory, base, writes=True):
    """Writes the adapters of a model, in float32, as PEFT reads them: PeftModel.from_pretrained(base model, directory).

    base: the directory or repository id of the model that they were trained on. writes: False on the ranks that only
    bring their rows of a sharded model, all but one. Raises OSError naming the file that could not be written.
    """
    layout = tensors_in_file(model, stacked=True)
    tensors = (join(name, [gather_whole(model.get_parameter(part).detach()).cpu() for part in tensor.names])
               for name, tensor in layout.items())
    if not writes:
        for _ in tensors:
            pass
        return
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config, file = adapter_files(directory)
    shapes = {name: torch.empty(tensor.shape, device="meta") for name, tensor in layout.items()}
    save_safetensors(shapes, file, tensors)
    # It comes last: a directory without it is unfinished.
    write_whole(config, [json.dumps(options_for_file(model, base), indent=2).encode()])


def join(name, parts):
    """The tensor in the file of some layers of ours, stacked."""
    return torch.cat(parts) if name.endswith("lora_A.weight") else torch.block_diag(*parts)


def options_for_file(model, base):
    layers = layers_in_file(model)
    layer = model.layers[0].self_attn.q_proj
    rank, gpt2 = len(layer.lora_a), is_gpt2(model.config)
    rank_pattern, alpha_pattern = stacked_patterns(rank, layer.alpha) if gpt2 else ({}, {})
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank,
            "lora_alpha": layer.alpha, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": gpt2,
            "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern, "inference_mode": True,
            "target_modules": sorted({name.rpartition(".")[2] for name in layers})}


# ---------------------------------------------------------------------------------------------------------------------
# Names

class FileTensor(NamedTuple):
    """A tensor of the file."""
    shape: tuple
    names: list                      # of our parameters that it holds: three of GPT-2's c_attn, otherwise one


def tensors_in_file(model, stacked):
    """{name in the file: FileTensor}. stacked: see Adapter."""
    layout = {}
    for name_in_file, names in layers_in_file(model).items():
        layers = [model.get_submodule(name) for name in names]
        rank, width = layers[0].lora_a.shape
        if stacked:
            rank *= len(layers)
        height = sum(layer.out_features for layer in layers)
        layout[f"{name_in_file}.lora_A.weight"] = FileTensor((rank, width), [f"{name}.lora_a" for name in names])
        layout[f"{name_in_file}.lora_B.weight"] = FileTensor((height, rank), [f"{name}.lora_b" for name in names])
    return layout


def layers_in_file(model):
    """{name of a linear layer of the blocks in the family's file, as PEFT calls it: our names of it}."""
    layers = {}
    for name, module in model.layers.named_modules(prefix="layers"):
        if isinstance(module, Linear):
            layers.setdefault(PREFIX + name_for_file(name, is_gpt2(model.config)), []).append(name)
    return layers


def name_for_file(name, gpt2):
    if not gpt2:
        return f"model.{name}"
    name = name.replace("k_proj", "q_proj").replace("v_proj", "q_proj") + "."
    for theirs, ours in GPT2_NAMES:
        name = name.replace(ours, theirs)
    return f"transformer.{name[:-1]}"


def stacked_patterns(rank, alpha):
    """(rank_pattern, alpha_pattern) of GPT-2's c_attn: three times both, so that alpha / r is the others'."""
    return {"c_attn": 3 * rank}, {"c_attn": 3 * alpha}
