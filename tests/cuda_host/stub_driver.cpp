// A stub of libcuda.so.1: not a GPU, and nothing measured with it means anything. It is unkind where a driver may be:
//
// * nothing is copied before somebody asks for an event or a stream, and an event's first query says "not ready";
// * the copies of a batch call are made in reverse order;
// * the NULL stream, empty batches, sizes of 0, NULL pointers, attributes out of order and more than `cap` descriptors
//   are refused;
// * memory that nobody has pinned is unknown to it: pointer attributes and the batch call refuse it, and a kernel that would touch
//   it, or any byte that is not there, loses the device, as an illegal address does;
// * the device's handle is not its number, memory is aligned to 512 bytes and no better, and giving things back needs a context;
// * it fails where it is told to: at one descriptor, at one launch, at one allocation, or from one copy on, as a lost device. A
//   lost device refuses everything but giving things back.
//
// "Device" memory is the process's own, but at the address that callers get nobody may read or write it (PROT_NONE), except while
// a kernel runs: code of ours that touches it crashes. The stub itself uses a second mapping. Kernels are copy_folios.cu and
// checksum_pages.cu, compiled for this machine by shim.h.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <iterator>
#include <map>
#include <mutex>
#include <new>
#include <type_traits>

#include <sys/mman.h>
#include <unistd.h>

#ifdef HAVE_CUDA_H
#include <cuda.h>       // then the compiler compares the signatures
#else
typedef int CUresult, CUdevice, CUdevice_attribute, CUpointer_attribute, CUdriverProcAddressQueryResult;
typedef unsigned long long CUdeviceptr;
typedef unsigned long long cuuint64_t;
typedef struct CUctx_st *CUcontext;
typedef struct CUstream_st *CUstream;
typedef struct CUevent_st *CUevent;
typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;
struct CUmemLocation { int type, id; };
struct CUmemcpyAttributes { int srcAccessOrder; CUmemLocation srcLocHint, dstLocHint; unsigned int flags; };
enum { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1, CUDA_ERROR_OUT_OF_MEMORY = 2, CUDA_ERROR_INVALID_DEVICE = 101, CUDA_ERROR_INVALID_CONTEXT = 201, CUDA_ERROR_INVALID_HANDLE = 400,
       CUDA_ERROR_NOT_FOUND = 500, CUDA_ERROR_NOT_READY = 600, CUDA_ERROR_LAUNCH_FAILED = 719 };
#endif

#include "shim.h"
#include "copy_folios.cu"
namespace checksum {
#include "checksum_pages.cu"
}

#define EXPORT extern "C" __attribute__((visibility("default"))) CUresult

// What a test sets and reads. 64-bit numbers, so that ctypes sees the same structure.
struct stub_state {
	// Set: numbers of a copy, launch, allocation or executed copy at which it fails, -1 for never.
	int64_t cap, fail_copy, fail_launch, fail_alloc, lose_at, no_batch, version, corrupt;
	// The stub's device time: ns for each copy that is executed, for each launch, and ps for each byte of either.
	int64_t ns_copy, ns_launch, ps_byte;
	// Bytes of device memory in all.
	int64_t device_bytes;
	// Read.
	int64_t batch_calls, most_descriptors, copies, executed, launches, allocs, frees, streams, events, flags, blocks, threads, lost, device_ns, bytes, async_calls;
};
extern "C" {
__attribute__((visibility("default"))) stub_state stub = {1 << 20, -1, -1, -1, -1, 0, 12080, 0, 0, 0, 0, int64_t(1) << 40,
							   0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};
}

static std::recursive_mutex lock;
static CUcontext const context = reinterpret_cast<CUcontext>(0xc0);
static thread_local CUcontext current;
#define ENTER std::lock_guard<std::recursive_mutex> guard(lock); if (stub.lost) return CUDA_ERROR_LAUNCH_FAILED
#define IN_CONTEXT if (current != context) return CUDA_ERROR_INVALID_CONTEXT
#define ENTER_CONTEXT ENTER; IN_CONTEXT
#define GIVE_BACK IN_CONTEXT; std::lock_guard<std::recursive_mutex> guard(lock)

