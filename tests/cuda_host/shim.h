// What copy_folios.cu needs of CUDA, for a C++ compiler: the words, and one thread's place in the grid. There is nothing
// here that copies.
#pragma once

#define __global__
#define __device__
#define __launch_bounds__(threads)
#define __grid_constant__

struct alignas(16) uint4 {
	unsigned int x, y, z, w;
};

struct dim {
	unsigned int x;
};

inline thread_local dim threadIdx, blockIdx, blockDim, gridDim;
