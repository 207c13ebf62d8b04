"""Reading compiled programs: what runs, how often, and who talks to whom."""

import itertools
import random

import pytest

from spvit_jax.preflight import hlo
from spvit_jax.preflight.collectives import collectives
from spvit_jax.preflight.cost import _places, count_cost

# Four chips. A loop of five rounds gathers and multiplies; before it come a reduction over pairs
# and, in a fusion spread over two, a gathering of which both pieces are the same.
PROGRAM = """
HloModule step, is_scheduled=true

%fused_product (p0: bf16[64,32], p1: bf16[32,16]) -> bf16[64,16] {
  %p0 = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[32,16]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %product = bf16[64,16]{1,0:T(8,128)(2,1)} convolution(%p0, %p1), dim_labels=bf_io->bf
}

%piece.1 (q0: f32[8,4]) -> f32[32,4] {
  %q0 = f32[8,4]{1,0:T(8,128)} parameter(0)
  ROOT %gather.1 = f32[32,4]{1,0:T(8,128)} all-gather(%q0), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
}

%piece.2 (r0: f32[8,4]) -> f32[32,4] {
  %r0 = f32[8,4]{1,0:T(8,128)} parameter(0)
  ROOT %gather.2 = f32[32,4]{1,0:T(8,128)} all-gather(%r0), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
}

%all-reduce-scatter.1 (s0: f32[16,4]) -> f32[8,4] {
  %s0 = f32[16,4]{1,0:T(8,128)} parameter(0)
  %whole = f32[16,4]{1,0:T(8,128)} all-reduce(%s0), channel_id=9, replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}, to_apply=%sum
  ROOT %part = f32[8,4]{1,0:T(8,128)} dynamic-slice(%whole), dynamic_slice_sizes={8,4}
}

%condition (state: (s32[], bf16[64,16])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %state = (s32[]{:T(128)}, bf16[64,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %round = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %more = pred[]{:T(512)} compare(%round, %limit), direction=LT
}

%body (carry: (s32[], bf16[64,16])) -> (s32[], bf16[64,16]) {
  %carry = (s32[]{:T(128)}, bf16[64,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %left = bf16[64,32]{1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=1
  %right = bf16[32,16]{1,0:T(8,128)(2,1)S(1)} all-gather(%left), channel_id=3, replica_groups={{0,2},{1,3}}, dimensions={0}
  %fused = bf16[64,16]{1,0:T(8,128)(2,1)} fusion(%left, %right), kind=kOutput, calls=%fused_product
  ROOT %next = (s32[]{:T(128)}, bf16[64,16]{1,0:T(8,128)(2,1)}) tuple(%carry, %fused)
}

ENTRY %main (a: f32[8,4], b: f32[16,4]) -> f32[] {
  %a = f32[8,4]{1,0:T(8,128)} parameter(0)
  %b = f32[16,4]{1,0:T(8,128)} parameter(1)
  %start = f32[32,4]{1,0:T(8,128)} fusion(%a), kind=kCustom, calls=%piece.1
  %done = f32[32,4]{1,0:T(8,128)} fusion(%start), kind=kCustom, calls=%piece.2
  %scattered = f32[8,4]{1,0:T(8,128)} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.1
  %shift = (f32[8,4]{1,0:T(8,128)}, f32[8,4]{1,0:T(8,128)}, u32[]{:S(2)}) collective-permute-start(%a), channel_id=1, source_target_pairs={{0,1},{2,3}}
  %initial = (s32[]{:T(128)}, bf16[64,16]{1,0:T(8,128)(2,1)}) tuple(%a, %b)
  %loop = (s32[]{:T(128)}, /*index=1*/bf16[64,16]{1,0:T(8,128)(2,1)}) while(%initial), condition=%condition, body=%body
  ROOT %result = f32[]{:T(128)} get-tuple-element(%loop), index=0
}
"""  # noqa: E501


@pytest.fixture(scope="module")
def program():
    return hlo.parse(PROGRAM)


def test_loops_run_as_often_as_they_do(program):
    times = {one.name: times for one, times, _ in program.executed()}
    assert (times["scattered"], times["fused"], times["right"]) == (1, 5, 5)
    assert "product" not in times  # inside of a fusion
    assert program.loops_of_unknown_length() == 0
    macs = 64 * 16 * 32
    assert (count_cost(program).macs, count_cost(program, repeat=False).macs) == (5 * macs, macs)


