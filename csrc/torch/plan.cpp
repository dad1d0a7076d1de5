// The CUDA engine's plan for people: no GPU and no CUDA library is needed to see what would run.
#include "../cuda/estimate.h"
#include "call.h"

namespace fusedrnn {
namespace {

// What would run and its estimate: text, microseconds a step and in all, and what limits a step,
// which is empty where the regime that was asked for cannot run.
std::tuple<std::string, double, double, std::string> plan(StringHandle cell, StringHandle dtype,
                                                          std::vector<int64_t> sizes,
                                                          StringHandle card, bool backward,
                                                          bool allow_tf32, StringHandle regime) {
  const std::string cell_name = take_string(cell), dtype_name = take_string(dtype);
  const std::string card_name = take_string(card), asked = take_string(regime);
  try {
    const cuda::PlanRequest q = cuda::request_named(cell_named(cell_name), dtype_name, sizes,
                                                    card_name, backward, allow_tf32, asked);
    const cuda::Card& chosen = cuda::card_named(card_name);
    const cuda::Plan plan = cuda::make_plan(q);
    const cuda::Estimate e = cuda::estimate(q, plan, chosen);
    return {cuda::describe(q, plan, chosen), e.step(), e.total(),
            cuda::is_refused(q, plan) ? "" : e.limit()};
  } catch (const std::invalid_argument& wrong) {
    fail(wrong.what());
  }
}

}  // namespace
}  // namespace fusedrnn

STABLE_TORCH_LIBRARY_IMPL(fusedrnn, CompositeExplicitAutograd, m) {
  m.impl("_plan", TORCH_BOX(&fusedrnn::plan));
  m.impl("_plan_cards", TORCH_BOX(&fusedrnn::cuda::list_cards));
}
