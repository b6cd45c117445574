// All ops of one instruction set, in its own namespace. Included after vec_*.h by one source for
// each instruction set, under the compiler options of that set.
#pragma once

#include "dense.h"
#include "exact_floats.h"
#include "mass.h"
#include "preference.h"
#include "propose.h"
#include "quantize.h"
#include "rerank.h"
#include "retrieve.h"
#include "score.h"
#include "sparse.h"
#include "stage.h"
#include "topk.h"
#include "write.h"

#define TAILORKV_STRING_OF(x) #x
#define TAILORKV_STRING(x) TAILORKV_STRING_OF(x)

// The table of this instruction set.
#define TAILORKV_KERNELS                                                       \
  {TAILORKV_STRING(TAILORKV_ISA),    TAILORKV_ISA::write_kv,                   \
   TAILORKV_ISA::quantize_groups,    TAILORKV_ISA::quantized_decode_attention, \
   TAILORKV_ISA::log_mass,           TAILORKV_ISA::score_onebit,               \
   TAILORKV_ISA::score_channels,     TAILORKV_ISA::select_topk,                \
   TAILORKV_ISA::propose_onebit,     TAILORKV_ISA::propose_channels,           \
   TAILORKV_ISA::rerank_topk,        TAILORKV_ISA::sparse_decode_attention,    \
   TAILORKV_ISA::retrieve_attention, TAILORKV_ISA::dense_preference,           \
   TAILORKV_ISA::stage_rows,         TAILORKV_ISA::exact_attention}
