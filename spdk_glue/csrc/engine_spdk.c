/* SPDX-License-Identifier: Apache-2.0 */
/* NVMe commands through SPDK's driver. The I/O thread polls while commands are in flight and sleeps
 * otherwise. What goes wrong is handled in steps: a command that takes too long is aborted; a
 * controller that does not abort, or a connection that is gone, is brought back, and what was lost
 * on the way is sent again; where that fails every command fails, and the engine with it. */
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "spdk_parts.h"

enum {
    MAX_DEPTH = 128, /* of the 192 commands that SPDK keeps in flight on a queue pair of 256 entries */
    MAX_TRIES = 4,
    IDLE_ADMIN_MS = 1000, /* keep-alive, and news of the namespace */
    BUSY_ADMIN_MS = 20,
    FLUSH_AFTER_MS = 200,
    RETRY_MS = 50,
};
static const uint64_t MS = 1000000;

struct spdk_engine {
    struct controller controller;
    struct spdk_nvme_qpair *qpair;
    int wake_fd;
    atomic_int woken, sleeping;
    uint32_t timeout_ms, admin_timeout_ms, recoveries, depth;

    struct event *events; /* completed and not yet collected: room for every command */
    uint32_t num_events;
    struct command *oldest, *newest; /* what SPDK has, in the order of sending */
    struct command *unsent;          /* what it had no room for, or lost */

    uint64_t admin_due;   /* when the admin queue wants to be looked at */
    uint64_t abort_due;   /* when an abort should have helped; 0 none is under way */
    uint32_t aborts;      /* not answered */
    uint64_t last_write;  /* of those that no flush has covered; 0 none */
    int flushing, ns_changed, gone;
    int lost, silent; /* the connection or the controller; nothing answers at all */
    int dead;         /* -errno */
};

/* lists -------------------------------------------------------------------------------------- */

static void add_event(struct spdk_engine *engine, struct event event)
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

static void keep_unsent(struct spdk_engine *engine, struct command *command)
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

static void fail_command(struct spdk_engine *engine, struct command *command, int error, const struct spdk_nvme_cpl *why)
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

static int send_command(struct spdk_engine *engine, struct command *command)
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

static int memory_fits(const struct spdk_engine *engine, const struct command *command)
{
    if (!engine->controller.local_memory)
        return 1;
    for (unsigned i = command->first; i < command->first + command->niov; i++)
        if (!env_holds((uint64_t)(uintptr_t)command->iov[i].iov_base, command->iov[i].iov_len))
            return 0;
    return 1;
}

/* A namespace need not know flush or deallocate; then there is nothing to do. */
static int is_known(const struct spdk_engine *engine, int op)
{
    uint32_t flags = spdk_nvme_ns_get_flags(engine->controller.ns);
    if (op == GLUE_FLUSH)
        return (flags & SPDK_NVME_NS_FLUSH_SUPPORTED) != 0;
    return op != GLUE_TRIM || flags & SPDK_NVME_NS_DEALLOCATE_SUPPORTED;
}

static int spdk_submit(void *self, struct command *command)
{
    struct spdk_engine *engine = self;
    if (engine->dead)
        return engine->dead;
    if (!memory_fits(engine, command))
        return -EFAULT;
    if (!is_known(engine, command->op)) {
        add_event(engine, (struct event){.command = command});
        return 0;
    }
    if (engine->unsent) {
        keep_unsent(engine, command);
        return 0;
    }
    int error = send_command(engine, command);
    if (error == -ENOMEM || error == -ENXIO || error == -EAGAIN) {
        engine->lost |= error == -ENXIO;
        keep_unsent(engine, command);
        return 0;
    }
    if (error && !controller_is_same(&engine->controller)) {
        engine->gone = 1;
        return -ENODEV;
    }
    return error;
}

static void send_unsent(struct spdk_engine *engine)
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

/* failure ------------------------------------------------------------------------------------ */

/* From here on everything fails. What SPDK still has comes back through on_complete(). */
static void die(struct spdk_engine *engine, int error)
{
    engine->dead = error;
    spdk_nvme_ctrlr_fail(engine->controller.ctrlr);
    if (engine->qpair)
        spdk_nvme_ctrlr_free_io_qpair(engine->qpair);
    engine->qpair = NULL;
    for (uint32_t i = 0; i < engine->num_events && error == -ENODEV; i++)
        engine->events[i].result = error; /* who answered is not known */
    while (engine->unsent) {
        struct command *command = engine->unsent;
        engine->unsent = command->next;
        fail_command(engine, command, error, NULL);
    }
}

static int reset_until(struct spdk_engine *engine, uint64_t deadline)
{
    for (;;) {
        int error = controller_reset(&engine->controller);
        if (!error || error == -ESTALE || clock_ns() > deadline)
            return error;
        poll(NULL, 0, RETRY_MS);
    }
}

/* After a reset of the controller no command from before can touch memory. A fabric's connection
 * may lead to a target that was started anew: what its volatile cache held is then gone, so only a
 * flush makes the writes before it certain. */
