// A library for LD_PRELOAD that makes an allocation fail. It counts the allocations of
// fusedrnn/_C.so by operator new and of torch for tensors, and refuses the n-th of them.
#include <dlfcn.h>
#include <execinfo.h>
#include <link.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace {

// The addresses of the code of a loaded library.
struct Range {
  const char* name;
  uintptr_t begin = 0, end = 0;
  bool holds(const void* p) const {
    const auto address = reinterpret_cast<uintptr_t>(p);
    return begin <= address && address < end;
  }
};
Range ours{"fusedrnn/_C.so"}, standard{"libstdc++.so"}, self{"failing.so"};

std::atomic<bool> counting{false};
std::atomic<long> counted{0}, refused{0};

int find(dl_phdr_info* info, size_t, void* wanted) {
  auto* range = static_cast<Range*>(wanted);
  if (!std::strstr(info->dlpi_name, range->name)) return 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    if (header.p_type != PT_LOAD || !(header.p_flags & PF_X)) continue;
    range->begin = info->dlpi_addr + header.p_vaddr;
    range->end = range->begin + header.p_memsz;
  }
  return 1;
}

// Counts an allocation. True if it is to be refused.
bool refuse() { return counted.fetch_add(1) + 1 == refused; }

// Whether fusedrnn/_C.so allocates, itself or through a function of the standard library.
bool library_asks() {
  thread_local bool inside = false;  // backtrace may allocate too
  if (!counting || inside) return false;
  inside = true;
  void* frames[12];
  const int depth = backtrace(frames, 12);
  inside = false;
  for (int i = 0; i < depth; ++i) {
    if (self.holds(frames[i]) || standard.holds(frames[i])) continue;
    return ours.holds(frames[i]);
  }
  return false;
}

void* allocate(size_t bytes, size_t alignment) {
  alignment = alignment < sizeof(void*) ? sizeof(void*) : alignment;
  return aligned_alloc(alignment, (bytes + alignment) / alignment * alignment);
}

void* allocate_or_throw(size_t bytes, size_t alignment) {
  void* p = library_asks() && refuse() ? nullptr : allocate(bytes, alignment);
  if (!p) throw std::bad_alloc();
  return p;
}

constexpr size_t kUsual = alignof(std::max_align_t);

}  // namespace

extern "C" {

// Counts from 0 again. The n-th allocation from now on fails; if n is 0, none does.
void refuse_allocation(long n) {
  counting = false;
  for (Range* range : {&ours, &standard, &self}) dl_iterate_phdr(find, range);
  void* frame;
  backtrace(&frame, 1);  // the first call of backtrace loads a library
  counted = 0;
  refused = n;
  counting = n > 0;
}

// The number of allocations since refuse_allocation.
long allocations() { return counted; }

// torch allocates the memory of tensors on the CPU with this function.
int posix_memalign(void** p, size_t alignment, size_t bytes) {
  if (counting && refuse()) return ENOMEM;
  *p = allocate(bytes, alignment);
  return *p ? 0 : ENOMEM;
}

}  // extern "C"

void* operator new(size_t bytes) { return allocate_or_throw(bytes, kUsual); }
void* operator new[](size_t bytes) { return allocate_or_throw(bytes, kUsual); }
void* operator new(size_t bytes, std::align_val_t a) {
  return allocate_or_throw(bytes, static_cast<size_t>(a));
}
void* operator new[](size_t bytes, std::align_val_t a) {
  return allocate_or_throw(bytes, static_cast<size_t>(a));
}
void* operator new(size_t bytes, const std::nothrow_t&) noexcept {
  return library_asks() && refuse() ? nullptr : allocate(bytes, kUsual);
}
void* operator new[](size_t bytes, const std::nothrow_t&) noexcept {
  return library_asks() && refuse() ? nullptr : allocate(bytes, kUsual);
}
void operator delete(void* p) noexcept { free(p); }
void operator delete[](void* p) noexcept { free(p); }
void operator delete(void* p, size_t) noexcept { free(p); }
void operator delete[](void* p, size_t) noexcept { free(p); }
void operator delete(void* p, std::align_val_t) noexcept { free(p); }
void operator delete[](void* p, std::align_val_t) noexcept { free(p); }
void operator delete(void* p, size_t, std::align_val_t) noexcept { free(p); }
void operator delete[](void* p, size_t, std::align_val_t) noexcept { free(p); }
void operator delete(void* p, const std::nothrow_t&) noexcept { free(p); }
void operator delete[](void* p, const std::nothrow_t&) noexcept { free(p); }
