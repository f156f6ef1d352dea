/* SPDX-License-Identifier: Apache-2.0 */
/* The engine's side of a queue: one thread that owns the engine, cuts transfers into commands and
 * sleeps in the kernel while there is nothing to do. It never spins: a spinner beside the
 * threads that compute attention costs more than it saves. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "queue.h"

enum { EVENTS = 64, HELD_NS = 50000 };

static int pieces_overlap(const struct transfer *a, const struct transfer *b)
{
    for (uint32_t i = 0; i < a->count; i++)
        for (uint32_t j = 0; j < b->count; j++) {
            const glue_piece *p = &a->pieces[i], *q = &b->pieces[j];
            if (p->file == q->file && p->offset < q->offset + piece_span(q) &&
                q->offset < p->offset + piece_span(p))
                return 1;
        }
    return 0;
}

/* Must `later` wait for `earlier`? */
static int must_wait(const struct transfer *earlier, const struct transfer *later)
{
    if (later->op == GLUE_FLUSH)
        return earlier->op == GLUE_WRITE || earlier->op == GLUE_TRIM;
    if (later->op == GLUE_WRITE_BACK && earlier->op != GLUE_WRITE)
        return 0;
    if (earlier->op > GLUE_TRIM || (earlier->op == GLUE_READ && later->op == GLUE_READ))
        return 0;
    return pieces_overlap(earlier, later);
}

static void count_waits(glue_queue *queue, struct transfer *transfer)
{
    for (struct transfer *earlier = queue->active.first; earlier; earlier = earlier->next)
        transfer->waits_for += (uint32_t)must_wait(earlier, transfer);
}

static void fail_transfer(struct transfer *transfer, const struct command *command, const struct event *event)
{
    transfer->cut_all = 1;
    transfer->done.memory_at_risk |= (uint32_t)event->memory_at_risk;
    if (transfer->done.result < 0)
        return;
    transfer->done.result = event->result;
    transfer->done.offset = command->offset;
    transfer->done.file = command->file;
    transfer->done.sct = event->sct;
    transfer->done.sc = event->sc;
}

static void fail_copies(struct transfer *transfer, int error)
{
    transfer->cut_all = 1;
    if (transfer->done.result < 0)
        return;
    transfer->done.result = error;
    transfer->done.device_error = copies_error(transfer->copies);
}

static void end_copies(struct transfer *transfer)
{
    int error = transfer->copies ? copies_end(transfer->copies) : 0;
    if (error)
        fail_copies(transfer, error);
}

static void finish_transfer(glue_queue *queue, struct transfer *transfer)
{
    end_copies(transfer);
    for (struct transfer *later = transfer->next; later; later = later->next)
        later->waits_for -= (uint32_t)must_wait(transfer, later);
    list_remove(&queue->active, transfer);
    transfer->done.ended_ns = clock_ns();
    queue->given_up += transfer->done.memory_at_risk != 0;
    pthread_mutex_lock(&queue->lock);
    uint32_t at = (queue->done_head + queue->done_count) % queue->options.max_transfers;
    queue->done[at] = transfer->done;
    queue->done_count++;
    pthread_mutex_unlock(&queue->lock);
    pthread_cond_broadcast(&queue->changed); /* not before: whoever wakes wants the lock */
    transfer_free(transfer);
}

static void release_command(glue_queue *queue, struct command *command)
{
    struct transfer *transfer = command->owner;
    command->next = queue->free_commands;
    queue->free_commands = command;
    transfer->in_flight--;
    if (transfer->cut_all && !transfer->in_flight)
        finish_transfer(queue, transfer);
}

/* A refused command leaves the engine as it was; anything but "full" fails the transfer. */
static int start_command(glue_queue *queue, struct command *command)
{
    int error = queue->ops->submit(queue->engine, command);
    if (!error)
        return 0;
    struct event event = {.command = command, .result = error};
    fail_transfer(command->owner, command, &event);
    in_flight_end(queue, command, 0);
    release_command(queue, command);
    return error;
}

