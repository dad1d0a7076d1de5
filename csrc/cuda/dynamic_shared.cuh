// The dynamic shared memory of a block, aligned for loads of 16 bytes, the widest ones.
#pragma once

namespace fusedrnn::cuda {

extern __shared__ __align__(16) char dynamic_shared[];

}  // namespace fusedrnn::cuda
