// Memory that detects wrong accesses, and a Runtime of the engine that uses it.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/runtime.h"
#include "cpu/team.h"

namespace fusedrnn_test {

// Buffers that lie between two bands. If a band changes, an error names the buffer. Bands and new
// buffers hold NaN, so that a value that is read from outside, or before it is written, spreads to
// the results.
class Fence {
 public:
  template <class T>
  T* take(const std::string& name, int64_t n) {
    return reinterpret_cast<T*>(take_bytes(name, static_cast<size_t>(n) * sizeof(T), sizeof(T)));
  }

  // A copy of n numbers.
  template <class T>
  T* copy(const std::string& name, const T* from, int64_t n) {
    T* to = take<T>(name, n);
    if (n) std::memcpy(to, from, static_cast<size_t>(n) * sizeof(T));
    return to;
  }

  // Memory at an address that is a multiple of 64 bytes, plus `shift`.
  void* take_bytes(const std::string& name, size_t bytes, size_t shift) {
    Piece piece = {name, std::unique_ptr<char, void (*)(void*)>(nullptr, std::free), shift, bytes};
    const size_t total = (2 * kBand + bytes + shift + 63) / 64 * 64;
    piece.base.reset(static_cast<char*>(std::aligned_alloc(64, total)));
    if (!piece.base) throw std::bad_alloc();
    fill(piece.before(), kBand);
    std::memset(piece.data(), 0xff, bytes);
    fill(piece.after(), kBand);
    pieces_.push_back(std::move(piece));
    return pieces_.back().data();
  }

  void check() const {
    for (const Piece& piece : pieces_) {
      if (!intact(piece.before())) throw std::runtime_error("written before " + piece.name);
      if (!intact(piece.after())) throw std::runtime_error("written past " + piece.name);
    }
  }

 private:
  // A band is larger than the widest tile.
  static constexpr size_t kBand = 2048;
  // A quiet NaN that no computation makes, as a float. Twice this word is such a double.
  static constexpr uint32_t kWord = 0x7ffdbeef;

  struct Piece {
    std::string name;
    std::unique_ptr<char, void (*)(void*)> base;
    size_t shift, bytes;
    char* before() const { return base.get() + shift; }
    char* data() const { return before() + kBand; }
    char* after() const { return data() + bytes; }
  };

  static const char* band() {
    static const std::vector<uint32_t> words(kBand / sizeof(kWord), kWord);
    return reinterpret_cast<const char*>(words.data());
  }
  static void fill(char* p, size_t bytes) { std::memcpy(p, band(), bytes); }
  static bool intact(const char* p) { return std::memcmp(p, band(), kBand) == 0; }

  std::vector<Piece> pieces_;
};

// A Runtime that runs tasks one after another, from the last to the first, or all at once. At once
// they run by a team, or each in its own thread.
class FencedRuntime final : public fusedrnn::cpu::Runtime {
 public:
  FencedRuntime(Fence& fence, int64_t threads, bool at_once)
      : fence_(fence), threads_(threads), at_once_(at_once) {}

  int64_t threads() const override { return threads_; }

  void parallel(int64_t n, const std::function<void(int64_t)>& body) override {
    if (team_) return team_->parallel(n, body);
    std::vector<std::thread> running;
    for (int64_t i = n - 1; i >= 0; --i) {
      if (at_once_) {
        running.emplace_back(body, i);
      } else {
        body(i);
      }
    }
    for (std::thread& thread : running) thread.join();
  }

  void together(const std::function<void()>& body) override {
    if (!at_once_) return body();
    fusedrnn::cpu::Team team;
    team_ = &team;
    std::vector<std::thread> helpers;
    for (int64_t i = 1; i < threads_; ++i) helpers.emplace_back([&] { team.help(); });
    body();
    team.close();
    for (std::thread& helper : helpers) helper.join();
    team_ = nullptr;
  }

  void* scratch(size_t bytes) override { return fence_.take_bytes("scratch", bytes, 0); }

 private:
  Fence& fence_;
  int64_t threads_;
  bool at_once_;
  fusedrnn::cpu::Team* team_ = nullptr;
};

}  // namespace fusedrnn_test
