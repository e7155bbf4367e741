"""Layers that only rearrange numbers: Flatten, Reshape, Permute, ShuffleChannel."""

from __future__ import annotations

from math import prod

import numpy as np

from ..graph import Value
from ..shapes import BATCH, ROIS, Dim, Shape, Symbol, axis_of, known, text
from .converters import LayerContext, converts

_MAX_SHUFFLED = 2**20


@converts("Flatten")
def flatten(ctx: LayerContext) -> list[Value]:
    """Caffe's Flatten: merge the axes from `axis` to `end_axis` into one."""
    data, param = ctx.bottom(), ctx.param.flatten_param
    first = ctx.axis(param.axis, data)
    last = ctx.axis(param.end_axis, data, "end_axis")
    if last < first:
        ctx.fail(f"end_axis {param.end_axis} is before axis {param.axis}")
    merged = _merged(ctx, data.shape[first : last + 1])
    return [ctx.reshape(data, (*data.shape[:first], merged, *data.shape[last + 1 :]))]


def _merged(ctx: LayerContext, dims: Shape) -> Dim:
    symbols = [dim for dim in dims if isinstance(dim, Symbol)]
    count = prod(_factor(dim) for dim in dims)
    if not symbols:
        return count
    if any(_is_batch(dim) for dim in dims):
        if len(symbols) > 1 or prod(_factor(dim) for dim in dims[: dims.index(symbols[0])]) != 1:
            ctx.fail("flattening would mix the images of a batch")
        return Symbol(symbols[0].name, count)
    return dims[0] if len(dims) == 1 else Symbol(f"flat{text(dims)}")


@converts("Reshape")
def reshape(ctx: LayerContext) -> list[Value]:
    """Caffe's Reshape: `shape` replaces `num_axes` axes from `axis` on. A size of 0 keeps the size; -1 infers it.

    A literal size can include the declared batch size B, and nothing in the layer marks it. So the batch goes to the
    first axis with as many elements before it as the batch had and a size divisible by B: a literal L means L / B rows
    per image.
    """
    data = ctx.bottom()
    wanted, before, after = _requested(ctx, data)
    shape: list[Dim | None] = [*before, *wanted, *after]
    if any(isinstance(dim, Symbol) and not _is_batch(dim) for dim in data.shape):
        return [ctx.reshape(data, _with_free_sizes(ctx, data, shape))]
    batch = next((dim for dim in data.shape if isinstance(dim, Symbol)), None)
    total = prod(_factor(dim) for dim in data.shape)
    if batch is not None:
        _place_batch(ctx, data, shape, batch, total)
    else:
        _fill(ctx, shape, total)
    result = tuple(dim for dim in shape if dim is not None)
    if prod(_factor(dim) for dim in result) != total:
        ctx.fail(f"{text(data.shape)} and {text(result)} have different numbers of elements")
    return [ctx.reshape(data, result)]


def _requested(ctx: LayerContext, data: Value) -> tuple[list[Dim | None], Shape, Shape]:
    """Return the requested sizes (None for -1), and the sizes that stay before and after them."""
    param, rank = ctx.param.reshape_param, len(data.shape)
    start = axis_of(param.axis, rank + 1)
    if param.num_axes < -1:
        ctx.fail(f"num_axes is {param.num_axes}")
    stop = rank if param.num_axes == -1 else start + param.num_axes
    if stop > rank:
        ctx.fail(f"num_axes {param.num_axes} from axis {param.axis} exceeds the {rank} axes of the bottom")
    sizes: list[Dim | None] = []
    for i, size in enumerate(param.shape.dim):
        if size == 0 and start + i >= rank:
            ctx.fail(f"a size of 0 keeps axis {start + i}, which does not exist")
        if size < -1 or size >= 2**31:
            ctx.fail(f"a size is {size}")
        sizes.append(data.shape[start + i] if size == 0 else None if size == -1 else size)
    if sizes.count(None) > 1:
        ctx.fail("has more than one -1")
    return sizes, data.shape[:start], data.shape[stop:]


