"""The expected time of programs of which every instruction's cycles are known."""

import re

import pytest

from spvit_jax.preflight import clock, hlo
from spvit_jax.preflight.clock import read_clock
from spvit_jax.preflight.collectives import collectives
from spvit_jax.preflight.parts import COLLECTIVES, LOOPS, OTHER, SCOPES, scope_of
from spvit_jax.preflight.topology import CHIPS
from tests.helpers import REPOSITORY

V5E = CHIPS["v5e"]
HERTZ = 197e12 / (2 * 4 * 128 * 128)  # four units of 128×128 make its 197 TFLOPs

# A loop of four rounds with a product and a copy without a scope; before it a gather, a scatter, a
# kernel with a stated cost, an all-reduce, and a copy that runs beside the others.
PROGRAM = """
HloModule step

FileNames
1 "/home/me/site-packages/spvit_jax/models/layers.py"
2 "/usr/lib/jax/numpy.py"

FunctionNames
1 "Mlp.__call__"
2 "take"

FileLocations
1 {file_name_id=1 function_name_id=1 line=34 end_line=34 column=1 end_column=9}
2 {file_name_id=2 function_name_id=2 line=7 end_line=7 column=1 end_column=9}

StackFrames
1 {file_location_id=2 parent_frame_id=1}
2 {file_location_id=1 parent_frame_id=1}
3 {file_location_id=2 parent_frame_id=3}

%product (p: bf16[64,32], q: bf16[32,16]) -> bf16[64,16] {
  %p = bf16[64,32]{1,0} parameter(0)
  %q = bf16[32,16]{1,0} parameter(1)
  %inner = bf16[64,16]{1,0} convolution(%p, %q), dim_labels=bf_io->bf, metadata={op_name="jit(s)/jvp()/while/body/mlp/dot_general"}
  ROOT %sum = bf16[64,16]{1,0} add(%inner, %inner), metadata={op_name="jit(s)/jvp()/while/body/norm/add"}
}

%gathers (t: f32[9999,3], i: s32[1500000]) -> f32[1500000,3] {
  %t = f32[9999,3]{1,0} parameter(0)
  %i = s32[1500000]{0} parameter(1)
  ROOT %rows = f32[1500000,3]{1,0} gather(%t, %i), offset_dims={1}, slice_sizes={1,3}
}

%condition (state: (s32[], bf16[64,16])) -> pred[] {
  %limit = s32[] constant(4)
  %state = (s32[], bf16[64,16]{1,0}) parameter(0)
  %round = s32[] get-tuple-element(%state), index=0
  ROOT %more = pred[] compare(%round, %limit), direction=LT
}

%body (carry: (s32[], bf16[64,16])) -> (s32[], bf16[64,16]) {
  %carry = (s32[], bf16[64,16]{1,0}) parameter(0)
  %left = bf16[64,32]{1,0} get-tuple-element(%carry), index=1
  %right = bf16[32,16]{1,0} get-tuple-element(%carry), index=1
  %fused = bf16[64,16]{1,0} fusion(%left, %right), kind=kOutput, calls=%product, metadata={op_name="jit(s)/jvp()/while/body/norm/add" stack_frame_id=3}, backend_config={"window_config":{"estimated_cycles":"1500000"}}
  %moved = bf16[64,16]{0,1} copy(%fused), backend_config={"window_config":{"estimated_cycles":"3000000"}}
  ROOT %next = (s32[], bf16[64,16]{1,0}) tuple(%carry, %moved)
}

ENTRY %main (a: f32[9999,3], b: s32[1500000]) -> f32[] {
  %a = f32[9999,3]{1,0} parameter(0)
  %b = s32[1500000]{0} parameter(1)
  %table = f32[1500000,3]{1,0} fusion(%a, %b), kind=kCustom, calls=%gathers, metadata={op_name="jit(s)/augment/gather" stack_frame_id=1}
  %spread = f32[9999,3]{1,0} scatter(%a, %b, %table), update_window_dims={1}, metadata={op_name="jit(s)/transpose(jvp(patch_embed))/scatter-add"}
  %kernel.1 = f32[8,128]{1,0} custom-call(%a), custom_call_target="tpu_custom_call", metadata={op_name="jit(s)/jvp(attention)/pallas_call"}, backend_config={"custom_call_config":{"body":"","cost_estimate":{"flops":"394000000000","transcendentals":"100","bytes_accessed":"100"}}}
  %gone = (f32[8]{0:S(1)}, f32[8]{0}, u32[]) copy-start(%a)
  %came = f32[8]{0:S(1)} copy-done(%gone)
  %reduced = f32[50000000]{0} all-reduce(%a), replica_groups={}, to_apply=%sum
  %last = f32[8]{0} negate(%came), backend_config={"window_config":{"estimated_cycles":"150000"}}
  %initial = (s32[], bf16[64,16]{1,0}) tuple(%a, %b)
  %loop = (s32[], bf16[64,16]{1,0}) while(%initial), condition=%condition, body=%body
  ROOT %result = f32[] get-tuple-element(%loop), index=0
}
"""  # noqa: E501


