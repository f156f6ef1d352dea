/* SPDX-License-Identifier: Apache-2.0 */
/* A CUDA driver without a GPU, for tests: "device memory" is host memory, a stream is a thread that works off
 * a list, and whatever the driver's rules forbid ends the process with a line on stderr. It shows mistakes
 * of order, lifetime and context; that a real driver takes the calls, and how fast it is, it cannot show.
 *
 * emu_set() scripts it: how long copies take, and which call fails. */
#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "cuda_driver.h"

#define API __attribute__((visibility("default")))

enum { MAX_RANGES = 4096, MAX_DEPTH = 16, CU_INVALID_VALUE = 1, CU_INVALID_CONTEXT = 201, CU_INVALID_HANDLE = 400 };
enum { MAGIC_EVENT = 0x65766e74, MAGIC_STREAM = 0x7374726d };

struct range {
    uint64_t address, bytes;
};

struct cu_event_st {
    int magic;
    uint64_t recorded, completed; /* versions: of the last record that was asked for, and that is done */
    unsigned waiters;             /* operations that name it */
    int destroyed;
    cu_event next, prev; /* of all: what its owner keeps for ever is no leak */
};

struct operation {
    enum { COPY, RECORD, WAIT, CALL } kind;
    struct operation *next;
    cu_copy_2d copy;
    cu_event event;
    uint64_t version;
    void (*function)(void *);
    void *argument;
};

