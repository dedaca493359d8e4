// checksum_pages: the 64-bit checksum of each of a list of pages, so that frames in device memory can be verified there.
//
// The twin of kernels/checksum.py, which says what the sum is. Compiled and tested as copy_folios.cu; leaves out any speed
// that matters: it runs after what is timed.
//
// One warp sums one page. Lanes do not meet: each adds what it has to the page's sum, which begins at 0.

typedef unsigned int u32;
typedef unsigned long long u64;

enum { PAGE_SHIFT = 12, WARP = 32, LOADS = 8 };     // LOADS * WARP * 16 bytes are one page

#ifdef __CUDACC__
__device__ __forceinline__ void add_to(u64 *sum, u64 v) { atomicAdd(sum, v); }
#define DEVICE __device__ __forceinline__
#else
inline void add_to(u64 *sum, u64 v) { *sum += v; }
#define DEVICE inline
#endif

// Word `place` of its page, mixed with its place.
DEVICE u64 mixed(u64 word, u32 place)
{
	u64 x = word + (place + 1) * 0x9e3779b97f4a7c15ull;

	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
	x = (x ^ x >> 27) * 0x94d049bb133111ebull;
	return x ^ x >> 31;
}

// Add to sums[i] the checksum of the page `pages[i]`, counted from `base`, a multiple of 16. Threads of a block are a multiple of 32.
extern "C" __global__ void __launch_bounds__(256)
checksum_pages(u64 base, const u32 *pages, u64 nr_pages, u64 *sums)
{
	const u32 lane = threadIdx.x % WARP;
	const u64 nr_warps = u64(gridDim.x) * (blockDim.x / WARP);

	for (u64 item = u64(blockIdx.x) * (blockDim.x / WARP) + threadIdx.x / WARP; item < nr_pages; item += nr_warps) {
		const uint4 *from = reinterpret_cast<const uint4 *>(base + (u64(pages[item]) << PAGE_SHIFT));
		u64 sum = 0;

		for (u32 i = lane; i < LOADS * WARP; i += WARP) {
			const uint4 v = from[i];

			sum += mixed(u64(v.y) << 32 | v.x, 2 * i) + mixed(u64(v.w) << 32 | v.z, 2 * i + 1);
		}
		add_to(sums + item, sum);
	}
}
#undef DEVICE
