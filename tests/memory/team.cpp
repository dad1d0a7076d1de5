// A team of threads whose pieces of work throw. The leader gets the exception when all pieces are
// done, and the team can be used again.
#include "cpu/team.h"

#include <cstdio>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

int main() {
  constexpr int kPieces = 64;
  fusedrnn::cpu::Team team;
  std::vector<std::thread> helpers;
  std::atomic<int> taken_by_helpers{0};
  const auto leader = std::this_thread::get_id();
  for (int i = 0; i < 3; ++i) helpers.emplace_back([&] { team.help(); });
  int caught = 0, wrong = 0;
  // Each piece throws in turn. In every fourth round all pieces throw, and in the last round none.
  for (int thrower = 0; thrower <= kPieces; ++thrower) {
    std::atomic<int> done{0};
    const auto note = std::make_unique<int>(thrower);  // destroyed after all pieces have run
    try {
      team.parallel(kPieces, [&](int64_t i) {
        if (std::this_thread::get_id() != leader) taken_by_helpers.fetch_add(1);
        if (i % 8 == 0) std::this_thread::yield();
        if (*note != thrower) std::abort();
        done.fetch_add(1);
        if (i == thrower || (thrower % 4 == 3 && thrower < kPieces))
          throw std::runtime_error(std::to_string(thrower));
      });
      wrong += thrower < kPieces;
    } catch (const std::runtime_error& error) {
      ++caught;
      wrong += error.what() != std::to_string(thrower);
    }
    wrong += done != kPieces;
  }
  team.close();
  for (std::thread& helper : helpers) helper.join();
  std::printf("%d caught, %d wrong, helpers took %s\n", caught, wrong,
              taken_by_helpers > 0 ? "some" : "none");
}
