"""Selected neurons as the only trainable parameters of a model.

The trick, in ten lines. A weight W is frozen; of it, the neurons with the sorted flat indices I are to be trained.
A parameter `values` of shape [K_t] holds W.flat[I] in float32: it is the master copy, and the only thing that an
optimizer, a gradient buffer, a clipping norm, a checkpoint, a ZeRO partition or an all-reduce ever sees, so all of
them have the size of K and need no changes. A parametrization stands where the module reads W: it hands on an alias
of W (made from `.data`, so autograd sees no write) whose backward takes the dense gradient of W, gathers its
entries I, casts these to float32 and lets autograd add them to `values.grad`. The dense gradient dies there, layer by
layer; that of an embedding or a head, the largest of all, is never made (`handover`). After an optimizer step `write()`
scatters `values` into W, cast to W's dtype, once a tensor.
Neurons outside I are never written, so they stay bit-identical, whatever the weight decay.
A tensor without a selected neuron stays plain and frozen: its weight gradient is never even computed.
Where everything is selected (dense) there is no index, and a float32 W shares its storage with `values`.

Shapes: N_t neurons of tensor t, K_t selected ones. Values and their gradients are float32 [K_t]; W has any
floating-point dtype and shape.

Sharded weights (ZeRO-3). The engine may hold only a slice of the flat W on each rank. Gather `values` tensor by
tensor after a step and give each rank's slice to `Neurons.write_shard`; every later gather of W is then right. The
engine gathers W for the parametrization, a module of its own, and lets go of it right after; the alias keeps it in
memory for the matrix product, and for as long as autograd keeps the alias. That is until the backward pass, unless the
layer is computed again there: so gradient checkpointing is what keeps the weights of all layers but one sharded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from allo_ray.errors import UserError
from allo_ray.neurons.handover import Handover
from allo_ray.neurons.selection import Selection, floating_parameters


class SelectedEntries(nn.Module):
    """Parametrization of one weight: `values` float32 [K_t] trains, `indices` says where they belong (None: dense)."""

    indices: Tensor | None

    def __init__(self, values: Tensor, indices: Tensor | None) -> None:
        super().__init__()
        self.values = nn.Parameter(values)
        self.register_buffer("indices", indices, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """Takes the frozen weight, returns its alias, which requires a gradient wherever `values` does."""
        return Handover.apply(self.values, weight, self.indices)  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class Attached:
    """One tensor with trained neurons: its Hugging Face name, the frozen weight, its parametrization, its places."""

    name: str
    weight: nn.Parameter
    entries: SelectedEntries
    places: list[tuple[nn.Module, str]]


class Neurons:
    """The trainable neurons of a model; made by `attach`."""

    def __init__(self, model: nn.Module, selection: Selection, attached: list[Attached]) -> None:
        self.model = model
        self.selection = selection
        self.attached = attached

    def parameters(self) -> list[nn.Parameter]:
        """The `values` of every tensor with a selected neuron, float32 [K_t], in the model's order."""
        return [tensor.entries.values for tensor in self.attached]

    def named_values(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(Hugging Face name, `values`), in the order of `parameters()`."""
        return ((tensor.name, tensor.entries.values) for tensor in self.attached)

    @property
    def count(self) -> int:
        """K, the number of trainable neurons."""
        return self.selection.count

    @torch.no_grad()
    def write(self) -> None:
        """Puts `values` into the weights, cast to their dtype. Call it after each optimizer step."""
        for tensor in self.attached:
            _write(tensor.weight.data.view(-1), tensor.entries.values.data, tensor.entries.indices)

    @torch.no_grad()
    def write_shard(self, name: str, values: Tensor, shard: Tensor, start: int) -> None:
        """Puts the part of one tensor's values that falls into a slice of its flat weight there.

        Args:
            name: the tensor.
            values: float32 [K_t], all values of the tensor.
            shard: [n], the slice [start, start + n) of the flat weight; may reach past its end (padding).
            start: flat index of the slice's first neuron.
        """
        indices = {tensor.name: tensor.entries.indices for tensor in self.attached}[name]
        size = self.selection.size_of(name)
        stop = min(start + len(shard), size)
        if indices is None:
            shard[: max(stop - start, 0)].copy_(values[start:stop])
            return
        bounds = torch.tensor([start, stop], dtype=indices.dtype, device=indices.device)
        low, high = torch.searchsorted(indices, bounds).tolist()
        _write(shard, values[low:high], indices[low:high] - start)

    @torch.no_grad()
    def load_values(self, values: Mapping[str, Tensor]) -> None:
        """Sets every tensor's values (float32 [K_t], by name; from a checkpoint or a delta) and writes them."""
        for name, own in self.named_values():
            own.data.copy_(values[name])
        self.write()

    def detach(self) -> None:
        """Takes the parametrizations off: the model is a plain one again, with the trained weights, all frozen."""
        for tensor in self.attached:
            for module, attribute in tensor.places:
                if isinstance(module, nn.Embedding):
                    module.sparse = False
                parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)