def test_what_lies_in_fast_memory_is_no_traffic_of_hbm(program):
    executed = {one.name: one for one, _, _ in program.executed()}
    (gathered,) = executed["right"].arrays
    assert (gathered.nbytes, gathered.in_hbm) == (2 * 32 * 16, False)
    assert executed["fused"].arrays[0].in_hbm
    done = count_cost(program)
    assert done.hbm_bytes < done.bytes


def test_a_loop_whose_end_is_computed_is_said():
    endless = PROGRAM.replace("%limit = s32[]{:T(128)} constant(5)", "%limit = s32[] copy(%state)")
    assert hlo.parse(endless).loops_of_unknown_length() == 1


def test_collectives_by_kind_and_axis(program):
    found = {
        (one.kind, one.axis): (one.count, one.sent)
        for one in collectives(program, {"data": 2, "fsdp": 2})
    }
    assert found == {
        ("all-gather", "data×fsdp"): (1, 32 * 4 * 4 * 3 / 4),
        ("reduce-scatter", "fsdp"): (1, 16 * 4 * 4 / 2),
        ("all-gather", "data"): (5, 5 * 32 * 16 * 2 / 2),
        ("collective-permute", "fsdp"): (1, 8 * 4 * 4),
    }


@pytest.mark.parametrize(
    ("groups", "axis"),
    [
        ("{{0,1},{2,3}}", "fsdp"),
        ("[2,2]<=[4]", "fsdp"),
        ("[2,2]<=[2,2]T(1,0)", "data"),
        ("mesh['axis_0'=2,'axis_1'=2] {'axis_0'}", "data"),
        ("mesh['axis_0'=4] {'axis_0'}", "data×fsdp"),
        ("mesh['axis_0'=2,'axis_1'=2], device_ids=([2,2]T(1,0)) {'axis_0'}", "fsdp"),
        ("mesh['axis_0'=2,'axis_1'=2], device_ids=([4]) {'axis_0'}", "data"),
        ("{}", "data×fsdp"),
        ("{{0,3},{1,2}}", "other"),
    ],
)
def test_groups_in_all_notations(groups, axis):
    text = PROGRAM.replace("replica_groups={{0,2},{1,3}}", f"replica_groups={groups}")
    found = collectives(hlo.parse(text), {"data": 2, "fsdp": 2})
    assert [one.axis for one in found if one.count >= 5] == [axis]


def test_unreadable_groups_are_not_passed_over():
    text = PROGRAM.replace("replica_groups={{0,2},{1,3}}", "replica_groups=v9(0,2)")
    with pytest.raises(ValueError, match="cannot read the groups of all-gather right"):
        collectives(hlo.parse(text), {"data": 2, "fsdp": 2})


@pytest.mark.parametrize(
    ("kind", "sent"), [("ALL_REDUCE", 4 / 3), ("ALL_GATHER", 2), ("ONE_TO_ONE", 1)]
)
def test_what_goes_to_other_slices(kind, sent):
    handler = '_xla_host_transfer_handler_name="xla_megascale_runtime"'
    types = f'{handler},_xla_megascale_transfer_type="{kind}"'
    send = (
        "  %send = (f32[8,4]{1,0}, u32[], token[]) send(%a, %after), channel_id=2, "
        f"is_host_transfer=true, frontend_attributes={{{types}}}\n"
    )
    text = PROGRAM.replace("  %initial =", send + "  %initial =")
    found = collectives(hlo.parse(text), {"data": 2, "fsdp": 2}, num_slices=3)
    (between,) = [one for one in found if one.axis == "slices"]
    assert (between.kind, between.count) == (kind.lower().replace("_", "-"), 1)
    assert between.sent == pytest.approx(sent * 8 * 4 * 4)
    with pytest.raises(ValueError, match="cannot read what is sent to other slices"):
        collectives(hlo.parse(text.replace(kind, "NEW_WAY")), {"data": 2, "fsdp": 2}, 3)