struct CUstream_st { std::deque<std::function<void()>> queue; };
struct CUevent_st { CUstream stream; bool over, asked, timing, recorded; int64_t at; };

static void run(CUstream stream)
{
	while (!stream->queue.empty() && !stub.lost) {
		auto next = std::move(stream->queue.front());
		stream->queue.pop_front();
		next();
	}
}

static void spend(int64_t ns, size_t size)
{
	stub.bytes += size;
	stub.device_ns += ns + stub.ps_byte * int64_t(size) / 1000;
}

// Device memory: where each piece begins for callers, its size, and where the stub reaches it. Pinned memory likewise.
enum { ALIGNMENT = 512 };
struct piece { size_t size; char *here; };
typedef std::map<uintptr_t, piece> pieces;
static pieces device_memory, pinned_memory;

static const pieces::value_type *find_in(const pieces &memory, uintptr_t address)
{
	auto next = memory.upper_bound(address);

	if (next == memory.begin() || address >= std::prev(next)->first + std::prev(next)->second.size)
		return nullptr;
	return &*std::prev(next);
}

static const pieces::value_type *find_piece(uintptr_t address) { return find_in(device_memory, address); }

static bool is_reached(uintptr_t address, size_t size)          // by the device: all of it in one piece
{
	auto found = find_piece(address);

	if (!found)
		found = find_in(pinned_memory, address);
	return found && address + size <= found->first + found->second.size;
}

static bool is_whole(uintptr_t address, size_t size)            // not half in one piece, half beyond
{
	return is_reached(address, size) || (!find_piece(address) && !find_in(pinned_memory, address));
}

static void *reach(uintptr_t address)
{
	auto found = find_piece(address);

	return found ? found->second.here + (address - found->first) : reinterpret_cast<void *>(address);
}

// While one lives, code may use device addresses as they are.
struct kernel_runs {
	kernel_runs() { protect(PROT_READ | PROT_WRITE); }
	~kernel_runs() { protect(PROT_NONE); }
	static void protect(int access)
	{
		for (auto &one : device_memory)
			mprotect(reinterpret_cast<void *>(one.first - ALIGNMENT), one.second.size + ALIGNMENT, access);
	}
};

static void fill(CUdeviceptr dst, unsigned char value, size_t size)
{
	spend(stub.ns_copy, size);
	if (stub.lose_at == stub.executed++)
		stub.lost = 1;
	else
		memset(reach(dst), value, size);
}

static void copy(CUdeviceptr dst, CUdeviceptr src, size_t size)
{
	spend(stub.ns_copy, size);
	if (stub.lose_at == stub.executed++) {
		stub.lost = 1;
		return;
	}
	memcpy(reach(dst), reach(src), size);
	if (stub.corrupt)
		*static_cast<char *>(reach(dst)) ^= 1;
}

EXPORT cuInit(unsigned int flags) { return flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS; }
EXPORT cuDriverGetVersion(int *version) { *version = stub.version; return CUDA_SUCCESS; }

static CUdevice const the_device = 7;

EXPORT cuDeviceGet(CUdevice *made, int number)
{
	ENTER;
	*made = the_device;
	return number ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS;
}

EXPORT cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device)
{
	if (device != the_device)
		return CUDA_ERROR_INVALID_DEVICE;
	*value = attribute == 16 ? 5 : attribute == 75 ? 9 : 0;
	return CUDA_SUCCESS;
}

EXPORT cuDeviceGetName(char *name, int length, CUdevice device)
{
	strncpy(name, "stub, not a GPU", length);
	return device != the_device ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS;
}