/* Loads go first: attention waits for them, and nobody for stores. */
static enum lane lane_of(const struct transfer *transfer)
{
    return transfer->op == GLUE_READ ? LOADS : STORES;
}

static int startable(const struct transfer *transfer, enum lane lane)
{
    return lane_of(transfer) == lane && !transfer->waits_for && !transfer->cut_all && !transfer->held;
}

static int any_startable(const glue_queue *queue, enum lane lane)
{
    for (const struct transfer *transfer = queue->active.first; transfer; transfer = transfer->next)
        if (startable(transfer, lane))
            return 1;
    return 0;
}

static void cut_and_start(glue_queue *queue, struct transfer *transfer, struct limit limit)
{
    enum lane lane = lane_of(transfer);
    if (!transfer->done.begun_ns)
        transfer->done.begun_ns = clock_ns();
    while (!transfer->cut_all && has_room(queue, lane, limit)) {
        struct command *command = queue->free_commands;
        queue->free_commands = command->next;
        command_cut(queue, transfer, command);
        transfer->in_flight++;
        in_flight_begin(queue, command);
        if (start_command(queue, command))
            return; /* the transfer may be gone */
    }
}

static void start_lane(glue_queue *queue, enum lane lane, struct limit limit)
{
    struct transfer *next;
    for (struct transfer *transfer = queue->active.first; transfer && has_room(queue, lane, limit); transfer = next) {
        next = transfer->next;
        if (startable(transfer, lane))
            cut_and_start(queue, transfer, limit);
    }
}

/* Is the device through with what the transfer waits for? One whose event failed ends here. */
static void ask_device(glue_queue *queue, struct transfer *transfer)
{
    int may = copies_may_start(transfer->copies);
    transfer->held = !may;
    queue->held |= transfer->held;
    if (may >= 0)
        return;
    fail_copies(transfer, may);
    finish_transfer(queue, transfer);
}

/* No event wakes this thread, so it looks from time to time. */
static void let_go_of_held(glue_queue *queue)
{
    uint64_t now = clock_ns();
    if (!queue->held || now < queue->ask_at)
        return;
    queue->held = 0;
    queue->ask_at = now + HELD_NS;
    struct transfer *next;
    for (struct transfer *transfer = queue->active.first; transfer; transfer = next) {
        next = transfer->next;
        if (transfer->held)
            ask_device(queue, transfer);
    }
}

static void start_ready(glue_queue *queue)
{
    let_go_of_held(queue);
    int stores = any_startable(queue, STORES);
    start_lane(queue, LOADS, limit_of_loads(queue, stores));
    if (stores)
        start_lane(queue, STORES, limit_of_stores(queue));
}

/* What has arrived goes on to the device at once. */
static void start_copies(const glue_queue *queue, struct transfer *transfer, const struct command *command)
{
    if (!transfer->copies || queue->draining)
        return;
    const glue_piece *piece = &transfer->pieces[command->piece];
    int error = copies_start(transfer->copies, piece, command->piece, command->begin, command->moved);
    if (!error)
        return;
    fail_copies(transfer, error);
    transfer->done.offset = command->offset - command->moved;
    transfer->done.file = command->file;
}

static void handle_event(glue_queue *queue, struct event *event)
{
    struct command *command = event->command;
    struct transfer *transfer = command->owner;
    if (event->result == -EINTR || event->result == -EAGAIN) {
        start_command(queue, command);
        return;
    }
    if (event->result == 0 && command->bytes)
        event->result = -ENODATA; /* the end of the medium: never hand out stale rows */
    if (event->result < 0)
        fail_transfer(transfer, command, event);
    else
        command_advance(command, (uint64_t)event->result);
    if (event->result > 0 && command->bytes) {
        start_command(queue, command);
        return;
    }
    if (transfer->done.result >= 0) {
        transfer->done.result += (int64_t)command->moved;
        start_copies(queue, transfer, command);
    }
    in_flight_end(queue, command, command->moved);
    release_command(queue, command);
}

