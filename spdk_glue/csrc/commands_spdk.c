/* SPDX-License-Identifier: Apache-2.0 */
/* One command on its way to SPDK's driver and back. */
#include <errno.h>

#include "engine_spdk.h"

enum {
    MAX_TRIES = 4,
};

/* lists -------------------------------------------------------------------------------------- */

void add_event(struct spdk_engine *engine, struct event event)
{
    engine->events[engine->num_events++] = event;
}

static void link_newest(struct spdk_engine *engine, struct command *command)
{
    command->next = NULL;
    command->prev = engine->newest;
    if (engine->newest)
        engine->newest->next = command;
    else
        engine->oldest = command;
    engine->newest = command;
}

static void unlink_command(struct spdk_engine *engine, struct command *command)
{
    if (command->prev)
        command->prev->next = command->next;
    else
        engine->oldest = command->next;
    if (command->next)
        command->next->prev = command->prev;
    else
        engine->newest = command->prev;
}

void keep_unsent(struct spdk_engine *engine, struct command *command)
{
    struct command **end = &engine->unsent;
    while (*end)
        end = &(*end)->next;
    command->next = NULL;
    *end = command;
}

/* completions -------------------------------------------------------------------------------- */

/* Aborted because its queue went away, or the path did: not what the medium says of the command. */
static int was_lost(const struct spdk_nvme_cpl *completion)
{
    return completion->status.sct == SPDK_NVME_SCT_PATH ||
           (completion->status.sct == SPDK_NVME_SCT_GENERIC &&
            completion->status.sc == SPDK_NVME_SC_ABORTED_SQ_DELETION);
}

static int errno_of(const struct spdk_nvme_cpl *completion)
{
    if (completion->status.sct != SPDK_NVME_SCT_GENERIC)
        return -EIO;
    switch (completion->status.sc) {
    case SPDK_NVME_SC_ABORTED_BY_REQUEST:
        return -ETIMEDOUT; /* nobody but us asks for it */
    case SPDK_NVME_SC_INVALID_NAMESPACE_OR_FORMAT:
        return -ENODEV;
    default:
        return -EIO;
    }
}

void fail_command(struct spdk_engine *engine, struct command *command, int error, const struct spdk_nvme_cpl *why)
{
    struct event event = {.command = command, .result = error};
    event.memory_at_risk = engine->dead && engine->controller.local_memory && command->tries;
    if (why) {
        event.sct = why->status.sct;
        event.sc = why->status.sc;
        /* A driver that gives up says nothing of the device, which may yet carry the command out. */
        event.memory_at_risk |= engine->dead && engine->controller.local_memory && was_lost(why);
    }
    add_event(engine, event);
}

static void on_complete(void *argument, const struct spdk_nvme_cpl *completion)
{
    struct command *command = argument;
    struct spdk_engine *engine = command->sender;
    unlink_command(engine, command);
    if (!spdk_nvme_cpl_is_error(completion)) {
        if (command->op == GLUE_WRITE)
            engine->last_write = clock_ns();
        else if (command->op == GLUE_FLUSH && engine->last_write < command->due_ns - engine->timeout_ms * MS)
            engine->last_write = 0;
        add_event(engine, (struct event){.command = command, .result = (int64_t)command->bytes});
    } else if (!was_lost(completion)) {
        int error = errno_of(completion);
        engine->gone |= error == -ENODEV; /* for good: what may come back need not be what went */
        fail_command(engine, command, error, completion);
    } else if (engine->dead) {
        fail_command(engine, command, engine->dead, completion);
    } else if (clock_ns() >= command->due_ns || ++command->tries >= MAX_TRIES) {
        fail_command(engine, command, -ETIMEDOUT, completion);
    } else {
        keep_unsent(engine, command);
    }
}

/* commands ----------------------------------------------------------------------------------- */