EXPORT cuDevicePrimaryCtxRetain(CUcontext *made, CUdevice device)
{
	ENTER;
	*made = context;
	return device != the_device ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS;
}

EXPORT cuCtxSetCurrent(CUcontext wanted)
{
	if (wanted && wanted != context)
		return CUDA_ERROR_INVALID_CONTEXT;
	current = wanted;
	return wanted && stub.lost ? CUDA_ERROR_LAUNCH_FAILED : CUDA_SUCCESS;
}

// Memory of a test's own that stands for pinned memory (as cuMemHostRegister() would make it), and no more.
extern "C" __attribute__((visibility("default"))) void stub_pin(uintptr_t address, size_t size)
{
	std::lock_guard<std::recursive_mutex> guard(lock);

	if (size)
		pinned_memory[address] = piece{size, nullptr};
	else
		pinned_memory.erase(address);
}

static int64_t device_free()
{
	int64_t free_bytes = stub.device_bytes;

	for (auto &one : device_memory)
		free_bytes -= one.second.size;
	return free_bytes < 0 ? 0 : free_bytes;
}

EXPORT cuMemAlloc_v2(CUdeviceptr *made, size_t size)
{
	ENTER_CONTEXT;
	if (stub.fail_alloc == stub.allocs++ || !size || int64_t(size) > device_free())
		return CUDA_ERROR_OUT_OF_MEMORY;
	int file = memfd_create("device memory of the stub", 0);
	if (ftruncate(file, size + ALIGNMENT))
		return CUDA_ERROR_OUT_OF_MEMORY;
	char *here = static_cast<char *>(mmap(nullptr, size + ALIGNMENT, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0)) + ALIGNMENT;
	char *there = static_cast<char *>(mmap(nullptr, size + ALIGNMENT, PROT_NONE, MAP_SHARED, file, 0)) + ALIGNMENT;
	close(file);
	if (size <= 1 << 20)
		memset(here, 0xa5, size);               // of more only the first, or every test would pay for all of it
	else
		memset(here, 0xa5, 1 << 20);
	*made = reinterpret_cast<CUdeviceptr>(there);
	device_memory[*made] = piece{size, here};
	return CUDA_SUCCESS;
}

EXPORT cuMemGetInfo_v2(size_t *free_bytes, size_t *total)
{
	ENTER_CONTEXT;
	*free_bytes = device_free();
	*total = stub.device_bytes;
	return CUDA_SUCCESS;
}

EXPORT cuMemFree_v2(CUdeviceptr memory)
{
	GIVE_BACK;
	auto found = device_memory.find(memory);

	if (found == device_memory.end())
		return CUDA_ERROR_INVALID_VALUE;
	munmap(found->second.here - ALIGNMENT, found->second.size + ALIGNMENT);
	munmap(reinterpret_cast<void *>(memory - ALIGNMENT), found->second.size + ALIGNMENT);
	device_memory.erase(found);
	stub.frees++;
	return CUDA_SUCCESS;
}

EXPORT cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr address)
{
	ENTER_CONTEXT;
	if (attribute != 2)
		return CUDA_ERROR_INVALID_VALUE;
	if (!is_reached(address, 1))
		return CUDA_ERROR_INVALID_VALUE;
	*static_cast<unsigned int *>(value) = find_piece(address) ? 2 : 1;
	return CUDA_SUCCESS;
}

EXPORT cuMemHostAlloc(void **made, size_t size, unsigned int flags)
{
	ENTER_CONTEXT;
	if (flags != 3)
		return CUDA_ERROR_INVALID_VALUE;        // not portable, or not mapped: the device need not reach it
	if (stub.fail_alloc == stub.allocs++ || !size)
		return CUDA_ERROR_OUT_OF_MEMORY;
	char *whole = static_cast<char *>(operator new(size + ALIGNMENT, std::align_val_t(4096)));
	memset(whole, 0xa5, size + ALIGNMENT);
	*made = whole + ALIGNMENT;
	pinned_memory[reinterpret_cast<uintptr_t>(*made)] = piece{size, whole};
	return CUDA_SUCCESS;
}

