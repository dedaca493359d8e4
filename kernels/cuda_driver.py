"""The CUDA driver by ctypes: the dozen calls that the copy engines queue, with their failing index.

Everything that is queued on a stream goes through here, so that one stand-in library proves the arguments without a
device (tests/cuda_host/stub_driver.cpp). CuPy has no binding for cuMemcpyBatchAsync, and its other copies are the same
calls. Leaves out managed memory, peers, graphs, the per-thread default stream.

The functions and their numbers are those of cuda.h 13.0, which a test compares where there is one.
"""

import ctypes

import numpy as np

__all__ = ("CudaError", "Driver", "KernelArguments", "MemcpyAttributes", "MOST_DESCRIPTORS", "BATCH_VERSION")

BATCH_VERSION = 12080
"""The form of cuMemcpyBatchAsync that is asked for: that of CUDA 12.8, with failIdx, which later drivers keep."""

MOST_DESCRIPTORS = 4096
"""In one batch call. 51,828 crashed or hung on one driver (vLLM issue 49276)."""

CUDA_SUCCESS = 0
CUDA_ERROR_INVALID_VALUE = 1
CUDA_ERROR_NOT_READY = 600
CU_STREAM_NON_BLOCKING = 1
CU_POINTER_ATTRIBUTE_MEMORY_TYPE = 2
CU_MEMORYTYPE_DEVICE = 2
CU_EVENT_DEFAULT = 0
CU_EVENT_DISABLE_TIMING = 2
CU_MEMHOSTALLOC_PORTABLE = 1
CU_MEMHOSTALLOC_DEVICEMAP = 2
CU_MEMCPY_SRC_ACCESS_ORDER_STREAM = 1
CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE = 1
CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16
CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE = 38
CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76

_word, _number, _flags, _pointer = ctypes.c_uint64, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p
_handle = _pointer                                  # streams, events, contexts, modules, functions

FUNCTIONS = {
    "cuInit": (_flags,),
    "cuDriverGetVersion": (_pointer,),
    "cuDeviceGet": (_pointer, _number),
    "cuDeviceGetAttribute": (_pointer, _number, _number),
    "cuDeviceGetName": (_pointer, _number, _number),
    "cuDevicePrimaryCtxRetain": (_pointer, _number),
    "cuCtxSetCurrent": (_handle,),
    "cuMemAlloc_v2": (_pointer, ctypes.c_size_t),
    "cuMemFree_v2": (_word,),
    "cuMemGetInfo_v2": (_pointer, _pointer),
    "cuMemsetD8Async": (_word, ctypes.c_ubyte, ctypes.c_size_t, _handle),
    "cuMemHostAlloc": (_pointer, ctypes.c_size_t, _flags),
    "cuMemFreeHost": (_pointer,),
    "cuPointerGetAttribute": (_pointer, _number, _word),
    "cuMemcpyAsync": (_word, _word, ctypes.c_size_t, _handle),
    "cuStreamCreate": (_pointer, _flags),
    "cuStreamSynchronize": (_handle,),
    "cuStreamDestroy_v2": (_handle,),
    "cuEventCreate": (_pointer, _flags),
    "cuEventRecord": (_handle, _handle),
    "cuEventQuery": (_handle,),
    "cuEventElapsedTime": (_pointer, _handle, _handle),
    "cuEventDestroy_v2": (_handle,),
    "cuModuleLoadData": (_pointer, _pointer),
    "cuModuleGetFunction": (_pointer, _handle, ctypes.c_char_p),
    "cuLaunchKernel": (_handle, *(_flags,) * 7, _handle, _pointer, _pointer),
    "cuGetErrorName": (_number, _pointer),
    "cuGetProcAddress_v2": (ctypes.c_char_p, _pointer, _number, _word, _pointer),
}
"""By the name that the library exports, with the types of the arguments; all return a CUresult."""

BATCH_ARGUMENTS = (_pointer, _pointer, _pointer, ctypes.c_size_t, _pointer, _pointer, ctypes.c_size_t, _pointer, _handle)


class MemcpyAttributes(ctypes.Structure):
    """CUmemcpyAttributes. The location hints stay 0: they matter for managed memory only."""

    _fields_ = [("srcAccessOrder", _number), ("srcLocHintType", _number), ("srcLocHintId", _number),
                ("dstLocHintType", _number), ("dstLocHintId", _number), ("flags", _flags)]


class CudaError(Exception):
    """A call returned an error. ``index`` is the descriptor of a batch call that it is about, or None."""

    def __init__(self, call, code, name, index=None):
        at = "" if index is None else f" at descriptor {index}"
        super().__init__(f"{call} failed{at}: {name} ({code})")
        self.call, self.code, self.index = call, code, index


