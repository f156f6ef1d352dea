/* SPDX-License-Identifier: Apache-2.0 */
/* Completes every command at once and moves nothing: what remains is the cost of our software. */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>

#include "engine.h"

struct null_engine {
    pthread_mutex_t lock;
    pthread_cond_t awake;
    int woken;
    struct command *first; /* submitted; order does not matter */
};

static int null_open(void **self, glue_options *options)
{
    (void)options;
    struct null_engine *engine = calloc(1, sizeof *engine);
    if (!engine)
        return -ENOMEM;
    pthread_mutex_init(&engine->lock, NULL);
    cond_init_monotonic(&engine->awake);
    *self = engine;
    return 0;
}

static int null_submit(void *self, struct command *command)
{
    struct null_engine *engine = self;
    command->next = engine->first;
    engine->first = command;
    return 0;
}

static int null_wait(void *self, struct event *out, unsigned max, int64_t timeout_ns)
{
    struct null_engine *engine = self;
    unsigned count = 0;
    for (; count < max && engine->first; count++) {
        struct command *command = engine->first;
        engine->first = command->next;
        out[count] = (struct event){.command = command, .result = (int64_t)command->bytes};
    }
    pthread_mutex_lock(&engine->lock);
    struct timespec deadline = deadline_after(timeout_ns);
    int late = 0;
    while (!count && !engine->woken && !late) {
        if (timeout_ns < 0)
            pthread_cond_wait(&engine->awake, &engine->lock);
        else
            late = pthread_cond_timedwait(&engine->awake, &engine->lock, &deadline) == ETIMEDOUT;
    }
    engine->woken = 0;
    pthread_mutex_unlock(&engine->lock);
    return (int)count;
}

static void null_wake(void *self)
{
    struct null_engine *engine = self;
    pthread_mutex_lock(&engine->lock);
    engine->woken = 1;
    pthread_cond_signal(&engine->awake);
    pthread_mutex_unlock(&engine->lock);
}

static void null_close(void *self)
{
    struct null_engine *engine = self;
    pthread_mutex_destroy(&engine->lock);
    pthread_cond_destroy(&engine->awake);
    free(engine);
}

const struct engine_ops engine_null = {
    .name = "null",
    .trims = 1,
    .open = null_open,
    .submit = null_submit,
    .wait = null_wait,
    .wake = null_wake,
    .close = null_close,
};
