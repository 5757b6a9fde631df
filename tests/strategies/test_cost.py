"""The cost model against arithmetic done by hand, and its refusals."""

import pytest

from lightning_peft import LoRA, MoEUpcycling, QLoRA, inject
from lightning_peft.errors import ConfigError
from lightning_peft.strategies.cost import Links, Tensors, communication_cost, step_cost, tensors_of
from lightning_peft.strategies.expert_cost import expert_cost
from lightning_peft.testing import tiny_llama

BASE = Tensors(rows=1024, columns=64, bytes_per_element=2, unit=0)
A = Tensors(rows=16, columns=64, bytes_per_element=4, role="trained", unit=0)


def test_ddp_sends_gradients_of_what_is_trained_and_nothing_of_the_base():
    cost = step_cost([BASE, A], processes=4, strategy="peft_ddp")
    assert cost.sent_bytes == cost.reduced_bytes == 2 * 3 / 4 * 16 * 64 * 4
    assert (cost.gathered_bytes, cost.collectives) == (0, 1)
    assert cost.weight_bytes == 1024 * 64 * 2 + 16 * 64 * 4
    assert cost.optimizer_bytes == 16 * 64 * 8
    assert cost.memory_bytes == cost.weight_bytes + 16 * 64 * (4 + 4 + 8)  # gradients, their buckets, optimizer


def test_buffers_are_sent_in_every_step_and_constants_are_held():
    held = [Tensors(rows=10, bytes_per_element=4, role="buffer"), Tensors(rows=7, bytes_per_element=1, role="constant")]
    cost = step_cost([BASE, A, *held], processes=4, strategy="peft_ddp")
    assert cost.broadcast_bytes == 40
    sharded = step_cost([BASE, A, *held], processes=4)
    assert sharded.broadcast_bytes == 40
    assert step_cost([BASE, A, *held], processes=1).broadcast_bytes == 0
    assert sharded.weight_bytes == (1024 * 64 * 2 + 16 * 64 * 4) / 4 + 47


def test_fsdp_gathers_the_base_twice_or_once():
    whole = 1024 * 64 * 2 + 16 * 64 * 4
    twice = step_cost([BASE, A], processes=4)
    once = step_cost([BASE, A], processes=4, reshard_after_forward=False)
    assert twice.gathered_bytes == 2 * once.gathered_bytes == 2 * whole * 3 / 4
    assert twice.reduced_bytes == once.reduced_bytes == 16 * 64 * 4 * 3 / 4
    assert (twice.collectives, once.collectives) == (3, 2)


def test_hsdp_gathers_within_a_group_and_averages_shards_of_gradients_between_groups():
    cost = step_cost([BASE, A], processes=8, replicate=2)
    inside = step_cost([BASE, A], processes=4)
    assert cost.gathered_bytes == inside.gathered_bytes
    assert cost.reduced_bytes == inside.reduced_bytes + 2 * (1 / 2) * 16 * 64 * 4 / 4
    assert cost.memory_bytes == inside.memory_bytes


def test_a_matrix_of_few_rows_is_cut_by_columns_or_padded_to_the_number_of_processes():
    assert [A.elements(n) / 64 for n in (1, 8, 16, 17, 32, 48, 64, 1000)] == [16, 16, 16, 17, 16, 48, 16, 1000]
    assert [Tensors(rows=8, columns=96, others=sizes).elements(16) for sizes in ((32, 3), (6, 16), (8, 12))] == [
        768,
        768,
        1536,
    ]
    assert Tensors(rows=4096).elements(1000) == 5000
    cost = step_cost([A], processes=1000)
    assert cost.reduced_bytes == pytest.approx(1000 * 64 * 4 * 0.999)
    assert cost.weight_bytes == 64 * 4  # a row for each of the first sixteen


def test_resharding_keeps_two_units_and_the_outer_one_whole_at_most():
    units = [Tensors(rows=8, bytes_per_element=size, unit=unit) for unit, size in enumerate((1, 3, 2))]
    outer = Tensors(rows=8, bytes_per_element=10)
    assert step_cost([*units, outer], processes=2).working_bytes == 80 + 8 * (3 + 2)
    assert step_cost([*units, outer], processes=2, prefetch=2).working_bytes == 80 + 8 * 6
    assert step_cost([*units, outer], processes=2, reshard_after_forward=False).working_bytes == 80 + 8 * 6
    assert step_cost([*units, outer], processes=1).working_bytes == 0


def test_one_process_sends_nothing():
    for strategy in ("peft_ddp", "peft_fsdp"):
        cost = step_cost([BASE, A], processes=1, strategy=strategy)
        assert (cost.sent_bytes, cost.seconds, cost.collectives) == (0, 0, 0)


def test_time_is_bytes_over_the_slowest_link_and_a_latency_for_each_hop():
    links = Links(inside=100.0, node=50.0, inside_latency=1.0, node_latency=10.0)
    one = [Tensors(rows=800, bytes_per_element=1, role="trained")]
    within = step_cost(one, processes=8, per_node=8, strategy="peft_ddp", links=links)
    assert within.seconds == pytest.approx(2 * 800 * 7 / 8 / 100 + 2 * 7 * 1.0)
    across = step_cost(one, processes=8, per_node=4, strategy="peft_ddp", links=links)
    assert across.seconds == pytest.approx(2 * 800 * 7 / 8 / 50 + 2 * (6 * 1.0 + 10.0))
    # Four groups lie side by side, and each has a fourth of what leaves the node.
    hybrid = step_cost(one, processes=8, per_node=4, replicate=2, links=links)
    scattered = 800 * 3 / 4 / 100 + 3 * 1.0
    assert hybrid.seconds - 2 * scattered - scattered == pytest.approx(2 * 200 / 2 / (50 / 4) + 2 * 10.0)


