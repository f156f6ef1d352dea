/* SPDX-License-Identifier: Apache-2.0 */
/* What an engine must offer. An engine moves commands; it knows nothing of transfers, order or
 * Python. All calls but wake, fault and close come from the queue's I/O thread. */
#ifndef ENGINE_H
#define ENGINE_H
#include <pthread.h>
#include <sys/uio.h>
#include <time.h>

#include "glue_api.h"

struct transfer;

/* One contiguous run of the medium and the memory it is scattered to. */
struct command {
    struct transfer *owner;
    int op;
    uint32_t file;
    uint64_t offset;      /* of the bytes still to move */
    uint64_t bytes;       /* still to move */
    uint64_t moved;
    struct iovec *iov;    /* owned by the queue, iov_capacity long */
    unsigned first, niov; /* iov[first .. first + niov) is still to move */
    uint64_t span;        /* TRIM, WRITE_BACK: how many bytes */
    uint32_t piece;       /* of the transfer, and where in it the command begins */
    uint64_t begin;
    uint64_t range[2];    /* uring_cmd: what TRIM hands to the controller */
    int registered;       /* uring_cmd: it was sent with a registered buffer */
    uint64_t due_ns;      /* mem: when it completes; spdk: when it has taken too long */
    int hung;             /* mem: never completes */
    unsigned at;          /* spdk: the segment that SPDK asks for next */
    unsigned tries;       /* spdk, uring_cmd: how often it has failed for a while */
    uint64_t into;        /* spdk: bytes into that segment */
    void *sender;         /* spdk: the engine */
    struct command *next, *prev; /* lists of whoever holds it */
};

struct event {
    struct command *command;
    int64_t result; /* bytes or -errno */
    uint16_t sct, sc;
    int memory_at_risk; /* the medium may still write to the command's memory */
};

struct engine_ops {
    const char *name;
    int trims; /* submit() takes GLUE_TRIM */
    int writes_back; /* submit() takes GLUE_WRITE_BACK */
    /* Required. 0 or -errno. May change queue_depth and command_bytes to what the medium takes. */
    int (*open)(void **self, glue_options *options);
    /* Required. Take a command; 0, or -EAGAIN when full. */
    int (*submit)(void *self, struct command *command);
    /* Required. Start what was submitted and collect events. Waits in the kernel until there is an
     * event, wake() was called or timeout_ns has passed (negative: for ever). Count or -errno. */
    int (*wait)(void *self, struct event *out, unsigned max, int64_t timeout_ns);
    /* Required, from any thread: the present or next wait() returns. */
    void (*wake)(void *self);
    /* Optional: the last call of the I/O thread, when nothing is in flight: let go of the files. */
    void (*finish)(void *self);
    /* Required, from any thread, after the I/O thread has ended. */
    void (*close)(void *self);
    /* Optional. 1 registered, 0 not possible (the commands work all the same). */
    int (*add_memory)(void *self, uint64_t address, uint64_t bytes);
    /* Bytes that were registered at the address. */
    uint64_t (*remove_memory)(void *self, uint64_t address);
    /* Optional, from any thread. */
    int (*fault)(void *self, const glue_fault *fault);
    int (*medium)(void *self, glue_medium *out);
};

extern const struct engine_ops engine_uring, engine_uring_cmd, engine_posix, engine_spdk, engine_mem, engine_null;

/* Commands in flight that move as much as was asked for, where the medium takes at most `most` bytes a command. */
static inline uint32_t depth_with(const glue_options *options, uint32_t most)
{
    uint64_t wanted = options->in_flight_bytes ? options->in_flight_bytes / most
                                               : (uint64_t)options->queue_depth * (options->command_bytes / most);
    return wanted > options->queue_depth ? (uint32_t)wanted : options->queue_depth;
}

uint64_t clock_ns(void);
/* For pthread_cond_timedwait on a condition of cond_init_monotonic; now where timeout_ns is negative. */
struct timespec deadline_after(int64_t timeout_ns);
void cond_init_monotonic(pthread_cond_t *condition);

#endif