struct cu_stream_st {
    int magic;
    pthread_t thread;
    struct operation *first, *last;
    int busy, stopping;
    unsigned seed;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static struct range pinned[MAX_RANGES], allocated[MAX_RANGES];
static unsigned num_pinned, num_allocated, live_events, live_streams;
static int retained, initialised, dead, integrated;
static uint64_t copies, copied_bytes, copy_delay_ns, copy_jitter_ns;
static char failing[64];
static int fail_skip, fail_count, fail_code;
static struct cu_stream_st default_stream;
static struct cu_event_st all_events;
static __thread int depth;

static void die(const char *text, ...)
{
    va_list more;
    va_start(more, text);
    fputs("CUDA emulator: misuse: ", stderr);
    vfprintf(stderr, text, more);
    fputc('\n', stderr);
    va_end(more);
    fflush(stderr);
    _exit(97);
}

/* the script ------------------------------------------------------------------------------------- */

/* With the lock. What the call is to answer. */
static cu_result scripted(const char *call)
{
    if (dead)
        die("%s after the driver was shut down", call);
    if (strcmp(call, failing))
        return CU_SUCCESS;
    if (fail_skip) {
        fail_skip--;
        return CU_SUCCESS;
    }
    if (!fail_count)
        return CU_SUCCESS;
    fail_count--;
    return fail_code;
}

static void need_context(const char *call)
{
    if (!depth)
        die("%s in a thread without a context", call);
}

/* Enters a call that is about a context. */
static cu_result enter(const char *call)
{
    pthread_mutex_lock(&lock);
    need_context(call);
    return scripted(call);
}

static cu_result leave(cu_result result)
{
    pthread_mutex_unlock(&lock);
    return result;
}

API void emu_set(uint64_t delay_us, uint64_t jitter_us, int is_integrated)
{
    pthread_mutex_lock(&lock);
    copy_delay_ns = delay_us * 1000;
    copy_jitter_ns = jitter_us * 1000;
    integrated = is_integrated;
    pthread_mutex_unlock(&lock);
}

/* Of the coming calls, `skip` pass and `count` fail with `code`. */
API void emu_fail(const char *call, int skip, int count, int code)
{
    pthread_mutex_lock(&lock);
    snprintf(failing, sizeof failing, "%s", call);
    fail_skip = skip;
    fail_count = count;
    fail_code = code;
    pthread_mutex_unlock(&lock);
}

/* Live events, streams, pinned ranges, allocations, references to the context; copies and their bytes. */
API void emu_counts(uint64_t out[7])
{
    pthread_mutex_lock(&lock);
    uint64_t now[7] = {live_events, live_streams, num_pinned, num_allocated, (uint64_t)retained, copies, copied_bytes};
    memcpy(out, now, sizeof now);
    pthread_mutex_unlock(&lock);
}

struct snapshot {
    const void *from;
    void *to;
    size_t bytes;
    useconds_t delay_us;
};

static void take_snapshot(void *argument)
{
    struct snapshot *snapshot = argument;
    usleep(snapshot->delay_us);
    memcpy(snapshot->to, snapshot->from, snapshot->bytes);
    free(snapshot);
}

static void put_snapshot(struct cu_stream_st *stream, struct snapshot *snapshot);

/* A kernel that takes its time, and then copies device memory to where the test looks at it. */
API void emu_snapshot(cu_stream stream, const void *from, void *to, size_t bytes, uint32_t delay_us)
{
    struct snapshot *snapshot = malloc(sizeof *snapshot);
    *snapshot = (struct snapshot){from, to, bytes, delay_us};
    pthread_mutex_lock(&lock);
    put_snapshot(stream, snapshot);
    pthread_mutex_unlock(&lock);
}

/* ranges ----------------------------------------------------------------------------------------- */

static int inside(const struct range *ranges, unsigned count, uint64_t begin, uint64_t end)
{
    for (unsigned i = 0; i < count; i++)
        if (begin >= ranges[i].address && end <= ranges[i].address + ranges[i].bytes)
            return 1;
    return 0;
}

static int overlaps(const struct range *ranges, unsigned count, uint64_t begin, uint64_t end)
{
    for (unsigned i = 0; i < count; i++)
        if (begin < ranges[i].address + ranges[i].bytes && ranges[i].address < end)
            return 1;
    return 0;
}

static int take_range(struct range *ranges, unsigned *count, uint64_t address)
{
    for (unsigned i = 0; i < *count; i++)
        if (ranges[i].address == address) {
            ranges[i] = ranges[--*count];
            return 1;
        }
    return 0;
}

/* The bytes of one side of a copy, all of them in one range. */
static void check_side(const char *when, const struct range *ranges, unsigned count, uint64_t address, size_t pitch,
                       const cu_copy_2d *copy, const char *what)
{
    uint64_t end = address + (copy->height - 1) * pitch + copy->width;
    if (!inside(ranges, count, address, end))
        die("%s a copy: %p to %p is not in %s", when, (void *)(uintptr_t)address, (void *)(uintptr_t)end, what);
}

static void check_copy(const char *when, const cu_copy_2d *copy)
{
    int in = copy->src_type == CU_MEMORY_HOST;
    uint64_t host = (uint64_t)(uintptr_t)(in ? copy->src_host : copy->dst_host);
    check_side(when, pinned, num_pinned, host, in ? copy->src_pitch : copy->dst_pitch, copy, "registered memory");
    check_side(when, allocated, num_allocated, in ? copy->dst_device : copy->src_device,
               in ? copy->dst_pitch : copy->src_pitch, copy, "device memory");
}

/* streams ---------------------------------------------------------------------------------------- */

static void nap(uint64_t ns)
{
    struct timespec left = {.tv_sec = (time_t)(ns / 1000000000u), .tv_nsec = (long)(ns % 1000000000u)};
    while (nanosleep(&left, &left) && errno == EINTR)
        ;
}

/* Half of the rows, a pause, the other half: whoever writes to them meanwhile is seen. */
static void move_bytes(const cu_copy_2d *copy, uint64_t delay)
{
    int in = copy->src_type == CU_MEMORY_HOST;
    const char *from = in ? copy->src_host : (const char *)(uintptr_t)copy->src_device;
    char *to = in ? (char *)(uintptr_t)copy->dst_device : copy->dst_host;
    nap(delay / 2);
    for (size_t row = 0; row < copy->height; row++) {
        if (row == copy->height / 2)
            nap(delay / 2);
        memcpy(to + row * copy->dst_pitch, from + row * copy->src_pitch, copy->width);
    }
}

static void run_copy(struct cu_stream_st *stream, const cu_copy_2d *copy)
{
    check_copy("during", copy);
    uint64_t delay = copy_delay_ns;
    if (copy_jitter_ns)
        delay += (uint64_t)rand_r(&stream->seed) % copy_jitter_ns;
    copies++;
    copied_bytes += copy->width * copy->height;
    pthread_mutex_unlock(&lock);
    move_bytes(copy, delay);
    pthread_mutex_lock(&lock);
    check_copy("at the end of", copy);
}

static void free_event(cu_event event)
{
    event->prev->next = event->next;
    if (event->next)
        event->next->prev = event->prev;
    free(event);
}

static void forget_waiter(cu_event event)
{
    if (!--event->waiters && event->destroyed)
        free_event(event);
}

static void run_operation(struct cu_stream_st *stream, struct operation *operation)
{
    switch (operation->kind) {
    case COPY:
        run_copy(stream, &operation->copy);
        break;
    case RECORD:
        operation->event->completed = operation->version;
        forget_waiter(operation->event);
        break;
    case WAIT:
        while (operation->event->completed < operation->version)
            pthread_cond_wait(&changed, &lock);
        forget_waiter(operation->event);
        break;
    case CALL:
        pthread_mutex_unlock(&lock);
        operation->function(operation->argument);
        pthread_mutex_lock(&lock);
    }
}

static void *stream_thread(void *argument)
{
    struct cu_stream_st *stream = argument;
    pthread_mutex_lock(&lock);
    for (;;) {
        while (!stream->first && !stream->stopping)
            pthread_cond_wait(&changed, &lock);
        if (!stream->first)
            break;
        struct operation *operation = stream->first;
        stream->first = operation->next;
        stream->busy = 1;
        run_operation(stream, operation);
        stream->busy = 0;
        free(operation);
        pthread_cond_broadcast(&changed);
    }
    pthread_mutex_unlock(&lock);
    return NULL;
}

static void start_stream(struct cu_stream_st *stream)
{
    static unsigned seeds;
    stream->magic = MAGIC_STREAM;
    stream->seed = ++seeds;
    if (pthread_create(&stream->thread, NULL, stream_thread, stream))
        die("no thread for a stream");
    if (stream == &default_stream)
        pthread_detach(stream->thread);
}

static struct cu_stream_st *stream_at(cu_stream handle, const char *call)
{
    struct cu_stream_st *stream = handle ? handle : &default_stream;
    if (stream->magic != MAGIC_STREAM)
        die("%s on something that is no stream, or no more", call);
    return stream;
}

static void append(struct cu_stream_st *stream, struct operation operation)
{
    struct operation *made = malloc(sizeof *made);
    *made = operation;
    made->next = NULL;
    if (stream->first)
        stream->last->next = made;
    else
        stream->first = made;
    stream->last = made;
    pthread_cond_broadcast(&changed);
}

static void put_snapshot(struct cu_stream_st *stream, struct snapshot *snapshot)
{
    append(stream, (struct operation){.kind = CALL, .function = take_snapshot, .argument = snapshot});
}

/* What is on the list, and what waits for it, is not worked off any more. */
static void shut_down(void)
{
    pthread_mutex_lock(&lock);
    dead = 1;
    pthread_mutex_unlock(&lock);
}

/* the driver ------------------------------------------------------------------------------------- */

API cu_result cuInit(unsigned flags)
{
    (void)flags;
    pthread_mutex_lock(&lock);
    cu_result result = scripted("cuInit");
    if (!result && !initialised) {
        initialised = 1;
        start_stream(&default_stream);
        atexit(shut_down);
    }
    return leave(result);
}

API cu_result cuDeviceGet(cu_device *device, int ordinal)
{
    pthread_mutex_lock(&lock);
    cu_result result = scripted("cuDeviceGet");
    *device = ordinal;
    return leave(result ? result : ordinal ? CU_INVALID_DEVICE : CU_SUCCESS);
}

API cu_result cuDeviceGetName(char *name, int size, cu_device device)
{
    pthread_mutex_lock(&lock);
    cu_result result = scripted("cuDeviceGetName");
    snprintf(name, (size_t)size, "emulated GPU %d", device);
    return leave(result);
}

API cu_result cuDeviceGetAttribute(int *value, int attribute, cu_device device)
{
    (void)device;
    pthread_mutex_lock(&lock);
    cu_result result = scripted("cuDeviceGetAttribute");
    *value = attribute == CU_ATTRIBUTE_MAX_PITCH ? 1 << 30 : integrated;
    return leave(result);
}

API cu_result cuDevicePrimaryCtxRetain(cu_context *context, cu_device device)
{
    (void)device;
    pthread_mutex_lock(&lock);
    cu_result result = scripted("cuDevicePrimaryCtxRetain");
    if (!result)
        retained++;
    *context = (cu_context)&retained;
    return leave(result);
}

API cu_result cuDevicePrimaryCtxRelease_v2(cu_device device)
{
    (void)device;
    pthread_mutex_lock(&lock);
    cu_result result = scripted("cuDevicePrimaryCtxRelease_v2");
    if (!retained)
        die("the primary context is released more often than it was retained");
    retained--;
    return leave(result);
}

API cu_result cuCtxPushCurrent_v2(cu_context context)
{
    pthread_mutex_lock(&lock);
    cu_result result = scripted("cuCtxPushCurrent_v2");
    if (!result && (context != (cu_context)&retained || !retained))
        die("a context that nobody retains is made current");
    if (!result && depth == MAX_DEPTH)
        die("contexts are pushed and never popped");
    if (!result)
        depth++;
    return leave(result);
}

API cu_result cuCtxPopCurrent_v2(cu_context *context)
{
    cu_result result = enter("cuCtxPopCurrent_v2");
    depth--;
    *context = (cu_context)&retained;
    return leave(result);
}

API cu_result cuMemHostRegister_v2(void *address, size_t bytes, unsigned flags)
{
    (void)flags;
    cu_result result = enter("cuMemHostRegister_v2");
    uint64_t begin = (uint64_t)(uintptr_t)address;
    if (!result && overlaps(pinned, num_pinned, begin, begin + bytes))
        result = CU_ALREADY_REGISTERED;
    if (!result && num_pinned == MAX_RANGES)
        die("too many registrations");
    if (!result)
        pinned[num_pinned++] = (struct range){begin, bytes};
    return leave(result);
}

API cu_result cuMemHostUnregister(void *address)
{
    cu_result result = enter("cuMemHostUnregister");
    if (!result && !take_range(pinned, &num_pinned, (uint64_t)(uintptr_t)address))
        die("%p is unregistered and is not registered", address);
    return leave(result);
}

API cu_result cuMemHostGetDevicePointer_v2(cu_pointer *device, void *host, unsigned flags)
{
    (void)flags;
    cu_result result = enter("cuMemHostGetDevicePointer_v2");
    uint64_t begin = (uint64_t)(uintptr_t)host;
    *device = begin;
    return leave(result || inside(pinned, num_pinned, begin, begin + 1) ? result : CU_INVALID_VALUE);
}

API cu_result cuMemAlloc_v2(cu_pointer *device, size_t bytes)
{
    pthread_mutex_lock(&lock);
    void *memory = calloc(1, bytes);
    if (!memory || num_allocated == MAX_RANGES)
        die("no memory");
    *device = (uint64_t)(uintptr_t)memory;
    allocated[num_allocated++] = (struct range){*device, bytes};
    return leave(CU_SUCCESS);
}

API cu_result cuMemFree_v2(cu_pointer device)
{
    pthread_mutex_lock(&lock);
    if (!take_range(allocated, &num_allocated, device))
        die("device memory is freed that is not allocated");
    free((void *)(uintptr_t)device);
    return leave(CU_SUCCESS);
}

API cu_result cuStreamCreate(cu_stream *stream, unsigned flags)
{
    (void)flags;
    cu_result result = enter("cuStreamCreate");
    if (!result) {
        *stream = calloc(1, sizeof **stream);
        start_stream(*stream);
        live_streams++;
    }
    return leave(result);
}

API cu_result cuStreamDestroy_v2(cu_stream handle)
{
    cu_result result = enter("cuStreamDestroy_v2");
    struct cu_stream_st *stream = stream_at(handle, "cuStreamDestroy");
    if (result)
        return leave(result);
    if (stream->first || stream->busy)
        die("a stream is destroyed with work on it: its memory is still in use");
    stream->stopping = 1;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
    pthread_join(stream->thread, NULL);
    pthread_mutex_lock(&lock);
    stream->magic = 0;
    free(stream);
    live_streams--;
    return leave(CU_SUCCESS);
}

API cu_result cuStreamQuery(cu_stream handle)
{
    cu_result result = enter("cuStreamQuery");
    struct cu_stream_st *stream = stream_at(handle, "cuStreamQuery");
    if (!result && (stream->first || stream->busy))
        result = CU_NOT_READY;
    return leave(result);
}

API cu_result cuStreamSynchronize(cu_stream handle)
{
    cu_result result = enter("cuStreamSynchronize");
    struct cu_stream_st *stream = stream_at(handle, "cuStreamSynchronize");
    while (!result && (stream->first || stream->busy))
        pthread_cond_wait(&changed, &lock);
    return leave(result);
}

static struct cu_event_st *event_at(cu_event event, const char *call)
{
    if (!event || event->magic != MAGIC_EVENT || event->destroyed)
        die("%s of an event that was destroyed", call);
    return event;
}

API cu_result cuStreamWaitEvent(cu_stream stream, cu_event event, unsigned flags)
{
    (void)flags;
    cu_result result = enter("cuStreamWaitEvent");
    event_at(event, "cuStreamWaitEvent");
    if (!result && event->completed < event->recorded) {
        event->waiters++;
        append(stream_at(stream, "cuStreamWaitEvent"),
               (struct operation){.kind = WAIT, .event = event, .version = event->recorded});
    }
    return leave(result);
}

API cu_result cuLaunchHostFunc(cu_stream stream, void (*function)(void *), void *argument)
{
    cu_result result = enter("cuLaunchHostFunc");
    if (!result)
        append(stream_at(stream, "cuLaunchHostFunc"),
               (struct operation){.kind = CALL, .function = function, .argument = argument});
    return leave(result);
}

API cu_result cuEventCreate(cu_event *event, unsigned flags)
{
    (void)flags;
    cu_result result = enter("cuEventCreate");
    if (!result) {
        *event = calloc(1, sizeof **event);
        (*event)->magic = MAGIC_EVENT;
        (*event)->next = all_events.next;
        (*event)->prev = &all_events;
        if (all_events.next)
            all_events.next->prev = *event;
        all_events.next = *event;
        live_events++;
    }
    return leave(result);
}

API cu_result cuEventDestroy_v2(cu_event event)
{
    cu_result result = enter("cuEventDestroy_v2");
    event_at(event, "cuEventDestroy");
    if (!result) {
        event->destroyed = 1;
        live_events--;
        if (!event->waiters)
            free_event(event);
    }
    return leave(result);
}

API cu_result cuEventRecord(cu_event event, cu_stream stream)
{
    cu_result result = enter("cuEventRecord");
    event_at(event, "cuEventRecord");
    if (!result) {
        event->waiters++;
        append(stream_at(stream, "cuEventRecord"),
               (struct operation){.kind = RECORD, .event = event, .version = ++event->recorded});
    }
    return leave(result);
}

API cu_result cuEventQuery(cu_event event)
{
    cu_result result = enter("cuEventQuery");
    event_at(event, "cuEventQuery");
    if (!result && event->completed < event->recorded)
        result = CU_NOT_READY;
    return leave(result);
}

static cu_result start_copy(const char *call, const cu_copy_2d *copy, cu_stream stream)
{
    cu_result result = enter(call);
    if (!result && (copy->src_pitch < copy->width || copy->dst_pitch < copy->width || !copy->width || !copy->height))
        result = CU_INVALID_VALUE;
    if (!result) {
        check_copy("at the start of", copy);
        append(stream_at(stream, call), (struct operation){.kind = COPY, .copy = *copy});
    }
    return leave(result);
}

API cu_result cuMemcpy2DAsync_v2(const cu_copy_2d *copy, cu_stream stream)
{
    return start_copy("cuMemcpy2DAsync_v2", copy, stream);
}

API cu_result cuMemcpyHtoDAsync_v2(cu_pointer to, const void *from, size_t bytes, cu_stream stream)
{
    cu_copy_2d copy = {.src_type = CU_MEMORY_HOST, .src_host = from, .src_pitch = bytes, .width = bytes, .height = 1};
    copy.dst_type = CU_MEMORY_DEVICE;
    copy.dst_device = to;
    copy.dst_pitch = bytes;
    return start_copy("cuMemcpyHtoDAsync_v2", &copy, stream);
}

API cu_result cuMemcpyDtoHAsync_v2(void *to, cu_pointer from, size_t bytes, cu_stream stream)
{
    cu_copy_2d copy = {.src_type = CU_MEMORY_DEVICE, .src_device = from, .src_pitch = bytes, .width = bytes, .height = 1};
    copy.dst_type = CU_MEMORY_HOST;
    copy.dst_host = to;
    copy.dst_pitch = bytes;
    return start_copy("cuMemcpyDtoHAsync_v2", &copy, stream);
}

API cu_result cuGetErrorName(cu_result error, const char **name)
{
    static const struct {
        int code;
        const char *name;
    } names[] = {{1, "CUDA_ERROR_INVALID_VALUE"},   {2, "CUDA_ERROR_OUT_OF_MEMORY"},
                 {4, "CUDA_ERROR_DEINITIALIZED"},   {600, "CUDA_ERROR_NOT_READY"},
                 {700, "CUDA_ERROR_ILLEGAL_ADDRESS"}, {712, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"}};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (names[i].code == error) {
            *name = names[i].name;
            return CU_SUCCESS;
        }
    return CU_INVALID_VALUE;
}
