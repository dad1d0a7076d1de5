"""Changes by which a kernel forgets that a sequence begins inside another one, or c in y."""

from __future__ import annotations

from tests.cuda.mutations import Mutation
from tests.kit.starts import StartsCase

SIZES = (4, 4, 3, 3, 1)
GRU = StartsCase("gru", 4, 3, 18, 18, 2, True, SIZES)
LSTM = StartsCase("lstm", 4, 3, 18, 18, 2, True, SIZES, c_in_y=True)
RNN = StartsCase("rnn_tanh", 4, 3, 18, 18, 2, True, SIZES)
MMA = StartsCase("gru", 9, 3, 18, 18, 2, True, (9, 9, 4, 4), "bf16")


def wrong(
    name: str, kernels: str, header: str, old: str, new: str, case: StartsCase = GRU
) -> Mutation:
    """A change that makes numbers wrong, or leaves memory unwritten."""
    return Mutation(name, kernels, header, old, new, ("numbers", "uninitialised read"), case)


FORWARD, BACKWARD = "resident_forward.cuh", "resident_backward.cuh"
EXCHANGED = "unless(dropped >> i & 1, h[i])"
GRADIENT = "unless(dropped[i], d_h[i])"
NEXT_H, NEXT_C = "kLast && dropped_ ? V(0) : emit_", "dropped_ ? V(0) : state_.c"
LAST_D_H, LAST_D_C = "(dropped_ ? V(0) : d_emit)", "dropped ? V(0) : a.d_c[j * a.H + u]"
STARTS_MUTATIONS = [
    wrong("hands h on, resident", "resident_fma.cu", FORWARD, EXCHANGED, "h[i]"),
    wrong("hands h on, tensor cores", "resident_mma.cu", FORWARD, EXCHANGED, "h[i]", MMA),
    wrong("hands h on, clusters", "clustered_fma.cu", FORWARD, EXCHANGED, "h[i]"),
    wrong("goes on with h", "resident_fma.cu", FORWARD, "      h[i] = V(0);\n", ""),
    wrong("goes on with c", "resident_fma.cu", FORWARD, "c[i] = V(0);", "c[i] = c[i];", LSTM),
    wrong(
        *("takes the beginnings of the other direction", "resident_fma.cu", FORWARD),
        *("if (a.drops[place.d][", "if (a.drops[1 - place.d]["),
    ),
    wrong(
        *("saves h once, though it is not h_in of the next row", "resident_fma.cu", FORWARD),
        *("Cell::kSavesH && !a.drops[place.d] ?", "Cell::kSavesH ?", RNN),
    ),
    wrong(
        *("reads h of h_in of the next row", "resident_fma.cu", BACKWARD),
        *("if (Cell::kSavesH && !a.drops[d])", "if (Cell::kSavesH)", RNN),
    ),
    wrong("takes d_h back", "resident_fma.cu", BACKWARD, GRADIENT, "d_h[i]"),
    wrong("takes d_h back, tensor cores", "resident_mma.cu", BACKWARD, GRADIENT, "d_h[i]", MMA),
    wrong(
        *("takes d_c back", "resident_fma.cu", BACKWARD),
        *("if (dropped[i]) d_c[i] = V(0);", "", LSTM),
    ),
    wrong(
        *("loses the gradient of c in y", "resident_fma.cu", BACKWARD),
        *("if (a.d_y_c) d_c[i]", "if (a.d_y_c && i > 0) d_c[i]", LSTM),
    ),
    wrong("hands h on, streamed", "streamed_fma.cu", "stage_work.cuh", NEXT_H, "emit_"),
    wrong("hands h on, per step", "step.cu", "stage_work.cuh", NEXT_H, "emit_"),
    wrong(
        "goes on with c, streamed", "streamed_fma.cu", "stage_work.cuh", NEXT_C, "state_.c", LSTM
    ),
    wrong("takes d_h back, streamed", "streamed_fma.cu", "stage_work.cuh", LAST_D_H, "d_emit"),
    wrong("takes d_h back, per step", "step.cu", "stage_work.cuh", LAST_D_H, "d_emit"),
    wrong(
        *("takes d_c back, per step", "step.cu", "stage_work.cuh"),
        *(LAST_D_C, "a.d_c[j * a.H + u]", LSTM),
    ),
    wrong(
        *("h_0 goes into sequences that begin anew", "around_loop.cu", "around_loop.cu"),
        *("if (!a.begins[j]) continue;", "if (a.begins[j]) continue;"),
    ),
]