def attach(
    model: nn.Module,
    selection: Selection,
    masters: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | None = None,
) -> Neurons:
    """Freezes a model and makes the selected neurons its only trainable parameters.

    Args:
        model: holds weights of any floating-point dtype, complete (not yet sharded) on one device.
        selection: which neurons; its tensors must be the model's.
        masters: float32 tensors of the model, as a mapping or a stream of (name, tensor), such as
            `delta.iter_masters` gives. Each is put into its weight (cast) and gives the start of `values`. Without
            them, or for tensors that they leave out, the start is what the model holds.

    Returns:
        The handle on the trainable neurons. The model holds `values` as parameters named
        `<module>.parametrizations.<attribute>.0.values`.

    Raises:
        UserError: the selection was made for another model; names the first tensor that differs.
    """
    weights = dict(floating_parameters(model))
    _check(selection, weights)
    for weight in model.parameters():
        weight.requires_grad_(False)
    values: dict[str, Tensor] = {}
    for name, master in masters.items() if isinstance(masters, Mapping) else masters or ():
        if name in weights:
            weights[name].data.copy_(master)
            if not _shared(selection, weights[name]):
                values[name] = _gather(master.to(weights[name].device), selection, name)
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, weight in module.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(id(weight), []).append((module, attribute))
    attached = []
    for name in selection.names:
        if selection.count_of(name) == 0:
            continue
        weight = weights[name]
        weight.data = weight.data.contiguous()
        if _shared(selection, weight):
            start = weight.data.view(-1)
        else:
            start = values.pop(name) if name in values else _gather(weight.data, selection, name)
        entries = SelectedEntries(
            start, None if selection.dense else selection.indices[name].to(weight.device)
        )
        for module, attribute in places[id(weight)]:
            if isinstance(module, nn.Embedding) and not selection.dense:
                # Its gradient then has the rows of a batch's tokens alone, not all V of them; see `handover`.
                module.sparse = True
            parametrize.register_parametrization(module, attribute, entries, unsafe=True)
        attached.append(Attached(name, weight, entries, places[id(weight)]))
    neurons = Neurons(model, selection, attached)
    neurons.write()
    return neurons


def _shared(selection: Selection, weight: Tensor) -> bool:
    """Whether `values` are the weight itself, in one storage."""
    return selection.dense and weight.dtype == torch.float32


def _gather(master: Tensor, selection: Selection, name: str) -> Tensor:
    """The selected entries of one full tensor, float32 [K_t], in storage of their own."""
    flat = master.detach().reshape(-1)
    if selection.dense:
        return flat.to(torch.float32, copy=True)
    if name not in selection.indices:
        return flat.new_empty(0, dtype=torch.float32)
    return flat.index_select(0, selection.indices[name].to(flat.device)).float()


def _write(target: Tensor, values: Tensor, indices: Tensor | None) -> None:
    """Writes values [K_t] into a flat tensor at `indices` (None: everywhere), cast to its dtype."""
    if indices is not None:
        target.index_copy_(0, indices.long(), values.to(target.dtype))
    elif target.data_ptr() != values.data_ptr():
        target.copy_(values)


def _check(selection: Selection, weights: Mapping[str, Tensor]) -> None:
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    for name in selection.names:
        if shapes.get(name) != selection.shapes[name]:
            raise UserError(
                f"the selection holds tensor {name} of shape {selection.shapes[name]}, the model has "
                f"{shapes.get(name, 'no such tensor')}. Locate the neurons on this model, or train the model they "
                "were located on."
            )
