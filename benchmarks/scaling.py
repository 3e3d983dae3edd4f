"""Measures how the training step scales: samples per second of all ranks, divided by their number times one rank's.

    torchrun --nproc_per_node N -m benchmarks.scaling [--batch PER_RANK] [--output FILE]

Weak scaling: every rank keeps its batch. On GPUs with NCCL at SD 1.5's size; on a CPU with gloo at a small one.
"""

import datetime
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks import jobs, machine
from cnkernels.progress import say
from controlnet.common.command import parser as command_parser
from controlnet.model.diffusion import DiffusionLoss, NoiseSchedule

STEPS, WARM_UP = 10, 3


def build(job: jobs.Job, device: torch.device, params: dict, parallel: bool):
    """Builds the training step of this rank, with gradients averaged over all ranks if `parallel`."""
    torch.manual_seed(0)
    model = jobs.controlled_unet(device, params)
    loss = DiffusionLoss(model, NoiseSchedule().to(device))
    x, hint, t, context = jobs.images(job, device, params["context_dim"])
    arguments = x.float(), hint, context, torch.randn_like(x).float(), t
    if parallel:
        ids = [device] if device.type == "cuda" else None
        loss = DistributedDataParallel(loss, device_ids=ids, forward_sync_buffers=False, gradient_as_bucket_view=True)
    return jobs.training(job, device, loss, list(model.trainable_parameters()), lambda: loss(*arguments))


def samples_per_second(step, batch: int, device: torch.device) -> float:
    """Measures this rank; all ranks measure at the same time."""
    for _ in range(WARM_UP):
        step()
    dist.barrier()
    begin = time.perf_counter()
    for _ in range(STEPS):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return batch * STEPS / (time.perf_counter() - begin)


EXAMPLES = """
torchrun --nproc_per_node 2 -m benchmarks.scaling --batch 4 --output scaling.json
"""


def main() -> None:
    parser = command_parser("benchmarks.scaling", __doc__, EXAMPLES)
    parser.add_argument("--batch", type=int, help="images per rank (default: 8 on a GPU, 1 on a CPU)")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    if "LOCAL_RANK" not in os.environ:
        parser.error("start it with torchrun --nproc_per_node N -m benchmarks.scaling")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(minutes=5))
    params, side = (jobs.SD15, 64) if cuda else (jobs.TINY, 8)
    job = jobs.Job("training step", options.batch or (8 if cuda else 1), side, torch.bfloat16)
    first = dist.get_rank() == 0
    if first:
        say(f"measuring {WARM_UP + STEPS} training steps of each rank alone, then of all together")
    alone = samples_per_second(build(job, device, params, parallel=False), job.batch, device)
    together = samples_per_second(build(job, device, params, parallel=True), job.batch, device)
    rates = torch.tensor([alone, together], dtype=torch.float64, device=device)
    dist.all_reduce(rates)
    if first:
        ranks = dist.get_world_size()
        row = {"shape": job.label, "ranks": ranks, "alone_per_second": rates[0].item() / ranks}
        row |= {"together_per_second": rates[1].item(), "efficiency": (rates[1] / rates[0]).item()}
        text = json.dumps({"machine": machine.describe(device), "scaling": row}, indent=1)
        print(text)
        if options.output:
            options.output.write_text(text + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
