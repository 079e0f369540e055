// SPDX-License-Identifier: Apache-2.0

#include "go_asm.h"
#include "textflag.h"

// decodeAsm is decodeGo for the middle of a chunk, where no symbol can reach the
// end of either buffer: a symbol needs no check but that its distance stays in
// the buffer, and the bits of trees, which nobody can foretell, are taken without
// a jump.
//
// All along: BX *lzma, SI input, DI output, R8 range, R9 code, R10 state, R11 last
// distance less one; between symbols, DX the byte before.

// The lower five bits of each index in the other order.
DATA reversed<>+0(SB)/8, $0x1c0c140418081000
DATA reversed<>+8(SB)/8, $0x1e0e16061a0a1202
DATA reversed<>+16(SB)/8, $0x1d0d150519091101
DATA reversed<>+24(SB)/8, $0x1f0f17071b0b1303
GLOBL reversed<>(SB), RODATA|NOPTR, $32

// FILL makes the range wide enough for the next bit.
#define FILL(done) \
	CMPL R8, $const_topRange; \
	JAE  done; \
	SHLL $8, R8; \
	SHLL $8, R9; \
	MOVB (SI), R9; \
	INCQ SI; \
done:

// BOUND splits the range by the probability AX.
#define BOUND \
	MOVL  R8, R13; \
	SHRL  $11, R13; \
	IMULL AX, R13

// ZERO and ONE take their part of the range and adapt the probability at p.
#define ZERO(p) \
	MOVL R13, R8; \
	MOVL $2048, R14; \
	SUBL AX, R14; \
	SHRL $5, R14; \
	ADDL R14, AX; \
	MOVW AX, p

#define ONE(p) \
	SUBL R13, R8; \
	SUBL R13, R9; \
	MOVL AX, R14; \
	SHRL $5, R14; \
	SUBL R14, AX; \
	MOVW AX, p

// BIT decodes a bit with the probability at p, and jumps when it is one.
#define BIT(p, filled, one) \
	MOVWLZX p, AX; \
	FILL(filled) \
	BOUND; \
	CMPL R9, R13; \
	JAE  one

// CHOOSE takes the part of the range that the code is in, without a jump; the
// carry flag is then set for a zero. R14 becomes the adapted probability less
// R13>>5.
#define CHOOSE \
	BOUND; \
	SUBL    R13, R8; \
	MOVL    R9, R14; \
	SUBL    R13, R9; \
	CMOVLCS R14, R9; \
	CMOVLCS R13, R8; \
	LEAL    -2017(AX), R15; \
	MOVL    AX, R13; \
	MOVL    AX, R14; \
	CMOVLCS R15, R13

// STEP goes down one level in the tree at R12: DX is the node, AX its
// probability. Those of both children are on their way before it is known
// which one is next.
#define STEP(filled) \
	FILL(filled) \
	MOVWLZX (R12)(DX*4), CX; \
	MOVWLZX 2(R12)(DX*4), BP; \
	CHOOSE; \
	MOVL    BP, AX; \
	CMOVLCS CX, AX; \
	LEAL    1(DX)(DX*1), CX; \
	SBBL    $0, CX; \
	SARL    $5, R13; \
	SUBL    R13, R14; \
	MOVW    R14, (R12)(DX*2); \
	MOVL    CX, DX

#define ROOT \
	MOVL    $1, DX; \
	MOVWLZX 2(R12), AX

// MATCHED goes down one level in the tree of a literal whose bits have so far
// been those of the byte at the last distance, BP; it leaves for the plain tree
// after the first bit that is not.
#define MATCHED(level, filled, differs) \
	MOVL    BP, CX; \
	SHLL    $(level+1), CX; \
	ANDL    $0x100, CX; \
	MOVL    BP, R15; \
	SHRL    $(8-level), R15; \
	ADDL    R15, CX; \
	MOVWLZX 512(R12)(CX*2), AX; \
	FILL(filled) \
	CHOOSE; \
	LEAL    1(DX)(DX*1), DX; \
	SBBL    $0, DX; \
	SARL    $5, R13; \
	SUBL    R13, R14; \
	MOVW    R14, 512(R12)(CX*2); \
	MOVL    BP, R15; \
	SHRL    $(7-level), R15; \
	CMPL    DX, R15; \
	JNE     differs