EXPORT cuMemFreeHost(void *memory)
{
	GIVE_BACK;
	auto found = pinned_memory.find(reinterpret_cast<uintptr_t>(memory));

	if (found == pinned_memory.end() || !found->second.here)
		return CUDA_ERROR_INVALID_VALUE;
	operator delete(found->second.here, std::align_val_t(4096));
	pinned_memory.erase(found);
	stub.frees++;
	return CUDA_SUCCESS;
}

EXPORT cuStreamCreate(CUstream *made, unsigned int flags)
{
	ENTER_CONTEXT;
	if (flags != 1)
		return CUDA_ERROR_INVALID_VALUE;        // it would wait for the legacy stream
	*made = new CUstream_st;
	stub.streams++;
	return CUDA_SUCCESS;
}

EXPORT cuStreamSynchronize(CUstream stream)
{
	ENTER_CONTEXT;
	run(stream);
	return stub.lost ? CUDA_ERROR_LAUNCH_FAILED : CUDA_SUCCESS;
}

EXPORT cuStreamDestroy_v2(CUstream stream)
{
	GIVE_BACK;
	run(stream);
	delete stream;
	stub.streams--;
	return CUDA_SUCCESS;
}

EXPORT cuEventCreate(CUevent *made, unsigned int flags)
{
	ENTER_CONTEXT;
	if (flags != 0 && flags != 2)
		return CUDA_ERROR_INVALID_VALUE;
	*made = new CUevent_st{nullptr, true, false, !flags, false, 0};
	stub.events++;
	return CUDA_SUCCESS;
}

EXPORT cuEventRecord(CUevent event, CUstream stream)
{
	ENTER_CONTEXT;
	if (!stream)
		return CUDA_ERROR_INVALID_VALUE;
	*event = CUevent_st{stream, false, false, event->timing, true, 0};
	stream->queue.push_back([event] { event->over = true; event->at = stub.device_ns; });
	return CUDA_SUCCESS;
}

EXPORT cuEventQuery(CUevent event)
{
	ENTER_CONTEXT;
	if (event->over)
		return CUDA_SUCCESS;
	if (!event->asked) {
		event->asked = true;
		return CUDA_ERROR_NOT_READY;
	}
	while (!event->over && !stub.lost && !event->stream->queue.empty()) {
		auto next = std::move(event->stream->queue.front());
		event->stream->queue.pop_front();
		next();
	}
	return stub.lost ? CUDA_ERROR_LAUNCH_FAILED : CUDA_SUCCESS;
}

// In the stub's own time, which stands still but for what is executed.
#ifdef cuEventElapsedTime
#undef cuEventElapsedTime
EXPORT cuEventElapsedTime(float *ms, CUevent start, CUevent stop);
static_assert(std::is_same<decltype(&cuEventElapsedTime), decltype(&cuEventElapsedTime_v2)>::value, "");
#endif
EXPORT cuEventElapsedTime(float *ms, CUevent start, CUevent stop)
{
	ENTER_CONTEXT;
	if (!start->timing || !stop->timing || !start->recorded || !stop->recorded)
		return CUDA_ERROR_INVALID_HANDLE;
	if (!start->over || !stop->over)
		return CUDA_ERROR_NOT_READY;
	*ms = float(double(stop->at - start->at) / 1e6);
	return CUDA_SUCCESS;
}

EXPORT cuEventDestroy_v2(CUevent event)
{
	GIVE_BACK;
	delete event;
	stub.events--;
	return CUDA_SUCCESS;
}

