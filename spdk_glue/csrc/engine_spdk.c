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

#include "engine_spdk.h"

enum {
    MAX_DEPTH = 128, /* of the 192 commands that SPDK keeps in flight on a queue pair of 256 entries */
    IDLE_ADMIN_MS = 1000, /* keep-alive, and news of the namespace */
    BUSY_ADMIN_MS = 20,
    FLUSH_AFTER_MS = 200,
    RETRY_MS = 50,
};
/* submit -------------------------------------------------------------------------------------- */

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
        options->queue_depth = depth_with(options, most);
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
