// copy_folios: one launch copies a whole batch of folios of mixed orders.
//
// The kernel behind the engine cuda-kernel; stands for what a DMA engine does with a scatter-gather list. kernels/cuda.py
// compiles it with NVRTC for the device at hand; kernels/cuda_plan.py lays out what it reads. Leaves out the checks: no
// destination may overlap another destination or any source, which the planner sees to.
//
// One warp moves one page of 4 KiB: each lane has eight loads of 16 bytes under way, then stores them. The warps of a
// grid of any size walk over the batch's pages, so a large folio is spread over many SMs and a small one keeps one warp
// busy. There is no barrier, no shuffle and no shared memory: lanes never meet, and that is why the same source, compiled
// by a C++ compiler and run lane after lane, is a faithful test (tests/cuda_host/).

typedef unsigned int u32;
typedef unsigned long long u64;

enum { PAGE_SHIFT = 12, WARP = 32, MAX_ORDER = 18, LOADS = 8 };     // LOADS * WARP * 16 bytes are one page

// A batch, sorted by order. The folios of order o are the pairs from first_pair[o] on, their pages the items
// first_item[o] up to first_item[o + 1]; the last entry is the number of pages in all. A kernel parameter.
struct folio_batch {
	u64 first_item[MAX_ORDER + 2];
	u32 first_pair[MAX_ORDER + 1];
	u32 zero;
};

// One folio: frame numbers, counted in pages from the bases.
struct alignas(8) folio_pair {
	u32 dst;
	u32 src;
};

#ifdef __CUDACC__

// Past L1: each byte is read once. Not the read-only path (.nc): it promises that nobody writes this memory meanwhile.
__device__ __forceinline__ uint4 ld_stream(const uint4 *from)
{
	uint4 v;

	asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
		     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
	return v;
}

__device__ __forceinline__ void st_stream(uint4 *to, uint4 v)
{
	asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};"
		     :: "l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// The list of pairs is never written while the kernel runs, so the read-only path is right here.
__device__ __forceinline__ folio_pair ld_pair(const folio_pair *from)
{
	uint2 v = __ldg(reinterpret_cast<const uint2 *>(from));

	return folio_pair{v.x, v.y};
}

#else

inline uint4 ld_stream(const uint4 *from) { return *from; }
inline void st_stream(uint4 *to, uint4 v) { *to = v; }
inline folio_pair ld_pair(const folio_pair *from) { return *from; }

#endif

// Copy the folios of `pairs`: frame f of a base lies at base + f * 4096. Bases are addresses that the device can reach,
// multiples of 16. Threads of a block are a multiple of 32; any number of blocks will do.
extern "C" __global__ void __launch_bounds__(256)
copy_folios(u64 dst_base, u64 src_base, const folio_pair *pairs, const __grid_constant__ folio_batch batch)
{
	const u32 lane = threadIdx.x % WARP;
	const u64 nr_warps = u64(gridDim.x) * (blockDim.x / WARP);
	const u64 nr_items = batch.first_item[MAX_ORDER + 1];
	u32 order = 0;

	for (u64 item = u64(blockIdx.x) * (blockDim.x / WARP) + threadIdx.x / WARP; item < nr_items; item += nr_warps) {
		// Items only grow, so the order is found by going on from the last one.
		while (item >= batch.first_item[order + 1])
			order++;

		const u64 page = item - batch.first_item[order];
		const folio_pair pair = ld_pair(pairs + batch.first_pair[order] + (page >> order));
		const u64 page_in_folio = page & ((u64(1) << order) - 1);
		const uint4 *from = reinterpret_cast<const uint4 *>(src_base + ((pair.src + page_in_folio) << PAGE_SHIFT)) + lane;
		uint4 *to = reinterpret_cast<uint4 *>(dst_base + ((pair.dst + page_in_folio) << PAGE_SHIFT)) + lane;
		uint4 v[LOADS];

#ifdef __CUDACC__
#pragma unroll
#endif
		for (int i = 0; i < LOADS; i++)
			v[i] = ld_stream(from + i * WARP);
#ifdef __CUDACC__
#pragma unroll
#endif
		for (int i = 0; i < LOADS; i++)
			st_stream(to + i * WARP, v[i]);
	}
}
