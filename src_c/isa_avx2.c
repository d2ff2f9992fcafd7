// SPDX-License-Identifier: MIT
#define ISA avx2
#include "kernels/table.inc"
