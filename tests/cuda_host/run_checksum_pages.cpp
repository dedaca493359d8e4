// Runs checksum_pages.cu on the CPU, thread after thread, as the test asks on standard input; writes the sums.
//
// A request: the words of `struct request`, the list of pages, the bytes. Each array is an allocation of exactly its size, so
// that the address sanitizer sees the first byte beyond it.
#include <cstdio>
#include <cstdlib>
#include <new>

#include "checksum_pages.cu"

struct request {
	u64 blocks, threads, nr_pages, nbytes, first_page;
};

int main()
{
	request r;

	while (fread(&r, sizeof(r), 1, stdin) == 1) {
		u32 *pages = new u32[r.nr_pages];
		u64 *sums = new u64[r.nr_pages]();
		char *bytes = new (std::align_val_t(4096)) char[r.nbytes];

		if ((r.nr_pages && fread(pages, sizeof(*pages) * r.nr_pages, 1, stdin) != 1) || (r.nbytes && fread(bytes, r.nbytes, 1, stdin) != 1))
			return 1;
		gridDim.x = r.blocks;
		blockDim.x = r.threads;
		for (blockIdx.x = 0; blockIdx.x < r.blocks; blockIdx.x++)
			for (threadIdx.x = 0; threadIdx.x < r.threads; threadIdx.x++)
				checksum_pages(u64(bytes) - (r.first_page << PAGE_SHIFT), pages, r.nr_pages, sums);
		fwrite(sums, sizeof(*sums), r.nr_pages, stdout);
		fflush(stdout);
		delete[] pages;
		delete[] sums;
		operator delete[](bytes, std::align_val_t(4096));
	}
	return 0;
}
