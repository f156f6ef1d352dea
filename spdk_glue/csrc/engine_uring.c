/* SPDX-License-Identifier: Apache-2.0 */
/* Ordinary files and block devices through io_uring. */
#include <errno.h>
#include <liburing.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "engine.h"

enum {
    BUFFER_SLOTS = 64,
    MAX_WORKERS = 4,
};
static const uint64_t BUFFER_BYTES = 1ull << 30; /* the kernel's limit for one registered buffer */

struct buffer {
    uint64_t address, bytes; /* bytes 0: a free slot */
};

struct uring_engine {
    struct io_uring ring;
    int wake_fd, wake_armed;
    uint64_t wake_count;
    uint32_t flags;
    int can_register;
    struct buffer buffers[BUFFER_SLOTS];
};

/* The I/O thread is the ring's only user, so completions can wait until it asks (Linux 6.1);
 * older kernels refuse the flags and get a plain ring. */
static int ring_open(struct io_uring *ring, unsigned entries)
{
    static const unsigned wished[] = {IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN,
                                      IORING_SETUP_COOP_TASKRUN, 0};
    int error = -EINVAL;
    for (unsigned i = 0; i < 3 && error == -EINVAL; i++)
        error = io_uring_queue_init(entries, ring, wished[i]);
    return error;
}

/* Linux 5.1 to 5.5 open a ring and cannot read an eventfd through it. */
static int ring_check(struct io_uring *ring)
{
    struct io_uring_probe *probe = io_uring_get_probe_ring(ring);
    int able = probe && io_uring_opcode_supported(probe, IORING_OP_READ);
    io_uring_free_probe(probe);
    return able ? 0 : -ENOSYS;
}

static void allow_workers(struct uring_engine *engine)
{
    unsigned limits[2] = {MAX_WORKERS, 0}; /* bounded work, as files are; 0 leaves the other as it is */
    io_uring_register_iowq_max_workers(&engine->ring, limits);
}

static int uring_open(void **self, glue_options *options)
{
    struct uring_engine *engine = calloc(1, sizeof *engine);
    if (!engine)
        return -ENOMEM;
    engine->flags = options->flags;
    engine->wake_fd = eventfd(0, EFD_CLOEXEC);
    int error = engine->wake_fd < 0 ? -errno : ring_open(&engine->ring, options->queue_depth + 8);
    if (error)
        goto fail;
    error = ring_check(&engine->ring);
    if (!error)
        error = io_uring_register_files(&engine->ring, options->fds, options->num_files);
    if (error) {
        io_uring_queue_exit(&engine->ring);
        goto fail;
    }
    engine->can_register = io_uring_register_buffers_sparse(&engine->ring, BUFFER_SLOTS) == 0;
    if (options->flags & GLUE_WORKERS)
        allow_workers(engine);
    *self = engine;
    return 0;
fail:
    if (engine->wake_fd >= 0)
        close(engine->wake_fd);
    free(engine);
    return error;
}

/* Slot of the registered buffer that holds all of the segment, or -1. */
static int buffer_of(const struct uring_engine *engine, const struct iovec *segment)
{
    uint64_t address = (uint64_t)(uintptr_t)segment->iov_base;
    for (int i = 0; i < BUFFER_SLOTS; i++) {
        const struct buffer *buffer = &engine->buffers[i];
        if (buffer->bytes && address >= buffer->address &&
            address + segment->iov_len <= buffer->address + buffer->bytes)
            return i;
    }
    return -1;
}

static void prepare_transfer(struct uring_engine *engine, struct io_uring_sqe *sqe, struct command *command)
{
    const struct iovec *iov = &command->iov[command->first];
    int fd = (int)command->file;
    int read = command->op == GLUE_READ;
    int slot = command->niov == 1 ? buffer_of(engine, iov) : -1;
    unsigned bytes = (unsigned)iov->iov_len;
    if (slot >= 0 && read)
        io_uring_prep_read_fixed(sqe, fd, iov->iov_base, bytes, command->offset, slot);
    else if (slot >= 0)
        io_uring_prep_write_fixed(sqe, fd, iov->iov_base, bytes, command->offset, slot);
    else if (read)
        io_uring_prep_readv(sqe, fd, iov, command->niov, command->offset);
    else
        io_uring_prep_writev(sqe, fd, iov, command->niov, command->offset);
}

