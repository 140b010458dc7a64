"""What a user gives as a model: taken out of its wrappers, and looked at."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrize import is_parametrized
from torch.optim.swa_utils import AveragedModel

from quantcli.errors import ModelError, UsageError, kind_of
from quantcli.recipe import checked_recipe
from quantcli.torch.layers import TWINS

WRAPPERS = (nn.DataParallel, DistributedDataParallel, AveragedModel)


def bare(model: nn.Module) -> nn.Module:
    """Return the module that is inside of what parallelizes, averages or compiles it; any other as it is."""
    while True:
        inner = model.module if isinstance(model, WRAPPERS) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def checked(model: Any, recipe: Any = None, loader: Any = ()) -> nn.Module:
    """Return the module that a user gives, without its wrappers.

    Raises:
        ModelError: If torch has scripted or quantized a part of it, or it is lazy and was never run.
        UsageError: If an argument is not of the type that it is to be of.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"the model is {kind_of(model)}", "give a torch.nn.Module; quantcli.convert takes files")
    checked_recipe(recipe)
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise UsageError(f"the loader is {kind_of(loader)}", "give something that yields batches: a DataLoader, a list")
    inner = bare(model)
    for name, module in inner.named_modules():
        place = f"'{name}'" if name else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            remedy = "give the module that it was made from"
            if not name:
                remedy += ", or save it with torch.jit.save and give quantcli.convert the file"
            raise ModelError(f"{place} is TorchScript, which is no live module", remedy)
        if hasattr(module, "_packed_params"):
            raise ModelError(f"{place} ({type(module).__name__}) was quantized by torch", "give the float model")
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
            raise ModelError(f"{place} ({type(module).__name__}) has no weights yet", "run the model on a batch first")
    return inner


def check_weight(layer: nn.Module, name: str) -> None:
    """Check that a layer's parameters are its own, and float32.

    Raises:
        ModelError: If they are computed from others, or are not float32.
    """
    own = dict(layer.named_parameters(recurse=False))
    for parameter in own.values():
        if parameter.dtype != torch.float32:
            kind = str(parameter.dtype).removeprefix("torch.")
            raise ModelError(f"'{name}' is {kind}, and what is prepared is float32", "call model.float() first")
    if is_parametrized(layer) or (isinstance(layer, tuple(TWINS)) and "weight" not in own):
        raise ModelError(
            f"'{name}' computes its parameters from others (weight_norm, spectral_norm, pruning or another parametrization)",
            "remove that first: torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight'), remove_weight_norm, "
            "remove_spectral_norm or prune.remove; or exclude the layer",
        )
