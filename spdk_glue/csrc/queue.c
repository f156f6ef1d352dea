/* SPDX-License-Identifier: Apache-2.0 */
/* The callers' side of a queue: open, submit, reap, close. */
#include "queue.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

uint64_t clock_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

struct timespec deadline_after(int64_t timeout_ns)
{
    uint64_t at = clock_ns() + (timeout_ns < 0 ? 0 : (uint64_t)timeout_ns);
    return (struct timespec){.tv_sec = (time_t)(at / 1000000000u), .tv_nsec = (long)(at % 1000000000u)};
}

void cond_init_monotonic(pthread_cond_t *condition)
{
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(condition, &monotonic);
    pthread_condattr_destroy(&monotonic);
}

void list_append(struct transfer_list *list, struct transfer *transfer)
{
    transfer->next = NULL;
    transfer->prev = list->last;
    if (list->last)
        list->last->next = transfer;
    else
        list->first = transfer;
    list->last = transfer;
}

void list_remove(struct transfer_list *list, struct transfer *transfer)
{
    if (transfer->prev)
        transfer->prev->next = transfer->next;
    else
        list->first = transfer->next;
    if (transfer->next)
        transfer->next->prev = transfer->prev;
    else
        list->last = transfer->prev;
}

void transfer_free(struct transfer *transfer)
{
    copies_free(transfer->copies);
    free(transfer->pieces);
    free(transfer);
}

static void list_free(struct transfer_list *list)
{
    while (list->first) {
        struct transfer *transfer = list->first;
        list_remove(list, transfer);
        transfer_free(transfer);
    }
}

static const struct engine_ops *engine_by_name(const char *kind)
{
    static const struct engine_ops *const all[] = {&engine_uring, &engine_uring_cmd, &engine_posix,
                                                   &engine_spdk,  &engine_mem,       &engine_null};
    for (unsigned i = 0; i < sizeof all / sizeof *all; i++)
        if (all[i]->name && !strcmp(all[i]->name, kind))
            return all[i];
    return NULL;
}

const char *glue_engines(void)
{
    if (engine_spdk.name)
        return engine_uring.name ? "uring uring_cmd posix spdk mem null" : "posix spdk mem null";
    return engine_uring.name ? "uring uring_cmd posix mem null" : "posix mem null";
}

static int options_check(const glue_options *options)
{
    if (!options->queue_depth || options->queue_depth > 4096 || !options->max_transfers)
        return -EINVAL;
    if (options->command_bytes < 4096 || options->command_bytes % 4096)
        return -EINVAL;
    return 0;
}

int queue_memory(glue_queue *queue)
{
    uint32_t depth = queue->options.queue_depth;
    queue->depth = depth;
    queue->command_bytes = queue->options.command_bytes;
    /* A run is 4 KiB or more; the kernel takes 1024 segments a command. */
    uint32_t segments = queue->options.command_bytes / 4096 + 1;
    queue->iov_capacity = segments < 1024 ? segments : 1024;
    queue->done = calloc(queue->options.max_transfers, sizeof *queue->done);
    queue->commands = calloc(depth, sizeof *queue->commands);
    queue->iovecs = calloc((size_t)depth * queue->iov_capacity, sizeof *queue->iovecs);
    if (!queue->done || !queue->commands || !queue->iovecs)
        return -ENOMEM;
    for (uint32_t i = 0; i < depth; i++) {
        queue->commands[i].iov = queue->iovecs + (size_t)i * queue->iov_capacity;
        queue->commands[i].next = queue->free_commands;
        queue->free_commands = &queue->commands[i];
    }
    return 0;
}

void queue_free(glue_queue *queue)
{
    list_free(&queue->incoming);
    list_free(&queue->active);
    for (unsigned i = 0; i < sizeof queue->strings / sizeof *queue->strings; i++)
        free(queue->strings[i]);
    free(queue->done);
    free(queue->commands);
    free(queue->iovecs);
    pthread_mutex_destroy(&queue->lock);
    pthread_cond_destroy(&queue->changed);
    free(queue);
}

/* An open that outlives its caller needs its own. */
static int copy_strings(glue_queue *queue)
{
    glue_options *options = &queue->options;
    const char **all[] = {&options->target, &options->hostnqn, &options->dhchap_key, &options->dhchap_ctrlr_key,
                          &options->tls_psk};
    for (unsigned i = 0; i < sizeof all / sizeof *all; i++) {
        queue->strings[i] = *all[i] ? strdup(*all[i]) : NULL;
        if (*all[i] && !queue->strings[i])
            return -ENOMEM;
        *all[i] = queue->strings[i];
    }
    return 0;
}