// AFTER makes R10 the state after something that is no literal.
#define AFTER(literal, other) \
	CMPL    R10, $const_literalStates; \
	MOVL    $literal, R10; \
	MOVL    $other, R14; \
	CMOVLCC R14, R10

// LENGTH decodes the length of a match with the probabilities at R12 into DX.
#define LENGTH(f1, c1, s1, s2, s3, f2, c2, s4, s5, s6, s7, high, done) \
	BIT((R12), f1, c1); \
	ZERO((R12)); \
	MOVL posState-8(SP), CX; \
	SHLL $4, CX; \
	LEAQ (2*const_lenLow)(R12)(CX*1), R12; \
	ROOT; \
	STEP(s1); \
	STEP(s2); \
	STEP(s3); \
	SUBL $(8-const_minMatch), DX; \
	JMP  done; \
c1: \
	ONE((R12)); \
	BIT((2*const_lenChoice2)(R12), f2, c2); \
	ZERO((2*const_lenChoice2)(R12)); \
	MOVL posState-8(SP), CX; \
	SHLL $4, CX; \
	LEAQ (2*const_lenMid)(R12)(CX*1), R12; \
	ROOT; \
	STEP(s4); \
	STEP(s5); \
	STEP(s6); \
	ADDL $const_minMatch, DX; \
	JMP  done; \
c2: \
	ONE((2*const_lenChoice2)(R12)); \
	ADDQ $(2*const_lenHigh), R12; \
	ROOT; \
high: \
	STEP(s7); \
	CMPL DX, $256; \
	JB   high; \
	SUBL $(256-16-const_minMatch), DX; \
done:

#define P(at) (lzma_probs+2*at)

// func decodeAsm(l *lzma, dst *byte, out int, outLimit *byte, in *byte, pos int, inLimit *byte) (outNow, posNow int, ok bool)
TEXT ·decodeAsm(SB), NOSPLIT, $24-73
	MOVQ l+0(FP), BX
	MOVQ dst+8(FP), DI
	ADDQ out+16(FP), DI
	MOVQ in+32(FP), SI
	ADDQ pos+40(FP), SI
	MOVL lzma_rng(BX), R8
	MOVL lzma_code(BX), R9
	MOVL lzma_state(BX), R10
	MOVL lzma_rep(BX), R11
	MOVBLZX -1(DI), DX

loop:
	CMPQ SI, inLimit+48(FP)
	JA   pause
	CMPQ DI, outLimit+24(FP)
	JA   pause
	MOVQ DI, R12
	SUBQ dst+8(FP), R12
	MOVL lzma_posMask(BX), CX
	ANDL R12, CX
	MOVL R10, R15
	SHLL $4, R15
	ADDL CX, R15
	BIT(P(const_isMatch)(BX)(R15*2), isMatchFilled, notLiteral)
	ZERO(P(const_isMatch)(BX)(R15*2))

	SHLL $8, R12
	ADDL DX, R12
	ANDL lzma_litMask(BX), R12
	MOVL lzma_lc(BX), CX
	SHLL CX, R12
	LEAL (R12)(R12*2), R12
	LEAQ P(const_literal)(BX)(R12*2), R12
	CMPL R10, $const_literalStates
	JAE  matched
	XORL R15, R15
	SUBL $3, R10
	CMOVLCS R15, R10
	ROOT
	STEP(lit0)
level1:
	STEP(lit1)
level2:
	STEP(lit2)
level3:
	STEP(lit3)
level4:
	STEP(lit4)
level5:
	STEP(lit5)
level6:
	STEP(lit6)
level7:
	STEP(lit7)
level8:
	MOVB DX, (DI)
	INCQ DI
	MOVBLZX DX, DX
	JMP  loop

