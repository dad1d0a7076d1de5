// The ops that show the CUDA engine's plan. They need neither a GPU nor the CUDA library.
#include "../cuda/estimate.h"
#include "call.h"

namespace fusedrnn {
namespace {

// Returns the result of body. If body throws std::invalid_argument, the ops throw an error with the
// same text.
template <class Body>
auto told_as_ours(const Body& body) {
  try {
    return body();
  } catch (const std::invalid_argument& wrong) {
    fail(wrong.what());
  }
}

// Returns four values: the plan and its estimate as text, the microseconds of a step, the
// microseconds of the pass, and the resource that limits a step. The last is empty if the regime
// that was asked for cannot run.
std::tuple<std::string, double, double, std::string> plan(StringHandle cell, StringHandle dtype,
                                                          std::vector<int64_t> sizes,
                                                          StringHandle card, bool backward,
                                                          bool allow_tf32, StringHandle regime,
                                                          StringHandle choice) {
  const std::string cell_name = take_string(cell), dtype_name = take_string(dtype);
  const std::string card_name = take_string(card), asked = take_string(regime);
  const std::string chosen_parts = take_string(choice);
  using Result = std::tuple<std::string, double, double, std::string>;
  return told_as_ours([&]() -> Result {
    cuda::PlanRequest q = cuda::request_named(
        {cell_of(cell_name), dtype_name, sizes, card_name, backward, allow_tf32, asked});
    q.choice = cuda::choice_named(chosen_parts);
    const cuda::Card& chosen = cuda::card_named(card_name);
    const cuda::Plan plan = cuda::make_plan(q);
    const cuda::Estimate e = cuda::estimate(q, plan, chosen);
    return {cuda::to_text(q, plan, chosen), e.step(), e.total(),
            cuda::is_refused(q, plan) ? "" : e.limit()};
  });
}

std::string plan_device(StringHandle card) {
  const std::string name = take_string(card);
  return told_as_ours([&] { return cuda::to_text(cuda::card_named(name).device); });
}

int64_t plan_blocks_per_sm(StringHandle card, int64_t registers, int64_t shared_bytes) {
  const std::string name = take_string(card);
  check(0 < registers && registers <= 255, "registers must be from 1 to 255, got ", registers);
  check(shared_bytes >= 0, "shared_bytes must not be negative, got ", shared_bytes);
  return told_as_ours([&]() -> int64_t {
    return cuda::blocks_per_sm(cuda::card_named(name).device, static_cast<int>(registers),
                               static_cast<size_t>(shared_bytes));
  });
}

}  // namespace
}  // namespace fusedrnn

STABLE_TORCH_LIBRARY_IMPL(fusedrnn, CompositeExplicitAutograd, m) {
  m.impl("_plan", &fusedrnn::boxed<&fusedrnn::plan>);
  m.impl("_plan_cards", &fusedrnn::boxed<&fusedrnn::cuda::list_cards>);
  m.impl("_plan_device", &fusedrnn::boxed<&fusedrnn::plan_device>);
  m.impl("_plan_blocks_per_sm", &fusedrnn::boxed<&fusedrnn::plan_blocks_per_sm>);
}
