"""Cycles of a kernel by the bundles that it was compiled to."""

import re

import pytest

from spvit_jax.preflight import bundles

# A grid of 6 programs, for which a pipeline makes 8 rounds, of 5 bundles; in each of them a loop
# from 1 to 7 in steps of 2, of 2 bundles; 2 bundles before, and 1 after.
TEXT = """
= control target key start
LB: loop body
= control target key end

     0   :  { %s1_s1 = smov 0 /* copy for cssa */ }
   0x1   :  { %7 = vsyncpa [#allocation3], 0 }
   0x2 LB: > { %s2_s2 = sadd.s32 1, %s3_s3  ;;  %s3_s3 = sphi %s1_s1, %s2_s2 /* iteration index */ } /* Start region 10 :: Start region 3 */
   0x3   : > { %s4_s4 = smov 1 } /* window
iteration_bounds: (2, 3)
strides: (64, 1) */
   0x4 LB: >> { %s5_s5 = sadd.s32 2, %s6_s6  ;;  %s6_s6 = sphi %s4_s4, %s5_s5 } /* Start region 11 */
   0x5   : >> { %p1_p1 = scmp.ge.s32.totalorder %s5_s5, 7  ;;  %9 = sbr.rel (!%p1_p1) target = $region11 }
   0x6   : > { %p2_p2 = scmp.ge.s32.totalorder %s2_s2, 8 /* loop exit test */ }
   0x7 PF: > { %8 = sbr.rel (!%p2_p2) target = $region10 }
   0x8   :  { %10 = vsyncpa [#allocation3], 1 }
   0x9   : > { } /* scheduled into the loop's delay slot */
"""  # noqa: E501


def test_bundles_count_as_often_as_their_loops_run():
    assert bundles.count_cycles(TEXT) == 3 + 6 * (5 + 3 * 2)


def test_the_grid_alone_has_a_pipeline():
    without = re.sub(r"iteration_bounds: .*\n", "", TEXT)
    assert bundles.count_cycles(without) == 3 + 8 * (5 + 3 * 2)


def test_a_counter_of_the_grid_may_have_been_stored_meanwhile():
    stored = TEXT.replace("sadd.s32 1, %s3_s3", "sadd.s32 1, %s8_s8")
    assert bundles.count_cycles(stored) == bundles.count_cycles(TEXT)


def test_an_instruction_may_have_a_condition():
    """Such as the end of a loop around another one."""
    text = TEXT.replace("s32 2, %s6_s6", "s32 (%p3_p3), 2, %s6_s6")
    text = text.replace("totalorder %s5_s5", "totalorder (%p3_p3), %s5_s5")
    assert bundles.count_cycles(text) == bundles.count_cycles(TEXT)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("%s5_s5, 7 ", "%s5_s5, %s9_s9 "),  # an end that is computed
        ("%s4_s4 = smov 1", "%s4_s4 = sld [smem:[#allocation1]]"),  # a start that is
        ("target = $region11", "target = $region12"),
        ("sadd.s32 2, %s6_s6", "sadd.s32 %s8_s8, %s6_s6"),
    ],
)
def test_what_cannot_be_read_is_not_guessed(old, new):
    assert TEXT.count(old) == 1
    assert bundles.count_cycles(TEXT.replace(old, new)) is None


def test_files_are_found_by_the_name_of_the_instruction(tmp_path):
    for name in ("attention.1", "attention.10", "fusion.1"):
        (tmp_path / f"1795645658351176485-{name}-72-final_bundles.txt").write_text(TEXT)
    (tmp_path / "1795645658351176485-attention.1-71-schedule-analysis_final_bundles.txt").touch()
    assert bundles.read_folder(tmp_path, ["attention.1", "other.1"]) == {"attention.1": 69}