enum { ABANDONED = 1 };

/* Waits until the engine is open: 0, -errno or ABANDONED, with the queue the thread's. An engine that hangs in its medium's driver keeps its thread. */
static int queue_start(glue_queue *queue)
{
    int error = pthread_create(&queue->thread, NULL, io_thread, queue);
    if (error)
        return -error;
    struct timespec deadline = deadline_after((int64_t)queue->options.open_ms * 1000000);
    pthread_mutex_lock(&queue->lock);
    while (!queue->ready && !queue->failed && !queue->abandoned) {
        if (!queue->options.open_ms)
            pthread_cond_wait(&queue->changed, &queue->lock);
        else if (pthread_cond_timedwait(&queue->changed, &queue->lock, &deadline) == ETIMEDOUT)
            queue->abandoned = !queue->ready && !queue->failed;
    }
    error = queue->failed;
    int abandoned = queue->abandoned;
    if (abandoned)
        pthread_detach(queue->thread);
    pthread_mutex_unlock(&queue->lock);
    if (abandoned)
        return ABANDONED;
    if (error)
        pthread_join(queue->thread, NULL);
    return error;
}

glue_queue *glue_queue_open(const glue_options *options, int *error)
{
    glue_queue *queue = NULL;
    const struct engine_ops *ops = engine_by_name(options->kind);
    *error = ops ? options_check(options) : -ENOTSUP;
    if (*error)
        return NULL;
    queue = calloc(1, sizeof *queue);
    if (!queue) {
        *error = -ENOMEM;
        return NULL;
    }
    queue->ops = ops;
    queue->options = *options;
    pthread_mutex_init(&queue->lock, NULL);
    cond_init_monotonic(&queue->changed);
    *error = copy_strings(queue);
    if (!*error)
        *error = queue_start(queue);
    if (!*error)
        return queue;
    if (*error == ABANDONED)
        *error = -ETIMEDOUT;
    else
        queue_free(queue);
    return NULL;
}

static struct transfer *transfer_new(int op, uint64_t tag, const glue_piece *pieces, uint32_t count)
{
    struct transfer *transfer = calloc(1, sizeof *transfer);
    if (!transfer)
        return NULL;
    transfer->pieces = malloc(count * sizeof *pieces);
    if (!transfer->pieces) {
        free(transfer);
        return NULL;
    }
    memcpy(transfer->pieces, pieces, count * sizeof *pieces);
    transfer->op = op;
    transfer->tag = tag;
    transfer->count = count;
    transfer->done.tag = tag;
    return transfer;
}

/* The piece ends at or before the largest file offset there is, so no later sum can wrap. */
static int piece_fits(const glue_piece *piece)
{
    uint64_t bytes, apart, end;
    if (piece->medium_stride && (piece->blocks != 1 || piece->medium_stride < piece->run_bytes))
        return 0;
    return !__builtin_mul_overflow(piece->run_bytes, (uint64_t)piece->heads * piece->blocks, &bytes) &&
           !__builtin_mul_overflow(piece->medium_stride, (uint64_t)piece->heads, &apart) &&
           !__builtin_add_overflow(piece->offset, bytes > apart ? bytes : apart, &end) && end <= INT64_MAX;
}

enum { MOST_WRITTEN_BACK = 1 << 30 }; /* io_uring takes 32 bits */

static int pieces_check(const glue_queue *queue, int op, const glue_piece *pieces, uint32_t count)
{
    if (op < GLUE_READ || op > GLUE_UNREGISTER || !count)
        return -EINVAL;
    if ((op == GLUE_TRIM && !queue->ops->trims) || (op == GLUE_WRITE_BACK && !queue->ops->writes_back))
        return -ENOTSUP;
    for (uint32_t i = 0; i < count; i++) {
        const glue_piece *piece = &pieces[i];
        if (piece->file >= queue->options.num_files && piece->file)
            return -EINVAL;
        if ((op == GLUE_TRIM || op == GLUE_WRITE_BACK) && piece->medium_stride)
            return -EINVAL;
        if (op < GLUE_FLUSH && (!piece->run_bytes || !piece->heads || !piece->blocks || !piece_fits(piece)))
            return -EINVAL;
        if (op == GLUE_WRITE_BACK && piece_bytes(piece) > MOST_WRITTEN_BACK)
            return -EINVAL;
    }
    return 0;
}

