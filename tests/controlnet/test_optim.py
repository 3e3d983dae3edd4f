"""Batch arithmetic, learning rate, optimizer settings and the running average."""

import math
import sys
import types

import pytest
import torch

from controlnet.config import ConfigError
from controlnet.training.optim import ExponentialAverage, LearningRate, build_optimizer, update
from controlnet.training.trainer import accumulation


class TestBatchArithmetic:
    def test_counts(self):
        assert accumulation(4, None, 1, 2) == 1
        assert accumulation(4, None, 3, 2) == 3
        assert accumulation(4, 8, 1, 2) == 1
        assert accumulation(4, 32, 1, 2) == accumulation(4, 32, 4, 2) == 4

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (
                (4, 10, 1, 2),
                "model.global_batch_size is 10; expected a multiple of 8 = model.micro_batch_size 4 x 2 ranks",
            ),
            ((4, 4, 1, 2), "model.global_batch_size is 4; expected a multiple of 8"),
            ((4, 32, 3, 2), "trainer.accumulate_grad_batches is 3 but model.global_batch_size 32 = 4 x 2 ranks x 4"),
            ((0, 32, 1, 2), "model.micro_batch_size is 0; expected 1 or more"),
            ((1, None, 0, 2), "trainer.accumulate_grad_batches is 0; expected 1 or more"),
        ],
    )
    def test_what_does_not_divide(self, arguments, message):
        with pytest.raises(ConfigError, match=message):
            accumulation(*arguments)


class TestSchedule:
    def rate(self, max_steps=None, **sched):
        base = {"name": "constant", "warmup_steps": 0, "warmup_ratio": None, "max_steps": None, "min_lr": 0.0}
        return LearningRate({"lr": 2.0, "sched": {**base, **sched}}, max_steps)

    def test_warm_up_then_constant(self):
        rate = self.rate(name="WarmupHoldPolicy", warmup_steps=4)
        assert [rate(step) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
        assert rate(10**9) == 2.0

    def test_cosine(self):
        rate = self.rate(name="CosineAnnealing", warmup_steps=2, max_steps=12, min_lr=0.5)
        assert rate(2) == 2.0 and rate(12) == 0.5 and rate(99) == 0.5
        assert rate(7) == pytest.approx(1.25)
        assert rate(4) == pytest.approx(0.5 + 1.5 * 0.5 * (1 + math.cos(math.pi * 0.2)))

    def test_linear_ends_with_the_run(self):
        rate = self.rate(max_steps=10, name="linear", warmup_ratio=0.2)
        assert [rate(step) for step in (0, 1, 2, 6, 10)] == [1.0, 2.0, 2.0, 1.0, 0.0]

    def test_refused(self):
        with pytest.raises(ConfigError, match="optim.sched.name is 'cosin'.*nearest: cosine"):
            self.rate(name="cosin")
        with pytest.raises(ConfigError, match="cosine needs an end; set optim.sched.max_steps or trainer.max_steps"):
            self.rate(name="cosine")


class TestOptimizer:
    CONFIG = {"name": "adamw", "lr": 1e-3, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.1}

    def test_settings_arrive(self):
        optimizer = build_optimizer(iter([torch.nn.Parameter(torch.ones(3))]), self.CONFIG)
        group = optimizer.param_groups[0]
        assert isinstance(optimizer, torch.optim.AdamW) and group["fused"]
        assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.9, 0.99), 0.1, 1e-8)

    def test_refused(self):
        parameter = torch.nn.Parameter(torch.ones(3))
        with pytest.raises(ConfigError, match="optim.name is 'adam_w'; expected one of .*nearest: adamw"):
            build_optimizer(iter([parameter]), {**self.CONFIG, "name": "adam_w"})
        with pytest.raises(ValueError, match=r"weight of shape \(3,\) is torch.float16; expected float32"):
            build_optimizer(iter([torch.nn.Parameter(parameter.half())]), self.CONFIG)
        with pytest.raises(ValueError, match="no parameter requires a gradient"):
            build_optimizer(iter([]), self.CONFIG)

    def test_eight_bit_state_is_another_packages(self, monkeypatch):
        made = []
        module = types.ModuleType("bitsandbytes.optim")
        module.AdamW8bit = lambda parameters, **settings: made.append(settings)
        monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
        monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
        config, weights = {**self.CONFIG, "name": "adamw_8bit"}, [torch.nn.Parameter(torch.ones(3))]
        build_optimizer(iter(weights), config)
        assert made == [{"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}]
        with pytest.raises(ConfigError, match="optim.zero is true with optim.name=adamw_8bit"):
            build_optimizer(iter(weights), {**config, "zero": True}, ranks=2)
        for name in ("bitsandbytes", "bitsandbytes.optim", "torchao", "torchao.optim"):
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match="neither bitsandbytes nor torchao is installed"):
            build_optimizer(iter(weights), config)

    @pytest.mark.parametrize("fused", [True, False])
    @pytest.mark.parametrize("broke", [True, False])
    def test_an_update_is_left_out_where_the_device_says_so(self, fused, broke):
        weight = torch.nn.Parameter(torch.ones(3))
        weight.grad = torch.full((3,), float("nan") if broke else 1.0)
        optimizer, asked = torch.optim.AdamW([weight], fused=fused), []
        update(optimizer, torch.tensor(float(broke)), lambda: asked.append(True) or broke)
        assert torch.equal(weight, torch.ones(3)) == broke
        assert asked == ([] if fused else [True])  # a fused kernel reads the flag itself
        if fused:
            assert optimizer.state[weight]["step"] == float(not broke)

    def test_average_follows_its_formula(self):
        model = torch.nn.Linear(1, 1, bias=False)
        model.weight.data.fill_(0.0)
        average, expected = ExponentialAverage(model, 0.5, every=2), 0.0
        for step in range(1, 9):
            model.weight.data.fill_(float(step))
            average.update(step)
            if step % 2 == 0:
                n = step // 2
                expected += (1 - min(0.5, (1 + n) / (10 + n))) * (step - expected)
        assert average.averages["weight"].item() == pytest.approx(expected)
        with average.swapped_in():
            assert model.weight.item() == pytest.approx(expected)
        assert model.weight.item() == 8.0
