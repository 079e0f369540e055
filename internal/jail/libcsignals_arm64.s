// SPDX-License-Identifier: Apache-2.0

#include "textflag.h"

// It returns to the kernel's own code in the vDSO: no restorer.
TEXT ignoreSignal<>(SB), NOSPLIT|NOFRAME, $0
	RET

DATA ·ignoreSignalPC(SB)/8, $ignoreSignal<>(SB)
GLOBL ·ignoreSignalPC(SB), RODATA, $8