def _place_batch(ctx: LayerContext, data: Value, shape: list[Dim | None], batch: Symbol, total: int) -> None:
    """Complete `shape` in place, with as many elements before the batch as in `data`.

    `total` is the number of elements per image.
    """
    outside = prod(_factor(dim) for dim in data.shape[: data.shape.index(batch)])
    kept = any(isinstance(dim, Symbol) for dim in shape)
    # If the declared batch is unknown, only -1 means the same for every batch.
    declared = ctx.batch if batch.name == BATCH else 0
    inferred = shape.index(None) if None in shape else -1
    _fill(ctx, shape, total if kept else total * (declared or 1))
    passed = 1
    for i, dim in enumerate(shape):
        if isinstance(dim, Symbol) and passed == outside:
            return
        possible = isinstance(dim, int) and (dim % declared == 0 if declared else i == inferred)
        if isinstance(dim, int) and not kept and passed == outside and possible:
            shape[i] = Symbol(batch.name, dim // (declared or 1))
            return
        passed *= _factor(dim or 1)
    wanted = text([-1 if dim is None else dim for dim in shape])
    ctx.fail(f"reshaping {text(data.shape)} to {wanted} would mix the images of a batch")


def _fill(ctx: LayerContext, shape: list[Dim | None], total: int) -> None:
    if None in shape:
        others = prod(_factor(dim) for dim in shape if dim is not None)
        shape[shape.index(None)] = _share(ctx, total, others)


def _share(ctx: LayerContext, total: int, others: int) -> int:
    if others < 1 or total % others:
        ctx.fail(f"{total} elements are not divisible by {others}")
    return total // others


def _with_free_sizes(ctx: LayerContext, data: Value, shape: list[Dim | None]) -> Shape:
    """Return the new shape of data with a symbolic height or width; -1 becomes a symbol of its own."""
    if shape and shape[0] == ctx.batch and data.shape[0] == Symbol(BATCH):
        shape[0] = data.shape[0]
    if not shape or shape[0] != data.shape[0]:
        ctx.fail("must keep the batch on axis 0 if height and width are unknown")
    dropped = [dim for dim in data.shape if isinstance(dim, Symbol) and dim not in shape]
    if dropped and None not in shape:
        ctx.fail("needs a known height and width, or a -1 in their place")
    return tuple(Symbol(f"reshape({ctx.name})") if dim is None else dim for dim in shape)


@converts("Permute")
def permute(ctx: LayerContext) -> list[Value]:
    """SSD's Permute: the axes in the given order, followed by the axes that it does not list."""
    data = ctx.bottom()
    order = list(ctx.param.permute_param.order)
    if len(set(order)) != len(order) or any(axis >= len(data.shape) for axis in order):
        ctx.fail(f"the order {order[:8]} is not a permutation of {len(data.shape)} axes")
    order += [axis for axis in range(len(data.shape)) if axis not in order]
    moved = [axis for axis in order if data.shape[axis] != 1]
    if moved == sorted(moved) and sum(isinstance(dim, Symbol) for dim in data.shape) < 2:
        # Only axes with one element move, so the numbers keep their order.
        return [ctx.reshape(data, tuple(data.shape[axis] for axis in order))]
    return [ctx.transpose(data, order)]


@converts("ShuffleChannel")
def shuffle_channel(ctx: LayerContext) -> list[Value]:
    """ShuffleNet's ShuffleChannel: channel i of group g becomes channel i * groups + g."""
    data, groups = ctx.bottom(), ctx.param.shuffle_channel_param.group
    if len(data.shape) < 2:
        ctx.fail("its bottom has no channel axis")
    channels = known(data.shape[1], "the number of channels")
    if channels > _MAX_SHUFFLED:
        ctx.fail(f"{channels} channels exceed the limit of {_MAX_SHUFFLED}")
    if groups < 1 or channels % groups:
        ctx.fail(f"{channels} channels cannot be split into {groups} groups")
    # One Gather of whole planes instead of the three nodes Reshape, Transpose, Reshape: it moves the data once.
    order = np.arange(channels).reshape(groups, -1).T.reshape(-1)
    return [ctx.emit("Gather", [data, ctx.constant(order, "order")], data.shape, axis=1)]


def _factor(dim: Dim) -> int:
    return dim.factor if isinstance(dim, Symbol) else dim


def _is_batch(dim: Dim) -> bool:
    return isinstance(dim, Symbol) and dim.name in (BATCH, ROIS)