/* SPDK asks for the segments of a command one after the other, and may start again in the middle. */
static void reset_segments(void *argument, uint32_t offset)
{
    struct command *command = argument;
    command->at = command->first;
    command->into = offset;
    while (command->into && command->into >= command->iov[command->at].iov_len)
        command->into -= command->iov[command->at++].iov_len;
}

static int next_segment(void *argument, void **address, uint32_t *length)
{
    struct command *command = argument;
    const struct iovec *segment = &command->iov[command->at++];
    *address = (char *)segment->iov_base + command->into;
    *length = (uint32_t)(segment->iov_len - command->into);
    command->into = 0;
    return 0;
}

static int send_transfer(struct spdk_engine *engine, struct command *command)
{
    struct spdk_nvme_ns *ns = engine->controller.ns;
    struct iovec *iov = &command->iov[command->first];
    uint64_t lba = command->offset / engine->controller.lba_bytes;
    uint32_t count = (uint32_t)(command->bytes / engine->controller.lba_bytes);
    if (command->niov == 1 && command->op == GLUE_READ)
        return spdk_nvme_ns_cmd_read(ns, engine->qpair, iov->iov_base, lba, count, on_complete, command, 0);
    if (command->niov == 1)
        return spdk_nvme_ns_cmd_write(ns, engine->qpair, iov->iov_base, lba, count, on_complete, command, 0);
    if (command->op == GLUE_READ)
        return spdk_nvme_ns_cmd_readv(ns, engine->qpair, lba, count, on_complete, command, 0, reset_segments,
                                      next_segment);
    return spdk_nvme_ns_cmd_writev(ns, engine->qpair, lba, count, on_complete, command, 0, reset_segments,
                                   next_segment);
}

static int send_trim(struct spdk_engine *engine, struct command *command)
{
    const struct controller *controller = &engine->controller;
    struct spdk_nvme_dsm_range range = {.starting_lba = command->offset / controller->lba_bytes,
                                        .length = (uint32_t)(command->span / controller->lba_bytes)};
    return spdk_nvme_ns_cmd_dataset_management(controller->ns, engine->qpair, SPDK_NVME_DSM_ATTR_DEALLOCATE, &range,
                                               1, on_complete, command);
}

int send_command(struct spdk_engine *engine, struct command *command)
{
    struct spdk_nvme_ns *ns = engine->controller.ns;
    command->sender = engine;
    command->due_ns = clock_ns() + engine->timeout_ms * MS;
    link_newest(engine, command);
    int error = command->op == GLUE_TRIM    ? send_trim(engine, command)
                : command->op == GLUE_FLUSH ? spdk_nvme_ns_cmd_flush(ns, engine->qpair, on_complete, command)
                                            : send_transfer(engine, command);
    if (error)
        unlink_command(engine, command);
    return error;
}

int memory_fits(const struct spdk_engine *engine, const struct command *command)
{
    if (!engine->controller.local_memory)
        return 1;
    for (unsigned i = command->first; i < command->first + command->niov; i++)
        if (!env_holds((uint64_t)(uintptr_t)command->iov[i].iov_base, command->iov[i].iov_len))
            return 0;
    return 1;
}

/* A namespace need not know flush or deallocate; then there is nothing to do. */
int is_known(const struct spdk_engine *engine, int op)
{
    uint32_t flags = spdk_nvme_ns_get_flags(engine->controller.ns);
    if (op == GLUE_FLUSH)
        return (flags & SPDK_NVME_NS_FLUSH_SUPPORTED) != 0;
    return op != GLUE_TRIM || flags & SPDK_NVME_NS_DEALLOCATE_SUPPORTED;
}

void send_unsent(struct spdk_engine *engine)
{
    while (engine->unsent) {
        struct command *command = engine->unsent;
        engine->unsent = command->next;
        int error = send_command(engine, command);
        if (!error)
            continue;
        if (error == -ENOMEM || error == -EAGAIN) {
            command->next = engine->unsent;
            engine->unsent = command;
            return;
        }
        fail_command(engine, command, error, NULL);
    }
}