static int bring_back(struct spdk_engine *engine)
{
    const struct controller *controller = &engine->controller;
    if (!controller_target_lives(controller) || (engine->silent && controller->id.trtype == SPDK_NVME_TRANSPORT_VFIOUSER))
        return -ENOTCONN;
    if (controller->fabric && controller->volatile_cache && engine->last_write)
        return -ESTALE;
    int error = reset_until(engine, clock_ns() + engine->timeout_ms * MS);
    if (error)
        return error == -ESTALE ? error : -ENOTCONN;
    spdk_nvme_ctrlr_free_io_qpair(engine->qpair);
    engine->qpair = controller_qpair(controller, engine->depth);
    return engine->qpair ? 0 : -ENOTCONN;
}

static void recover(struct spdk_engine *engine)
{
    int error = bring_back(engine);
    engine->lost = engine->silent = engine->flushing = 0;
    engine->aborts = 0;
    engine->abort_due = 0;
    if (error) {
        die(engine, error);
        return;
    }
    engine->recoveries++;
    send_unsent(engine);
}

static void on_abort(void *argument, const struct spdk_nvme_cpl *completion)
{
    struct spdk_engine *engine = argument;
    (void)completion; /* whether it helped shows in the command */
    if (engine->aborts)
        engine->aborts--;
}

static void on_timeout(void *argument, struct spdk_nvme_ctrlr *ctrlr, struct spdk_nvme_qpair *qpair, uint16_t cid)
{
    struct spdk_engine *engine = argument;
    if (!qpair) {
        engine->lost = engine->silent = 1;
        return;
    }
    if (qpair != engine->qpair || engine->dead)
        return;
    if (spdk_nvme_ctrlr_cmd_abort(ctrlr, qpair, cid, on_abort, engine))
        engine->lost = 1;
    else
        engine->aborts++;
    if (!engine->abort_due)
        engine->abort_due = clock_ns() + engine->admin_timeout_ms * MS;
}

static void on_event(void *argument, const struct spdk_nvme_cpl *completion)
{
    struct spdk_engine *engine = argument;
    (void)completion;
    engine->ns_changed = 1;
}

/* polling ------------------------------------------------------------------------------------ */

static void on_flush(void *argument, const struct spdk_nvme_cpl *completion)
{
    struct spdk_engine *engine = argument;
    engine->flushing = 0;
    if (spdk_nvme_cpl_is_error(completion))
        engine->last_write = clock_ns();
}

/* A fabric's writes are made certain as soon as there is a pause. */
static void flush_in_pause(struct spdk_engine *engine, uint64_t at)
{
    const struct controller *controller = &engine->controller;
    if (!engine->last_write || engine->oldest || engine->flushing || !controller->fabric || !controller->volatile_cache)
        return;
    if (at < engine->last_write + FLUSH_AFTER_MS * MS)
        return;
    engine->last_write = 0;
    engine->flushing = !spdk_nvme_ns_cmd_flush(controller->ns, engine->qpair, on_flush, engine);
    if (!engine->flushing)
        engine->last_write = at;
}

static void look_at_admin(struct spdk_engine *engine, uint64_t at)
{
    engine->admin_due = at + BUSY_ADMIN_MS * MS;
    if (spdk_nvme_ctrlr_process_admin_completions(engine->controller.ctrlr) < 0)
        engine->lost = 1;
    int waiting = engine->oldest && at > engine->oldest->due_ns - engine->timeout_ms * MS + BUSY_ADMIN_MS * MS;
    if (waiting && !controller_target_lives(&engine->controller))
        engine->lost = 1;
    if (engine->abort_due && at > engine->abort_due) {
        engine->abort_due = 0;
        engine->lost |= engine->oldest && at > engine->oldest->due_ns;
        engine->silent |= engine->aborts > 0;
    }
}

static void poll_once(struct spdk_engine *engine)
{
    if (engine->dead)
        return;
    if (spdk_nvme_qpair_process_completions(engine->qpair, 0) < 0)
        engine->lost = 1;
    uint64_t at = clock_ns();
    if (engine->num_events || at >= engine->admin_due) /* no answer is passed on before the news */
        look_at_admin(engine, at);
    if (engine->lost)
        recover(engine);
    if (engine->ns_changed && !engine->dead) {
        engine->ns_changed = 0;
        engine->gone |= !controller_is_same(&engine->controller);
    }
    if (engine->gone && !engine->dead)
        die(engine, -ENODEV);
    if (engine->unsent && !engine->dead)
        send_unsent(engine);
    if (!engine->dead)
        flush_in_pause(engine, at);
}

static int idle_ms(const struct spdk_engine *engine, uint64_t deadline)
{
    uint64_t at = clock_ns();
    uint64_t wait = engine->last_write && engine->controller.fabric ? FLUSH_AFTER_MS : IDLE_ADMIN_MS;
    if (engine->dead)
        wait = 60000;
    if (deadline <= at)
        return 0;
    uint64_t left = (deadline - at) / MS + 1;
    return (int)(left < wait ? left : wait);
}

