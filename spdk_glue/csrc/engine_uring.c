/* SPDX-License-Identifier: Apache-2.0 */
/* Ordinary files and block devices through io_uring. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>

#include "ring_uring.h"

enum { MAX_WORKERS = 4 };

struct uring_engine {
    struct ring ring; /* first, see ring_uring.h */
    uint32_t flags;
};

static void allow_workers(struct uring_engine *engine)
{
    unsigned limits[2] = {MAX_WORKERS, 0}; /* bounded work, as files are; 0 leaves the other as it is */
    io_uring_register_iowq_max_workers(&engine->ring.uring, limits);
}

static int uring_open(void **self, glue_options *options)
{
    struct uring_engine *engine = calloc(1, sizeof *engine);
    if (!engine)
        return -ENOMEM;
    engine->flags = options->flags;
    int error = ring_open(&engine->ring, 0, IORING_OP_READV, options);
    if (error) {
        free(engine);
        return error;
    }
    if (options->flags & GLUE_WORKERS)
        allow_workers(engine);
    *self = engine;
    return 0;
}

static void prepare_transfer(struct uring_engine *engine, struct io_uring_sqe *sqe, struct command *command)
{
    const struct iovec *iov = &command->iov[command->first];
    int fd = (int)command->file;
    int read = command->op == GLUE_READ;
    int slot = ring_buffer_of(&engine->ring, iov, command->niov);
    unsigned bytes = (unsigned)iov->iov_len;
    if (slot >= 0 && command->niov == 1 && read)
        io_uring_prep_read_fixed(sqe, fd, iov->iov_base, bytes, command->offset, slot);
    else if (slot >= 0 && command->niov == 1)
        io_uring_prep_write_fixed(sqe, fd, iov->iov_base, bytes, command->offset, slot);
    else if (read)
        io_uring_prep_readv(sqe, fd, iov, command->niov, command->offset);
    else
        io_uring_prep_writev(sqe, fd, iov, command->niov, command->offset);
    if (slot >= 0 && command->niov > 1) {
        sqe->opcode = read ? OP_READV_FIXED : OP_WRITEV_FIXED;
        sqe->buf_index = (uint16_t)slot;
    }
}

static int uring_submit(void *self, struct command *command)
{
    struct uring_engine *engine = self;
    struct io_uring_sqe *sqe = io_uring_get_sqe(&engine->ring.uring);
    if (!sqe)
        return -EAGAIN;
    if (command->op == GLUE_FLUSH)
        io_uring_prep_fsync(sqe, (int)command->file, IORING_FSYNC_DATASYNC);
    else if (command->op == GLUE_WRITE_BACK)
        io_uring_prep_sync_file_range(sqe, (int)command->file, (unsigned)command->span, command->offset,
                                      SYNC_FILE_RANGE_WRITE);
    else
        prepare_transfer(engine, sqe, command);
    sqe->flags |= IOSQE_FIXED_FILE;
    if (engine->flags & GLUE_WORKERS && command->op < GLUE_WRITE_BACK)
        sqe->flags |= IOSQE_ASYNC;
    io_uring_sqe_set_data(sqe, command);
    return 0;
}

static void uring_close(void *self)
{
    ring_close(self);
    free(self);
}

const struct engine_ops engine_uring = {
    .name = "uring",
    .writes_back = 1,
    .open = uring_open,
    .submit = uring_submit,
    .wait = ring_wait,
    .wake = ring_wake,
    .finish = ring_finish,
    .close = uring_close,
    .add_memory = ring_add_memory,
    .remove_memory = ring_remove_memory,
};