static void handle_memory(glue_queue *queue, struct transfer *transfer)
{
    const struct engine_ops *ops = queue->ops;
    const glue_piece *piece = transfer->pieces;
    int registered = 0;
    uint64_t removed = 0;
    if (transfer->op == GLUE_REGISTER && ops->add_memory)
        registered = ops->add_memory(queue->engine, piece->address, piece->run_bytes);
    if (transfer->op == GLUE_UNREGISTER && ops->remove_memory)
        removed = ops->remove_memory(queue->engine, piece->address);
    transfer->done.result = registered;
    pthread_mutex_lock(&queue->lock);
    if (registered)
        queue->stats.registered += (uint32_t)(piece->run_bytes >> 20);
    queue->stats.registered -= (uint32_t)(removed >> 20);
    pthread_mutex_unlock(&queue->lock);
    finish_transfer(queue, transfer);
}

static int take_incoming(glue_queue *queue)
{
    pthread_mutex_lock(&queue->lock);
    struct transfer_list incoming = queue->incoming;
    queue->incoming = (struct transfer_list){0};
    int stopping = queue->stopping;
    pthread_mutex_unlock(&queue->lock);
    while (incoming.first) {
        struct transfer *transfer = incoming.first;
        list_remove(&incoming, transfer);
        count_waits(queue, transfer);
        list_append(&queue->active, transfer);
        if (transfer->op >= GLUE_REGISTER)
            handle_memory(queue, transfer);
        else if (transfer->copies)
            ask_device(queue, transfer);
    }
    return stopping;
}

static int collect(glue_queue *queue, int64_t timeout_ns)
{
    struct event events[EVENTS];
    int count = queue->ops->wait(queue->engine, events, EVENTS, timeout_ns);
    for (int i = 0; i < count; i++)
        handle_event(queue, &events[i]);
    return count < 0 ? count : 0;
}

static void announce(glue_queue *queue, int failed)
{
    pthread_mutex_lock(&queue->lock);
    queue->ready = !failed;
    queue->failed = failed;
    pthread_cond_broadcast(&queue->changed);
    pthread_mutex_unlock(&queue->lock);
}

/* Nothing new is started; commands in flight get drain_ms to come back. */
static void drain(glue_queue *queue)
{
    uint64_t deadline = clock_ns() + queue->options.drain_ms * 1000000ull;
    queue->draining = 1;
    for (struct transfer *transfer = queue->active.first; transfer; transfer = transfer->next)
        transfer->cut_all = 1;
    while (queue->in_flight && clock_ns() < deadline)
        if (collect(queue, 10000000))
            break;
    for (struct transfer *transfer = queue->active.first; transfer; transfer = transfer->next)
        queue->given_up += transfer->in_flight > 0;
}

/* 0 where nobody waits for the queue any more. */
static int open_engine(glue_queue *queue)
{
    int failed = queue->ops->open(&queue->engine, &queue->options);
    if (!failed) {
        failed = queue_memory(queue);
        if (failed)
            queue->ops->close(queue->engine);
    }
    announce(queue, failed);
    return !failed;
}

/* Whoever opened the queue went away before it was open: nobody else will ever close it. */
static int was_abandoned(glue_queue *queue)
{
    pthread_mutex_lock(&queue->lock);
    int abandoned = queue->abandoned;
    pthread_mutex_unlock(&queue->lock);
    return abandoned;
}

void *io_thread(void *argument)
{
    glue_queue *queue = argument;
    ask_for_short_slices();
    int open = open_engine(queue);
    if (was_abandoned(queue)) {
        if (open)
            queue->ops->close(queue->engine);
        queue_free(queue);
        return NULL;
    }
    while (open && !take_incoming(queue)) {
        start_ready(queue);
        int failed = collect(queue, queue->held ? HELD_NS : -1);
        if (failed) {
            announce(queue, failed);
            break;
        }
    }
    if (open)
        drain(queue);
    if (open && !queue->in_flight && queue->ops->finish)
        queue->ops->finish(queue->engine);
    return NULL;
}