EXPORT cuMemcpyAsync(CUdeviceptr dst, CUdeviceptr src, size_t size, CUstream stream)
{
	ENTER_CONTEXT;
	stub.async_calls++;
	if (!stream || !dst || !src || !size || !is_whole(dst, size) || !is_whole(src, size) || stub.fail_copy == stub.copies++)
		return CUDA_ERROR_INVALID_VALUE;
	stream->queue.push_back([=] { copy(dst, src, size); });
	return CUDA_SUCCESS;
}

EXPORT cuMemsetD8Async(CUdeviceptr dst, unsigned char value, size_t size, CUstream stream)
{
	ENTER_CONTEXT;
	if (!stream || !size || !find_piece(dst) || !is_whole(dst, size))
		return CUDA_ERROR_INVALID_VALUE;
	stream->queue.push_back([=] { fill(dst, value, size); });
	return CUDA_SUCCESS;
}

static CUresult memcpy_batch(CUdeviceptr *dsts, CUdeviceptr *srcs, size_t *sizes, size_t count, CUmemcpyAttributes *attrs,
			     size_t *attrs_idxs, size_t nr_attrs, size_t *fail_idx, CUstream stream)
{
	ENTER_CONTEXT;
	CUresult result = CUDA_SUCCESS;

	*fail_idx = SIZE_MAX;
	stub.batch_calls++;
	if (!stream || !count || int64_t(count) > stub.cap || nr_attrs != 1 || attrs_idxs[0] || attrs->srcAccessOrder != 1 ||
	    attrs->srcLocHint.type || attrs->srcLocHint.id || attrs->dstLocHint.type || attrs->dstLocHint.id || attrs->flags > 1)
		return CUDA_ERROR_INVALID_VALUE;
	stub.flags = attrs->flags;
	if (int64_t(count) > stub.most_descriptors)
		stub.most_descriptors = count;
	for (size_t i = 0; i < count; i++) {
		if (!dsts[i] || !srcs[i] || !sizes[i] || !is_reached(dsts[i], sizes[i]) || !is_reached(srcs[i], sizes[i]) || stub.fail_copy == stub.copies++) {
			*fail_idx = i;
			result = CUDA_ERROR_INVALID_VALUE;
			break;
		}
	}
	// Where the call fails the rest is made all the same: nothing is promised about it.
	for (size_t i = count; i-- > 0;) {
		CUdeviceptr dst = dsts[i], src = srcs[i];
		size_t size = sizes[i];

		if (result == CUDA_SUCCESS || i > *fail_idx)
			stream->queue.push_back([=] { copy(dst, src, size); });
	}
	return result;
}

EXPORT cuModuleLoadData(CUmodule *module, const void *image)
{
	ENTER_CONTEXT;
	*module = reinterpret_cast<CUmodule>(0xd0);
	return strcmp(static_cast<const char *>(image), "stub image") ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

static CUfunction const the_copy = reinterpret_cast<CUfunction>(0xf0), the_checksum = reinterpret_cast<CUfunction>(0xf1);

EXPORT cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name)
{
	ENTER_CONTEXT;
	*function = !strcmp(name, "copy_folios") ? the_copy : !strcmp(name, "checksum_pages") ? the_checksum : nullptr;
	return module != reinterpret_cast<CUmodule>(0xd0) || !*function ? CUDA_ERROR_NOT_FOUND : CUDA_SUCCESS;
}

// Whether the device reaches all that a launch would touch.
static bool all_reached(u64 dst_base, u64 src_base, folio_pair *pairs, const folio_batch &batch)
{
	for (u32 order = 0; order <= MAX_ORDER; order++) {
		u64 nr = (batch.first_item[order + 1] - batch.first_item[order]) >> order;
		uintptr_t first = reinterpret_cast<uintptr_t>(pairs + batch.first_pair[order]);

		if (nr && !is_reached(first, nr * sizeof(folio_pair)))
			return false;
		for (auto *pair = static_cast<folio_pair *>(reach(first)); nr--; pair++)
			for (u64 address : {dst_base + (u64(pair->dst) << PAGE_SHIFT), src_base + (u64(pair->src) << PAGE_SHIFT)})
				if (address % 16 || !is_reached(address, u64(1) << (order + PAGE_SHIFT)))
					return false;
	}
	return true;
}

