/* SPDX-License-Identifier: Apache-2.0 */
/* NVMe commands through io_uring and the kernel's driver: a namespace's generic device, past the block
 * layer. Whatever is sent must be right as it is: the kernel neither cuts nor repeats it. */
#include <endian.h>
#include <errno.h>
#include <linux/nvme_ioctl.h>
#include <stdlib.h>
#include <string.h>

#include "nvme_generic.h"
#include "ring_uring.h"

enum {
    FLUSH = 0x00, /* opcodes */
    WRITE = 0x01,
    READ = 0x02,
    DATASET_MANAGEMENT = 0x09,
    DEALLOCATE = 1 << 2,
    DO_NOT_RETRY = 1 << 14, /* of a status: then the status type from bit 8 on, and below it the code */
    NO_SUCH_NAMESPACE = 0x0b,
    MAX_TRIES = 5, /* as often as the kernel sends a command of its own */
    MAX_DEPTH = 128,
    TRIAL_BYTES = 4096,
};

struct uring_cmd_engine {
    struct ring ring; /* first, see ring_uring.h */
    uint32_t nsid;
    glue_medium medium;
};

/* commands ----------------------------------------------------------------------------------- */

static void prepare_transfer(struct uring_cmd_engine *engine, struct io_uring_sqe *sqe, struct nvme_uring_cmd *nvme,
                             struct command *command)
{
    const struct iovec *iov = &command->iov[command->first];
    uint64_t lba = command->offset / engine->medium.lba_bytes;
    int slot = command->niov == 1 && engine->ring.can_register ? ring_buffer_of(&engine->ring, iov, 1) : -1;
    nvme->opcode = command->op == GLUE_READ ? READ : WRITE;
    nvme->cdw10 = (uint32_t)lba;
    nvme->cdw11 = (uint32_t)(lba >> 32);
    nvme->cdw12 = (uint32_t)(command->bytes / engine->medium.lba_bytes - 1);
    if (command->niov == 1) {
        nvme->addr = (uint64_t)(uintptr_t)iov->iov_base;
        nvme->data_len = (uint32_t)iov->iov_len;
    } else {
        sqe->cmd_op = NVME_URING_CMD_IO_VEC;
        nvme->addr = (uint64_t)(uintptr_t)iov;
        nvme->data_len = command->niov;
    }
    command->registered = slot >= 0;
    if (command->registered) {
        sqe->uring_cmd_flags = IORING_URING_CMD_FIXED;
        sqe->buf_index = (uint16_t)slot;
    }
}

/* How much of the span one command names. */
static uint64_t trim_bytes(const struct uring_cmd_engine *engine, const struct command *command)
{
    uint64_t most = (uint64_t)UINT32_MAX * engine->medium.lba_bytes;
    return command->span < most ? command->span : most;
}

static void prepare_trim(struct uring_cmd_engine *engine, struct nvme_uring_cmd *nvme, struct command *command)
{
    uint64_t lbas = trim_bytes(engine, command) / engine->medium.lba_bytes;
    command->range[0] = htole64(lbas << 32); /* attributes, then the number of blocks */
    command->range[1] = htole64(command->offset / engine->medium.lba_bytes);
    nvme->opcode = DATASET_MANAGEMENT;
    nvme->addr = (uint64_t)(uintptr_t)command->range;
    nvme->data_len = sizeof command->range;
    nvme->cdw11 = DEALLOCATE;
}

static void prepare(struct uring_cmd_engine *engine, struct io_uring_sqe *sqe, struct command *command)
{
    struct nvme_uring_cmd *nvme = (void *)sqe->cmd;
    memset(sqe, 0, 2 * sizeof *sqe); /* SQE128 */
    sqe->opcode = IORING_OP_URING_CMD;
    sqe->flags = IOSQE_FIXED_FILE;
    sqe->cmd_op = NVME_URING_CMD_IO;
    nvme->nsid = engine->nsid;
    if (command->op == GLUE_TRIM)
        prepare_trim(engine, nvme, command);
    else if (command->op == GLUE_FLUSH)
        nvme->opcode = FLUSH;
    else
        prepare_transfer(engine, sqe, nvme, command);
}

/* Without a volatile cache there is nothing to flush, and a controller need not know deallocate. */
static int is_needed(const struct uring_cmd_engine *engine, int op)
{
    if (op == GLUE_FLUSH)
        return engine->medium.volatile_cache != 0;
    return op != GLUE_TRIM || engine->medium.can_trim;
}

static int uring_cmd_submit(void *self, struct command *command)
{
    struct uring_cmd_engine *engine = self;
    if ((command->offset | command->bytes | command->span) % engine->medium.lba_bytes && command->op != GLUE_FLUSH)
        return -EINVAL;
    struct io_uring_sqe *sqe = io_uring_get_sqe(&engine->ring.uring);
    if (!sqe)
        return -EAGAIN;
    if (is_needed(engine, command->op))
        prepare(engine, sqe, command);
    else
        io_uring_prep_nop(sqe);
    io_uring_sqe_set_data(sqe, command);
    return 0;
}

/* answers ------------------------------------------------------------------------------------ */

static int send_again(struct uring_cmd_engine *engine, struct event *event)
{
    event->result = uring_cmd_submit(engine, event->command);
    return event->result == 0;
}