class Driver:
    """libcuda.so.1, loaded. OSError if it is not there, CudaError for what it refuses.

    Calls act on the context that is current in the calling thread. ``functions`` are the ctypes functions by name;
    ``memcpy_batch`` tells whether the batch call is there.
    """

    def __init__(self, library="libcuda.so.1"):
        self._library = ctypes.CDLL(str(library))
        self.functions = {}
        for name, arguments in FUNCTIONS.items():
            function = getattr(self._library, name, None)
            if function is None:
                raise OSError(f"{library} has no {name}: the driver is older than CUDA 12")
            function.argtypes, function.restype = arguments, _number
            self.functions[name] = function
        self("cuInit", 0)
        self._batch = self._find_batch()

    def __call__(self, name, *arguments):
        code = self.functions[name](*arguments)
        if code:
            raise self.error(name, code)

    def error(self, call, code, index=None):
        """The CudaError of what a call returned."""
        return CudaError(call.removesuffix("_v2"), code, self.error_name(code), index)

    def _made(self, name, *arguments, kind=ctypes.c_void_p):
        # For calls that write what they make to their first argument.
        made = kind()
        self(name, ctypes.byref(made), *arguments)
        return made.value

    def _find_batch(self):
        address, status = ctypes.c_void_p(), ctypes.c_int()
        code = self.functions["cuGetProcAddress_v2"](b"cuMemcpyBatchAsync", ctypes.byref(address), BATCH_VERSION, 0,
                                                      ctypes.byref(status))
        if code or status.value or not address.value:
            return None
        return ctypes.CFUNCTYPE(_number, *BATCH_ARGUMENTS)(address.value)

    @property
    def memcpy_batch(self):
        return self._batch is not None

    def error_name(self, code):
        text = ctypes.c_char_p()
        if self.functions["cuGetErrorName"](code, ctypes.byref(text)) or not text.value:
            return "unknown error"
        return text.value.decode("ascii", "replace")

    # The device.

    def version(self):
        """The CUDA version of the driver: 12080 is 12.8."""
        return self._made("cuDriverGetVersion", kind=_number)

    def device(self, number):
        """The handle of the device of that number, which the three calls below take."""
        return self._made("cuDeviceGet", number, kind=_number)

    def attribute(self, attribute, device):
        return self._made("cuDeviceGetAttribute", attribute, device, kind=_number)

    def device_name(self, device):
        name = ctypes.create_string_buffer(256)
        self("cuDeviceGetName", name, len(name), device)
        return name.value.decode("utf-8", "replace")

    def retain_context(self, device):
        """The primary context of a device, the one that CuPy uses as well."""
        return self._made("cuDevicePrimaryCtxRetain", device)

    # Memory.

    def alloc(self, nbytes):
        return self._made("cuMemAlloc_v2", nbytes, kind=_word)

    def free_bytes(self):
        """Bytes of the device's memory that can be had now."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def host_alloc(self, nbytes):
        """Page-locked memory that host and device reach at the same address."""
        return self._made("cuMemHostAlloc", nbytes, CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP)

    def on_device(self, address):
        """Whether ``address`` lies in device memory; what the driver does not know is ordinary host memory. CudaError if it does
        not answer: a lost device's memory is not the host's."""
        kind = _flags()
        code = self.functions["cuPointerGetAttribute"](ctypes.byref(kind), CU_POINTER_ATTRIBUTE_MEMORY_TYPE, address)
        if code not in (CUDA_SUCCESS, CUDA_ERROR_INVALID_VALUE):
            raise self.error("cuPointerGetAttribute", code)
        return code == CUDA_SUCCESS and kind.value == CU_MEMORYTYPE_DEVICE

    # Queueing. A stream of one's own always: the legacy stream would wait for all others.

    def stream(self):
        return self._made("cuStreamCreate", CU_STREAM_NON_BLOCKING)

    def event(self, *, timing=False):
        return self._made("cuEventCreate", CU_EVENT_DEFAULT if timing else CU_EVENT_DISABLE_TIMING)

    def event_is_over(self, event):
        """Whether all that was queued before the event was recorded has ended; CudaError if it failed."""
        code = self.functions["cuEventQuery"](event)
        if code not in (CUDA_SUCCESS, CUDA_ERROR_NOT_READY):
            raise self.error("cuEventQuery", code)
        return code == CUDA_SUCCESS

    def elapsed_ns(self, start, stop):
        """Device time between two events that are over, made with ``timing``: ns, told in steps of about 500."""
        return round(self._made("cuEventElapsedTime", start, stop, kind=ctypes.c_float) * 1e6)

    def memcpy_batch_async(self, dst, src, nbytes, stream, *, overlap=False):
        """One cuMemcpyBatchAsync: arrays of addresses and sizes, uint64 and contiguous, MOST_DESCRIPTORS at most.

        They may be overwritten when it returns. The copies are in no order among each other.
        """
        attributes = MemcpyAttributes(srcAccessOrder=CU_MEMCPY_SRC_ACCESS_ORDER_STREAM,
                                      flags=CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE if overlap else 0)
        from_first, failed = ctypes.c_size_t(0), ctypes.c_size_t(2**64 - 1)
        code = self._batch(dst.ctypes.data, src.ctypes.data, nbytes.ctypes.data, len(nbytes), ctypes.addressof(attributes),
                           ctypes.addressof(from_first), 1, ctypes.addressof(failed), stream)
        if code:
            index = failed.value if failed.value < len(nbytes) else None
            raise self.error("cuMemcpyBatchAsync", code, index)

    def load_function(self, image, name):
        """The function of that name in a compiled image, which stays loaded."""
        return self._made("cuModuleGetFunction", self._made("cuModuleLoadData", image), name.encode())

    def launch(self, function, blocks, threads, stream, arguments):
        """Launch with KernelArguments, which are copied before it returns."""
        self("cuLaunchKernel", function, blocks, 1, 1, threads, 1, 1, 0, stream, ctypes.addressof(arguments.addresses), None)


class KernelArguments:
    """NumPy scalars and records as a launch takes them: an array of their addresses. Made ahead, it is not what a launch waits for."""

    def __init__(self, *values):
        self._values = [np.ascontiguousarray(value) for value in values]
        self.addresses = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in self._values))
