// SPDX-License-Identifier: MIT
#define ISA baseline
#include "kernels/table.inc"