/* Kernels before 6.12 refuse most commands with registered buffers: then none is sent with one any more. */
static int was_refused(struct uring_cmd_engine *engine, struct event *event)
{
    if (event->result != -EINVAL || !event->command->registered)
        return 0;
    engine->ring.can_register = 0;
    event->command->registered = 0;
    return 1;
}

static int trims_on(struct uring_cmd_engine *engine, struct command *command)
{
    uint64_t done = trim_bytes(engine, command);
    if (command->op != GLUE_TRIM || done == command->span || !engine->medium.can_trim)
        return 0;
    command->offset += done;
    command->span -= done;
    return 1;
}

/* The kernel's result is -errno, 0 or the controller's status. 1: that is the answer; 0: the command is
 * on its way again. */
static int is_answer(struct uring_cmd_engine *engine, struct event *event)
{
    struct command *command = event->command;
    int64_t status = event->result;
    if (status < 0)
        return !was_refused(engine, event) || !send_again(engine, event);
    if (!status) {
        event->result = (int64_t)command->bytes;
        return !trims_on(engine, command) || !send_again(engine, event);
    }
    if (!(status & DO_NOT_RETRY) && ++command->tries < MAX_TRIES)
        return !send_again(engine, event);
    event->sct = status >> 8 & 7;
    event->sc = status & 0xff;
    event->result = !event->sct && event->sc == NO_SUCH_NAMESPACE ? -ENODEV : -EIO;
    return 1;
}

static int uring_cmd_wait(void *self, struct event *out, unsigned max, int64_t timeout_ns)
{
    int count = ring_wait(self, out, max, timeout_ns), kept = 0;
    for (int i = 0; i < count; i++)
        if (is_answer(self, &out[i]))
            out[kept++] = out[i];
    return count < 0 ? count : kept;
}

/* open, close -------------------------------------------------------------------------------- */

/* As many bytes in flight as were asked for, in commands that the controller takes whole. */
static void fit_options(const glue_medium *medium, glue_options *options)
{
    uint32_t most = medium->max_command_bytes, asked = options->queue_depth;
    if (options->command_bytes <= most)
        return;
    uint32_t wanted = depth_with(options, most);
    options->queue_depth = wanted < MAX_DEPTH ? wanted : asked > MAX_DEPTH ? asked : MAX_DEPTH;
    options->command_bytes = most;
}

/* Reads the first blocks: what the kernel or the controller answers, as in a completion. */
static int try_read(struct uring_cmd_engine *engine, void *page)
{
    struct iovec iov = {page, TRIAL_BYTES};
    struct command command = {.op = GLUE_READ, .bytes = TRIAL_BYTES, .iov = &iov, .niov = 1};
    struct io_uring_cqe *cqe;
    int error = uring_cmd_submit(engine, &command);
    if (!error)
        error = io_uring_submit(&engine->ring.uring);
    if (error < 0)
        return error;
    do
        error = io_uring_wait_cqe(&engine->ring.uring, &cqe);
    while (error == -EINTR);
    if (error)
        return error;
    int result = cqe->res;
    io_uring_cqe_seen(&engine->ring.uring, cqe);
    return result;
}

/* Whether the kernel takes commands here at all. A block that cannot be read is no reason to refuse the
 * others. */
static int try_commands(struct uring_cmd_engine *engine)
{
    void *page = aligned_alloc(TRIAL_BYTES, TRIAL_BYTES);
    if (!page)
        return -ENOMEM;
    int result = try_read(engine, page);
    free(page);
    if (result == -EOPNOTSUPP)
        return -ENOSYS;
    return result < 0 ? result : 0;
}

static int open_ring(struct uring_cmd_engine *engine, const glue_options *options)
{
    int error = ring_open(&engine->ring, IORING_SETUP_SQE128 | IORING_SETUP_CQE32, IORING_OP_URING_CMD, options);
    if (error == -EACCES) /* not the device's */
        return -EPERM;
    if (error)
        return error == -EINVAL ? -ENOSYS : error;
    error = try_commands(engine);
    if (error)
        ring_close(&engine->ring);
    return error;
}

static int uring_cmd_open(void **self, glue_options *options)
{
    if (options->num_files != 1)
        return -EINVAL;
    struct uring_cmd_engine *engine = calloc(1, sizeof *engine);
    if (!engine)
        return -ENOMEM;
    int error = nvme_generic_identify(options->fds[0], &engine->nsid, &engine->medium);
    if (!error) {
        fit_options(&engine->medium, options);
        error = open_ring(engine, options);
    }
    if (error)
        free(engine);
    else
        *self = engine;
    return error;
}

static void uring_cmd_close(void *self)
{
    ring_close(self);
    free(self);
}

static int uring_cmd_medium(void *self, glue_medium *out)
{
    const struct uring_cmd_engine *engine = self;
    *out = engine->medium;
    return 0;
}

const struct engine_ops engine_uring_cmd = {
    .name = "uring_cmd",
    .trims = 1,
    .open = uring_cmd_open,
    .submit = uring_cmd_submit,
    .wait = uring_cmd_wait,
    .wake = ring_wake,
    .finish = ring_finish,
    .close = uring_cmd_close,
    .add_memory = ring_add_memory,
    .remove_memory = ring_remove_memory,
    .medium = uring_cmd_medium,
};