matched:
	LEAL -3(R10), R14
	SUBL $6, R10
	CMPL R10, $4
	CMOVLCS R14, R10
	MOVQ DI, R15
	SUBQ R11, R15
	MOVBLZX -1(R15), BP
	ORL  $0x100, BP
	MOVL $1, DX
	MATCHED(0, mat0, differs1)
	MATCHED(1, mat1, differs2)
	MATCHED(2, mat2, differs3)
	MATCHED(3, mat3, differs4)
	MATCHED(4, mat4, differs5)
	MATCHED(5, mat5, differs6)
	MATCHED(6, mat6, differs7)
	MATCHED(7, mat7, level8)
	JMP  level8

differs1:
	MOVWLZX (R12)(DX*2), AX
	JMP level1
differs2:
	MOVWLZX (R12)(DX*2), AX
	JMP level2
differs3:
	MOVWLZX (R12)(DX*2), AX
	JMP level3
differs4:
	MOVWLZX (R12)(DX*2), AX
	JMP level4
differs5:
	MOVWLZX (R12)(DX*2), AX
	JMP level5
differs6:
	MOVWLZX (R12)(DX*2), AX
	JMP level6
differs7:
	MOVWLZX (R12)(DX*2), AX
	JMP level7

notLiteral:
	ONE(P(const_isMatch)(BX)(R15*2))
	MOVL CX, posState-8(SP)
	BIT(P(const_isRep)(BX)(R10*2), isRepFilled, repeated)
	ZERO(P(const_isRep)(BX)(R10*2))
	MOVL (lzma_rep+8)(BX), R14
	MOVL R14, (lzma_rep+12)(BX)
	MOVL (lzma_rep+4)(BX), R14
	MOVL R14, (lzma_rep+8)(BX)
	MOVL R11, (lzma_rep+4)(BX)
	AFTER(7, 10)
	LEAQ P(const_matchLen)(BX), R12
	LENGTH(mf1, mc1, ms1, ms2, ms3, mf2, mc2, ms4, ms5, ms6, ms7, mhigh, mdone)

	MOVL DX, R11
	LEAL (-const_minMatch)(DX), CX
	MOVL $3, R14
	CMPL CX, R14
	CMOVLHI R14, CX
	SHLL $7, CX
	LEAQ P(const_distSlot)(BX)(CX*1), R12
	ROOT
	STEP(slot0)
	STEP(slot1)
	STEP(slot2)
	STEP(slot3)
	STEP(slot4)
	STEP(slot5)
	SUBL $64, DX
	CMPL DX, $4
	JB   haveDistance

	MOVL DX, CX
	SHRL $1, CX
	MOVL DX, R15
	ANDL $1, R15
	ORL  $2, R15
	CMPL DX, $14
	JAE  direct
	DECL CX
	SHLL CX, R15
	MOVL R15, distance-16(SP)
	MOVL $1, R14
	SHLL CX, R14
	MOVL R14, limit-24(SP)
	SUBL $4, DX
	SHLL $6, DX
	LEAQ P(const_distLow)(BX)(DX*1), R12
	ROOT
low:
	STEP(lowFilled)
	CMPL DX, limit-24(SP)
	JB   low
	// The first bit was the lowest one: turn those below the leading one around.
	MOVL limit-24(SP), R14
	XORL R14, DX
	LEAQ reversed<>(SB), R15
	MOVBLZX (R15)(DX*1), DX
	BSFL R14, R14
	MOVL $5, CX
	SUBL R14, CX
	SHRL CX, DX
	ADDL distance-16(SP), DX
	JMP  haveDistance

direct:
	SUBL $5, CX
	MOVL R15, DX
directBit:
	FILL(directFilled)
	SHRL $1, R8
	MOVL R9, R14
	SUBL R8, R9
	CMOVLCS R14, R9
	LEAL 1(DX)(DX*1), DX
	SBBL $0, DX
	DECL CX
	JNE  directBit
	SHLL $4, DX
	MOVL DX, distance-16(SP)
	LEAQ P(const_distAlign)(BX), R12
	ROOT
	STEP(align0)
	STEP(align1)
	STEP(align2)
	STEP(align3)
	ANDL $15, DX
	LEAQ reversed<>(SB), R15
	MOVBLZX (R15)(DX*1), DX
	SHRL $1, DX
	ADDL distance-16(SP), DX

