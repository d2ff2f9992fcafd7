// SPDX-License-Identifier: MIT
#define ISA neon
#include "kernels/table.inc"
