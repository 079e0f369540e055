// SPDX-License-Identifier: Apache-2.0

#include "textflag.h"

TEXT ignoreSignal<>(SB), NOSPLIT|NOFRAME, $0
	RET

// SA_RESTORER of rt_sigaction(2): the stack pointer is at the frame that the kernel made, above the return address.
TEXT sigreturn<>(SB), NOSPLIT|NOFRAME, $0
	MOVQ $15, AX // rt_sigreturn
	SYSCALL
	INT $3 // not reached

DATA ·ignoreSignalPC(SB)/8, $ignoreSignal<>(SB)
GLOBL ·ignoreSignalPC(SB), RODATA, $8
DATA ·sigreturnPC(SB)/8, $sigreturn<>(SB)
GLOBL ·sigreturnPC(SB), RODATA, $8
