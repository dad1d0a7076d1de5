// Compares backward of a cell with central differences of its forward, for one unit in double. The
// cell has one stage; the macros CELL_HEADER and CELL name its header and its class.
#include <math.h>

#include <cstdio>
#include <cstdlib>

#include CELL_HEADER

using namespace fusedrnn;
using Cell = CELL;

constexpr double kWeightH = 0.7, kWeightC = -0.4;

// The weighted sum of h' and c', as a function of the gates' inputs at[0..G-1] and of c, at[G].
double loss(const double* at, double* saved) {
  const double none[Cell::kGates] = {};
  State<double> state = {0, at[Cell::kGates]};
  const double h = Cell::forward<0>(at, none, state, saved);
  return kWeightH * h + kWeightC * state.c;
}

int main() {
  double worst = 0;
  std::srand(0);
  for (int draw = 0; draw < 100; ++draw) {
    double at[Cell::kGates + 1], saved[Cell::kSaved], delta[Cell::kGates + 1];
    for (double& value : at) value = 4.0 * std::rand() / RAND_MAX - 2;
    loss(at, saved);
    const State<double> state = {0, at[Cell::kGates]};
    Carry<double> carry = {0, kWeightC};
    Cell::backward<0>(kWeightH, saved, state, carry, delta, delta);
    delta[Cell::kGates] = carry.d_c;
    for (int i = 0; i <= Cell::kGates; ++i) {
      constexpr double kStep = 1e-5;
      double other[Cell::kSaved], above[Cell::kGates + 1], below[Cell::kGates + 1];
      for (int k = 0; k <= Cell::kGates; ++k) above[k] = below[k] = at[k];
      above[i] += kStep, below[i] -= kStep;
      const double wanted = (loss(above, other) - loss(below, other)) / (2 * kStep);
      worst = fmax(worst, fabs(wanted - delta[i]));
    }
  }
  std::printf("%s: largest difference %.1e\n", Cell::kName, worst);
  return worst < 1e-9 ? 0 : 1;
}