def test_a_model_by_its_numbers_agrees_with_its_tensors():
    cost = communication_cost(parameters=1024 * 64, trained=16 * 64, rank=16, units=1, processes=4)
    assert cost == step_cost([BASE, A], processes=4)
    spread = communication_cost(parameters=10**6, trained=10**4, units=7, processes=4, strategy="peft_ddp")
    assert spread.sent_bytes == 2 * 3 / 4 * 10**4 * 4
    assert spread.weight_bytes == 2 * 10**6 + 4 * 10**4


def test_what_is_sent_by_expert_parallelism():
    sizes = {"hidden": 8, "intermediate": 16, "experts": 4, "top_k": 2, "layers": 3}
    cost = expert_cost(**sizes, tokens=10, processes=8, group=4)
    elements = 3 * 4 * 3 * 8 * 16
    assert cost.exchanged_bytes == 10 * 3 * 4 * 2 * 8 * 2 * 3 / 4
    assert cost.averaged_bytes == 2 * (1 / 2) * elements / 4 * 4
    assert cost.sharded_bytes == 3 / 4 * elements * (2 + 2 + 4) + cost.averaged_bytes
    assert (cost.held_bytes, cost.working_bytes) == (elements / 4 * (2 + 2 + 8), elements * 2 / 3 * 2)
    even = expert_cost(**sizes, tokens=round(cost.tokens_where_equal), processes=8, group=4)
    assert even.sent_bytes == pytest.approx(even.sharded_bytes, rel=1e-2)
    assert expert_cost(**sizes, tokens=10, processes=8, group=1).tokens_where_equal == float("inf")


def test_the_experts_of_a_model_are_those_of_the_arithmetic():
    model = tiny_llama()
    inject(model, MoEUpcycling(experts=8, top_k=2))
    sizes = {"hidden": 64, "intermediate": 128, "experts": 8, "top_k": 2, "layers": 2, "tokens": 1, "weight_bytes": 4.0}
    experts = [one for one in tensors_of(model) if one.role == "trained" and one.columns > 64]
    for processes in (2, 4, 8):
        assert step_cost(experts, processes=processes).sent_bytes == pytest.approx(
            expert_cost(**sizes, processes=processes, group=processes).sharded_bytes
        )
    # More processes than experts: they are cut by another dimension, and none is padded.
    ratio = step_cost(experts, processes=64).sent_bytes / step_cost(experts, processes=8).sent_bytes
    assert ratio == pytest.approx((63 / 64) / (7 / 8))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"processes": 0}, "processes must be a whole number from 1, got 0"),
        ({"processes": 4, "per_node": 2.5}, "per_node must be a whole number from 1, got 2.5"),
        ({"processes": 6, "replicate": 4}, "replicate=4 does not divide the 6 processes"),
        ({"processes": 2, "strategy": "ddp"}, "strategy must be 'peft_ddp' or 'peft_fsdp', got 'ddp'"),
    ],
)
def test_a_step_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        step_cost([A], **fields)


def test_other_numbers_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="Links node must be a positive number of bytes a second, got 0"):
        Links(node=0)
    with pytest.raises(ConfigError, match="Links node_latency must be a number of seconds from 0, got -1"):
        Links(node_latency=-1)
    with pytest.raises(ConfigError, match="rank=3 is not a positive number that divides the 16 trained elements"):
        communication_cost(parameters=1, trained=16, rank=3, processes=1)
    sizes = {"hidden": 8, "intermediate": 16, "experts": 4, "layers": 3, "tokens": 1, "processes": 8}
    with pytest.raises(ConfigError, match="top_k=5 is more than the 4 experts"):
        expert_cost(**sizes, top_k=5, group=4)
    with pytest.raises(ConfigError, match="group=3 must divide the 8 processes and the 4 experts"):
        expert_cost(**sizes, top_k=2, group=3)


def test_the_tensors_of_a_quantised_model_are_packed_bytes_and_scales_that_every_process_holds():
    model = tiny_llama()
    inject(model, QLoRA(rank=4, double_quantization=True), targets="all_linear")
    tensors = tensors_of(model)
    packed = [one for one in tensors if one.role == "frozen" and one.bytes_per_element == 1]
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert sum(one.elements() for one in packed) == weights / 2
    assert {one.unit for one in packed} == {0, 1}
    ends = [one for one in tensors if one.role == "frozen" and one.elements() == 128 * 64]
    assert [one.unit for one in ends] == [None, None]
    states = [one.quant_state for one in model.parameters() if hasattr(one, "quant_state")]
    tables = [
        table for one in states for table in (one.absmax, one.code, one.offset, one.state2.absmax, one.state2.code)
    ]
    held = sum(table.nbytes for table in tables) + sum(buffer.nbytes for buffer in model.buffers())
    assert sum(one.stored() for one in tensors if one.role == "constant") == held
    assert len(states) == 14


def test_dtypes_of_gathering_and_reducing_are_counted_where_they_apply():
    model = tiny_llama()
    inject(model, LoRA(rank=4))
    as_stored = step_cost(tensors_of(model), processes=2)
    halved = step_cost(tensors_of(model, gather_bytes=2, reduce_bytes=2), processes=2)
    assert halved.gathered_bytes == as_stored.gathered_bytes / 2
    assert halved.reduced_bytes == as_stored.reduced_bytes / 2
    assert halved.weight_bytes == as_stored.weight_bytes
