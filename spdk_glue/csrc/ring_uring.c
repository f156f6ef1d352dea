/* SPDX-License-Identifier: Apache-2.0 */
/* An io_uring with the files of a queue, an eventfd that wakes its thread, and a table of buffers. */
#include "ring_uring.h"

#include <errno.h>
#include <sys/eventfd.h>
#include <unistd.h>

static const uint64_t BUFFER_BYTES = 1ull << 30; /* the kernel's limit for one registered buffer */

/* The I/O thread is the ring's only user, so completions can wait until it asks (Linux 6.1);
 * older kernels refuse the flags and get a plain ring. */
static int init(struct io_uring *uring, unsigned entries, unsigned flags)
{
    static const unsigned wished[] = {IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN,
                                      IORING_SETUP_COOP_TASKRUN, 0};
    int error = -EINVAL;
    for (unsigned i = 0; i < 3 && error == -EINVAL; i++)
        error = io_uring_queue_init(entries, uring, wished[i] | flags);
    return error;
}

/* Linux 5.1 to 5.5 open a ring and cannot read an eventfd through it. */
static int check(struct ring *ring, int opcode)
{
    struct io_uring_probe *probe = io_uring_get_probe_ring(&ring->uring);
    int able = probe && io_uring_opcode_supported(probe, IORING_OP_READ) && io_uring_opcode_supported(probe, opcode);
    ring->can_scatter = probe && io_uring_opcode_supported(probe, OP_WRITEV_FIXED);
    io_uring_free_probe(probe);
    return able ? 0 : -ENOSYS;
}

static int fill(struct ring *ring, int opcode, const glue_options *options)
{
    int error = check(ring, opcode);
    if (!error)
        error = io_uring_register_files(&ring->uring, options->fds, options->num_files);
    if (!error)
        ring->can_register = io_uring_register_buffers_sparse(&ring->uring, BUFFER_SLOTS) == 0;
    return error;
}

int ring_open(struct ring *ring, unsigned flags, int opcode, const glue_options *options)
{
    ring->wake_fd = eventfd(0, EFD_CLOEXEC);
    if (ring->wake_fd < 0)
        return -errno;
    int error = init(&ring->uring, options->queue_depth + 8, flags);
    if (error) {
        close(ring->wake_fd);
        return error;
    }
    error = fill(ring, opcode, options);
    if (error)
        ring_close(ring);
    return error;
}

void ring_close(struct ring *ring)
{
    io_uring_queue_exit(&ring->uring);
    close(ring->wake_fd);
}

/* wait, wake --------------------------------------------------------------------------------- */

static void arm_wake(struct ring *ring)
{
    struct io_uring_sqe *sqe = ring->wake_armed ? NULL : io_uring_get_sqe(&ring->uring);
    if (!sqe)
        return;
    io_uring_prep_read(sqe, ring->wake_fd, &ring->wake_count, sizeof ring->wake_count, 0);
    io_uring_sqe_set_data(sqe, NULL);
    ring->wake_armed = 1;
}

static int enter(struct ring *ring, int64_t timeout_ns)
{
    if (timeout_ns < 0)
        return io_uring_submit_and_wait(&ring->uring, 1);
    struct __kernel_timespec limit = {.tv_sec = timeout_ns / 1000000000, .tv_nsec = timeout_ns % 1000000000};
    struct io_uring_cqe *cqe;
    return io_uring_submit_and_wait_timeout(&ring->uring, &cqe, 1, &limit, NULL);
}

int ring_wait(void *self, struct event *out, unsigned max, int64_t timeout_ns)
{
    struct ring *ring = self;
    arm_wake(ring);
    int error = enter(ring, timeout_ns);
    if (error < 0 && error != -EINTR && error != -ETIME && error != -EAGAIN && error != -EBUSY)
        return error;
    unsigned count = 0;
    struct io_uring_cqe *cqe;
    while (count < max && !io_uring_peek_cqe(&ring->uring, &cqe)) {
        struct command *command = io_uring_cqe_get_data(cqe);
        if (command)
            out[count++] = (struct event){.command = command, .result = cqe->res};
        else
            ring->wake_armed = 0;
        io_uring_cqe_seen(&ring->uring, cqe);
    }
    return (int)count;
}

void ring_wake(void *self)
{
    struct ring *ring = self;
    uint64_t one = 1;
    while (write(ring->wake_fd, &one, sizeof one) < 0 && errno == EINTR)
        ;
}

/* The closed ring lingers in the kernel for a while, and with it the files, their locks and claims. Only
 * the thread that submits may take them out (SINGLE_ISSUER). */
void ring_finish(void *self)
{
    struct ring *ring = self;
    io_uring_unregister_files(&ring->uring);
}

/* memory ------------------------------------------------------------------------------------- */

static int holds(const struct buffer *buffer, const struct iovec *segment)
{
    uint64_t address = (uint64_t)(uintptr_t)segment->iov_base;
    return buffer->bytes && address >= buffer->address &&
           address + segment->iov_len <= buffer->address + buffer->bytes;
}

int ring_buffer_of(const struct ring *ring, const struct iovec *segments, unsigned count)
{
    if (count > 1 && !ring->can_scatter)
        return -1;
    for (int i = 0; i < BUFFER_SLOTS; i++) {
        unsigned held = 0;
        while (held < count && holds(&ring->buffers[i], &segments[held]))
            held++;
        if (held == count)
            return i;
    }
    return -1;
}

static int add_buffer(struct ring *ring, uint64_t address, uint64_t bytes)
{
    for (unsigned i = 0; i < BUFFER_SLOTS; i++) {
        if (ring->buffers[i].bytes)
            continue;
        struct iovec iov = {(void *)(uintptr_t)address, bytes};
        __u64 tag = 0;
        /* -ENOMEM is RLIMIT_MEMLOCK: what does not fit stays unregistered and works all the same. */
        if (io_uring_register_buffers_update_tag(&ring->uring, i, &iov, &tag, 1) != 1)
            return 0;
        ring->buffers[i] = (struct buffer){address, bytes};
        return 1;
    }
    return 0;
}

int ring_add_memory(void *self, uint64_t address, uint64_t bytes)
{
    struct ring *ring = self;
    if (!ring->can_register || bytes > BUFFER_BYTES)
        return 0;
    return add_buffer(ring, address, bytes);
}

uint64_t ring_remove_memory(void *self, uint64_t address)
{
    struct ring *ring = self;
    uint64_t removed = 0;
    for (unsigned i = 0; i < BUFFER_SLOTS; i++) {
        struct buffer *buffer = &ring->buffers[i];
        if (!buffer->bytes || buffer->address != address)
            continue;
        struct iovec none = {NULL, 0};
        __u64 tag = 0;
        io_uring_register_buffers_update_tag(&ring->uring, i, &none, &tag, 1);
        removed += buffer->bytes;
        *buffer = (struct buffer){0};
    }
    return removed;
}
