"""The Arm kernels' assembly, made on any machine, and the loops found in it."""

import pytest

from bench.arm_mca import BOARDS, inner_loops, kernel_assembly, product_loops

ASSEMBLY = """
outer:
.LBB0_1:                                // %rows
	mov	x1, x0
.LBB0_2:                                // %blocks
	// a comment
	sdot	v0.4s, v1.16b, v2.4b[1]
	sdot	v0.4s, v3.16b, v4.16b           // and another
	.p2align	5
	subs	x2, x2, #1
	b.ne	.LBB0_2
	cbnz	x3, .LBB0_1
	b.eq	.LBB0_3
	sdot	v0.4s, v1.16b, v2.16b
.LBB0_3:
	ret
"""
PI_4, PI_5 = BOARDS


def test_inner_loops():
    assert inner_loops(ASSEMBLY) == [
        [
            "\tsdot\tv0.4s, v1.16b, v2.4b[1]",
            "\tsdot\tv0.4s, v3.16b, v4.16b",
            "\tsubs\tx2, x2, #1",
            "\tb.ne\t.LBB0_2",
        ]
    ]


def test_two_sdot_multiply_a_block():
    assert list(product_loops(PI_5, ASSEMBLY)) == [1]


@pytest.mark.parametrize("board, has, lacks", [(PI_4, "\tsmlal2\t", "\tsdot\t"), (PI_5, "\tsdot\t", "\tsmlal\t")])
def test_each_board_gets_its_instructions(board, has, lacks):
    kernels = kernel_assembly(board)
    code = kernels["code"]["q40"]
    assert has in code and lacks not in code
    assert kernels["rows"] in product_loops(board, code), "the loop for one token is found"