haveDistance:
	MOVL R11, CX
	MOVL DX, R11

// CX bytes from R11+1 before.
copy:
	MOVQ DI, R12
	SUBQ dst+8(FP), R12
	CMPQ R11, R12
	JAE  damaged
	CMPL R11, lzma_dict(BX)
	JAE  damaged
	LEAQ (DI)(CX*1), R13
	MOVQ DI, R12
	SUBQ R11, R12
	DECQ R12
	LEAQ 1(R11), R14
	CMPQ R14, $16
	JB   near
far:
	MOVOU (R12), X0
	MOVOU X0, (DI)
	ADDQ $16, R12
	ADDQ $16, DI
	CMPQ DI, R13
	JB   far
	MOVQ R13, DI
	MOVBLZX -1(DI), DX
	JMP  loop

// What a copy has written doubles the distance the next one may go over.
near:
	MOVOU (R12), X0
	MOVOU X0, (DI)
	ADDQ R14, DI
	ADDQ R14, R14
	CMPQ R14, $16
	JB   near
	CMPQ DI, R13
	JB   far
	MOVQ R13, DI
	MOVBLZX -1(DI), DX
	JMP  loop

repeated:
	ONE(P(const_isRep)(BX)(R10*2))
	BIT(P(const_isRepG0)(BX)(R10*2), g0Filled, notRep0)
	ZERO(P(const_isRepG0)(BX)(R10*2))
	MOVL R10, R15
	SHLL $4, R15
	ADDL posState-8(SP), R15
	BIT(P(const_isRep0Long)(BX)(R15*2), longFilled, rep0Long)
	ZERO(P(const_isRep0Long)(BX)(R15*2))
	AFTER(9, 11)
	MOVL $1, CX
	JMP  copy
rep0Long:
	ONE(P(const_isRep0Long)(BX)(R15*2))
	JMP  repLength

notRep0:
	ONE(P(const_isRepG0)(BX)(R10*2))
	MOVL (lzma_rep+4)(BX), DX
	MOVL R11, (lzma_rep+4)(BX)
	MOVL DX, R11
	BIT(P(const_isRepG1)(BX)(R10*2), g1Filled, notRep1)
	ZERO(P(const_isRepG1)(BX)(R10*2))
	JMP  repLength
notRep1:
	ONE(P(const_isRepG1)(BX)(R10*2))
	MOVL (lzma_rep+8)(BX), DX
	MOVL R11, (lzma_rep+8)(BX)
	MOVL DX, R11
	BIT(P(const_isRepG2)(BX)(R10*2), g2Filled, notRep2)
	ZERO(P(const_isRepG2)(BX)(R10*2))
	JMP  repLength
notRep2:
	ONE(P(const_isRepG2)(BX)(R10*2))
	MOVL (lzma_rep+12)(BX), DX
	MOVL R11, (lzma_rep+12)(BX)
	MOVL DX, R11
repLength:
	AFTER(8, 11)
	LEAQ P(const_repLen)(BX), R12
	LENGTH(rf1, rc1, rs1, rs2, rs3, rf2, rc2, rs4, rs5, rs6, rs7, rhigh, rdone)
	MOVL DX, CX
	JMP  copy

pause:
	MOVB $1, ok+72(FP)
	JMP  return
damaged:
	MOVB $0, ok+72(FP)
return:
	MOVL R8, lzma_rng(BX)
	MOVL R9, lzma_code(BX)
	MOVL R10, lzma_state(BX)
	MOVL R11, lzma_rep(BX)
	SUBQ dst+8(FP), DI
	MOVQ DI, outNow+56(FP)
	SUBQ in+32(FP), SI
	MOVQ SI, posNow+64(FP)
	RET
