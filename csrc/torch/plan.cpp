// The CUDA engine's plan for people: no GPU and no CUDA library is needed to see what would run.
#include "../cuda/estimate.h"
#include "call.h"

namespace fusedrnn {
namespace {

std::string architecture_names() {
  std::string names;
  for (const cuda::Architecture& arch : cuda::kArchitectures)
    names.append(names.empty() ? "" : ", ").append(arch.name);
  return names;
}

cuda::Dtype dtype_named(const std::string& name) {
  for (const cuda::Dtype dtype : {cuda::Dtype::kFloat32, cuda::Dtype::kFloat64,
                                  cuda::Dtype::kFloat16, cuda::Dtype::kBFloat16})
    if (name == cuda::name_of(dtype)) return dtype;
  fail("dtype must be f32, f64, f16 or bf16, got '", name, "'");
}

std::tuple<std::string, double, double, std::string> plan(StringHandle cell, StringHandle dtype,
                                                          std::vector<int64_t> sizes,
                                                          StringHandle architecture, bool backward,
                                                          bool allow_tf32, StringHandle regime) {
  const std::string cell_name = take_string(cell), dtype_name = take_string(dtype);
  const std::string arch_name = take_string(architecture), asked = take_string(regime);
  check(sizes.size() == 6, "sizes must be T, N, I, H, P, D, got ", sizes.size(), " of them");
  for (const int64_t size : sizes)
    check(size > 0 && size < int64_t(1) << 31, "sizes must be positive and below 2^31, got ", size);
  const cuda::Architecture* arch = cuda::architecture_named(arch_name);
  check(arch, "arch must be one of ", architecture_names(), ", got '", arch_name, "'");
  check(asked.empty() || asked == "resident" || asked == "per_step",
        "regime must be resident or per_step, got '", asked, "'");
  cuda::PlanRequest q = {.cell = cell_named(cell_name),
                         .dtype = dtype_named(dtype_name),
                         .T = sizes[0],
                         .N = sizes[1],
                         .I = sizes[2],
                         .H = sizes[3],
                         .P = sizes[4],
                         .D = sizes[5],
                         .backward = backward,
                         .allow_tf32 = allow_tf32,
                         .regime = {},
                         .device = arch->device};
  if (!asked.empty())
    q.regime = asked == "resident" ? cuda::Regime::kResident : cuda::Regime::kPerStep;
  const cuda::Estimate e = cuda::estimate(q, cuda::make_plan(q), *arch);
  return {cuda::describe(q, *arch), e.step(), e.total(), e.limit()};
}

}  // namespace
}  // namespace fusedrnn

STABLE_TORCH_LIBRARY_IMPL(fusedrnn, CompositeExplicitAutograd, m) {
  m.impl("_plan", TORCH_BOX(&fusedrnn::plan));
  m.impl("_plan_architectures", TORCH_BOX(&fusedrnn::architecture_names));
}
