/* SPDX-License-Identifier: Apache-2.0 */
/* The inside of a copier, shared by copy_cuda.c, event_cuda.c and copies_cuda.c. */
#ifndef COPIER_CUDA_H
#define COPIER_CUDA_H
#include <pthread.h>

#include "cuda_driver.h"
#include "glue_api.h"

struct range {
    uint64_t address, bytes;
    uint64_t of; /* the address that was asked for, of which this is a chunk */
};

enum event_state {
    EVENT_DONE,     /* or never recorded */
    EVENT_EXPECTED, /* a transfer will record it */
    EVENT_RECORDED,
    EVENT_FAILED,
};

struct glue_event {
    glue_copier *copier;
    cu_event handle;
    uint32_t refs;
    enum event_state state;
    struct glue_event *next_free, *next;
};

struct glue_copier {
    struct cuda_driver driver;
    cu_device device;
    cu_context context;
    cu_stream streams[2];
    size_t max_pitch;
    glue_gpu gpu;

    pthread_mutex_t lock; /* guards the rest, and every call of the driver: none comes after closing */
    uint32_t refs;
    int closed;
    struct range *ranges;
    uint32_t num_ranges, max_ranges;
    glue_event *events, *free_events; /* all of them; those that nobody has */
    uint32_t live_events;
};

/* Takes the lock and makes the context the calling thread's. 0 or -ESHUTDOWN: then nothing is to be left. */
int copier_enter(glue_copier *copier);
void copier_leave(glue_copier *copier);
void copier_ref(glue_copier *copier);
/* 0 or -errno; remembers, for this thread, what the driver answered to `call`. */
int cuda_check(const glue_copier *copier, enum cuda_call call, cu_result result);
uint32_t cuda_last_error(void);
void cuda_explain(const char *text);

#define CHECKED(copier, name, ...) cuda_check(copier, CALL_##name, (copier)->driver.name(__VA_ARGS__))

/* With the context current, without the lock, so that others' copies go on: 0 when both streams are idle,
 * -EBUSY where they are not within the time. */
int copier_drain(glue_copier *copier, uint32_t timeout_ms);

/* The following want the lock. */
/* Those registered at `of`, or all. Those that the driver keeps stay. */
int copier_unpin(glue_copier *copier, uint64_t of, int all);
/* 0, or -EFAULT where the piece is not in one chunk of registered memory. */
int copier_check(const glue_copier *copier, const glue_piece *piece);
int copier_copy_range(glue_copier *copier, int direction, cu_stream stream, const glue_piece *piece,
                      const glue_device_piece *device, uint64_t begin, uint64_t bytes);
int event_record(glue_event *event, cu_stream stream);
int event_done(glue_event *event);
void event_drop(glue_event *event);
void events_destroy(glue_copier *copier);

static inline cu_stream stream_of(uint64_t handle)
{
    return (cu_stream)(uintptr_t)handle;
}

#endif
