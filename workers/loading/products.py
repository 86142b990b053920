"""Matrix products on the CPU: through the faster library, and of LoRA layers in one step.

torch hands products in float32 to MKL, which on AMD's processors uses half of their width; oneDNN, which torch carries
as well, uses all of it and is as exact. A LoRA layer as peft writes it makes seven tensors of the layer's size on its
way forth and back; here its small products are added into the large one.

What a layer computes stays the same, up to the order of sums. Nothing is chosen by a clock, so that equal runs on equal
machines leave equal bytes.
"""

import functools
from pathlib import Path
from typing import Any

from workers.loading.devices import Compute

CPU_INFO = Path("/proc/cpuinfo")


def quicken(model: Any, compute: Compute) -> Any:
    """Makes a model's linear and LoRA layers quick, where it computes in float32 on a CPU; returns the model.

    To be called when its adapters are attached. Layers keep their names, weights and places.
    """
    if compute != Compute("cpu", "float32"):
        return model
    import torch
    from peft.tuners.lora.layer import Linear as LoraLinear

    linear, lora = _classes()
    for module in model.modules():
        if type(module) is torch.nn.Linear and wide_only_in_onednn():
            module.__class__ = linear
        elif type(module) is LoraLinear and not module.fan_in_fan_out:
            module.__class__ = lora
    return model


@functools.cache
def wide_only_in_onednn() -> bool:
    """Whether this is an AMD processor with AVX-512, on which MKL does not use it."""
    import torch

    try:
        amd = "AuthenticAMD" in CPU_INFO.read_text()
    except OSError:
        return False
    return amd and bool(torch.backends.mkldnn.is_available()) and torch.backends.cpu.get_cpu_capability() == "AVX512"


@functools.cache
def _classes() -> tuple[type, type]:
    """Subclasses of ``torch.nn.Linear`` and of peft's LoRA layer."""
    import torch
    from peft.tuners.lora.layer import Linear as LoraLinear
    from torch.autograd.function import once_differentiable

    onednn = torch.ops.mkldnn._linear_pointwise

    def product(rows: Any, weight: Any, bias: Any = None) -> Any:
        """rows · weightᵀ (+ bias), both of two dimensions."""
        if wide_only_in_onednn():
            return onednn(rows, weight, bias, "none", [], "")
        return torch.nn.functional.linear(rows, weight, bias)

    def flat(tensor: Any) -> Any:
        return tensor.reshape(-1, tensor.shape[-1])

    class Product(torch.autograd.Function):  # type: ignore[misc]
        @staticmethod
        def forward(ctx: Any, x: Any, weight: Any, bias: Any) -> Any:
            ctx.save_for_backward(x if weight.requires_grad else None, weight)
            return product(flat(x), weight, bias).view(*x.shape[:-1], -1)

        @staticmethod
        @once_differentiable  # type: ignore[untyped-decorator]
        def backward(ctx: Any, grad: Any) -> Any:
            x, weight = ctx.saved_tensors
            rows = flat(grad)
            of_x, of_weight, of_bias = ctx.needs_input_grad
            return (
                product(rows, weight.t()).view(*grad.shape[:-1], -1) if of_x else None,
                product(rows.t(), flat(x).t()) if of_weight else None,
                rows.sum(0) if of_bias else None,
            )

    class LoraProduct(torch.autograd.Function):  # type: ignore[misc]
        """x Wᵀ + bias + s · (d Aᵀ) Bᵀ, where d is x after dropout."""

        @staticmethod
        def forward(ctx: Any, x: Any, dropped: Any, weight: Any, bias: Any, a: Any, b: Any, scale: float) -> Any:
            ctx.scale, ctx.same = scale, dropped is x
            small = product(flat(dropped), a).mul_(scale)
            out = product(flat(x), weight, bias).addmm_(small, b.t())
            ctx.save_for_backward(dropped, small, weight, a, b)
            return out.view(*x.shape[:-1], -1)

        @staticmethod
        @once_differentiable  # type: ignore[untyped-decorator]
        def backward(ctx: Any, grad: Any) -> Any:
            dropped, small, weight, a, b = ctx.saved_tensors
            of_x, of_dropped, of_weight, of_bias, of_a, of_b, _ = ctx.needs_input_grad
            rows, shape = flat(grad), (*grad.shape[:-1], -1)
            of_small = product(rows, b.t()).mul_(ctx.scale)
            for_x = product(rows, weight.t()) if of_x else None
            for_dropped = None
            if ctx.same:
                for_x = for_x.addmm_(of_small, a) if for_x is not None else None
            elif of_dropped:
                for_dropped = product(of_small, a.t()).view(shape)
            return (
                for_x.view(shape) if for_x is not None else None,
                for_dropped,
                product(rows.t(), flat(dropped).t()) if of_weight else None,
                rows.sum(0) if of_bias else None,
                product(of_small.t(), flat(dropped).t()) if of_a else None,
                rows.t() @ small if of_b else None,
                None,
            )

    def is_float(*tensors: Any) -> bool:
        return all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)

    class Linear(torch.nn.Linear):  # type: ignore[misc]
        def forward(self, input: Any) -> Any:
            if input.numel() and is_float(input, self.weight) and not torch.is_autocast_enabled("cpu"):
                return Product.apply(input, self.weight, self.bias)
            return super().forward(input)

    class Lora(LoraLinear):  # type: ignore[misc]
        def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
            active = [name for name in self.active_adapters if name in self.lora_A]
            base = self.base_layer
            if (
                args
                or kwargs
                or len(active) != 1
                or active[0] in self.lora_variant
                or self.disable_adapters
                or self.merged
                or not isinstance(base, torch.nn.Linear)
            ):
                return super().forward(x, *args, **kwargs)
            a, b = self.lora_A[active[0]], self.lora_B[active[0]]
            plain = x.numel() and is_float(x, base.weight, a.weight, b.weight) and a.bias is None and b.bias is None
            if not plain or torch.is_autocast_enabled("cpu"):
                return super().forward(x)
            dropout = self.lora_dropout[active[0]]
            dropped = dropout(x) if dropout.training and getattr(dropout, "p", 0.0) else x
            return LoraProduct.apply(x, dropped, base.weight, base.bias, a.weight, b.weight, self.scaling[active[0]])

    return Linear, Lora
