// The kernels of an instruction set as a table of functions, and the plain structs that they take.
// The engine (layer.cpp) fills the structs and calls through the table. The kernels (kernels.inl)
// are compiled once for each instruction set.
//
// Rows are packed rows, see csrc/layer/sequences.h. `Stored` is the stored type: float, double or
// Bf16. The factors of products and the saved values have this type. Sums and c have the compute
// type Real<Stored>.
#pragma once

#include <cstdint>

#include "../cells/cells.h"
#include "../layer/dtype.h"

namespace fusedrnn::cpu {

// A chunk of a batch in one direction: the positions [begin, end) of the sequences
// [n_begin, n_end). Positions count steps in the order in which they are processed.
struct Steps {
  int64_t T;
  const int64_t* batch_sizes;  // [T], non-increasing
  const int64_t* row_offset;   // [T + 1]
  bool descending;             // position p is step T - 1 - p instead of p
  int64_t begin, end;
  int64_t first_row;  // packed row that is row 0 of the chunk's buffers, such as gates_x and delta
  int64_t n_begin, n_end;
};

// The step at a position.
inline __attribute__((always_inline)) int64_t step_at(const Steps& s, int64_t p) {
  return s.descending ? s.T - 1 - p : p;
}

// The number of terms of a sum that one instruction multiplies and adds in a lane. Panels keep this
// many terms of a unit side by side. I, H and P must be multiples of it: if they are not, the
// caller runs the layer in Real<Stored>.
template <class Stored>
constexpr int64_t kTerms = static_cast<int64_t>(sizeof(Real<Stored>) / sizeof(Stored));

// K, rounded up to whole groups of kTerms<Stored>. The added terms are zero. (All functions of this
// header are always inlined, because it is compiled for every instruction set.)
template <class Stored>
inline __attribute__((always_inline)) constexpr int64_t whole_terms(int64_t K) {
  return (K + kTerms<Stored> - 1) / kTerms<Stored> * kTerms<Stored>;
}

// The most sequences for which a time loop reads weights as torch stores them.
constexpr int kFewRows = 3;

// Panels [begin, end) of a stage. One step walks them from the first to the last, the next step
// from the last to the first, and so on. Thus a step begins with the weights that the step before
// has left in the nearest cache.
struct PanelRange {
  int64_t begin, end;
  bool from_last = false;
};

// The work of one call of a kernel of the time loop. The parts of one stage at one position may run
// at the same time. For the same sequences, a stage must be complete before the next stage begins,
// and a position before the next position.
struct Part {
  int64_t position;
  int stage;
  PanelRange panels;
};

// The recurrent weights of each stage, in one of two forms. The pointer to the other form is null.
template <class Stored>
struct StageWeights {
  const Stored* panels[kMaxStages];     // packed by pack_gates, or backward by pack_columns
  const Stored* as_stored[kMaxStages];  // [gates * width, K], for at most kFewRows sequences
};

template <class Stored>
struct ForwardArgs {
  using Scalar = Real<Stored>;

  Steps steps;
  int64_t N, H, P;
  bool keep;  // whether h_in, c_in, saved and emit keep every row for backward

  StageWeights<Stored> weights;
  const Scalar* bias[kMaxStages];  // [panel][2][gates][units]: b_ih, then b_hh; zero padded
  const Scalar* gates_x;           // [chunk rows, G*H]: x W, without bias
  const Stored* params;            // [kParams*H] parameters of each unit, if the cell has any
  const Scalar* row_input;         // [S] one value per row, if the cell takes one

  Stored* h;     // [N, P] in: h before the chunk; out: h after it
  Scalar* c;     // [N, H] the same for c; null if the cell has no c
  Stored* y;     // [S, y_ld]
  Stored* y_c;   // [S, y_ld] c_t of every row, or null
  int64_t y_ld;  // the width of y, which both directions share
  Stored* h_in;  // h_{t-1} of every row: [S, P] if keep, else two steps [2, N, P]
  Scalar* c_in;  // c_{t-1} of every row: [S, H] if keep, else null (c is updated in place)
  // The values that the cell saves.
  //   keep:                [S, kSaved*H]
  //   keep and kSavesH:    [N, H], h of each sequence's last step; h_in has h of the earlier steps
  //   not keep:            [N, kSaved*H], from one stage to the next; null for cells of one stage
  Stored* saved;
  Stored* emit;  // the emit of stage 0: [S, H] if keep, else [N, H]; null for cells of one stage
};

template <class Stored>
struct BackwardArgs {
  using Scalar = Real<Stored>;

  Steps steps;
  int64_t N, H, P;

  StageWeights<Stored> weights;
  const Stored* params;     // as in ForwardArgs
  const Scalar* row_input;  // as in ForwardArgs
  Scalar* few_sums;         // [kFewRows, few_ld], a row per sequence, if weights are read as stored
  int64_t few_ld;           // at least H and P, in whole vectors
  const Stored* saved;      // [S, kSaved*H] or [N, H], as forward left it
  const Stored* h_in;       // [S, P]
  const Scalar* c_in;       // [S, H]
  const Stored* d_y;        // [S, d_y_ld] or null
  const Stored* d_y_c;      // [S, d_y_ld] gradient of y_c, or null
  int64_t d_y_ld;