static bool all_reached(u64 base, u32 *pages, u64 nr_pages, u64 *sums)
{
	if (!is_reached(uintptr_t(pages), nr_pages * sizeof(*pages)) || !is_reached(uintptr_t(sums), nr_pages * sizeof(*sums)) || u64(sums) % 8)
		return false;
	for (auto *page = static_cast<u32 *>(reach(uintptr_t(pages))); nr_pages--; page++)
		if (!is_reached(base + (u64(*page) << PAGE_SHIFT), 1 << PAGE_SHIFT))
			return false;
	return true;
}

EXPORT cuLaunchKernel(CUfunction function, unsigned int blocks, unsigned int blocks_y, unsigned int blocks_z,
		      unsigned int threads, unsigned int threads_y, unsigned int threads_z, unsigned int shared,
		      CUstream stream, void **arguments, void **extra)
{
	ENTER_CONTEXT;
	if ((function != the_copy && function != the_checksum) || !stream || !blocks || !threads || threads % 32 || threads > 256 ||
	    blocks_y * blocks_z * threads_y * threads_z != 1 || shared || extra)
		return CUDA_ERROR_INVALID_VALUE;
	if (stub.fail_launch == stub.launches++)
		return CUDA_ERROR_LAUNCH_FAILED;
	stub.blocks = blocks;
	stub.threads = threads;
	auto for_each_thread = [=](auto kernel) {
		kernel_runs now;

		gridDim.x = blocks;
		blockDim.x = threads;
		for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
			for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++)
				kernel();
	};
	if (function == the_checksum) {
		u64 base = *static_cast<u64 *>(arguments[0]), nr_pages = *static_cast<u64 *>(arguments[2]);
		u32 *pages = *static_cast<u32 **>(arguments[1]);
		u64 *sums = *static_cast<u64 **>(arguments[3]);

		stream->queue.push_back([=] {
			if (all_reached(base, pages, nr_pages, sums))
				for_each_thread([=] { checksum::checksum_pages(base, pages, nr_pages, sums); });
			else
				stub.lost = 1;
		});
		return CUDA_SUCCESS;
	}
	u64 dst_base = *static_cast<u64 *>(arguments[0]), src_base = *static_cast<u64 *>(arguments[1]);
	folio_pair *pairs = *static_cast<folio_pair **>(arguments[2]);
	folio_batch batch = *static_cast<folio_batch *>(arguments[3]);
	stream->queue.push_back([=] {
		spend(stub.ns_launch, size_t(batch.first_item[MAX_ORDER + 1]) << PAGE_SHIFT);
		if (all_reached(dst_base, src_base, pairs, batch))
			for_each_thread([=] { copy_folios(dst_base, src_base, pairs, batch); });
		else
			stub.lost = 1;
	});
	return CUDA_SUCCESS;
}

EXPORT cuGetErrorName(CUresult error, const char **text)
{
	*text = error == CUDA_ERROR_INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE" :
		error == CUDA_ERROR_OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" :
		error == CUDA_ERROR_LAUNCH_FAILED ? "CUDA_ERROR_LAUNCH_FAILED" : nullptr;
	return *text ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

EXPORT cuGetProcAddress_v2(const char *symbol, void **function, int version, cuuint64_t flags,
			   CUdriverProcAddressQueryResult *status)
{
	// Asked for another version it would give the form without fail_idx, which is not here.
	bool found = !strcmp(symbol, "cuMemcpyBatchAsync") && version == 12080 && !flags && !stub.no_batch;

	*function = found ? reinterpret_cast<void *>(&memcpy_batch) : nullptr;
	*status = static_cast<CUdriverProcAddressQueryResult>(found ? 0 : 1);
	return found ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