/* 1 accepted; 0 full, or -errno: then the transfer is gone. */
static int enqueue(glue_queue *queue, struct transfer *transfer)
{
    int result = 0;
    pthread_mutex_lock(&queue->lock);
    if (queue->failed)
        result = queue->failed;
    else if (queue->accepted < queue->options.max_transfers) {
        queue->accepted++;
        list_append(&queue->incoming, transfer);
        result = 1;
    }
    pthread_mutex_unlock(&queue->lock);
    if (result == 1)
        queue->ops->wake(queue->engine);
    else
        transfer_free(transfer);
    return result;
}

int glue_submit(glue_queue *queue, int op, uint64_t tag, const glue_piece *pieces, uint32_t count)
{
    return glue_submit_copied(queue, op, tag, pieces, count, NULL, NULL, 0);
}

int glue_submit_copied(glue_queue *queue, int op, uint64_t tag, const glue_piece *pieces, uint32_t count,
                       const glue_copies *copies, glue_event *const *after, uint32_t num_after)
{
    int result = copies && op != GLUE_READ ? -EINVAL : pieces_check(queue, op, pieces, count);
    if (result)
        return result;
    struct transfer *transfer = transfer_new(op, tag, pieces, count);
    if (!transfer)
        return -ENOMEM;
    if (copies || num_after)
        result = copies_new(&transfer->copies, copies, pieces, count, after, num_after);
    if (result) {
        transfer_free(transfer);
        return result;
    }
    return enqueue(queue, transfer);
}

static void wait_for_done(glue_queue *queue, uint32_t min, int64_t timeout_ns)
{
    struct timespec deadline = deadline_after(timeout_ns);
    while (queue->done_count < min && !queue->failed) {
        if (timeout_ns < 0)
            pthread_cond_wait(&queue->changed, &queue->lock);
        else if (pthread_cond_timedwait(&queue->changed, &queue->lock, &deadline) == ETIMEDOUT)
            break;
    }
}

int glue_reap(glue_queue *queue, glue_completion *out, uint32_t max, uint32_t min, int64_t timeout_ns)
{
    uint32_t taken = 0;
    pthread_mutex_lock(&queue->lock);
    wait_for_done(queue, min < max ? min : max, timeout_ns);
    for (; taken < max && queue->done_count; taken++) {
        out[taken] = queue->done[queue->done_head];
        queue->done_head = (queue->done_head + 1) % queue->options.max_transfers;
        queue->done_count--;
        queue->accepted--;
    }
    int result = taken || !queue->failed ? (int)taken : queue->failed;
    pthread_mutex_unlock(&queue->lock);
    return result;
}

static uint64_t thread_cpu_ns(pthread_t thread)
{
    clockid_t clock;
    struct timespec spent;
    if (pthread_getcpuclockid(thread, &clock) || clock_gettime(clock, &spent))
        return 0;
    return (uint64_t)spent.tv_sec * 1000000000u + (uint64_t)spent.tv_nsec;
}

void glue_queue_stats(glue_queue *queue, glue_stats *out)
{
    pthread_mutex_lock(&queue->lock);
    *out = queue->stats;
    pthread_mutex_unlock(&queue->lock);
    out->cpu_ns = thread_cpu_ns(queue->thread);
}

int glue_queue_medium(glue_queue *queue, glue_medium *out)
{
    return queue->ops->medium ? queue->ops->medium(queue->engine, out) : -ENOTSUP;
}

void glue_queue_options(glue_queue *queue, uint32_t *queue_depth, uint32_t *command_bytes)
{
    *queue_depth = queue->depth;
    *command_bytes = queue->command_bytes;
}

int glue_queue_tune(glue_queue *queue, uint32_t queue_depth, uint32_t command_bytes)
{
    if (!queue_depth || queue_depth > queue->options.queue_depth)
        return -EINVAL;
    if (command_bytes < 4096 || command_bytes % 4096 || command_bytes > queue->options.command_bytes)
        return -EINVAL;
    queue->depth = queue_depth;
    queue->command_bytes = command_bytes;
    queue->ops->wake(queue->engine);
    return 0;
}

int glue_queue_fault(glue_queue *queue, const glue_fault *fault)
{
    return queue->ops->fault ? queue->ops->fault(queue->engine, fault) : -ENOTSUP;
}

int glue_queue_close(glue_queue *queue)
{
    pthread_mutex_lock(&queue->lock);
    queue->stopping = 1;
    pthread_mutex_unlock(&queue->lock);
    queue->ops->wake(queue->engine);
    pthread_join(queue->thread, NULL);
    queue->ops->close(queue->engine);
    int given_up = queue->given_up;
    queue_free(queue);
    return given_up;
}