static void sleep_in_kernel(struct spdk_engine *engine, uint64_t deadline)
{
    struct pollfd wake = {.fd = engine->wake_fd, .events = POLLIN};
    uint64_t count;
    atomic_store(&engine->sleeping, 1);
    if (!atomic_load(&engine->woken))
        poll(&wake, 1, idle_ms(engine, deadline));
    atomic_store(&engine->sleeping, 0);
    while (read(engine->wake_fd, &count, sizeof count) < 0 && errno == EINTR)
        ;
}

static void spdk_wake(void *self)
{
    struct spdk_engine *engine = self;
    uint64_t one = 1;
    atomic_store(&engine->woken, 1);
    if (atomic_load(&engine->sleeping))
        while (write(engine->wake_fd, &one, sizeof one) < 0 && errno == EINTR)
            ;
}

static unsigned take_events(struct spdk_engine *engine, struct event *out, unsigned max)
{
    unsigned count = engine->num_events < max ? engine->num_events : max;
    memcpy(out, engine->events, count * sizeof *out);
    engine->num_events -= count;
    memmove(engine->events, engine->events + count, engine->num_events * sizeof *out);
    return count;
}

static int spdk_wait(void *self, struct event *out, unsigned max, int64_t timeout_ns)
{
    struct spdk_engine *engine = self;
    uint64_t deadline = timeout_ns < 0 ? UINT64_MAX : clock_ns() + (uint64_t)timeout_ns;
    for (;;) {
        poll_once(engine);
        if (engine->num_events)
            return (int)take_events(engine, out, max);
        if (atomic_exchange(&engine->woken, 0) || clock_ns() >= deadline)
            return 0;
        if (!engine->oldest && !engine->unsent && !engine->flushing)
            sleep_in_kernel(engine, deadline);
    }
}

/* open, close -------------------------------------------------------------------------------- */

/* As many bytes in flight as were asked for, in commands that the controller takes whole. */
static void fit_options(const struct controller *controller, glue_options *options)
{
    uint32_t most = spdk_nvme_ns_get_max_io_xfer_size(controller->ns) / 4096 * 4096;
    if (options->command_bytes > most) {
        options->queue_depth *= options->command_bytes / most;
        options->command_bytes = most;
    }
    if (options->queue_depth > MAX_DEPTH)
        options->queue_depth = MAX_DEPTH;
}

static int make_queue(struct spdk_engine *engine, glue_options *options)
{
    fit_options(&engine->controller, options);
    engine->depth = options->queue_depth;
    engine->events = calloc(engine->depth, sizeof *engine->events);
    engine->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    engine->qpair = controller_qpair(&engine->controller, engine->depth);
    if (!engine->events || engine->wake_fd < 0 || !engine->qpair)
        return -ENOMEM;
    struct spdk_nvme_ctrlr *ctrlr = engine->controller.ctrlr;
    spdk_nvme_ctrlr_register_timeout_callback(ctrlr, engine->timeout_ms * 1000ull, engine->admin_timeout_ms * 1000ull,
                                              on_timeout, engine);
    spdk_nvme_ctrlr_register_aer_callback(ctrlr, on_event, engine);
    return 0;
}

static void spdk_close(void *self)
{
    struct spdk_engine *engine = self;
    if (!env_is_ours())
        return;
    if (engine->oldest && !engine->dead)
        die(engine, -ECANCELED);
    if (engine->qpair)
        spdk_nvme_ctrlr_free_io_qpair(engine->qpair);
    spdk_nvme_ctrlr_register_timeout_callback(engine->controller.ctrlr, 0, 0, NULL, NULL);
    spdk_nvme_ctrlr_register_aer_callback(engine->controller.ctrlr, NULL, NULL);
    controller_close(&engine->controller, engine->dead == -ENOTCONN);
    if (engine->wake_fd >= 0)
        close(engine->wake_fd);
    free(engine->events);
    free(engine);
}

static int spdk_open(void **self, glue_options *options)
{
    struct spdk_engine *engine = calloc(1, sizeof *engine);
    if (!engine)
        return -ENOMEM;
    engine->wake_fd = -1;
    engine->timeout_ms = options->timeout_ms;
    engine->admin_timeout_ms = options->admin_timeout_ms;
    int error = controller_open(&engine->controller, options);
    if (error) {
        free(engine);
        return error;
    }
    error = make_queue(engine, options);
    if (error)
        spdk_close(engine);
    else
        *self = engine;
    return error;
}

static int spdk_medium(void *self, glue_medium *out)
{
    const struct spdk_engine *engine = self;
    controller_medium(&engine->controller, out);
    out->recoveries = engine->recoveries;
    return 0;
}

const struct engine_ops engine_spdk = {
    .name = "spdk",
    .trims = 1,
    .open = spdk_open,
    .submit = spdk_submit,
    .wait = spdk_wait,
    .wake = spdk_wake,
    .close = spdk_close,
    .medium = spdk_medium,
};
