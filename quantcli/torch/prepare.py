"""Prepare a live model: layers become twins that quantize, whose ranges are observed, learned, and frozen."""

from __future__ import annotations

import fnmatch
import inspect
import logging
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from calibration.errors import DataError, ReportedError
from calibration.observers import Counting, TensorStatistics
from calibration.ranges import Grid, observer_for, parse_range, range_of
from quantcli.arithmetic.affine import IntegerType
from quantcli.errors import PlanError, UsageError
from quantcli.load.exporter import reason, where
from quantcli.recipe import Recipe, resolve_target
from quantcli.torch.floats import is_prepared
from quantcli.torch.given import check_weight, checked
from quantcli.torch.layers import (
    TWINS,
    Add,
    QuantAdd,
    QuantFunctional,
    Quantizing,
    addition_modules,
    channel_axis,
    copied,
    names_of,
    passed_over,
    put,
    swapped_as,
    twin_of,
)
from quantcli.torch.normalization import Folded, norm_twin, normalized
from quantcli.torch.quantizers import (
    PASSES,
    ActivationQuantizer,
    DorefaActivation,
    DorefaWeight,
    WeightQuantizer,
    check_bits,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

logger = logging.getLogger(__name__)

SCHEMES = ("affine", "dorefa")


def prepare(
    model: nn.Module,
    recipe: Recipe | None = None,
    *,
    weight_bits: int | None = None,
    activation_bits: int | None = None,
    scheme: str = "affine",
    quant_inference: bool = False,
    inplace: bool = False,
) -> nn.Module:
    """Swap a model's layers for twins that quantize their input and their weight.

    Conv1d, 2d and 3d, ConvTranspose1d, 2d and 3d, Linear, `quantcli.torch.Add` and PyTorch's FloatFunctional are swapped. A copy
    is prepared; the model stays as it is.

    Args:
        model: A float module.
        recipe: Target, widths, ``[layers] include`` and ``exclude`` (patterns of the modules' names, or ``op:Linear``), and the
            observer; None for the defaults.
        weight_bits: Width of weights, 2 to 16; 32 leaves them float. None for the recipe's.
        activation_bits: Width of activations, likewise.
        scheme: ``affine`` or ``dorefa``.
        quant_inference: Whether the weights are on their grids already, and pass through.
        inplace: Whether to change the model itself.

    Returns:
        The prepared model. An affine one wants `calibrate` before it runs.

    Raises:
        ModelError: If a layer computes its weight (weight_norm, spectral_norm, pruning), or the model cannot be copied.
        UsageError: If a width, the scheme or a pattern has no meaning, or nothing is left to swap.
    """
    model, given = checked(model, recipe), model
    if model is not given:
        logger.warning("the module inside %s is prepared: wrap what prepare returns", type(given).__name__)
    if scheme not in SCHEMES:
        raise UsageError(f"there is no scheme '{scheme}'", f"known: {', '.join(SCHEMES)}")
    making = Making(recipe or Recipe(), weight_bits, activation_bits, scheme, quant_inference)
    chosen = making.chosen(model)
    if not chosen:
        raise UsageError("the model holds no layer that could be prepared", "look at its modules, and at the patterns")
    for name in chosen:
        check_weight(model.get_submodule(name), name)
    prepared = model if inplace else copied(model)
    norms = normalized(prepared) if making.folds else {}
    places = names_of(prepared)
    for layer in [prepared.get_submodule(name) for name in chosen]:
        put(prepared, places[layer], making.twin(layer))
    for name, norm in norms.items():
        layer = prepared.get_submodule(name)
        if isinstance(layer, Quantizing) and channel_axis(layer) is not None:
            put(prepared, [norm], norm_twin(prepared.get_submodule(norm), layer))
    for module in prepared.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            # Its shortcut for evaluation reads the layers' weights itself, past the twins, unless it does not know the activation.
            module.activation_relu_or_gelu = 0
    return prepared


def check_prepared(model: nn.Module) -> None:
    """Check that a model holds twins.

    Raises:
        UsageError: If it holds none.
    """
    if not is_prepared(model):
        raise UsageError(
            "the model is not prepared", "give what prepare returned: without inplace=True, that is a copy"
        )


def parametrized(module: nn.Module) -> bool:
    """Tell whether a module is a layer that computes its parameters."""
    return isinstance(module, tuple(TWINS)) and is_parametrized(module)


class Making:
    """How twins are made."""

    def __init__(
        self, recipe: Recipe, weight_bits: int | None, activation_bits: int | None, scheme: str, already: bool
    ) -> None:
        target = resolve_target(recipe)
        self.recipe, self.scheme, self.already = recipe, scheme, already
        grid = IntegerType(target.activation.grid)
        self.signed, self.symmetric = grid.signed, target.activation.symmetric
        self.per_channel = target.weight.per_channel
        self.activation_bits = check_bits(grid.bits if activation_bits is None else activation_bits, "activations")
        self.weight_bits = check_bits(target.weight.bits if weight_bits is None else weight_bits, "weights")
        if IntegerType(target.activation.dtype).bits < self.activation_bits != PASSES:
            logger.warning(
                "activations of %d bits do not fit %s: convert takes them with Recipe(activation=Activation(dtype='int16'))",
                self.activation_bits,
                target.activation.dtype,
            )

    @property
    def folds(self) -> bool:
        """Whether layers have grids onto which the biases of folded BatchNorms are rounded."""
        return self.scheme == "affine" and self.per_channel and PASSES not in {self.activation_bits, self.weight_bits}

    def chosen(self, model: nn.Module) -> list[str]:
        """Return the names of the modules that are swapped.

        Raises:
            UsageError: If a pattern matches none.
        """
        kinds = addition_modules()
        names = [
            name
            for name, module in model.named_modules()
            if name and (type(module) in kinds or swapped_as(module) or parametrized(module))
        ]
        if not names and (type(model) in kinds or swapped_as(model)):
            raise UsageError(
                "the model is a single layer, which has no place to put its twin", "wrap it in nn.Sequential"
            )
        others = [name for name, module in model.named_modules() if passed_over(module)]
        known, places = names + others, names_of(model)

        def matches(name: str, pattern: str) -> bool:
            module, kind = model.get_submodule(name), pattern.removeprefix("op:")
            if kind != pattern:
                return kind in {type(module).__name__, getattr(swapped_as(module), "__name__", None)}
            return any(fnmatch.fnmatchcase(other, pattern) for other in places[module])

        def matching(pattern: str) -> list[str]:
            found = [name for name in known if matches(name, pattern)]
            if not found:
                raise UsageError(f"the pattern '{pattern}' matches no layer", f"layers: {', '.join(known[:8])}")
            return found

        layers = self.recipe.layers
        included = {name for pattern in layers.include for name in matching(pattern)} if layers.include else set(known)
        wanted = included - {name for pattern in layers.exclude for name in matching(pattern)}
        if left := [f"'{name}' ({type(model.get_submodule(name)).__name__})" for name in others if name in wanted]:
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            logger.warning("not prepared, for they compute in their own way: %s%s", ", ".join(left[:3]), more)
        return [name for name in names if name in wanted]

    def twin(self, layer: nn.Module) -> nn.Module:
        """Return the twin of a layer."""
        if type(layer) in addition_modules():
            kind = QuantAdd if isinstance(layer, Add) else QuantFunctional
            return kind(self.activation(), self.activation())
        return twin_of(layer, self.activation(), self.weight(layer))

    def activation(self) -> nn.Module:
        """Return a quantizer of activations."""
        if self.activation_bits == PASSES:
            return nn.Identity()
        if self.scheme == "dorefa":
            return DorefaActivation(self.activation_bits)
        sign = "" if self.signed else "u"
        return ActivationQuantizer(IntegerType(f"{sign}int{self.activation_bits}"), self.symmetric)

    def weight(self, layer: nn.Module) -> nn.Module:
        """Return a quantizer of a layer's weight."""
        if self.weight_bits == PASSES:
            return nn.Identity()
        kind = DorefaWeight if self.scheme == "dorefa" else WeightQuantizer
        return kind(self.weight_bits, channel_axis(layer) if self.per_channel else None, self.already)


def quantizers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the affine quantizers of activations, by name."""
    for name, module in model.named_modules():
        if isinstance(module, ActivationQuantizer):
            yield name, module


def spare_quantizers(model: nn.Module) -> set[nn.Module]:
    """Return the quantizers that nothing may reach: those of modules that may do other things than add."""
    sums = [module for module in model.modules() if isinstance(module, QuantFunctional)]
    return {quantizer for module in sums for quantizer in (module.first_quantizer, module.second_quantizer)}


def calibrate(model: nn.Module, loader: Iterable[Any], recipe: Recipe | None = None) -> nn.Module:
    """Run data through a prepared model in float, and set the ranges of its activations.

    Args:
        model: What `prepare` returned; it is changed, and left in the mode (training or not) that it was in.
        loader: Batches: tensors; tuples or lists of the arguments that ``forward`` needs, in order (labels may follow), or that
            begin with such a tuple; or dicts by argument.
        recipe: The observer (``[calibration]``) and the range (``[activation]``); None for the lowest and highest value.

    Returns:
        The same model.

    Raises:
        DataError: If there is no batch, the model does not take one, or values are not finite.
        PlanError: If a quantizer is not reached.
        UsageError: If the model is not prepared, or something is of another type.
    """
    whole, model = model, checked(model, recipe, loader)
    check_prepared(model)
    recipe = recipe or Recipe()
    spec = parse_range(recipe.activation.range or recipe.calibration.observer or "minmax")
    counting = Counting(recipe.calibration.observer or observer_for(spec), momentum=recipe.calibration.momentum)
    seen: dict[str, TensorStatistics] = {}
    handles = []

    def observing(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            del module
            values = arguments[0].detach().float().cpu().numpy()
            if name not in seen:
                seen[name] = TensorStatistics.for_counting(counting)
                seen[name].prepare(values, len(values), counting)
            seen[name].update(values, 0, len(values), counting)

        return hook

    training = {module: module.training for module in model.modules()}
    with passing(model):
        handles = [module.register_forward_pre_hook(observing(name)) for name, module in quantizers(model)]
        try:
            count = sum(1 for batch in loader if run(model, batch))
        finally:
            for handle in handles:
                handle.remove()
            for module, mode in training.items():
                module.training = mode
    if not count:
        raise DataError("the loader yields no batch", "give at least one")
    spare = spare_quantizers(model)
    for name, module in quantizers(model):
        if name not in seen and module in spare:
            continue
        if name not in seen:
            raise PlanError(f"the data does not reach '{name}'", "exclude its layer, or give data that reaches it")
        if (histogram := seen[name].histogram) is not None:
            histogram.flush()
        grid = Grid(module.integer.qmax - module.integer.qmin, module.symmetric)
        lo, hi = range_of(spec, name, seen[name], grid)
        with torch.no_grad():
            module.lo.fill_(float(np.float32(lo)))
            module.hi.fill_(float(np.float32(hi)))
    return whole


class passing:  # noqa: N801 - it reads as what it does
    """Let a prepared model run in float, in evaluation mode, while its ranges are observed."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.handles: list[Any] = []

    def __enter__(self) -> None:
        self.model.eval()
        for module in self.model.modules():
            if isinstance(module, (ActivationQuantizer, WeightQuantizer)):
                self.handles.append(Bypass(module, "forward"))
            elif isinstance(module, Quantizing):
                self.handles.append(Bypass(module, "rounded_bias"))
            elif isinstance(module, Folded):
                self.handles.append(Bypass(module, "moved"))

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


class Bypass:
    """Let a method that rounds return what it is given."""

    def __init__(self, module: nn.Module, method: str) -> None:
        self.module, self.method = module, method
        setattr(module, method, lambda x: x)

    def remove(self) -> None:
        """Let it round again."""
        delattr(self.module, self.method)


def run(model: nn.Module, batch: Any) -> bool:
    """Run a batch of a loader.

    Raises:
        DataError: If the model does not take it.
    """
    arguments, keywords = taken_of(batch, model)
    try:
        with torch.no_grad():
            model(*arguments, **keywords)
    except ReportedError:
        raise
    except Exception as error:
        raise DataError(
            f"the model fails on a batch of the loader ({reason(error)}){where(error)}", "yield what its forward takes"
        ) from error
    return True


def taken_of(batch: Any, model: nn.Module) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Return what a model is called with for a batch; entries that it does not take, such as labels, are left out.

    Raises:
        DataError: If the batch lacks what the model needs.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    named = [p for p in parameters if p.kind in {p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY}]
    needed = [p.name for p in named if p.default is p.empty]
    arguments, keywords = arguments_of(batch, max(len(needed), 1))
    lacking = [name for name in needed[len(arguments) :] if name not in keywords]
    if lacking:
        held = f"{len(arguments)} tensors" if arguments else ", ".join(map(str, keywords)) or "nothing"
        raise DataError(
            f"the loader's batches hold no '{lacking[0]}' (they hold {held})",
            f"yield dicts by the arguments of forward, or tuples in their order: {', '.join(p.name for p in named)}",
        )
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = {p.name for p in named}
    return arguments, {name: value for name, value in keywords.items() if anything or name in names}


def arguments_of(batch: Any, count: int) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Return what a loader's batch is called with: the first tensors of a tuple (or of one in its front), a dict by its names.

    Args:
        batch: The batch.
        count: How many tensors are called for; what stands behind them are labels.

    Raises:
        DataError: If it is none of them.
    """
    if isinstance(batch, Mapping):
        return (), dict(batch)
    entries = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
    if entries and isinstance(entries[0], (Mapping, tuple, list)):
        return arguments_of(entries[0], count)
    if not entries or not all(isinstance(entry, torch.Tensor) for entry in entries[:count]):
        raise DataError(
            f"the loader yields {type(batch).__name__}", "yield tensors, tuples that begin with them, or dicts of them"
        )
    return entries[:count], {}


def freeze(model: nn.Module) -> nn.Module:
    """Fix what was learned: ranges learn no more, and weights and biases are put onto their grids.

    Args:
        model: A prepared model; it is changed, and left in evaluation mode.

    Returns:
        The same model. It gives what it gave before, in evaluation mode: a parameter of several modules becomes a layer's own.

    Raises:
        PlanError: If a quantizer has no range.
        UsageError: If the model is not prepared.
    """
    whole, model = model, checked(model)
    check_prepared(model)
    spare = spare_quantizers(model)
    for name, module in quantizers(model):
        if not module.ready and module not in spare:
            raise PlanError(f"'{name}' has no range yet", "calibrate the prepared model first")
        module.lo.requires_grad_(False)
        module.hi.requires_grad_(False)
    owners = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    for layer in model.modules():
        if isinstance(layer, Quantizing) and isinstance(layer.weight_quantizer, WeightQuantizer):
            with torch.no_grad():
                fix(layer, "bias", layer.rounded_bias(layer.bias), owners)
                fix(layer, "weight", layer.weight_quantizer(layer.weight), owners)
            layer.weight_quantizer.already = layer.frozen = True
    return whole.eval()


def fix(layer: nn.Module, name: str, values: Tensor | None, owners: Mapping[int, int]) -> None:
    """Give a parameter the values of its grid, apart from the other modules that own it."""
    parameter = getattr(layer, name)
    if parameter is None or values is None:
        return
    if owners[id(parameter)] > 1:  # the others read it as it is
        parameter = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
        setattr(layer, name, parameter)
    parameter.copy_(values)
