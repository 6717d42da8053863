"""Run under torchrun with two processes: a sharded model trains as a replicated one does.

accelerate prepares FSDP2 on GPUs alone; here its part is done by hand, so that gathering and
putting back sharded states is tested without one.
"""

from __future__ import annotations

import contextlib
import sys

import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from toy_training import recipe

from mdiff.training.build import build_run
from mdiff.training.state import capture, restore


class Sharding(Accelerator):
    """An Accelerator that cuts the model over the processes with FSDP2, on the CPU."""

    def prepare(self, model, *optimizers):
        mesh = init_device_mesh("cpu", (self.num_processes,))
        whole = dict(model.named_parameters())
        fully_shard(model.backbone.inner, mesh=mesh)
        fully_shard(model, mesh=mesh)
        cut = {id(whole[name]): p for name, p in model.named_parameters()}
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["params"] = [cut[id(p)] for p in group["params"]]
        return model, *optimizers

    def unwrap_model(self, model):
        return model

    @contextlib.contextmanager
    def no_sync(self, model):
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)

    def clip_grad_norm_(self, parameters, max_norm):
        return torch.nn.utils.clip_grad_norm_(list(parameters), max_norm).full_tensor()


def steps(run, numbers):
    for number in numbers:
        run.stepper.step(number, run.rows[number], stopping=lambda: False)
    return capture(run.backbone, run.placement, run.averaged)


def difference(one, two):
    if one.keys() != two.keys():
        raise SystemExit("the states have other names")
    return max(float((one[name] - two[name]).abs().max()) for name in one)


def main(optimizer):
    settings = recipe(
        precision="fp64", model__dropout=0.0, optim__name=optimizer, micro_batch=2, steps=6
    )
    replicated = steps(build_run(settings, Accelerator(cpu=True)), range(1, 7))
    run = build_run(settings, Sharding(cpu=True))
    if not all(isinstance(p, DTensor) for p in run.backbone.parameters()):
        raise SystemExit("the model was not cut")
    middle = steps(run, range(1, 4))
    whole = steps(run, range(4, 7))
    again = build_run(settings, Sharding(cpu=True))
    restore(middle, again.backbone, again.placement, again.averaged)
    resumed = steps(again, range(4, 7))
    if difference(replicated, whole) > 1e-9 or difference(whole, resumed) != 0:
        raise SystemExit("a sharded model trains differently")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        main(name)
    torch.distributed.destroy_process_group()
