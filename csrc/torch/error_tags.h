// The tags at the end of the messages of errors that Python turns into others. fusedrnn/_errors.py
// states them once more, and a test compares the two.
#pragma once

namespace fusedrnn {

// The regime that was asked for cannot run.
constexpr const char* kRegimeTag = " [fusedrnn:regime]";
// A GPU lacks memory.
constexpr const char* kMemoryTag = " [fusedrnn:memory]";

}  // namespace fusedrnn
