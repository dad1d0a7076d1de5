// Prints NVIDIA's own count of the blocks that one multiprocessor runs together, without a device.
// The arguments are: major minor threads_per_sm shared_per_block shared_per_sm shared_reserved.
// For each line of stdin, "registers block shared", the count is printed.
#include <cuda_occupancy.h>

#include <cstdio>
#include <cstdlib>

int main(int argc, char** argv) {
  if (argc != 7) return 1;
  cudaOccDeviceProp p{};
  p.computeMajor = std::atoi(argv[1]);
  p.computeMinor = std::atoi(argv[2]);
  p.maxThreadsPerBlock = 1024;
  p.maxThreadsPerMultiprocessor = std::atoi(argv[3]);
  p.regsPerBlock = p.regsPerMultiprocessor = 65536;
  p.warpSize = 32;
  p.sharedMemPerBlock = 49152;
  p.sharedMemPerBlockOptin = static_cast<size_t>(std::atol(argv[4]));
  p.sharedMemPerMultiprocessor = static_cast<size_t>(std::atol(argv[5]));
  p.reservedSharedMemPerBlock = static_cast<size_t>(std::atol(argv[6]));
  p.numSms = 1;
  cudaOccDeviceState state{};
  state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
  int registers, block;
  long shared;
  while (std::scanf("%d %d %ld", &registers, &block, &shared) == 3) {
    cudaOccFuncAttributes f{};
    f.maxThreadsPerBlock = 1024;
    f.numRegs = registers;
    f.partitionedGCConfig = PARTITIONED_GC_OFF;
    f.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    f.maxDynamicSharedSizeBytes = p.sharedMemPerBlockOptin;
    f.numBlockBarriers = 1;
    cudaOccResult result{};
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &p, &f, &state, block,
                                                static_cast<size_t>(shared)) != CUDA_OCC_SUCCESS)
      return 2;
    std::printf("%d\n", result.activeBlocksPerMultiprocessor);
  }
}
