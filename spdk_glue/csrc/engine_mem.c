/* SPDX-License-Identifier: Apache-2.0 */
/* A medium in RAM with a scripted bandwidth, latency, completion order and faults. */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "engine.h"

enum { MAX_FAULTS = 16 };

struct mem_engine {
    pthread_mutex_t lock; /* guards woken and the faults */
    pthread_cond_t awake;
    int woken;
    glue_fault faults[MAX_FAULTS];
    unsigned num_faults;

    glue_options options;
    char *medium;
    struct command *pending; /* in the order of submission */
    uint64_t medium_free_at; /* when the scripted bandwidth is idle again */
    uint64_t random;
};

static int mem_open(void **self, glue_options *options)
{
    struct mem_engine *engine = calloc(1, sizeof *engine);
    if (!engine)
        return -ENOMEM;
    engine->medium = mmap(NULL, options->capacity, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (engine->medium == MAP_FAILED) {
        int error = -errno;
        free(engine);
        return error;
    }
    engine->options = *options;
    engine->random = options->seed * 2862933555777941757u + 3037000493u;
    pthread_mutex_init(&engine->lock, NULL);
    cond_init_monotonic(&engine->awake);
    *self = engine;
    return 0;
}

static int mem_submit(void *self, struct command *command)
{
    struct mem_engine *engine = self;
    uint64_t now = clock_ns();
    uint64_t begin = now > engine->medium_free_at ? now : engine->medium_free_at;
    if (engine->options.bandwidth)
        begin += (uint64_t)((double)command->bytes * 1e9 / (double)engine->options.bandwidth);
    engine->medium_free_at = begin;
    command->due_ns = begin + engine->options.latency_ns;
    command->hung = 0;
    command->next = NULL;
    struct command **end = &engine->pending;
    while (*end)
        end = &(*end)->next;
    *end = command;
    return 0;
}

static int fault_hits(const glue_fault *fault, const struct command *command)
{
    return fault->op == (uint32_t)command->op && command->offset < fault->hi &&
           fault->lo < command->offset + command->bytes;
}

/* The scripted fault that this command meets, or NULL. Counts it. */
static const glue_fault *meet_fault(struct mem_engine *engine, const struct command *command)
{
    const glue_fault *met = NULL;
    pthread_mutex_lock(&engine->lock);
    for (unsigned i = 0; i < engine->num_faults && !met; i++) {
        glue_fault *fault = &engine->faults[i];
        if (!fault_hits(fault, command))
            continue;
        if (fault->skip)
            fault->skip--;
        else if (fault->count) {
            fault->count--;
            met = fault;
        }
    }
    pthread_mutex_unlock(&engine->lock);
    return met;
}

static void move_bytes(struct mem_engine *engine, struct command *command, uint64_t bytes)
{
    char *at = engine->medium + command->offset;
    for (unsigned i = command->first; bytes; i++) {
        struct iovec segment = command->iov[i];
        uint64_t step = segment.iov_len < bytes ? segment.iov_len : bytes;
        if (command->op == GLUE_READ)
            memcpy(segment.iov_base, at, step);
        else
            memcpy(at, segment.iov_base, step);
        at += step;
        bytes -= step;
    }
}

/* 1 with an event in *out, 0 where the command hangs. */
static int carry_out(struct mem_engine *engine, struct command *command, struct event *out)
{
    *out = (struct event){.command = command, .result = (int64_t)command->bytes};
    if (command->op == GLUE_FLUSH)
        return 1;
    if (command->offset + command->bytes + command->span > engine->options.capacity) {
        *out = (struct event){.command = command, .result = -EIO, .sc = 0x80}; /* NVMe: LBA out of range */
        return 1;
    }
    if (command->op == GLUE_TRIM) {
        memset(engine->medium + command->offset, 0, command->span);
        return 1;
    }
    const glue_fault *fault = meet_fault(engine, command);
    if (!fault) {
        move_bytes(engine, command, command->bytes);
        return 1;
    }
    if (fault->kind == GLUE_FAULT_TORN)
        move_bytes(engine, command, command->bytes / 2);
    *out = (struct event){.command = command, .result = -EIO, .sct = fault->sct, .sc = fault->sc};
    return fault->kind != GLUE_FAULT_HANG;
}

static uint64_t next_random(struct mem_engine *engine)
{
    engine->random ^= engine->random << 13;
    engine->random ^= engine->random >> 7;
    engine->random ^= engine->random << 17;
    return engine->random;
}

/* A command that is due: the oldest, or any of them when the order is shuffled. */
static struct command **pick_due(struct mem_engine *engine, uint64_t now)
{
    struct command **picked = NULL;
    uint64_t seen = 0;
    for (struct command **at = &engine->pending; *at; at = &(*at)->next) {
        if ((*at)->hung || (*at)->due_ns > now)
            continue;
        seen++;
        if (!picked)
            picked = at;
        else if (engine->options.flags & GLUE_REORDER && next_random(engine) % seen == 0)
            picked = at;
        if (!(engine->options.flags & GLUE_REORDER))
            break;
    }
    return picked;
}

static unsigned complete_due(struct mem_engine *engine, struct event *out, unsigned max)
{
    unsigned count = 0;
    struct command **at;
    uint64_t now = clock_ns();
    while (count < max && (at = pick_due(engine, now))) {
        struct command *command = *at;
        if (carry_out(engine, command, &out[count])) {
            *at = command->next;
            count++;
        } else {
            command->hung = 1;
        }
    }
    return count;
}

static uint64_t next_due(const struct mem_engine *engine, uint64_t latest)
{
    for (const struct command *command = engine->pending; command; command = command->next)
        if (!command->hung && command->due_ns < latest)
            latest = command->due_ns;
    return latest;
}

static void sleep_until(struct mem_engine *engine, uint64_t until)
{
    struct timespec at = {.tv_sec = (time_t)(until / 1000000000u), .tv_nsec = (long)(until % 1000000000u)};
    pthread_mutex_lock(&engine->lock);
    while (!engine->woken) {
        if (until == UINT64_MAX)
            pthread_cond_wait(&engine->awake, &engine->lock);
        else if (pthread_cond_timedwait(&engine->awake, &engine->lock, &at) == ETIMEDOUT)
            break;
    }
    engine->woken = 0;
    pthread_mutex_unlock(&engine->lock);
}

static int mem_wait(void *self, struct event *out, unsigned max, int64_t timeout_ns)
{
    struct mem_engine *engine = self;
    unsigned count = complete_due(engine, out, max);
    if (count)
        return (int)count;
    sleep_until(engine, next_due(engine, timeout_ns < 0 ? UINT64_MAX : clock_ns() + (uint64_t)timeout_ns));
    return (int)complete_due(engine, out, max);
}

static void mem_wake(void *self)
{
    struct mem_engine *engine = self;
    pthread_mutex_lock(&engine->lock);
    engine->woken = 1;
    pthread_cond_signal(&engine->awake);
    pthread_mutex_unlock(&engine->lock);
}

static int mem_fault(void *self, const glue_fault *fault)
{
    struct mem_engine *engine = self;
    int error = 0;
    pthread_mutex_lock(&engine->lock);
    if (engine->num_faults == MAX_FAULTS)
        error = -ENOSPC;
    else
        engine->faults[engine->num_faults++] = *fault;
    pthread_mutex_unlock(&engine->lock);
    return error;
}

static void mem_close(void *self)
{
    struct mem_engine *engine = self;
    munmap(engine->medium, engine->options.capacity);
    pthread_mutex_destroy(&engine->lock);
    pthread_cond_destroy(&engine->awake);
    free(engine);
}

const struct engine_ops engine_mem = {
    .name = "mem",
    .trims = 1,
    .open = mem_open,
    .submit = mem_submit,
    .wait = mem_wait,
    .wake = mem_wake,
    .close = mem_close,
    .fault = mem_fault,
};