IN_PLACE = """
HloModule round

%put (stack: f32[9,8,4], value: f32[8,4], at: s32[]) -> (f32[9,8,4], f32[8,4]) {
  %stack = f32[9,8,4]{2,1,0} parameter(0)
  %value = f32[8,4]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %doubled = f32[8,4]{1,0} add(%value, %value)
  %shaped = f32[1,8,4]{2,1,0} bitcast(%doubled)
  %put_in = f32[9,8,4]{2,1,0} dynamic-update-slice(%stack, %shaped, %at)
  ROOT %both = (f32[9,8,4]{2,1,0}, f32[8,4]{1,0}) tuple(%put_in, %doubled)
}

%take (stack: f32[9,8,4], at: s32[]) -> f32[8,4] {
  %stack.1 = f32[9,8,4]{2,1,0} parameter(0)
  %at.1 = s32[] parameter(1)
  %part = f32[1,8,4]{2,1,0} dynamic-slice(%stack.1, %at.1), dynamic_slice_sizes={1,8,4}
  ROOT %flat = f32[8,4]{1,0} bitcast(%part)
}

ENTRY %main (stack: f32[9,8,4], value: f32[8,4], at: s32[]) -> f32[8,4] {
  %stacked = f32[9,8,4]{2,1,0} parameter(0)
  %new = f32[8,4]{1,0} parameter(1)
  %round = s32[] parameter(2)
  %fresh = f32[9,8,4]{2,1,0} custom-call(), custom_call_target="AllocateBuffer"
  %kept = (f32[9,8,4]{2,1,0}, f32[8,4]{1,0}) fusion(%stacked, %new, %round), kind=kLoop, calls=%put
  %all = f32[9,8,4]{2,1,0} get-tuple-element(%kept), index=0
  ROOT %taken = f32[8,4]{1,0} fusion(%all, %round), kind=kLoop, calls=%take
}
"""


def test_a_part_of_an_array_is_read_and_written_as_a_part():
    """As in a loop, whose rounds keep what they compute in one array."""
    part, index = 8 * 4 * 4, 4
    put = part + index + part + part  # reads the value and where; writes it into both results
    assert count_cost(hlo.parse(IN_PLACE)).hbm_bytes == put + (part + index) + part


NESTED = """
HloModule nested

%only_a_bitcast (inner: f32[72,4]) -> f32[9,8,4] {
  %inner = f32[72,4]{1,0} parameter(0)
  ROOT %shaped = f32[9,8,4]{2,1,0} bitcast(%inner)
}

%outer (all: f32[72,4], at: s32[]) -> f32[1,8,4] {
  %all = f32[72,4]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %view = f32[9,8,4]{2,1,0} fusion(%all), kind=kLoop, calls=%only_a_bitcast
  ROOT %part = f32[1,8,4]{2,1,0} dynamic-slice(%view, %at), dynamic_slice_sizes={1,8,4}
}

%passing (given: f32[72,4]) -> f32[9,8,4] {
  %given = f32[72,4]{1,0} parameter(0)
  ROOT %passed = f32[9,8,4]{2,1,0} bitcast(%given)
}

ENTRY %main (stack: f32[72,4], at: s32[]) -> f32[1,8,4] {
  %stack = f32[72,4]{1,0} parameter(0)
  %round = s32[] parameter(1)
  %copy = f32[9,8,4]{2,1,0} fusion(%stack), kind=kLoop, calls=%passing
  ROOT %taken = f32[1,8,4]{2,1,0} fusion(%stack, %round), kind=kLoop, calls=%outer
}
"""


def test_what_is_read_through_a_nested_bitcast():
    whole, part, index = 72 * 4 * 4, 8 * 4 * 4, 4
    assert count_cost(hlo.parse(NESTED)).hbm_bytes == 2 * whole + (part + index) + part


def test_places_where_a_kernel_meets_its_operand():
    generator = random.Random(0)
    for _ in range(300):
        stride, apart, before = (generator.randint(*ends) for ends in ((1, 5), (1, 5), (-3, 9)))
        spread, size, kernel, results = (generator.randint(1, 7) for _ in range(4))
        window = {
            "stride": f"{stride}",
            "lhs_dilate": f"{apart}",
            "rhs_dilate": f"{spread}",
            "pad": f"{before}_0",
        }
        places = (
            stride * r + spread * k - before
            for r, k in itertools.product(range(results), range(kernel))
        )
        expected = sum(0 <= p <= (size - 1) * apart and p % apart == 0 for p in places)
        assert _places(size, kernel, results, window) == expected
