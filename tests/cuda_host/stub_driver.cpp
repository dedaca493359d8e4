// A stub of libcuda.so.1: not a GPU, and nothing measured with it means anything. It is unkind where a driver may be:
//
// * nothing is copied before somebody asks for an event or a stream, and an event's first query says "not ready";
// * the copies of a batch call are made in reverse order;
// * the NULL stream, empty batches, sizes of 0, NULL pointers, attributes out of order and more than `cap` descriptors
//   are refused;
// * it fails where it is told to: at one descriptor, at one launch, at one allocation, or from one copy on, as a lost device.
//
// "Device" memory is the process's own. Kernels are copy_folios.cu, compiled for this machine by shim.h.
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
enum { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1, CUDA_ERROR_OUT_OF_MEMORY = 2, CUDA_ERROR_INVALID_CONTEXT = 201, CUDA_ERROR_INVALID_HANDLE = 400,
       CUDA_ERROR_NOT_FOUND = 500, CUDA_ERROR_NOT_READY = 600, CUDA_ERROR_LAUNCH_FAILED = 719 };
#endif

#include "shim.h"
#include "copy_folios.cu"

#define EXPORT extern "C" __attribute__((visibility("default"))) CUresult

// What a test sets and reads. 64-bit numbers, so that ctypes sees the same structure.
struct stub_state {
	// Set: numbers of a copy, launch, allocation or executed copy at which it fails, -1 for never.
	int64_t cap, fail_copy, fail_launch, fail_alloc, lose_at, no_batch, version, corrupt;
	// The stub's device time: ns for each copy that is executed, for each launch, and ps for each byte of either.
	int64_t ns_copy, ns_launch, ps_byte;
	// Read.
	int64_t batch_calls, most_descriptors, copies, executed, launches, allocs, frees, streams, events, flags, blocks, threads, lost, device_ns, bytes, async_calls;
};
extern "C" {
__attribute__((visibility("default"))) stub_state stub = {1 << 20, -1, -1, -1, -1, 0, 12080, 0, 0, 0, 0,
							   0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};
}

static std::recursive_mutex lock;
static CUcontext const context = reinterpret_cast<CUcontext>(0xc0);
static thread_local CUcontext current;
#define ENTER std::lock_guard<std::recursive_mutex> guard(lock); if (stub.lost) return CUDA_ERROR_LAUNCH_FAILED
#define ENTER_CONTEXT ENTER; if (current != context) return CUDA_ERROR_INVALID_CONTEXT

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

static void copy(CUdeviceptr dst, CUdeviceptr src, size_t size)
{
	spend(stub.ns_copy, size);
	if (stub.lose_at == stub.executed++) {
		stub.lost = 1;
		return;
	}
	memcpy(reinterpret_cast<void *>(dst), reinterpret_cast<void *>(src), size);
	if (stub.corrupt)
		*reinterpret_cast<char *>(dst) ^= 1;
}

EXPORT cuInit(unsigned int flags) { return flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS; }
EXPORT cuDriverGetVersion(int *version) { *version = stub.version; return CUDA_SUCCESS; }

EXPORT cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device)
{
	if (device)
		return CUDA_ERROR_INVALID_VALUE;
	*value = attribute == 16 ? 5 : attribute == 75 ? 9 : 0;
	return CUDA_SUCCESS;
}

EXPORT cuDeviceGetName(char *name, int length, CUdevice)
{
	strncpy(name, "stub, not a GPU", length);
	return CUDA_SUCCESS;
}