def timed(text=PROGRAM, **bundles):
    program = hlo.parse(text)
    return read_clock(program, V5E, collectives(program, {"data": 4}), bundles)


@pytest.fixture(scope="module")
def by_name():
    return {one.name: one for one in timed().instructions}


def test_cycles_count_as_often_as_loops_run(by_name):
    assert by_name["fused"].seconds == 4 * 1_500_000 / HERTZ
    assert by_name["last"].seconds == 150_000 / HERTZ
    assert by_name["fused"].basis == clock.CYCLES


def test_what_has_no_cycles_is_estimated_and_said(by_name):
    gathered, scattered, sent = (by_name[n] for n in ("table", "spread", "all-reduce over data"))
    for one in (gathered, scattered):  # 11 bundles for each of 1.5 million rows
        assert (one.basis, one.seconds) == (clock.SLICES, pytest.approx(11 * 1.5e6 / HERTZ))
    assert (sent.basis, sent.seconds) == (clock.LINKS, pytest.approx(2 * 3 / 4 * 200e6 / 200e9))
    kernel = by_name["kernel.1"]
    assert (kernel.basis, kernel.seconds) == (clock.STATED, 394e9 / 197e12)
    assert "gone" not in by_name  # runs beside the others
    assert "came" not in by_name


def test_a_kernel_takes_its_bundles_and_at_least_its_products():
    for bundles, seconds in ((9_000_000, 9e6 / HERTZ), (1_000, 394e9 / 197e12)):
        (kernel,) = [
            one for one in timed(**{"kernel.1": bundles}).instructions if one.name == "kernel.1"
        ]
        assert (kernel.basis, kernel.seconds) == (clock.BUNDLES, seconds)


def test_parts_are_those_of_products_results_and_loops(by_name):
    parts = {name: one.part for name, one in by_name.items()}
    assert parts == {
        "fused": "MLP",  # where its product is, not where its result is
        "moved": LOOPS,
        "table": "augmentation",
        "spread": "stem",
        "kernel.1": "attention",
        "last": OTHER,
        "all-reduce over data": COLLECTIVES,
    }
    one = timed()
    assert sum(one.by_part.values()) == pytest.approx(one.seconds)
    assert sum(one.by_basis.values()) == pytest.approx(one.seconds)


def test_what_is_large_and_no_product_is_named_with_its_line(by_name):
    assert [one.name for one in timed().large] == ["table", "spread", "moved"]
    assert by_name["table"].place == "numpy.py:7"
    # The innermost line of this package, behind which JAX's own is.
    assert by_name["fused"].place == "spvit_jax/models/layers.py:34"


@pytest.mark.parametrize(
    ("operation", "part"),
    [
        ("jit(train_step)/transpose(jvp(patch_embed))/conv_general_dilated", "stem"),
        ("jit(s)/while/body/checkpoint/attention/bnhd,bmhd->bhnm/dot_general", "attention"),
        ("jit(s)/augment/normalize/sub", "augmentation"),
        ("jit(s)/heads/norm/mul", "norms"),
        ("jit(s)/jvp()/add", None),
        ("", None),
    ],
)
def test_the_innermost_scope_decides(operation, part):
    assert scope_of(operation) == part


def test_every_scope_of_the_package_belongs_to_a_part():
    found = {
        name
        for path in (REPOSITORY / "spvit_jax").rglob("*.py")
        for name in re.findall(r'named_scope\("(\w+)"\)', path.read_text())
    }
    assert found == set(SCOPES)
