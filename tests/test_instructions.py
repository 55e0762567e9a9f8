"""benchmarks/instructions.py: what it counts, on a listing whose ways are known."""

import pytest

pytest.importorskip("triton")

from benchmarks.instructions import basic_blocks, budget, executed, load_width

# 2 instructions, then rounds of 5 with 3 more that can be left out and a loop of 2 within, then 2 more.
LISTING = """
        /*0000*/                   MOV R1, 0x10 ;
        /*0010*/                   LDG.E.64 R4, desc[UR14][R4.64] ;
.L_x_1:
        /*0020*/                   LDG.E.128 R4, desc[UR14][R54.64] ;
        /*0030*/                   BRA.DIV UR7, `(.L_x_9) ;
.L_x_2:
        /*0040*/                   MUFU.EX2 R7, R7 ;
        /*0050*/              @!P4 BRA `(.L_x_2) ;
        /*0060*/               @P6 BRA `(.L_x_3) ;
        /*0070*/                   MUFU.EX2 R7, R7 ;
        /*0080*/                   MUFU.EX2 R7, R7 ;
        /*0090*/                   MUFU.EX2 R7, R7 ;
.L_x_3:
        /*00a0*/              @!P1 EXIT ;
        /*00b0*/                   BRA `(.L_x_1) ;
.L_x_9:
        /*00c0*/                   MUFU.EX2 R7, R7 ;
        /*00d0*/                   EXIT ;
"""


def test_loops_are_counted_as_often_as_they_go_round_and_what_can_be_left_out_is():
    code = executed(basic_blocks(LISTING), [3, 5])
    times = {name: sum(n for each, n in code if name in each) for name in ("LDG.E.64", "LDG.E.128", "EX2", "EXIT")}
    assert times == {"LDG.E.64": 1, "LDG.E.128": 3, "EX2": 15, "EXIT": 3}
    assert sum(n for _, n in code) == 2 + 3 * 5 + 15 * 2


def test_the_width_of_loads_is_that_of_the_logits():
    wide, word, narrow = (f"LDG.E{size} R4, desc[UR14][R4.64]" for size in (".128", "", ".U16"))
    code = [(wide, 1), (word, 9), (narrow, 16)]  # 128, 288 and 256 bits
    assert [load_width(code, bits) for bits in (256, 258, 576)] == [128, 16, 32]
    assert load_width([(narrow, 8), ("LDS.128 R4, [R2]", 9)], 128) == 16


def test_the_budget_of_a_card():
    """An H200 issues 132 x 4 x 32 instructions a clock and takes in 4.8 TB, or 2.4 T numbers of two bytes, a second."""
    assert budget("H200", 2, False) == pytest.approx(132 * 128 * 1.83e9 / 2.4e12)
    assert budget("H200", 2, True) == pytest.approx(2 * budget("H200", 2, False))
