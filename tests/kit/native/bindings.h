// The parts of the native test module. Each is defined in the file of its name.
#pragma once

#include <pybind11/pybind11.h>

namespace fusedrnn_test {

void define_kernels(pybind11::module_& m);  // and the three below
void define_steps(pybind11::module_& m);
void define_scalar_layer(pybind11::module_& m);
void define_plan(pybind11::module_& m);

}  // namespace fusedrnn_test