static int uring_submit(void *self, struct command *command)
{
    struct uring_engine *engine = self;
    struct io_uring_sqe *sqe = io_uring_get_sqe(&engine->ring);
    if (!sqe)
        return -EAGAIN;
    if (command->op == GLUE_FLUSH)
        io_uring_prep_fsync(sqe, (int)command->file, IORING_FSYNC_DATASYNC);
    else
        prepare_transfer(engine, sqe, command);
    sqe->flags |= IOSQE_FIXED_FILE;
    if (engine->flags & GLUE_WORKERS && command->op != GLUE_FLUSH)
        sqe->flags |= IOSQE_ASYNC;
    io_uring_sqe_set_data(sqe, command);
    return 0;
}

static void arm_wake(struct uring_engine *engine)
{
    struct io_uring_sqe *sqe = engine->wake_armed ? NULL : io_uring_get_sqe(&engine->ring);
    if (!sqe)
        return;
    io_uring_prep_read(sqe, engine->wake_fd, &engine->wake_count, sizeof engine->wake_count, 0);
    io_uring_sqe_set_data(sqe, NULL);
    engine->wake_armed = 1;
}

static int enter(struct uring_engine *engine, int64_t timeout_ns)
{
    if (timeout_ns < 0)
        return io_uring_submit_and_wait(&engine->ring, 1);
    struct __kernel_timespec limit = {.tv_sec = timeout_ns / 1000000000, .tv_nsec = timeout_ns % 1000000000};
    struct io_uring_cqe *cqe;
    return io_uring_submit_and_wait_timeout(&engine->ring, &cqe, 1, &limit, NULL);
}

static int uring_wait(void *self, struct event *out, unsigned max, int64_t timeout_ns)
{
    struct uring_engine *engine = self;
    arm_wake(engine);
    int error = enter(engine, timeout_ns);
    if (error < 0 && error != -EINTR && error != -ETIME && error != -EAGAIN && error != -EBUSY)
        return error;
    unsigned count = 0;
    struct io_uring_cqe *cqe;
    while (count < max && !io_uring_peek_cqe(&engine->ring, &cqe)) {
        struct command *command = io_uring_cqe_get_data(cqe);
        if (command)
            out[count++] = (struct event){.command = command, .result = cqe->res};
        else
            engine->wake_armed = 0;
        io_uring_cqe_seen(&engine->ring, cqe);
    }
    return (int)count;
}

static void uring_wake(void *self)
{
    struct uring_engine *engine = self;
    uint64_t one = 1;
    while (write(engine->wake_fd, &one, sizeof one) < 0 && errno == EINTR)
        ;
}

static int add_buffer(struct uring_engine *engine, uint64_t address, uint64_t bytes)
{
    for (unsigned i = 0; i < BUFFER_SLOTS; i++) {
        if (engine->buffers[i].bytes)
            continue;
        struct iovec iov = {(void *)(uintptr_t)address, bytes};
        __u64 tag = 0;
        /* -ENOMEM is RLIMIT_MEMLOCK: what does not fit stays unregistered and works all the same. */
        if (io_uring_register_buffers_update_tag(&engine->ring, i, &iov, &tag, 1) != 1)
            return 0;
        engine->buffers[i] = (struct buffer){address, bytes};
        return 1;
    }
    return 0;
}

static uint64_t uring_remove_memory(void *self, uint64_t address)
{
    struct uring_engine *engine = self;
    uint64_t removed = 0;
    for (unsigned i = 0; i < BUFFER_SLOTS; i++) {
        struct buffer *buffer = &engine->buffers[i];
        if (!buffer->bytes || buffer->address != address)
            continue;
        struct iovec none = {NULL, 0};
        __u64 tag = 0;
        io_uring_register_buffers_update_tag(&engine->ring, i, &none, &tag, 1);
        removed += buffer->bytes;
        *buffer = (struct buffer){0};
    }
    return removed;
}

static int uring_add_memory(void *self, uint64_t address, uint64_t bytes)
{
    struct uring_engine *engine = self;
    if (!engine->can_register || bytes > BUFFER_BYTES)
        return 0;
    return add_buffer(engine, address, bytes);
}

/* The closed ring lingers in the kernel for a while, and with it the files, their locks and claims. Only
 * the thread that submits may take them out (SINGLE_ISSUER). */
static void uring_finish(void *self)
{
    struct uring_engine *engine = self;
    io_uring_unregister_files(&engine->ring);
}

static void uring_close(void *self)
{
    struct uring_engine *engine = self;
    io_uring_queue_exit(&engine->ring);
    close(engine->wake_fd);
    free(engine);
}

const struct engine_ops engine_uring = {
    .name = "uring",
    .open = uring_open,
    .submit = uring_submit,
    .wait = uring_wait,
    .wake = uring_wake,
    .finish = uring_finish,
    .close = uring_close,
    .add_memory = uring_add_memory,
    .remove_memory = uring_remove_memory,
};
