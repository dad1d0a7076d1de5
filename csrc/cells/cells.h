// The list of cells. docs/adding-a-cell.md names the files that a new cell touches.
#pragma once

#include "gru.h"
#include "lstm.h"
#include "rnn.h"

namespace fusedrnn {

// X(kind, type). CellKind and the kernel tables have the cells in this order.
#define FUSEDRNN_CELLS(X)            \
  X(kLstm, Lstm)                     \
  X(kLstmProj, LstmProj)             \
  X(kGru, Gru)                       \
  X(kGruResetBefore, GruResetBefore) \
  X(kRnnTanh, RnnTanh)               \
  X(kRnnRelu, RnnRelu)               \
  X(kLstmPeephole, LstmPeephole)

#define FUSEDRNN_KIND(kind, type) kind,
enum class CellKind : int { FUSEDRNN_CELLS(FUSEDRNN_KIND) kCount };
#undef FUSEDRNN_KIND

constexpr int kCellCount = static_cast<int>(CellKind::kCount);

// The constants of a cell as data, for code that is not compiled once per cell. contract.h explains
// them; `projects` says whether any of its stages projects.
struct CellInfo {
  const char* name;
  int gates;
  int saved;
  bool saves_h;
  bool has_c;
  bool carries_h;
  bool separate_deltas;
  bool projects;
  int params;
  bool takes_row;
  int stages;
  Stage stage[kMaxStages];
};

template <class C>
constexpr CellInfo info_of() {
  static_assert(Cell<C>, "a cell of the list does not keep the contract, see contract.h");
  CellInfo info = {.name = C::kName,
                   .gates = C::kGates,
                   .saved = C::kSaved,
                   .saves_h = C::kSavesH,
                   .has_c = C::kHasC,
                   .carries_h = C::kCarriesH,
                   .separate_deltas = C::kSeparateDeltas,
                   .projects = false,
                   .params = C::kParams,
                   .takes_row = C::kTakesRow,
                   .stages = C::kStages,
                   .stage = {}};
  for (int s = 0; s < C::kStages; ++s) {
    info.stage[s] = C::stage(s);
    info.projects = info.projects || info.stage[s].projects;
  }
  return info;
}

#define FUSEDRNN_INFO(kind, type) info_of<type>(),
inline constexpr CellInfo kCellInfo[] = {FUSEDRNN_CELLS(FUSEDRNN_INFO)};
#undef FUSEDRNN_INFO

constexpr const CellInfo& info_of(CellKind cell) { return kCellInfo[static_cast<int>(cell)]; }

}  // namespace fusedrnn
