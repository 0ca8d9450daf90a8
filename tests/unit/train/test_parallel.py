from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from qat.errors import UserError
from qat.train import parallel
from qat.train.base import training_device


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one, so that FSDP2 can be used without a second process."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_shares_together_are_the_batch(count: int, size: int) -> None:
    batch = list(range(100, 100 + size))
    shares = [parallel.share(batch, index, count) for index in range(count)]
    assert sorted(row for own in shares if own.counts for row in own.rows) == batch
    assert all(own.rows for own in shares)
    lengths = [len(own.rows) for own in shares if own.counts]
    assert max(lengths) - min(lengths) <= 1 and sum(own.counts for own in shares) == min(count, size)


def test_a_process_of_its_own_does_everything() -> None:
    tensor, model = torch.arange(3.0), nn.Linear(2, 2)
    assert (parallel.rank(), parallel.ranks()) == (0, 1)
    assert parallel.own_rows([[3, 1], [2]]) == [[3, 1], [2]]
    assert parallel.agreed("x") == parallel.by_the_first(lambda: "x") == "x" and parallel.gathered(4) == [4]
    assert all(function(tensor) is tensor for function in (parallel.whole, parallel.for_the_first, parallel.summed))
    assert parallel.placed_like(tensor, torch.zeros(3)) is tensor
    assert not parallel.is_sharded(model)
    parallel.require_sharded(model, dict(model.named_parameters()))
    with parallel.whole_layer(model):
        pass


@pytest.mark.parametrize(("said", "expected"), [("true", True), ("True", True), ("false", False), (None, False)])
def test_what_the_launcher_said(said: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable by which `accelerate launch --use_fsdp` tells its processes (accelerate.utils.launch)."""
    if said is None:
        monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    else:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", said)
    assert parallel.sharding() == expected


def test_decoder_layer() -> None:
    model = nn.Module()
    model.add_module("model", nn.Module())
    model.model.add_module("layers", nn.ModuleList([nn.Linear(1, 1) for _ in range(12)]))
    layers = model.get_submodule("model.layers")
    assert parallel.decoder_layer(model, "model.layers.1.mixer.up_proj") is layers[1]
    assert parallel.decoder_layer(model, "model.layers.11.mixer.experts.down_proj") is layers[11]
    with pytest.raises(ValueError, match="lm_head"):
        parallel.decoder_layer(model, "lm_head")


def test_only_decoder_layers_are_cut() -> None:
    """All parameters stand either in a layer or in a module that stays whole, and none in both."""
    from qat.recipe.schema import AdapterBlock
    from qat.train.adapters import attach_adapter
    from tests.tiny_models import nemotron_h_tiny

    model, _ = attach_adapter(nemotron_h_tiny(), AdapterBlock(rank=2), "nemotron_h", 0)
    plugin = SimpleNamespace(transformer_cls_names_to_wrap=None, ignored_modules=None)
    parallel.choose_layers(cast("Any", SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))), model)
    assert plugin.transformer_cls_names_to_wrap == ["NemotronHBlock"]
    whole = {id(parameter) for module in plugin.ignored_modules for parameter in module.parameters()}
    kept = {name.removeprefix("base_model.model.") for name, p in model.named_parameters() if id(p) in whole}
    assert kept == {"model.embeddings.weight", "model.norm_f.weight", "lm_head.weight"}
    parallel.choose_layers(cast("Any", SimpleNamespace(state=SimpleNamespace())), model)


def test_the_forward_is_given_back() -> None:
    model = nn.Linear(2, 2)
    assert parallel.call_inside(model, model, lambda: 7) == 7
    with pytest.raises(KeyError):
        parallel.call_inside(model, model, lambda: {}["x"])
    assert model(torch.zeros(1, 2)).shape == (1, 2)


def _sharded() -> tuple[nn.Sequential, nn.Sequential]:
    torch.manual_seed(0)
    # FSDP2 moves what it shards to the GPU, if there is one.
    plain, model = (nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).to(training_device()) for _ in range(2))
    model.load_state_dict(plain.state_dict())
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    return plain, model


@pytest.mark.usefixtures("alone")
def test_sharded_tensors_come_together_and_apart() -> None:
    plain, model = _sharded()
    parameter = model.get_parameter("0.weight")
    assert isinstance(parameter, DTensor) and parallel.is_sharded(model)
    assert torch.equal(parallel.whole(parameter), plain[0].weight)
    assert torch.equal(parallel.for_the_first(parameter), plain[0].weight)
    other = torch.randn(6, 4, device=parameter.device)
    placed = parallel.placed_like(other, parameter)
    assert isinstance(placed, DTensor) and placed.placements == parameter.placements
    assert torch.equal(placed.full_tensor(), other)
    step = torch.tensor(3.0)
    assert parallel.placed_like(step, parameter) is step
    with parallel.whole_layer(model[0]):
        assert torch.equal(model[0].weight, plain[0].weight) and not isinstance(model[0].weight, DTensor)
    assert isinstance(model[0].weight, DTensor)


@pytest.mark.usefixtures("alone")
def test_an_optimizer_goes_on_from_whole_tensors() -> None:
    """Two steps in a row, plainly, against one step, its state made whole, and one step of another sharded model."""
    plain, _ = _sharded()
    rows = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)).to(training_device())

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        parallel.call_inside(model, model, lambda: nn.Sequential.forward(model, rows).square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()

    reference = torch.optim.AdamW(plain.parameters(), lr=0.1)
    step(plain, reference)
    state = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), reference.state_dict())
    _, model = _sharded()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            target = model.get_parameter(name)
            target.copy_(parallel.placed_like(parameter.detach().clone(), target))
    step(plain, reference)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    parallel.place_optimizer_state_(state, optimizer)
    optimizer.load_state_dict(state)
    step(model, optimizer)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(parallel.whole(model.get_parameter(name)), parameter, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("alone")
def test_what_no_layer_holds_cannot_be_trained_sharded() -> None:
    _, model = _sharded()
    parallel.require_sharded(model, dict(model.named_parameters()))
    with pytest.raises(UserError, match="only the decoder layers"):
        parallel.require_sharded(model, {"lm_head.weight": nn.Parameter(torch.zeros(2))})
    assert isinstance(model, FSDPModule)
