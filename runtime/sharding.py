"""One model over many ranks: who holds what of it, and when gradients are exchanged. Three ways, and the loop does not
know which:

    one process           holds everything, and exchanges nothing
    --shard no            every rank holds everything (DDP); gradients are exchanged once a step
    --shard all, node     every rank holds its rows of each parameter, gradient and moment (FSDP2), over all ranks or
                          over those of a node. A block is gathered when it is needed, what is outside of them for a
                          whole pass

Rows are the first dimension. Rank i of k holds those from i * ceil(n / k) on, ceil(n / k) of them or what is left: the
last ones may hold fewer, or none.
"""

import contextlib
import functools

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from runtime.process import UserError, read_launch


SHARDS = ("no", "all", "node")                                            # of --shard


def ranks_per_copy(how, ranks):
    """How many ranks have one copy of the model among them. Raises UserError."""
    if how == "no":
        return 1
    if how == "all":
        return ranks.world
    launch = read_launch()
    here = launch.local_world
    if here * launch.nodes != ranks.world:
        raise UserError(f"--shard node: {ranks.world} ranks, {here} of them on this node; expected as many on each")
    return here


def shard(model, how, dtype, ranks):
    """Cuts a model's parameters into the rows that each rank holds, in place; it may be on "meta" still. how: one of
    SHARDS. dtype: autocast's.

    Blocks that are trained in float32 under bfloat16 autocast travel in bfloat16, and are computed with as they come.
    Compared with DDP one thing more is rounded: the weights of the blocks' norms, and each rank's gradient of them.
    (Autocast rounds matrices and biases anyway. Gradients are added in float32.) What is outside of the blocks travels
    as it is: in bfloat16 the gradient of an embedding's row would be a sum of as many rounded terms as it has tokens.
    """
    count = ranks_per_copy(how, ranks)
    if count == 1:
        return
    mesh = mesh_of(ranks.device.type, ranks.world // count, count)
    # Inputs are not cast: the residual stream stays float32.
    as_it_is = MixedPrecisionPolicy(cast_forward_inputs=False)
    rounded = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    is_float32 = all(p.dtype == torch.float32 for p in model.layers.parameters())
    for block in model.layers:
        fully_shard(block, mesh=mesh, mp_policy=rounded if is_float32 else as_it_is)
    # FSDP would leave the root whole after a forward pass: parameters() would give what the optimizer does not hold.
    fully_shard(model, mesh=mesh, mp_policy=as_it_is, reshard_after_forward=True)
    register_fsdp_forward_method(model, "generate")
    model.agree = of_rank_0


@functools.cache                                                          # one set of process groups for all models
def mesh_of(device_type, copies, count):
    """The ranks: a copy of the weights in each row, if there are several."""
    if copies == 1:
        return init_device_mesh(device_type, (count,))
    return init_device_mesh(device_type, (copies, count), mesh_dim_names=("copies", "rows"))


def of_rank_0(t):
    """t as rank 0 has it, on every rank. Ranks that gather weights for each token must end after the same one, also if
    their GPUs round differently."""
    dist.broadcast(t, 0)
    return t


@contextlib.contextmanager
def gradient_exchange(net, is_last):
    """Within it one micro-batch is computed, the last of a step or not.

    DDP adds gradients over ranks in the last one. A sharded model adds those of a rank's rows in each, since a rank
    that waited would hold the gradient of the whole model, and those of the rows' copies on other nodes in the last.
    """
    if isinstance(net, FSDPModule):
        net.set_requires_all_reduce(is_last)
    waits = isinstance(net, DistributedDataParallel) and not is_last
    with net.no_sync() if waits else contextlib.nullcontext():
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Rows and whole tensors

def rows_of(p):
    """(first, one past the last) of the rows of a parameter that this rank holds."""
    if not isinstance(p, DTensor):
        return 0, len(p)
    count, index = p.device_mesh.size(-1), p.device_mesh.get_local_rank(-1)
    size = -(-len(p) // count)
    return min(index * size, len(p)), min((index + 1) * size, len(p))


def as_rows_of(p, rows, device):
    """Rows `rows_of(p)` of a tensor, anywhere and in any dtype, as what p is: in its dtype, on the device, sharded as
    it is. p may be on "meta"."""
    rows = rows.to(device, p.dtype)
    if not isinstance(p, DTensor):
        return rows
    return DTensor.from_local(rows, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def my_rows(whole, p):
    """Rows `rows_of(p)` of a whole tensor, of which no more is kept."""
    first, stop = rows_of(p)
    return whole if stop - first == len(whole) else whole[first:stop].clone()


def draw_parameters(model, device):
    """Gives those of a model's parameters that are on "meta" what they start from, by its `initialise`. One whole
    tensor is held at a time."""
    drawn = {}
    for name, p in model.named_parameters():
        if p.is_meta:
            whole = torch.empty(p.shape)
            model.initialise(name, whole)
            drawn[name] = as_rows_of(p, my_rows(whole, p), device)
    model.load_state_dict(drawn, strict=False, assign=True)


def local(t):
    """The rows that this rank holds."""
    return t.to_local() if isinstance(t, DTensor) else t


def is_sharded(model):
    return isinstance(model, FSDPModule)


def gather_whole(t):
    """The whole tensor. Of a sharded one every rank must ask for it."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def gradient_norm(parameters):
    """The norm of all their gradients together: 0-d float64. Of sharded ones every rank must ask for it.

    Each row is added up in float32, as it is, and the rows in float64. Sharding cuts no row, so that it does not change
    the norm. (torch's adds up whole matrices in float32: on a CPU that of 49,152 x 576 numbers is off by 0.16%.)
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = []                       # of rows, and the numbers of vectors
    for gradient in gradients:
        rows = local(gradient)
        if rows.dim() > 1:
            rows = torch.linalg.vector_norm(rows, dim=-1)
        norms.append(rows.flatten())
    norm = torch.linalg.vector_norm(torch.cat(norms), dtype=torch.float64)
    if isinstance(gradients[0], DTensor):
        square = norm.square()
        dist.all_reduce(square, group=gradients[0].device_mesh.get_group(-1))
        norm = square.sqrt()
    return norm