EXPORT cuDevicePrimaryCtxRetain(CUcontext *made, CUdevice device)
{
	ENTER;
	*made = context;
	return device ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

EXPORT cuDevicePrimaryCtxRelease_v2(CUdevice) { return CUDA_SUCCESS; }
EXPORT cuCtxSetCurrent(CUcontext wanted) { current = wanted; return CUDA_SUCCESS; }

static std::map<uintptr_t, size_t> device_memory;       // where each piece begins, and its size

static CUresult allocate(void **made, size_t size)
{
	if (stub.fail_alloc == stub.allocs++ || !size)
		return CUDA_ERROR_OUT_OF_MEMORY;
	*made = operator new(size, std::align_val_t(4096));
	memset(*made, 0xa5, size);
	return CUDA_SUCCESS;
}

static CUresult release(void *memory)
{
	stub.frees++;
	operator delete(memory, std::align_val_t(4096));
	return CUDA_SUCCESS;
}

EXPORT cuMemAlloc_v2(CUdeviceptr *made, size_t size)
{
	ENTER_CONTEXT;
	CUresult result = allocate(reinterpret_cast<void **>(made), size);
	if (result == CUDA_SUCCESS)
		device_memory[*made] = size;
	return result;
}

EXPORT cuMemFree_v2(CUdeviceptr memory)
{
	std::lock_guard<std::recursive_mutex> guard(lock);
	device_memory.erase(memory);
	return release(reinterpret_cast<void *>(memory));
}

EXPORT cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr address)
{
	ENTER_CONTEXT;
	if (attribute != 2)
		return CUDA_ERROR_INVALID_VALUE;
	auto next = device_memory.upper_bound(address);
	bool found = next != device_memory.begin() && address < std::prev(next)->first + std::prev(next)->second;
	*static_cast<unsigned int *>(value) = found ? 2 : 1;
	// Host memory that no call has pinned is not known to it; here nobody keeps account of that.
	return CUDA_SUCCESS;
}

EXPORT cuMemHostAlloc(void **made, size_t size, unsigned int) { ENTER_CONTEXT; return allocate(made, size); }
EXPORT cuMemFreeHost(void *memory) { return release(memory); }

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
	std::lock_guard<std::recursive_mutex> guard(lock);
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

EXPORT cuEventDestroy_v2(CUevent event) { delete event; stub.events--; return CUDA_SUCCESS; }

EXPORT cuMemcpyAsync(CUdeviceptr dst, CUdeviceptr src, size_t size, CUstream stream)
{
	ENTER_CONTEXT;
	stub.async_calls++;
	if (!stream || !dst || !src || !size || stub.fail_copy == stub.copies++)
		return CUDA_ERROR_INVALID_VALUE;
	stream->queue.push_back([=] { copy(dst, src, size); });
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
		if (!dsts[i] || !srcs[i] || !sizes[i] || stub.fail_copy == stub.copies++) {
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

EXPORT cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }

EXPORT cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name)
{
	ENTER_CONTEXT;
	*function = reinterpret_cast<CUfunction>(0xf0);
	return module != reinterpret_cast<CUmodule>(0xd0) || strcmp(name, "copy_folios") ? CUDA_ERROR_NOT_FOUND : CUDA_SUCCESS;
}

EXPORT cuLaunchKernel(CUfunction function, unsigned int blocks, unsigned int blocks_y, unsigned int blocks_z,
		      unsigned int threads, unsigned int threads_y, unsigned int threads_z, unsigned int shared,
		      CUstream stream, void **arguments, void **extra)
{
	ENTER_CONTEXT;
	if (function != reinterpret_cast<CUfunction>(0xf0) || !stream || !blocks || !threads || threads % 32 || threads > 256 ||
	    blocks_y * blocks_z * threads_y * threads_z != 1 || shared || extra)
		return CUDA_ERROR_INVALID_VALUE;
	if (stub.fail_launch == stub.launches++)
		return CUDA_ERROR_LAUNCH_FAILED;
	stub.blocks = blocks;
	stub.threads = threads;
	u64 dst_base = *static_cast<u64 *>(arguments[0]), src_base = *static_cast<u64 *>(arguments[1]);
	folio_pair *pairs = *static_cast<folio_pair **>(arguments[2]);
	folio_batch batch = *static_cast<folio_batch *>(arguments[3]);
	stream->queue.push_back([=] {
		spend(stub.ns_launch, size_t(batch.first_item[MAX_ORDER + 1]) << PAGE_SHIFT);
		gridDim.x = blocks;
		blockDim.x = threads;
		for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
			for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++)
				copy_folios(dst_base, src_base, pairs, batch);
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
