// Runs copy_folios.cu on the CPU, thread after thread, as the test asks on standard input; writes what the arenas hold then.
//
// A request: the words of `struct request`, the folio_batch, the pairs, the bytes of the destination and of the source.
// Each array is an allocation of exactly its size, so that the address sanitizer sees the first byte beyond it.
#include <cstdio>
#include <cstdlib>
#include <new>

#include "copy_folios.cu"

static_assert(sizeof(folio_pair) == 8 && sizeof(folio_batch) == 240, "as FOLIO_BATCH_DTYPE");

struct request {
	u64 blocks, threads, first_block, nr_pairs, dst_bytes, src_bytes, dst_page, src_page;
};

// Page-aligned; freed at the end of the request.
struct arena {
	char *bytes;
	u64 size;

	explicit arena(u64 size) : bytes(new (std::align_val_t(4096)) char[size]), size(size)
	{
		if (size && fread(bytes, size, 1, stdin) != 1)
			abort();
	}
	~arena() { operator delete[](bytes, std::align_val_t(4096)); }
};

int main()
{
	request r;

	while (fread(&r, sizeof(r), 1, stdin) == 1) {
		folio_batch batch;

		if (fread(&batch, sizeof(batch), 1, stdin) != 1)
			return 1;
		arena pairs(r.nr_pairs * sizeof(folio_pair)), dst(r.dst_bytes), src(r.src_bytes);
		// The arenas hold the pages from dst_page and src_page on: a huge address space, of which only these are there.
		u64 dst_base = u64(dst.bytes) - (r.dst_page << PAGE_SHIFT), src_base = u64(src.bytes) - (r.src_page << PAGE_SHIFT);

		gridDim.x = r.blocks;
		blockDim.x = r.threads;
		for (u64 block = r.first_block; block < r.blocks; block++) {
			for (u64 thread = 0; thread < r.threads; thread++) {
				blockIdx.x = block;
				threadIdx.x = thread;
				copy_folios(dst_base, src_base, reinterpret_cast<folio_pair *>(pairs.bytes), batch);
			}
		}
		fwrite(dst.bytes, 1, dst.size, stdout);
		fwrite(src.bytes, 1, src.size, stdout);
		fflush(stdout);
	}
	return 0;
}