  Scalar* d_h;         // [N, P] in: gradient of h after the chunk; out: gradient of h before it
  Scalar* d_c;         // [N, H] the same for c
  Stored* delta;       // [chunk rows, G*H] gradient of h U + b_hh
  Stored* delta_x;     // [chunk rows, G*H] gradient of x W + b_ih; equal to delta if it is the same
  Stored* delta_proj;  // [chunk rows, P] gradient of the projection's product
  Stored* delta_params;  // [chunk rows, kParams*H] each row's part of the parameters' gradient
};

// Packs a weight as torch stores it, [gates * width, K], into panels in which the gates of the
// units lie side by side: [panel][K][gates][units], padded with zeros. Each group of kTerms<Stored>
// terms of a unit is contiguous.
template <class Stored>
struct PackGatesArgs {
  const Stored* weight;            // [gates * width, K]
  const Stored* bias_x = nullptr;  // [gates * width] or null
  const Stored* bias_h = nullptr;  // [gates * width] or null
  int64_t gates, width, K;
  int64_t panel_begin = 0, panel_end = 0;
  Stored* panels;                // or null if only the biases are wanted
  Real<Stored>* bias = nullptr;  // [panel][2][gates][units], or null if not wanted
};

// Packs the columns of a matrix [K, N] into panels [panel][K][units], padded with zeros.
template <class Stored>
struct PackColumnsArgs {
  const Stored* matrix;
  int64_t ld, K, N;
  int64_t panel_begin = 0, panel_end = 0;
  Stored* panels;
};

// Computes c = a b, or c += a b, for the rows [m_begin, m_end) and the columns of some panels. b is
// packed by pack_columns, or by pack_gates with one gate, which transposes.
template <class Stored>
struct GemmArgs {
  const Stored* a;  // [M, K] with row stride a_ld, or [K, M] if a_transposed
  int64_t a_ld;
  bool a_transposed = false;
  const Stored* panels;
  Real<Stored>* c;  // [M, N], row stride c_ld
  int64_t c_ld;
  int64_t K, N;
  int64_t m_begin = 0, m_end = 0;
  int64_t panel_begin = 0, panel_end = 0;
  bool accumulate = false;
  int64_t whole_K = 0;  // terms of the whole sum if this product is a part of it, else 0
  // If not null, the rows are those of the chunk's sequences [n_begin, n_end), counted from
  // first_row, instead of [m_begin, m_end), and a is not transposed.
  const Steps* steps = nullptr;
};

// Computes some columns of c = a b^T, where b is a weight as torch stores it. The columns are
// counted in panels of pack_columns, although b is not packed.
template <class Stored>
struct GemmAsStoredArgs {
  const Stored* a;  // [M, K]
  const Stored* b;  // [N, K]
  Real<Stored>* c;  // [M, N]
  int64_t M, N, K;
  int64_t panel_begin = 0, panel_end = 0;
};

// Computes out[j] = Σ_rows m[row, j], or adds the sum to out[j] if accumulate, for the columns
// [begin, end). The order of the sum depends only on the number of rows.
template <class Stored>
struct SumRowsArgs {
  const Stored* m;  // [rows, ld]
  int64_t rows, ld;
  int64_t begin, end;
  Real<Stored>* out;  // [ld]
  bool accumulate;
};

template <class Stored>
struct DtypeKernels {
  // Forward calls enter, and then forward for each stage of each position, in order. If y_c is
  // wanted, the stage number `stages` follows, which writes it. Backward calls backward for the
  // stages of each position from the last to the first, and then for the stage number `stages`,
  // which writes d_h of the sequences that leave. If there is d_y_c, the stage number `stages` + 1
  // comes before all others and adds it to d_c.
  void (*enter)(const ForwardArgs<Stored>&);
  void (*forward[kCellCount])(const ForwardArgs<Stored>&, const Part&);
  void (*backward[kCellCount])(const BackwardArgs<Stored>&, const Part&);

  int64_t (*units_of_gates_panel)(int64_t gates);  // units in a panel of pack_gates
  int64_t (*units_of_columns_panel)();  // columns in a panel of pack_columns and gemm_as_stored
  void (*pack_gates)(const PackGatesArgs<Stored>&);
  void (*pack_columns)(const PackColumnsArgs<Stored>&);
  void (*gemm)(const GemmArgs<Stored>&);
  void (*gemm_as_stored)(const GemmAsStoredArgs<Stored>&);
  void (*sum_rows)(const SumRowsArgs<Stored>&);
};

struct KernelTable {
  const char* isa;
  DtypeKernels<float> f32;
  DtypeKernels<double> f64;
  const DtypeKernels<Bf16>* bf16;  // if null, layers of bfloat16 are computed in float
};

extern const KernelTable kKernelsPortable;
extern const KernelTable kKernelsAvx2;
extern const KernelTable kKernelsAvx512;
extern const DtypeKernels<Bf16> kBf16KernelsAvx512;

}  // namespace fusedrnn::cpu
