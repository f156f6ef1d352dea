/* SPDX-License-Identifier: Apache-2.0 */
/* What we need of the CUDA driver's interface, declared by ourselves: a build needs neither CUDA's headers
 * nor its libraries. The names and layouts are the driver's ABI, which does not change ("_v2" is part of a
 * name). */
#ifndef CUDA_DRIVER_H
#define CUDA_DRIVER_H
#include <stddef.h>
#include <stdint.h>

typedef int cu_result;
typedef int cu_device;
typedef struct cu_context_st *cu_context;
typedef struct cu_stream_st *cu_stream;
typedef struct cu_event_st *cu_event;
typedef unsigned long long cu_pointer;

enum {
    CU_SUCCESS = 0,
    CU_OUT_OF_MEMORY = 2,
    CU_NOT_INITIALIZED = 3,
    CU_DEINITIALIZED = 4,
    CU_NO_DEVICE = 100,
    CU_INVALID_DEVICE = 101,
    CU_NOT_READY = 600,
    CU_ALREADY_REGISTERED = 712,
    CU_NOT_SUPPORTED = 801,
};
enum { CU_MEMORY_HOST = 1, CU_MEMORY_DEVICE = 2 };
enum { CU_ATTRIBUTE_MAX_PITCH = 11, CU_ATTRIBUTE_INTEGRATED = 18, CU_ATTRIBUTE_HOST_POINTER = 91 };
enum { CU_EVENT_NO_TIMING = 2, CU_STREAM_NON_BLOCKING = 1, CU_REGISTER_PORTABLE = 1, CU_REGISTER_DEVICEMAP = 2 };

/* CUDA_MEMCPY2D_v2 */
typedef struct {
    size_t src_x, src_y;
    unsigned src_type;
    const void *src_host;
    cu_pointer src_device;
    void *src_array;
    size_t src_pitch;
    size_t dst_x, dst_y;
    unsigned dst_type;
    void *dst_host;
    cu_pointer dst_device;
    void *dst_array;
    size_t dst_pitch;
    size_t width, height;
} cu_copy_2d;

#define CUDA_CALLS(X)                                                                  \
    X(init, "cuInit", (unsigned flags))                                                \
    X(device_get, "cuDeviceGet", (cu_device * device, int ordinal))                    \
    X(device_name, "cuDeviceGetName", (char *name, int size, cu_device device))        \
    X(device_attribute, "cuDeviceGetAttribute", (int *value, int attribute, cu_device device)) \
    X(context_retain, "cuDevicePrimaryCtxRetain", (cu_context * context, cu_device device)) \
    X(context_release, "cuDevicePrimaryCtxRelease_v2", (cu_device device))             \
    X(context_push, "cuCtxPushCurrent_v2", (cu_context context))                       \
    X(context_pop, "cuCtxPopCurrent_v2", (cu_context * context))                       \
    X(host_register, "cuMemHostRegister_v2", (void *address, size_t bytes, unsigned flags)) \
    X(host_unregister, "cuMemHostUnregister", (void *address))                         \
    X(host_pointer, "cuMemHostGetDevicePointer_v2", (cu_pointer * device, void *host, unsigned flags)) \
    X(stream_create, "cuStreamCreate", (cu_stream * stream, unsigned flags))           \
    X(stream_destroy, "cuStreamDestroy_v2", (cu_stream stream))                        \
    X(stream_query, "cuStreamQuery", (cu_stream stream))                               \
    X(stream_wait, "cuStreamWaitEvent", (cu_stream stream, cu_event event, unsigned flags)) \
    X(event_create, "cuEventCreate", (cu_event * event, unsigned flags))               \
    X(event_destroy, "cuEventDestroy_v2", (cu_event event))                            \
    X(event_record, "cuEventRecord", (cu_event event, cu_stream stream))               \
    X(event_query, "cuEventQuery", (cu_event event))                                   \
    X(copy_2d, "cuMemcpy2DAsync_v2", (const cu_copy_2d *copy, cu_stream stream))       \
    X(copy_in, "cuMemcpyHtoDAsync_v2", (cu_pointer to, const void *from, size_t bytes, cu_stream stream)) \
    X(copy_out, "cuMemcpyDtoHAsync_v2", (void *to, cu_pointer from, size_t bytes, cu_stream stream)) \
    X(error_name, "cuGetErrorName", (cu_result error, const char **name))

enum cuda_call {
#define CALL(name, symbol, parameters) CALL_##name,
    CUDA_CALLS(CALL)
#undef CALL
};

/* The driver library as it was found at run time. */
struct cuda_driver {
    void *library;
#define MEMBER(name, symbol, parameters) cu_result(*name) parameters;
    CUDA_CALLS(MEMBER)
#undef MEMBER
};

/* library: NULL for the machine's own. 0; -ENOTSUP where there is none, or none new enough. */
int cuda_driver_open(struct cuda_driver *driver, const char *library);
int cuda_errno(cu_result error);
const char *cuda_call_name(enum cuda_call call);

#endif
