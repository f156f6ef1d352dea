/* SPDX-License-Identifier: Apache-2.0 */
/* What the engines on io_uring share: the ring, how its thread sleeps and is woken, registered memory.
 * An engine begins with a struct ring, so that these calls can be its own. */
#ifndef RING_URING_H
#define RING_URING_H
#include <liburing.h>

#include "engine.h"

enum { BUFFER_SLOTS = 64 };
/* Linux 6.15: several runs of one registered buffer, which liburing 2.3 has no names for. Half the CPU a byte of
 * IORING_OP_READV, which looks every page up. */
enum { OP_READV_FIXED = 60, OP_WRITEV_FIXED = 61 };

struct buffer {
    uint64_t address, bytes; /* bytes 0: a free slot */
};

struct ring {
    struct io_uring uring;
    int wake_fd, wake_armed;
    uint64_t wake_count;
    int can_register, can_scatter; /* of a registered buffer: one run, several of them */
    struct buffer buffers[BUFFER_SLOTS];
};

/* flags: IORING_SETUP_*, beside those that are best for speed. opcode: what the kernel must know.
 * 0; -ENOSYS where it does not, -EINVAL where it does not know the flags; nothing is left then. */
int ring_open(struct ring *ring, unsigned flags, int opcode, const glue_options *options);
/* After ring_open(), which it undoes. */
void ring_close(struct ring *ring);
/* Slot of the registered buffer that holds all segments; -1: there is none, or the kernel takes no several. */
int ring_buffer_of(const struct ring *ring, const struct iovec *segments, unsigned count);

/* Calls of struct engine_ops, of any engine that begins with a struct ring. */
/* A completion's result is as the kernel gave it. */
int ring_wait(void *self, struct event *out, unsigned max, int64_t timeout_ns);
void ring_wake(void *self);
void ring_finish(void *self);
int ring_add_memory(void *self, uint64_t address, uint64_t bytes);
uint64_t ring_remove_memory(void *self, uint64_t address);

#endif
